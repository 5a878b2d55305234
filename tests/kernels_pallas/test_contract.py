"""What holds for linear_scan, grouped_matmul and expert_mlp whatever the caller's numbers, modes of
jax and meshes are.
"""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import slow
from jax.sharding import AxisType, NamedSharding

from kernels_pallas import dispatch
from kernels_pallas.ops import (
    expert_mlp,
    grouped_matmul,
    linear_scan,
    linear_scan_step,
    permute_rows,
    sort_by_group,
)

P = jax.P
R = np.random.default_rng(0)


def normal(*shape):
    return R.normal(size=shape).astype(np.float32)


M, G = 300, 3
LHS, RHS = normal(M, 4), normal(G, 4, 5)
PRODUCT = np.concatenate([LHS[i * 100 : (i + 1) * 100] @ RHS[i] for i in range(G)])
Q, K, V = normal(2, 12, 2, 4), normal(2, 12, 2, 4), normal(2, 12, 2, 3)
LOGS = -np.abs(normal(2, 12, 2, 4))
EXPERTS = normal(14, 4), normal(3, 4, 6), normal(3, 4, 6), normal(3, 6, 4)
SIZES = np.array([5, 0, 7])


def kernel(fn, implementation, **options):
    interpret = implementation in ("tpu", "gpu")
    return partial(fn, implementation=implementation, interpret=interpret, **options)


# --- the caller's numbers


@pytest.mark.parametrize("implementation", ["reference", "xla", slow("tpu"), "gpu"])
def test_sizes_of_any_width(implementation):
    multiply = jax.jit(kernel(grouped_matmul, implementation))
    for dtype in ("int8", "uint8", "int16", "uint32", "int64", "uint64"):
        got = multiply(LHS, RHS, np.asarray([100] * G, dtype))
        np.testing.assert_allclose(got, PRODUCT, atol=1e-4, err_msg=dtype)
    with jax.enable_x64(True):
        got = multiply(LHS, RHS, jnp.asarray([100, 100, 2**40]))
        np.testing.assert_allclose(got, PRODUCT, atol=1e-4)
    no_limit = np.asarray([100, 2**63 - 1, 2**63 - 1])
    np.testing.assert_allclose(
        kernel(grouped_matmul, implementation)(LHS, RHS, no_limit)[:100], PRODUCT[:100], atol=1e-4
    )
    got = multiply(LHS, RHS, np.asarray([100, -7, 100]))
    np.testing.assert_allclose(got[:100], PRODUCT[:100], atol=1e-4)
    assert not np.asarray(got[200:]).any()


