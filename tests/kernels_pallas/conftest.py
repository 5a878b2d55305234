"""What the tests of several ops share."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

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


@pytest.fixture
def run_as_script(request):
    """Runs the test's own file: in a process of its own, as this one may need libtpu with
    schedules.
    """

    def run(*arguments: str) -> None:
        root = Path(__file__).parents[2]
        environment = os.environ | {"PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, str(request.path), *arguments],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]

    return run
