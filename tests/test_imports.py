"""Which way imports may point: commands -> gatedjax -> kernels_pallas -> jax, and inside gatedjax
one way too.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A package may import itself and what stands above it. Modules of gatedjax that are no package go
# by their own names.
ORDER = (
    ("errors",),
    ("files", "papers", "paths"),
    ("buckets",),
    ("config",),
    ("sharding",),
    ("per_shard",),
    ("data", "layers"),
    ("caches", "layer_stack"),
    ("model", "toys"),
    ("output",),
    ("training",),
    ("evaluation",),
    ("aot",),
    ("runtime",),
    ("reporting",),
    ("resume",),
    (
        "interop",
        "study",
        "train",
        "eval",
        "generate",
        "merge_lora",
        "probe",
        "lm_eval",
        "convert",
        "exits",
        "stack_experts",
        "skip_experts",
        "make_adaptive",
        "phatgoose",
        "cache_to_cache",
        "split_experts",
    ),
    ("evidence",),
)


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in the file; `from a import b` gives
    a and a.b.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def starts_with(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("package", ["flax", "gatedjax", "optax"])
def test_kernels_need_no(package):
    for path in files("kernels_pallas"):
        found = [name for name in imported(path) if starts_with(name, package)]
        assert not found, f"{path.relative_to(ROOT)} imports {found}"


@pytest.mark.parametrize("package", ["data", "training", "evaluation", "reporting", "runtime"])
def test_layers_need_no(package):
    for path in files("gatedjax/layers"):
        found = [name for name in imported(path) if starts_with(name, f"gatedjax.{package}")]
        assert not found, f"{path.relative_to(ROOT)} imports {found}"


def test_gatedjax_imports_point_one_way():
    rank = {name: i for i, names in enumerate(ORDER) for name in names}
    wrong = set()
    for path in files("gatedjax"):
        here = path.relative_to(ROOT / "gatedjax").parts[0].removesuffix(".py")
        for name in imported(path):
            parts = name.split(".")
            if parts[0] != "gatedjax" or len(parts) == 1 or here in ("__init__", "ops"):
                continue
            there = parts[1]
            if there in rank and there != here and rank[there] >= rank[here]:
                wrong.add((".".join(path.relative_to(ROOT).with_suffix("").parts), there))
    assert not wrong
