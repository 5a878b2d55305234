"""An entry of the compile cache runs only under the name that it was written for."""

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache

from gatedjax.runtime import compile_cache


@pytest.fixture
def folder(tmp_path):
    """A cache of every program, however quick to compile; the session's own comes back after."""
    before = {
        name: getattr(jax.config, name)
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compile_cache.use(tmp_path)
    yield tmp_path
    compilation_cache.get_file_cache = compile_cache._file_cache
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def doubled(x):
    return 2 * x


def squared(x):
    return x * x


def compiled_again(function):
    jax.clear_caches()
    return float(jax.jit(function)(jnp.float32(3.0)))


def test_programs_are_found_again_and_exchanged_ones_are_not_run(folder):
    x = jnp.float32(3.0)
    assert (float(jax.jit(doubled)(x)), float(jax.jit(squared)(x))) == (6.0, 9.0)
    first = next(folder.glob("jit_doubled-*-cache"))
    second = next(folder.glob("jit_squared-*-cache"))
    right = first.read_bytes()
    times = first.stat().st_mtime_ns
    assert compiled_again(doubled) == 6.0 and first.stat().st_mtime_ns == times, "it is found"

    first.write_bytes(second.read_bytes())
    assert compiled_again(doubled) == 6.0
    assert first.read_bytes() != second.read_bytes(), "the wrong one was replaced"

    first.write_bytes(right[: len(right) // 2])
    assert compiled_again(doubled) == 6.0
    first.write_bytes(right[: -compile_cache._END_BYTES])  # as plain jax writes it
    assert compiled_again(doubled) == 6.0
    assert compile_cache._MARK in first.read_bytes()
