"""rotary's TPU kernels pass Mosaic's compiler, and what stands around them is not copied.

python tests/kernels_pallas/rotary/test_rotary_compiles.py tpu:v6e [interleaved ...]
"""

import os
import sys

os.environ.setdefault(
    "JAX_PLATFORMS", "cpu"
)  # as a script; libtpu is loaded to compile, not to run

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gatedjax.aot import compile_for, libtpu
from kernels_pallas.ops import rotary

VARIANTS = {
    "normed": dict(H=4),
    "one head, no norm": dict(H=1, normed=False),
    "interleaved, part of the channels": dict(pairs=16, interleaved=True),
    "wide heads": dict(D=256, pairs=128),
    "odd length": dict(T=1001),
    "a few tokens": dict(B=1, T=129),
    "32 heads": dict(H=32),
    "norm alone": dict(H=12, D=256, pairs=0),
}


def compile_variant(target, B=2, T=512, H=2, D=128, pairs=64, normed=True, **options) -> str:
    """Forward and backward of a matrix product's columns: the compiled program's text."""
    frequencies = np.float32(1e4 ** (-np.arange(pairs) / pairs))
    array = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype)

    def run(x, w, scale, positions, dy):
        def call(x, w, scale):
            columns = jnp.einsum("btm,mn->btn", x, w)
            heads = columns.reshape(B, T, H, D)
            turned = rotary(heads, positions, frequencies, scale, implementation="tpu", **options)
            return turned.reshape(columns.shape)

        y, pull_back = jax.vjp(call, x, w, scale)
        return y, pull_back(dy)

    compiled, _ = compile_for(
        target,
        run,
        array(B, T, 256, dtype=jnp.bfloat16),
        array(256, H * D, dtype=jnp.bfloat16),
        array(D, dtype=jnp.float32) if normed else None,
        array(B, T, dtype=jnp.int32),
        array(B, T, H * D, dtype=jnp.bfloat16),
        schedule=False,
    )
    return compiled.as_text()


def heads_that_are_copied(text: str) -> list[str]:
    """The copies of arrays of all tokens, but for the bodies of asynchronous ones, into VMEM."""
    lines = (line.strip() for line in text.splitlines())
    copies = [line for line in lines if " copy(" in line and "bf16[2,512," in line]
    return [line for line in copies if not line.startswith("ROOT")]


@pytest.mark.skipif(not libtpu.installed(), reason="libtpu is not installed (pip install '.[aot]')")
@pytest.mark.parametrize(
    "target, names",
    [
        ("tpu:v5p", ["normed", "norm alone"]),
        *(
            pytest.param(f"tpu:{chip}", [], marks=pytest.mark.slow)
            for chip in ("v5e", "v5p", "v6e", "v7x")
        ),
    ],
)
def test_it_compiles(target, names, run_as_script):
    run_as_script(target, *names)


if __name__ == "__main__":
    target, *names = sys.argv[1:]
    for name, variant in VARIANTS.items():
        if not names or any(n in name for n in names):
            text = compile_variant(target, **variant)
            assert "rotary_forward" in text and "rotary_backward" in text, name
            copied = heads_that_are_copied(text)
            assert not copied, copied
            print(f"{target} {name}", flush=True)
