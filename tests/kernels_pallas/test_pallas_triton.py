"""Pallas-Triton may leave jax: it is imported where a call is for a GPU, and without it "gpu" is
refused by name.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# The ops that have kernels there, and gatedjax itself, where nobody can import it.
PROGRAM = """
import sys

asked = []

class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("jax.experimental.pallas.triton", "jax._src.pallas.triton")):
            asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Gone())

from functools import partial
import jax, jax.numpy as jnp
import gatedjax.model, gatedjax.ops
from kernels_pallas import dispatch, ops

print(asked)
x = jnp.ones((1, 16, 1, 16))
token = x[:, 0]
rows, matrix, sizes = jnp.ones((4, 8)), jnp.ones((1, 8, 8)), jnp.array([4])
calls = [
    (ops.linear_scan, x, x, x),
    (ops.delta_scan, x, x, x, x[..., 0]),
    (ops.attention, x, x, x),
    (partial(ops.attention_step, valid=jnp.ones((1, 16), bool)), token, x, x),
    (ops.grouped_matmul, rows, matrix, sizes),
    (ops.expert_mlp, rows, matrix, matrix, matrix, sizes),
]
for op, *arguments in calls:
    jax.eval_shape(op, *arguments)
for op, *arguments in calls:
    try:
        op(*arguments, implementation="gpu")
    except NotImplementedError as error:
        print(error)
dispatch.target_platform = lambda *arrays: "gpu"
jax.eval_shape(partial(ops.attention, causal=False), x, x, x)
print(*dispatch.last_choice("attention"))
"""


def test_without_it_everything_else_works():
    """Imports, which do not even ask for it, the ops on a CPU, a GPU's calls by XLA."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    asked, *refusals, choice = done.stdout.splitlines()
    assert asked == "[]"
    assert len(refusals) == 6
    for line in refusals:
        assert "implementation='gpu' needs Pallas-Triton, which jax" in line
        assert line.endswith("lacks (pip install 'jax<0.13')")
    assert choice.startswith("attention xla the gpu kernel needs Pallas-Triton")
