"""XLA's "YNN" fusions on CPUs: compiling with and without them, and finding the broken kind.

See docs/notes/xla_cpu_ynn_broadcast.md for the fault. Two checks find it. `broken_products` reads
it in a compiled program, whatever the memory holds. `assert_same_without_fusions` also runs a
function both ways, on a heap full of NaN.
"""

import re
from collections.abc import Callable

import jax
import numpy as np

# conftest.py compiles at level 0. This is how a user compiles who sets nothing.
AS_USERS_COMPILE = {"xla_backend_optimization_level": 3}
WITHOUT_FUSIONS = AS_USERS_COMPILE | {"xla_cpu_experimental_ynn_fusion_type": ""}

# Sizes of the blocks, in float32 numbers, that a small program gets from malloc.
BLOCK_SIZES = (16, 64, 256, 512, 1024, 2048, 4096, 16384, 65536, 262144)
BLOCKS = 12

# One instruction of HLO text: name, opcode and operands, and what follows them (dimensions).
INSTRUCTION = re.compile(r"%(\S+) = \S+?\[([\d,]*)\]\S* ([\w-]+)\(([^)]*)\)(.*)")
COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \([^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
FUSION = re.compile(r"calls=%([\w.-]+).*__ynn_fusion")
# Instructions that hand on the columns of their operand as they are.
COLUMNS_STAY = ("convert", "copy", "bitcast", "negate", "exponential")


def dirty_heap() -> None:
    """Fills blocks of memory with NaN and frees them: the next program is likely to get them."""
    blocks = []
    for size in BLOCK_SIZES:
        for _ in range(BLOCKS):
            blocks.append(np.full(size, np.nan, np.float32))
    del blocks


def broken_products(hlo: str) -> list[str]:
    """The matrix products of a compiled program that read past the end of their right operand.

    They are in a YNN fusion that also reduces, and their right operand is a broadcast along its
    last axis.
    """
    computations = dict(COMPUTATION.findall(hlo))
    found = []
    for name in FUSION.findall(hlo):
        body = computations[name]
        if " reduce(" in body:
            found += [f"{name}: {line}" for line in _products_of_broadcasts(body)]
    return found


def _products_of_broadcasts(body: str) -> list[str]:
    """The lines of a computation that multiply by a matrix whose columns are all the same."""
    instructions = {}
    products = []
    for line in body.splitlines():
        match = INSTRUCTION.search(line)
        if match is None:
            continue
        name, shape, opcode, operands, rest = match.groups()
        operand_names = re.findall(r"%([\w.-]+)", operands)
        instructions[name] = (opcode, shape, operand_names, rest)
        if opcode == "dot" and _has_equal_columns(instructions, operand_names[1]):
            products.append(line.strip())
    return products


def _has_equal_columns(instructions: dict, name: str) -> bool:
    opcode, shape, operands, attributes = instructions[name]
    while opcode in COLUMNS_STAY and operands[0] in instructions:
        opcode, shape, operands, attributes = instructions[operands[0]]
    if opcode != "broadcast":
        return False
    last = len(shape.split(",")) - 1
    kept = re.search(r"dimensions=\{([\d,]*)\}", attributes).group(1)
    return str(last) not in kept.split(",")


def assert_same_without_fusions(function: Callable, *arrays, tolerance: float = 1e-3) -> None:
    """Compiles `function` as users do and without the fusions, and compares all that it returns.

    The measure is the largest error over 1 + the largest entry; both programs round differently.
    """
    compiled = jax.jit(function, compiler_options=AS_USERS_COMPILE).lower(*arrays).compile()
    broken = broken_products(compiled.as_text())
    assert not broken, broken
    expected = jax.jit(function, compiler_options=WITHOUT_FUSIONS)(*arrays)
    expected = jax.tree.map(_as_numbers, expected)
    for _ in range(2):
        dirty_heap()
        actual = jax.tree.map(_as_numbers, compiled(*arrays))
        for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected)):
            error = largest_error(x, y)
            assert error < tolerance, (
                f"{jax.tree_util.keystr(path)}: error {error}, expected below {tolerance}"
            )


def _as_numbers(x) -> np.ndarray:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).astype(np.float64)


def largest_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest error over 1 + the largest entry; infinite where only one is finite."""
    if actual.size == 0:
        return 0.0
    same_places = np.isfinite(actual) == np.isfinite(expected)
    if not same_places.all():
        return float("inf")
    finite = np.isfinite(expected)
    if not finite.any():
        return 0.0
    difference = np.abs(actual[finite] - expected[finite]).max()
    return float(difference / (1 + np.abs(expected[finite]).max()))