def test_ids_of_64_bits_stay_apart():
    ids = np.array([[1] * 5 + [1 + 2**32] * 7] * 2)
    got = linear_scan(Q, K, V, segment_ids=ids)
    want = linear_scan(Q, K, V, segment_ids=np.array([[0] * 5 + [1] * 7] * 2, np.uint8))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: linear_scan(Q, K, V, chunk_size=True), "chunk_size: got True"),
        (lambda: linear_scan(Q, K, V, chunk_size=16.0), "chunk_size: got 16.0"),
        (lambda: linear_scan(Q, K, V, segment_ids=np.ones((2, 12))), "segment_ids: got dtype"),
        (
            lambda: linear_scan(Q, K, V, segment_ids=np.ones((2, 12), bool)),
            "segment_ids: got dtype",
        ),
        (lambda: linear_scan(Q.astype("float8_e4m3fn"), K, V), "q: got dtype float8"),
        (lambda: grouped_matmul(LHS, RHS, np.ones(3)), "group_sizes: got dtype float64"),
        (lambda: grouped_matmul(LHS, RHS, np.ones(3, bool)), "group_sizes: got dtype bool"),
        (
            lambda: grouped_matmul(LHS, RHS, SIZES, preferred_element_type="float8_e5m2"),
            "preferred_element_type: got float8",
        ),
        (lambda: expert_mlp(*EXPERTS, np.ones(3)), "group_sizes: got dtype float64"),
    ],
)
def test_numbers_that_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_numbers_of_numpy_as_options():
    got = linear_scan(Q, K, V, chunk_size=np.int64(4), scale=np.float32(0.5))
    np.testing.assert_allclose(got, linear_scan(Q, K, V, scale=0.5), atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla", slow("tpu"), "gpu"])
def test_bad_rows_of_another_group_do_not_matter(implementation):
    def results(implementation, lhs, rhs, dout, experts, weights, dy):
        y, vjp = jax.vjp(lambda a, b: kernel(grouped_matmul, implementation)(a, b, SIZES), lhs, rhs)
        z, mlp_vjp = jax.vjp(
            lambda w, *x: kernel(expert_mlp, implementation)(*x, SIZES, w), weights, *experts
        )
        dweights, drows, *dmatrices = mlp_vjp(dy)
        dlhs, drhs = vjp(dout)
        return (y, z, dlhs, dweights, drows), (drhs, *dmatrices)

    lhs, rhs, dout, weights, dy = LHS[:14], RHS, normal(14, 5), normal(14), normal(14, 4)
    run = jax.jit(partial(results, implementation))
    rows, matrices = run(lhs, rhs, dout, EXPERTS, weights, dy)
    bad = [x.copy() for x in (lhs, dout, EXPERTS[0], weights, dy)]
    for x in bad:
        x[1] = np.nan  # of group 0
        x[12:] = np.inf  # of no group
    bad_rhs = rhs.copy()
    bad_rhs[0] = np.inf
    bad_lhs, bad_dout, bad_x, bad_weights, bad_dy = bad
    got = run(bad_lhs, bad_rhs, bad_dout, (bad_x, *EXPERTS[1:]), bad_weights, bad_dy)
    for a, b in zip(got[0], rows):
        np.testing.assert_array_equal(np.asarray(a)[5:], np.asarray(b)[5:])
        assert not np.isfinite(np.asarray(a)[1]).all()
    for a, b in zip(got[1], matrices):
        np.testing.assert_array_equal(np.asarray(a)[1:], np.asarray(b)[1:])
    # Matrices of the last group that are not finite, and rows behind it.
    bad_rhs = rhs.copy()
    bad_rhs[2] = np.inf
    assert not np.asarray(run(lhs, bad_rhs, dout, EXPERTS, weights, dy)[0][0])[12:].any()


# --- modes of jax


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("mode", ["nans", "infs", "x64"])
def test_modes(mode, implementation):
    modes = {
        "nans": jax.debug_nans(True),
        # Arguments may be infinite, such as logs; no result is where it should be finite.
        "infs": jax.debug_infs(True),
        "x64": jax.enable_x64(True),
    }
    scan = kernel(linear_scan, implementation)
    ids = np.array([[0] * 5 + [1] * 7] * 2)
    logs = LOGS.copy()
    logs[:, 3] = -np.inf
    with modes[mode]:
        for log_decay in (None, logs[0, 0, :, 0], logs[..., 0], logs):

            def loss(q, log_decay=log_decay):
                options = {"normalize": True} if log_decay is None else {}
                if log_decay is not None and log_decay.ndim == 4:
                    options = {"inclusive": False, "bonus": normal(2, 4)}
                return scan(q, K, V, log_decay, segment_ids=ids, **options).sum()

            assert np.isfinite(jax.jit(jax.grad(loss))(Q.astype("bfloat16"))).all()
        dx = jax.jit(
            jax.grad(lambda x: kernel(expert_mlp, implementation)(x, *EXPERTS[1:], SIZES).sum())
        )(EXPERTS[0])
        assert np.isfinite(dx).all()


def losses(implementation, dtype):
    """Every op as a function of its float arguments, and these, in `dtype`."""
    scan = kernel(linear_scan, implementation)
    q, k, v, logs = (jnp.asarray(x, dtype) for x in (Q, K, V, LOGS))
    bonus = q[0, 0]
    state = jnp.asarray(normal(2, 2, 4, 3))
    ids = np.array([[0] * 5 + [1] * 7] * 2)

    def of_scan(q, k, v, log_decay=None, **options):
        o, state = scan(q, k, v, log_decay, segment_ids=ids, return_final_state=True, **options)
        return o.astype("float32").sum() + state.sum()

    yield partial(of_scan, normalize=True), (q, k, v)
    yield of_scan, (q, k, v, jnp.asarray(LOGS[0, 0, :, 0]))
    yield partial(of_scan, reverse=True), (q, k, v, logs[..., 0])
    yield partial(of_scan, inclusive=False, bonus=bonus), (q, k, v, logs)
    yield partial(of_scan, initial_state=state), (q, k, v, jnp.asarray(LOGS))

    def of_step(q, k, v, state, log_decay):
        step = kernel(linear_scan_step, implementation)
        o, state = step(q, k, v, state, log_decay, inclusive=False, bonus=bonus)
        return o.astype("float32").sum() + state.sum()

    tokens = (q[:, 0], k[:, 0], v[:, 0], state)
    yield of_step, (*tokens, logs[:, 0])
    yield of_step, (*tokens, jnp.asarray(LOGS[:, 0, :, 0]))

    lhs, rhs = jnp.asarray(LHS[:14], dtype), jnp.asarray(RHS, dtype)

    def of_product(lhs, rhs, sizes, **options):
        y = kernel(grouped_matmul, implementation)(lhs, rhs, jnp.asarray(sizes), **options)
        return (y.astype("float32") ** 2).sum()

    for sizes in (SIZES.astype(width) for width in ("int32", "uint8", "int16", "uint32")):
        yield partial(of_product, sizes=sizes), (lhs, rhs)
    yield partial(of_product, sizes=SIZES, preferred_element_type="bfloat16"), (lhs, rhs)

    def of_gradient(lhs, rhs):
        gradient = jax.grad(partial(of_product, sizes=SIZES))(lhs, rhs)
        return (gradient.astype("float32") ** 2).sum()

    yield of_gradient, (lhs, rhs)

    def of_experts(weights, *arrays):
        y = kernel(expert_mlp, implementation)(*arrays, jnp.asarray(SIZES), weights)
        return (y.astype("float32") ** 2).sum()

    yield of_experts, (jnp.ones(14), *(jnp.asarray(x, dtype) for x in EXPERTS))

    def of_order(x):
        order, inverse, _ = sort_by_group(jnp.arange(28) % 3, 3)
        return (permute_rows(x, order, inverse).astype("float32") ** 2).sum()

    yield of_order, (lhs,)


@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu"])
def test_strict_promotion_of_dtypes_and_ranks(implementation):
    """Nothing inside is converted or broadcast behind the caller's back, gradients neither."""
    for loss, arrays in losses(implementation, "bfloat16"):
        gradient = jax.grad(loss, tuple(range(len(arrays))))
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            gradients = jax.eval_shape(gradient, *arrays)
        assert [g.dtype for g in gradients] == [x.dtype for x in arrays]


def test_strict_promotion_leaves_values_as_they_are():
    cases = list(losses("xla", "bfloat16"))
    for loss, arrays in (cases[2], cases[-3]):
        gradient = jax.value_and_grad(loss, tuple(range(len(arrays))))
        want = jax.jit(gradient)(*arrays)
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            got = jax.jit(gradient)(*arrays)
        jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("implementation", ["xla", slow("tpu"), "gpu"])
def test_second_derivatives_of_grouped_matmul(implementation):
    def second(implementation, argument):
        def value(x):
            arrays = [LHS[:14], RHS]
            arrays[argument] = x
            return (kernel(grouped_matmul, implementation)(*arrays, SIZES) ** 2).sum()

        x = (LHS[:14], RHS)[argument]
        return jax.jit(jax.grad(lambda x: (jax.grad(value)(x) ** 2).sum()))(x)

    for argument in (0, 1):
        want = second("reference", argument)
        np.testing.assert_allclose(second(implementation, argument), want, 1e-4, 1e-3)


def test_second_derivatives_that_are_refused():
    scan = kernel(linear_scan, "tpu", chunk_size=16)
    mlp = kernel(expert_mlp, "tpu")
    for op, fn, x in (
        ("linear_scan", lambda q: scan(q, K, V), Q),
        ("expert_mlp", lambda x: mlp(x, *EXPERTS[1:], SIZES), EXPERTS[0]),
    ):
        gradient = jax.grad(lambda x, fn=fn: (fn(x) ** 2).sum())
        with pytest.raises(NotImplementedError, match=f"{op}: this kernel has no second"):
            jax.grad(lambda x, gradient=gradient: gradient(x).sum())(x)


def test_forward_mode():
    """The reference has it, everything else refuses."""
    jax.jvp(lambda q: linear_scan(q, K, V, implementation="reference"), (Q,), (Q,))
    jax.jvp(lambda a: grouped_matmul(a, RHS, SIZES, implementation="reference"), (LHS,), (LHS,))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: linear_scan(q, K, V, implementation="xla"), (Q,), (Q,))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda a: grouped_matmul(a, RHS, SIZES, implementation="xla"), (LHS,), (LHS,))


