"""linear_scan's TPU kernels pass Mosaic's compiler with every option: interpreted kernels may ask
what no TPU can do.

python tests/kernels_pallas/linear_scan/test_linear_scan_compiles.py tpu:v6e [packed ...]
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
from kernels_pallas.ops import linear_scan, linear_scan_step

F32, BF16 = jnp.float32, jnp.bfloat16
VARIANTS = {
    "packed, exclusive, bonus, state": dict(segments=True, bonus=True, inclusive=False, state=True),
    "packed, reverse": dict(segments=True, reverse=True, log_dtype=BF16),
    "scalar, exclusive, bonus, state": dict(rank=3, bonus=True, inclusive=False, state=True),
    "scalar, packed, reverse": dict(rank=3, segments=True, reverse=True),
    "constant": dict(rank=1),
    "no decay, packed": dict(rank=0, segments=True),
    "grouped": dict(Hk=2, Hv=4),
    "one key head of sixteen": dict(rank=3, H=16, Hk=1, Hv=1),
    "length 1000, packed": dict(T=1000, segments=True),
    "length 63": dict(T=63),
    "length 1, scalar": dict(T=1, rank=3),
    "float32": dict(dtype=F32),
    "float32, scalar": dict(dtype=F32, rank=3, state=True),
    "float16": dict(dtype=jnp.float16, log_dtype=jnp.float16),
    "normalize, state": dict(normalize=True, state=True, rank=3),
    "K 64 V 64": dict(K=64, V=64),
    "K 96 V 40": dict(K=96, V=40, rank=3),
    "K 512 V 512": dict(K=512, V=512, H=2),
    "K 32 V 512, three heads": dict(K=32, V=512, H=3),
    "chunks of 64, packed": dict(chunk_size=64, segments=True),
    "chunks of 16": dict(chunk_size=16, rank=3),
}


def compile_variant(
    target,
    B=2,
    T=512,
    H=8,
    Hk=None,
    Hv=None,
    K=128,
    V=128,
    rank=4,
    dtype=BF16,
    log_dtype=F32,
    segments=False,
    bonus=False,
    state=False,
    **options,
) -> None:
    """Forward and backward, and a decoding step."""
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    x = {"q": array(B, T, H, K), "k": array(B, T, Hk or H, K), "v": array(B, T, Hv or H, V)}
    if rank:
        x["log_decay"] = array(*{1: (H,), 3: (B, T, H), 4: (B, T, H, K)}[rank], dtype=log_dtype)
    if bonus:
        x["bonus"] = array(H, K, dtype=F32)
    states = array(B, H, K, V + options.get("normalize", False), dtype=F32)
    token = {
        n: array(a.shape[0], *a.shape[2:], dtype=a.dtype) if a.ndim > 2 else a for n, a in x.items()
    }
    token["state"] = states
    if state:
        x["initial_state"] = states

    def loss(x, segment_ids):
        options_here = options | {
            "segment_ids": segment_ids if segments else None,
            "return_final_state": state,
        }
        out = linear_scan(**x, **options_here, implementation="tpu")
        return sum((y.astype(F32) ** 2).sum() for y in jax.tree.leaves(out))

    compile_for(target, jax.value_and_grad(loss), x, array(B, T, dtype=jnp.int32), schedule=False)
    options = {n: o for n, o in options.items() if n in ("inclusive", "normalize")}
    step = lambda token: linear_scan_step(**token, implementation="tpu", **options)
    compile_for(target, step, token, schedule=False)


@pytest.mark.slow
@pytest.mark.skipif(not libtpu.installed(), reason="libtpu is not installed (pip install '.[aot]')")
@pytest.mark.parametrize("target", ["tpu:v5e", "tpu:v6e", "tpu:v7x"])
def test_every_option_compiles(target, run_as_script):
    run_as_script(target)


if __name__ == "__main__":
    target, *names = sys.argv[1:]
    for name, variant in VARIANTS.items():
        if not names or any(n in name for n in names):
            compile_variant(target, **variant)
            print(f"{target} {name}", flush=True)
