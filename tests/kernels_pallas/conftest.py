"""What the tests of several ops share."""

from functools import partial

import jax
import pytest


@pytest.fixture
def interpreter_in_shard_map(monkeypatch):
    """Pallas' interpreter knows nothing of varying axes, and a Triton kernel has no other one.

    So the interpreter's own program is traced without the check, which for the op and its
    derivative stays on. The check of the kernels' types needs no such help where they are compiled:
    test_aot_cuda.py.
    """
    from jax._src import config
    from jax._src.pallas import hlo_interpreter

    right = hlo_interpreter.pallas_call_hlo_interpret

    def interpret(*args, **params):
        with config._check_vma(False):
            program = jax.make_jaxpr(partial(right, **params))(
                *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args)
            )
            return jax.core.eval_jaxpr(program.jaxpr, program.consts, *args)

    monkeypatch.setattr(hlo_interpreter, "pallas_call_hlo_interpret", interpret)
