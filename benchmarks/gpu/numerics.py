"""Every kernel against the reference in float64: results, gradients, and whether two runs agree."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.guard import WorkerOptions, run_each
from benchmarks.gpu.numeric_cases import AS_DISPATCHED, BY, NumericCase, numeric_cases
from benchmarks.gpu.numeric_inputs import Arrays, Drawn, draw
from benchmarks.gpu.programs import kernel_options
from benchmarks.gpu.records import append_record, one_line


def check_numerics(options: WorkerOptions) -> None:
    """The cases of this process."""
    settings = options.settings

    def check(case: NumericCase) -> None:
        record(case, **check_case(case, settings.dry))

    def failed(case: NumericCase, error: Exception) -> None:
        record(case, ok=False, error=one_line(error))

    def record(case: NumericCase, **fields: Any) -> None:
        append_record(
            settings.out,
            stage="parallel",
            kind="numerics",
            case=case.name,
            ptxas=settings.ptxas,
            **fields,
        )

    run_each(numeric_cases(settings.dry), check, failed, options)


def check_case(case: NumericCase, dry: bool) -> dict[str, Any]:
    """The fields of a record.

    `same` is whether two runs gave the same bits, `errors` are those of results and gradients.
    """
    drawn = draw(case)
    expected, weights = reference(case, drawn)

    inputs = {}
    for name, value in drawn.inputs.items():
        dtype = case.dtype if name in drawn.operands else jnp.float32
        inputs[name] = jnp.asarray(value, dtype)
    weights_32 = {name: jnp.asarray(value, jnp.float32) for name, value in weights.items()}

    how = how_to_call(case, dry)

    def run(inputs: Arrays, weights: Arrays) -> Arrays:
        return results_and_gradients(drawn.call, inputs, weights, how)

    began = time.perf_counter()
    compiled = jax.jit(run).lower(inputs, weights_32).compile()
    compile_s = time.perf_counter() - began

    actual = _to_numpy(compiled(inputs, weights_32))
    again = _to_numpy(compiled(inputs, weights_32))
    same = all(np.array_equal(actual[k], again[k], equal_nan=True) for k in actual)
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    # NaN is not below the tolerance.
    close = all(error <= case.tolerance(expected[name].ndim) for name, error in errors.items())
    return {
        "ok": same and close,
        "same": same,
        "compile_s": round(compile_s, 1),
        "errors": {name: float(f"{error:.1e}") for name, error in errors.items()},
    }


def how_to_call(case: NumericCase, dry: bool) -> dict[str, Any]:
    """The arguments by which the op takes the kernel that the case is about."""
    if BY in case.options:
        return {"implementation": case.options[BY]}
    return {} if case.op in AS_DISPATCHED else kernel_options(dry)


def reference(
    case: NumericCase,
    drawn: Drawn,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(expected results and gradients, weights of the results in the loss), on the CPU."""
    random = np.random.default_rng(7)
    how = {"implementation": "reference"}

    def call(inputs: Arrays) -> Arrays:
        return drawn.call(inputs, **how)

    def run(inputs: Arrays, weights: Arrays) -> Arrays:
        return results_and_gradients(drawn.call, inputs, weights, how)

    cpu = jax.devices("cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        inputs = {k: jnp.asarray(v, jnp.float64) for k, v in drawn.inputs.items()}
        weights = {}
        for name, result in jax.eval_shape(call, inputs).items():
            values = random.standard_normal(result.shape)
            # The cotangent of a result is rounded to the result's type: round it here, for both.
            weights[name] = np.asarray(jnp.asarray(values, case.dtype), np.float64)
        expected = _to_numpy(jax.jit(run)(inputs, weights))
    return expected, weights


def results_and_gradients(
    call: Callable[..., Arrays],
    inputs: Arrays,
    weights: Arrays,
    how: dict[str, Any],
) -> Arrays:
    """Results of a call, and the gradients of their weighted sum.

    Args:
      call: (inputs, **how) -> results by name.
      inputs: by name.
      weights: of each result's numbers in the sum; their type is that of the sum.
      how: implementation and interpret.

    Returns:
      Results by their names, gradients as "d" and the input's name.
    """

    def loss(inputs: Arrays):
        results = call(inputs, **how)
        total = 0.0
        for name, result in results.items():
            weight = weights[name]
            total += (result.astype(weight.dtype) * weight).sum()
        return total, results

    gradients, results = jax.grad(loss, has_aux=True)(inputs)
    found = dict(results)
    for name, gradient in gradients.items():
        found[f"d{name}"] = gradient
    return found


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference as a fraction of the norm of the expected."""
    difference = np.linalg.norm(actual.astype(np.float64) - expected)
    return float(difference / max(np.linalg.norm(expected), 1e-30))


def _to_numpy(arrays: Arrays) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in arrays.items()}
