"""Sinkhorn's and the QR form's weights: sums of rows and columns, against formulas and ott-jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms, slow

from kernels_pallas.attention.doubly_stochastic import sinkhorn_log_weights
from kernels_pallas.ops import attention, qr_attention, sinkhorn_attention

B, T, H, HK, K = 2, 7, 4, 2, 8


def arrays(size=1.0):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, T, heads, K)) for heads in (H, HK, HK))
    return size * q, k, v


def identity():
    """Values by which the output is the weights: [B, T, H, T] of rows by columns."""
    return np.broadcast_to(np.eye(T)[None, :, None], (B, T, HK, T))


def sinkhorn_by_formula(s, iterations):
    """Rows and columns divided by their sums, by turns."""
    w = np.exp(s - s.max((-1, -2), keepdims=True))
    for i in range(iterations):
        w = w / w.sum(-1 - i % 2, keepdims=True)
    return w


def logits(q, k):
    return K**-0.5 * np.einsum("bthk,bshk->bhts", q, np.repeat(k, H // HK, axis=2))


def test_sinkhorn_is_its_formula():
    """Values and gradients in float64, with padding that is NaN; strong logits stay finite."""
    q, k, v = arrays(3.0)
    is_token = np.arange(T)[None] < np.asarray([[T], [4]])
    broken_k, broken_v = k.copy(), v.copy()
    broken_k[1, 4:], broken_v[1, 5:] = np.nan, np.inf

    def formula(q):
        s = logits(q, k)
        whole = sinkhorn_by_formula(s[0] / 0.7, 3)
        part = np.zeros((H, T, T))
        part[:, :4, :4] = sinkhorn_by_formula(s[1, :, :4, :4] / 0.7, 3)
        return np.einsum("bhts,bshv->bthv", np.stack([whole, part]), np.repeat(v, 2, axis=2))

    with jax.enable_x64(True):

        @jax.jit
        def both(q, cotangent):
            y, pull = jax.vjp(
                lambda q: sinkhorn_attention(
                    q, broken_k, broken_v, iterations=3, epsilon=0.7, is_token=is_token
                ),
                q,
            )
            return y, pull(cotangent)[0]

        cotangent = np.random.default_rng(3).normal(size=(B, T, H, K))
        y, dq = both(q, cotangent)
    direction, step = np.random.default_rng(4).normal(size=q.shape), 1e-6
    assert rel_rms(y, formula(q)) < 1e-12 and not np.any(y[1, 4:])
    expected = np.sum(cotangent * (formula(q + step * direction) - formula(q - step * direction)))
    assert np.isclose(2 * step * np.sum(dq * direction), expected, rtol=1e-6)
    assert np.isfinite(sinkhorn_attention(1e4 * q, k, v, iterations=21)).all()


def test_one_iteration_is_softmax_and_many_are_doubly_stochastic():
    q, k, v = (np.asarray(x, np.float32) for x in arrays())
    expected = attention(q, k, v, causal=False, implementation="reference")
    assert rel_rms(sinkhorn_attention(q, k, v, iterations=1), expected) < 1e-5
    w = np.exp(sinkhorn_log_weights(logits(q, k), None, 101))
    assert np.allclose(w.sum(-1), 1, atol=1e-5) and np.allclose(w.sum(-2), 1, atol=1e-5)


def test_qr_is_doubly_stochastic():
    """Every token's weights and every key's sum to 1; the sign of a column does not show."""
    q, k = (np.asarray(x, np.float32) for x in arrays()[:2])
    w = qr_attention(q, k, identity().astype(np.float32))
    assert np.allclose(w.sum(-1), 1, atol=1e-5) and np.allclose(w.sum(1), 1, atol=1e-5)
    orthogonal, _ = np.linalg.qr(logits(q, k).astype(np.float64))
    assert rel_rms(np.moveaxis(w, 1, 2), orthogonal**2) < 1e-4
    # Fewer channels than tokens: the rank is less, and the sums are the same.
    q, k = q[..., :3], k[..., :3]
    noise = 1e-7 * jax.random.normal(jax.random.key(0), (B, H, T, T))
    w = qr_attention(q, k, identity().astype(np.float32), noise=noise)
    assert np.allclose(w.sum(-1), 1, atol=1e-5) and np.allclose(w.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("op", [slow(sinkhorn_attention), qr_attention])
def test_documents_have_weights_of_their_own(op):
    """Packed rows give what the documents give alone; padding, here NaN, gives 0."""
    q, k, v = (np.asarray(x[:1], np.float32) for x in arrays())
    k[0, 6], v[0, 6] = np.nan, np.inf
    segment_ids = np.asarray([[4, 4, 4, 4, 9, 9, 0]])
    packed = np.asarray(op(q, k, v, segment_ids=segment_ids))
    for start, end in ((0, 4), (4, 6)):
        alone = op(q[:, start:end], k[:, start:end], v[:, start:end])
        assert rel_rms(packed[:, start:end], alone) < 1e-4
    assert not np.any(packed[:, 6])


def test_sinkhorn_equals_the_ott_package():
    linear, sinkhorn = (
        pytest.importorskip(f"ott.{name}")
        for name in ("problems.linear.linear_problem", "solvers.linear.sinkhorn")
    )
    geometry = pytest.importorskip("ott.geometry.geometry")
    s = logits(*arrays()[:2])[0, 0].astype(np.float32)
    problem = linear.LinearProblem(geometry.Geometry(cost_matrix=-s, epsilon=0.5))
    solver = sinkhorn.Sinkhorn(threshold=1e-7, max_iterations=2000)
    # Their marginals are 1 / T.
    expected = T * solver(problem).matrix
    actual = np.exp(sinkhorn_log_weights(s / 0.5, None, 401))
    assert rel_rms(actual, expected) < 1e-4


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda x: sinkhorn_attention(x, x, x, iterations=0),
            "sinkhorn_attention: iterations: got 0, expected an integer from 1 on",
        ),
        (
            lambda x: sinkhorn_attention(x, x, x, epsilon=0.0),
            "sinkhorn_attention: epsilon: got 0.0, expected a number above 0",
        ),
        (
            lambda x: qr_attention(x, x[:, 1:], x),
            r"qr_attention: k: got shape \(1, 2, 2, 4\), expected \[1, 3, a divisor of 2, 4\]",
        ),
        (
            lambda x: attention(x, x, x, normalizer="sinkhorn"),
            "attention: normalizer: got 'sinkhorn', which no causal model has.*; expected "
            "kernels_pallas.ops.sinkhorn_attention in its place",
        ),
        (
            lambda x: attention(x, x, x, normalizer="learned_entmax", normalizer_parameters=x[0]),
            r"attention: normalizer_parameters: got shape \(3, 2, 4\), expected \(1, 2\) for alpha",
        ),
        (
            lambda x: attention(x, x, x, normalizer_parameters=x[0, :1, 0]),
            r"normalizer_parameters: got shape \(1, 4\), expected None with normalizer=Softmax",
        ),
    ],
)
def test_bad_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((1, 3, 2, 4)))
