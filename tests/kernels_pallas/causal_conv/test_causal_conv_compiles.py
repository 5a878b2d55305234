"""causal_conv's TPU kernels pass Mosaic's compiler, and nothing around them is copied.

python tests/kernels_pallas/causal_conv/test_causal_conv_compiles.py tpu:v6e [packed ...]
"""

import os
import sys

os.environ.setdefault(
    "JAX_PLATFORMS", "cpu"
)  # as a script; libtpu is loaded to compile, not to run

import jax
import jax.numpy as jnp
import pytest

from gatedjax.aot import compile_for, libtpu
from kernels_pallas.ops import causal_conv

VARIANTS = {
    "packed": dict(),
    "with a bias, unpacked": dict(has_bias=True, is_packed=False),
    "no SiLU": dict(is_activated=False),
    "odd length": dict(T=1001, F=640),
    "short rows": dict(B=64, T=2, F=128),
    "wide": dict(F=6144, W=4),
    "nine taps": dict(W=9),
    "one tap": dict(W=1),
}


def compile_variant(
    target, B=2, T=1024, F=1024, W=4, has_bias=False, is_packed=True, is_activated=True
) -> str:
    """Forward and backward behind a matrix product, as a projection has it: the program's text."""
    array = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype)

    def run(x, w, kernel, bias, segment_ids, dy):
        def call(x, w, kernel, bias):
            projected = jnp.einsum("btm,mf->btf", x, w)
            return causal_conv(
                projected,
                kernel,
                bias,
                segment_ids,
                is_activated=is_activated,
                implementation="tpu",
            )

        y, pull_back = jax.vjp(call, x, w, kernel, bias)
        return y, pull_back(dy)

    compiled, _ = compile_for(
        target,
        run,
        array(B, T, 256, dtype=jnp.bfloat16),
        array(256, F, dtype=jnp.bfloat16),
        array(W, F, dtype=jnp.float32),
        array(F, dtype=jnp.float32) if has_bias else None,
        array(B, T, dtype=jnp.int32) if is_packed else None,
        array(B, T, F, dtype=jnp.bfloat16),
        schedule=False,
    )
    return compiled.as_text()


def tokens_that_are_copied(text: str) -> list[str]:
    """The copies of arrays of all tokens, but for the bodies of asynchronous ones, into VMEM."""
    lines = (line.strip() for line in text.splitlines())
    copies = [line for line in lines if " copy(" in line and "bf16[2,1024,1024" in line]
    return [line for line in copies if not line.startswith("ROOT")]


@pytest.mark.skipif(not libtpu.installed(), reason="libtpu is not installed (pip install '.[aot]')")
@pytest.mark.parametrize(
    "target, names",
    [
        ("tpu:v5p", ["packed", "with a bias"]),
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
            assert "causal_conv_forward" in text and "causal_conv_backward" in text, name
            copied = tokens_that_are_copied(text)
            assert not copied, copied
            print(f"{target} {name}", flush=True)