def test_the_step_kernel_differentiates():
    state = normal(2, 2, 4, 3)

    def gradients(implementation):
        def loss(*x):
            step = kernel(linear_scan_step, implementation)
            o, new_state = step(*x, inclusive=False, bonus=Q[0, 0])
            return (o**2).sum() + (new_state**2).sum()

        arrays = (Q[:, 0], K[:, 0], V[:, 0], state, LOGS[:, 0])
        return jax.grad(loss, (0, 1, 2, 3, 4))(*arrays)

    for got, want in zip(gradients("tpu"), gradients("reference")):
        np.testing.assert_allclose(got, want, 1e-4, 1e-5)


# --- platforms and meshes


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_a_kernel_whose_platform_is_not_there(implementation):
    for op, fn in (
        ("linear_scan", lambda i: linear_scan(Q, K, V, implementation=i)),
        ("linear_scan", lambda i: jax.jit(lambda q: linear_scan(q, K, V, implementation=i))(Q)),
        (
            "linear_scan",
            lambda i: jax.grad(lambda q: linear_scan(q, K, V, implementation=i).sum())(Q),
        ),
        ("grouped_matmul", lambda i: grouped_matmul(LHS, RHS, SIZES, implementation=i)),
        ("expert_mlp", lambda i: expert_mlp(*EXPERTS, SIZES, implementation=i)),
    ):
        with pytest.raises(NotImplementedError, match=f"{op}: implementation='{implementation}'"):
            fn(implementation)


