"""delta_scan's TPU kernels pass Mosaic's compiler with every option: interpreted kernels may ask
what no TPU can do.

python tests/kernels_pallas/delta_scan/test_delta_scan_compiles.py tpu:v6e [packed ...]
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
from kernels_pallas.ops import delta_scan, delta_scan_step

F32, BF16 = jnp.float32, jnp.bfloat16
VARIANTS = {
    "vector, packed, state": dict(segments=True, state=True),
    "scalar, packed, l2 norm, grouped": dict(rank=3, segments=True, l2_norm=True, Hq=1, Hk=1),
    "none, float32": dict(rank=0, dtype=F32, log_dtype=BF16),
    "float32, as many heads as a step takes": dict(H=8, dtype=F32),
    "as many heads as a step takes": dict(H=16),
    "channels, K 96 V 192": dict(K=96, V=192, rule="channels"),
    "float16, length 63": dict(rank=3, T=63, dtype=jnp.float16),
    "K 256 V 256": dict(H=8, K=256, V=256),
    "chunks of 16, length 1": dict(T=1, chunk_size=16),
}


def compile_variant(
    target,
    B=1,
    T=256,
    H=2,
    Hq=None,
    Hk=None,
    K=128,
    V=128,
    rank=4,
    dtype=BF16,
    log_dtype=F32,
    rule="beta",
    segments=False,
    state=False,
    **options,
) -> None:
    """Forward and backward, and a decoding step."""
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    x = {"q": array(B, T, Hq or H, K), "k": array(B, T, Hk or H, K), "v": array(B, T, H, V)}
    if rule == "beta":
        x["beta"] = array(B, T, H, dtype=log_dtype)
    else:
        x |= {"erase": array(B, T, H, K), "write": array(B, T, H, V)}
    if rank:
        x["log_decay"] = array(*{3: (B, T, H), 4: (B, T, H, K)}[rank], dtype=log_dtype)
    token = {n: array(a.shape[0], *a.shape[2:], dtype=a.dtype) for n, a in x.items()}
    token["state"] = array(B, H, K, V, dtype=F32)
    if state:
        x["initial_state"] = token["state"]

    def loss(x, segment_ids):
        ids = segment_ids if segments else None
        out = delta_scan(
            **x, segment_ids=ids, return_final_state=state, implementation="tpu", **options
        )
        return sum((y.astype(F32) ** 2).sum() for y in jax.tree.leaves(out))

    compile_for(target, jax.value_and_grad(loss), x, array(B, T, dtype=jnp.int32), schedule=False)
    step = lambda token: delta_scan_step(**token, implementation="tpu")
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
