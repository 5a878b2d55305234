"""What a compiled program's HLO text says: its collectives, its kernels, the layouts of their
operands.
"""

import dataclasses
import functools
import math
import re
from collections import Counter

import numpy as np

from gatedjax.aot.loops import ASSIGNED, COMPUTATION, NAME, trips

_BITS = {
    "pred": 8,
    "bf16": 16,
    "f16": 16,
    "f32": 32,
    "f64": 64,
    "c64": 64,
    "token": 0,
}
# What a TPU's host sends to another slice for it, over the data center network.
BETWEEN_SLICES = "between slices"
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_KERNEL_TARGETS = (
    "tpu_custom_call",
    "__gpu$xla.gpu.triton",
    "mosaic_gpu",
    "triton_kernel_call",
)

_INSTRUCTION = re.compile(rf"^{ASSIGNED}(.*)$")
_RESULT = re.compile(rf"^{ASSIGNED}(\([^=]*?\)|\S+) [\w\-]+\(")
# Groups: the name, the opcode.
_OPCODE = re.compile(rf"^{ASSIGNED}(?:\([^=]*?\)|\S+) ([\w\-]+)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FUSED = re.compile(rf" calls={NAME}")
_MATMULS = ("convolution", "dot")
# Lines that begin something, though they are no instruction.
_OTHER_START = re.compile(r"(ENTRY|%|HloModule|\w+Names|\w+Locations|StackFrames|\d+ )")
# Groups: the result's type, the kind, whether it is an asynchronous start, the operands.
_COLLECTIVE = re.compile(
    rf"\s*(?:ROOT )?%[\w.\-]+ = (.*?) ({'|'.join(_COLLECTIVES)})(-start)?\(([^)]*)\)"
)
_SEND = re.compile(r"\s*(?:ROOT )?%[\w.\-]+ = \((.*?), .* send\(.*xla_megascale_runtime")
# Groups: the computation that an instruction starts, to run beside others.
_STARTED = re.compile(rf" (?:async|call)-start\(.*(?:calls|to_apply)={NAME}")
# Groups: the name, the type, the layout.
_TYPED = re.compile(rf"{ASSIGNED}(\w+\[[^\]]*\])(\{{[^}}]*\}})?")
# Groups: the name, the operands, the target, the attributes.
_CUSTOM_CALL = re.compile(
    r'\s*(?:ROOT )?%(\S+) = .*? custom-call\((.*?)\), custom_call_target="([^"]+)"(.*)$'
)
_SCOPED_VMEM = re.compile(
    r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a run of the program.

    kind: as XLA calls it, or BETWEEN_SLICES.
    bytes: of a device's operand or result, the larger; of a ragged exchange, and of what goes to
      another slice, the operand.
    asynchronous_bytes: of those that run while the device computes.
    asynchronous_count: how many do.
    """

    kind: str
    count: int
    bytes: int
    asynchronous_bytes: int = 0
    asynchronous_count: int = 0

    @property
    def sent_bytes(self) -> int:
        """What a device sends, on a ring of many: an all-reduce is a reduce-scatter and an
        all-gather.
        """
        return self.bytes * self._times_sent

    @property
    def blocking_bytes(self) -> int:
        """What a device sends while it waits."""
        return (self.bytes - self.asynchronous_bytes) * self._times_sent

    @property
    def _times_sent(self) -> int:
        return 2 if self.kind == "all-reduce" else 1


@dataclasses.dataclass(frozen=True)
class Instruction:
    """What an instruction does, and where it comes from.

    opcode: such as "fusion", "custom-call".
    op_name: the path of names in the source, such as "jit(step)/layer_0/mixer/dot_general".
    has_matmul: itself, or some instruction that is fused into it.
    """

    opcode: str
    op_name: str
    has_matmul: bool


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A call of a Pallas kernel. `operands`: (type, layout) such as ("f32[8,128]",
    "{1,0:T(8,128)}").
    """

    name: str
    op_name: str
    operands: tuple[tuple[str, str], ...]
    vmem_bytes: int | None


def joined(text: str) -> list[str]:
    """One instruction a line: attributes may hold line ends."""
    lines = []
    for line in text.splitlines():
        if not lines or _starts_something(line):
            lines.append(line)
        else:
            lines[-1] += f" {line}"
    return lines


def _starts_something(line: str) -> bool:
    """Whether the line does not go on with the instruction of the line before."""
    if line.strip() in ("", "}"):
        return True
    return _INSTRUCTION.match(line) is not None or _OTHER_START.match(line) is not None


def collectives(text: str) -> tuple[Collective, ...]:
    """Collectives by kind. Those in a loop's body count once for each of its trips, if the text
    tells how many.

    The TPU compiler writes a reduce-scatter as an all-reduce and a slice in a computation of that
    name.
    """
    lines = joined(text)
    times_run = trips(lines)
    result_bytes = _result_bytes(lines)
    started = {match[1] for line in lines if (match := _STARTED.search(line))}
    count = Counter()
    total = Counter()
    asynchronous_bytes = Counter()
    asynchronous_count = Counter()
    computation = ""

    def add(kind: str, size: int, is_asynchronous: bool) -> None:
        times = times_run.get(computation, 1)
        count[kind] += times
        total[kind] += times * size
        if is_asynchronous:
            asynchronous_count[kind] += times
            asynchronous_bytes[kind] += times * size

    for line in lines:
        head = COMPUTATION.match(line)
        if head is not None:
            computation = head[1]
        send = _SEND.match(line)
        if send is not None:
            add(BETWEEN_SLICES, type_bytes(send[1])[0], is_asynchronous=True)
        match = _COLLECTIVE.match(line)
        if match is None:
            continue
        result_type, kind, is_start, operands = match.groups()
        if computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        parts = type_bytes(result_type)
        # An asynchronous start returns its operand beside its result.
        received = max(parts) if is_start and parts else sum(parts)
        operand_bytes = [result_bytes.get(name, 0) for name in re.findall(NAME, operands)]
        if kind == "ragged-all-to-all":
            # Its result is a buffer with room for any exchange; the rows that there are, are its
            # first operand.
            size = operand_bytes[0]
        else:
            size = max(received, sum(operand_bytes))
        is_asynchronous = is_start is not None or computation in started
        add(kind, size, is_asynchronous)
    return tuple(
        Collective(
            kind,
            count[kind],
            total[kind],
            asynchronous_bytes[kind],
            asynchronous_count[kind],
        )
        for kind in sorted(count)
    )


def instructions(text: str) -> dict[str, Instruction]:
    """Every instruction of the program by its name, those inside of fusions too."""
    opcodes: dict[str, str] = {}
    op_names: dict[str, str] = {}
    callees: dict[str, str] = {}
    inside: dict[str, list[str]] = {}
    computation = ""
    for line in joined(text):
        head = COMPUTATION.match(line)
        if head is not None:
            computation = head[1]
            continue
        match = _OPCODE.match(line)
        if match is None:
            continue
        name, opcodes[name] = match[1], match[2]
        inside.setdefault(computation, []).append(name)
        op_name = _OP_NAME.search(line)
        op_names[name] = op_name[1] if op_name else ""
        callee = _FUSED.search(line)
        if callee is not None:
            callees[name] = callee[1]

    @functools.cache
    def described(name: str) -> Instruction:
        fused = [described(inner) for inner in inside.get(callees.get(name, ""), ())]
        # A fusion without a name has that of what it returns, the last one.
        names = [op_names[name], *(inner.op_name for inner in reversed(fused))]
        return Instruction(
            opcode=opcodes[name],
            op_name=next(filter(None, names), ""),
            has_matmul=opcodes[name] in _MATMULS or any(inner.has_matmul for inner in fused),
        )

    return {name: described(name) for name in opcodes}


def donated_outputs(text: str) -> int:
    """How many outputs of the program may lie where an argument did."""
    head = text.partition("\n")[0]
    _, _, aliases = head.partition("input_output_alias={")
    return len(re.findall(r"(?:may|must)-alias", aliases))


def _result_bytes(lines: list[str]) -> dict[str, int]:
    """The size of every instruction's result, by its name."""
    found = {}
    for line in lines:
        match = _RESULT.match(line)
        if match is not None:
            found[match[1]] = sum(type_bytes(match[2]))
    return found


def kernel_calls(text: str) -> tuple[KernelCall, ...]:
    """Every Mosaic or Triton kernel of the program, in the order of the text."""
    lines = joined(text)
    types = {}
    for line in lines:
        match = _TYPED.match(line)
        if match is not None:
            types[match[1]] = (match[2], match[3] or "")
    calls = []
    for line in lines:
        match = _CUSTOM_CALL.match(line)
        if match is None or match[3] not in _KERNEL_TARGETS:
            continue
        name, operands, _, attributes = match.groups()
        without_comments = re.sub(r"/\*.*?\*/", "", operands)
        operand_names = re.findall(NAME, without_comments)
        vmem = _SCOPED_VMEM.search(attributes)
        op_name = _OP_NAME.search(attributes)
        calls.append(
            KernelCall(
                name=name,
                op_name=op_name[1] if op_name else "",
                operands=tuple(types.get(operand, ("?", "")) for operand in operand_names),
                vmem_bytes=int(vmem[1]) if vmem else None,
            )
        )
    return tuple(calls)


def type_bytes(text: str) -> list[int]:
    """Bytes of every array type in the text, padding not counted: "(f32[8,128]{1,0}, s32[])" ->
    [4096, 4].
    """
    sizes = []
    for dtype, shape in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text):
        elements = math.prod(_integers(shape))
        sizes.append(elements * _bits(dtype) // 8)
    return sizes


def _bits(dtype: str) -> int:
    """Of one element: types that are not in the table have it in their name, as s4 does."""
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0


def _integers(text: str) -> list[int]:
    """ "2,1,0" -> [2, 1, 0]; "" -> []."""
    return [int(part) for part in text.split(",") if part]


def memory_words(array: np.ndarray, layout: str) -> np.ndarray:
    """The 32-bit words of an array in an XLA layout such as "{2,1,0:T(8,128)(4,1)}"."""
    match = re.match(r"\{([\d,]*)(?::(.*))?\}", layout or "{}")
    if match is None:
        raise ValueError(f"layout: got {layout!r}, expected one such as {{1,0:T(8,128)}}")
    a = _as_stored(np.asarray(array))
    # The layout lists the axes from the fastest to the slowest; numpy has the fastest last.
    order = _integers(match[1])
    if order:
        a = a.transpose(order[::-1])
    if a.ndim == 0:
        a = a.reshape(1)
    # S(5) and the like name a memory, and are no tiles.
    tiles_text = re.sub(r"S\(\d+\)", "", match[2] or "")
    tiles = [_integers(tile) for tile in re.findall(r"\(([\d,]+)\)", tiles_text)]
    for i, tile in enumerate(tiles):
        missing = len(tile) - a.ndim
        if i == 0 and missing > 0:
            a = a.reshape((1,) * missing + a.shape)
        a = _tiled(a, tile)
    raw = np.ascontiguousarray(a).tobytes()
    padding = b"\0" * (-len(raw) % 4)
    return np.frombuffer(raw + padding, np.int32)


def _as_stored(a: np.ndarray) -> np.ndarray:
    """In the type that the program has for it: predicates are bytes, long integers are int32."""
    if a.dtype == np.bool_:
        return a.astype(np.int8)
    if a.dtype == np.int64:
        return a.astype(np.int32)
    return a


def _tiled(a: np.ndarray, tile: list[int]) -> np.ndarray:
    """The last axes padded and cut into tiles, the axes inside a tile last."""
    lead = a.ndim - len(tile)
    leading = a.shape[:lead]
    padding = [(0, 0)] * lead
    cut: list[int] = []
    for size, t in zip(a.shape[lead:], tile):
        padding.append((0, -size % t))
        # An axis becomes two: which tile (rounded up), and where in it.
        cut += [-(-size // t), t]
    a = np.pad(a, padding).reshape(*leading, *cut)
    which_tile = range(lead, a.ndim, 2)
    inside_tile = range(lead + 1, a.ndim, 2)
    return a.transpose(*range(lead), *which_tile, *inside_tile)