def test_what_a_program_is_lowered_for():
    def loss(q):
        return (linear_scan(q, K, V, LOGS) ** 2).sum()

    with dispatch.lowering_for("tpu"):
        exported = jax.export.export(jax.jit(jax.grad(loss)), platforms=["tpu"])(Q)
    assert "tpu_custom_call" in exported.mlir_module()
    # A named kernel needs no telling.
    named = jax.jit(lambda q: linear_scan(q, K, V, LOGS, implementation="tpu"))
    assert "tpu_custom_call" in jax.export.export(named, platforms=["tpu"])(Q).mlir_module()
    # Told nothing, the xla path is taken, and says so; not where it is meant.
    with pytest.warns(UserWarning, match="linear_scan: traced for another platform .* 'tpu'"):
        jax.export.export(jax.jit(jax.grad(loss)), platforms=["tpu"])(Q)
    by_name = jax.jit(lambda q: linear_scan(q, K, V, LOGS, implementation="xla"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.export.export(by_name, platforms=["tpu"])(Q)
        jax.jit(jax.grad(loss))(Q)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, slow(AxisType.Auto)])
def test_meshes(axis_type):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
    ids = np.array([[0] * 5 + [1] * 7] * 2)
    state = normal(2, 2, 4, 3)

    def split(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    def value_and_gradients(fn, arrays):
        return jax.jit(jax.value_and_grad(fn, tuple(range(len(arrays)))))

    def scan(log_decay, implementation, *arrays):
        o = kernel(linear_scan, implementation)(*arrays, log_decay, segment_ids=ids)
        return (o**2).sum()

    def multiply(implementation, lhs, rhs):
        order, inverse, _ = sort_by_group(jnp.arange(16) % 3, 3)
        rows = permute_rows(lhs, order, inverse)
        return (kernel(grouped_matmul, implementation)(rows, rhs, np.array([6, 5, 5])) ** 2).sum()

    def step(implementation, *arrays):
        return sum((x**2).sum() for x in kernel(linear_scan_step, implementation)(*arrays))

    wanted = []
    for implementation in ("reference", "xla"):
        cases = []
        for log_decay in (None, LOGS[0, 0, :, 0], LOGS[..., 0], LOGS):
            heads = [split(x, "data", None, "tensor") for x in (Q, K, V)]
            cases.append((partial(scan, log_decay, implementation), (Q, K, V), heads))
        rows = [split(LHS[:16], "data"), RHS]
        cases.append((partial(multiply, implementation), (LHS[:16], RHS), rows))
        tokens = (Q[:, 0], K[:, 0], V[:, 0], state)
        cases.append(
            (partial(step, implementation), tokens, [split(x, "data", "tensor") for x in tokens])
        )
        # The reference on whole arrays is what both must give.
        wanted = wanted or [value_and_gradients(fn, whole)(*whole) for fn, whole, _ in cases]
        for (fn, whole, parts), want in zip(cases, wanted):
            with jax.set_mesh(mesh):
                got = value_and_gradients(fn, whole)(*parts)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want
            )
