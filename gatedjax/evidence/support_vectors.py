"""One layer of attention, trained, points to a support vector machine (arXiv 2308.16898).

    loss = mean_i exp(-y_i v^T X_i^T softmax(X_i W z_i))

with tokens X_i [T, d], a query z_i and a fixed head v. Gradient descent makes W grow without bound.
Its direction goes to that of

    minimize ||W||  so that  (x_chosen - x_t)^T W z >= 1  for all other tokens t of every row

where chosen is the token that the row's softmax ends on: the Frobenius norm if W itself is trained,
the nuclear norm if W = K Q^T and both are.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize, nnls
from scipy.special import logsumexp


class Rows(NamedTuple):
    """Problems: tokens, a query each, and how good every token is (y_i v^T x_t)."""

    tokens: Float[np.ndarray, "n T d"]
    queries: Float[np.ndarray, "n d"]
    goodness: Float[np.ndarray, "n T"]


def draw_rows(
    rng: np.random.Generator,
    num_rows: int,
    num_tokens: int,
    width: int,
) -> Rows:
    """Tokens, queries and the head on the unit sphere; random labels.

    Args:
      rng: draws them.
      num_rows: n.
      num_tokens: T.
      width: d.
    """
    tokens = _unit(rng.normal(size=(num_rows, num_tokens, width)))
    queries = _unit(rng.normal(size=(num_rows, width)))
    head = _unit(rng.normal(size=width))
    labels = rng.choice([-1.0, 1.0], size=num_rows)
    return Rows(tokens, queries, labels[:, None] * (tokens @ head))


def _unit(x: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def loss_and_gradient(
    W: Float[np.ndarray, "d d"], rows: Rows
) -> tuple[float, Float[np.ndarray, "d d"], Float[np.ndarray, "n T"]]:
    """The loss; its gradient in W over `gradient_scale`; and the attention weights.

    Without the scale the gradient would become 0 to rounding long before its direction stops
    changing; steps of a given length do not need it.
    """
    log_weights = _log_weights(W, rows)
    weights = np.exp(log_weights)
    read = np.sum(weights * rows.goodness, axis=1)
    losses = np.exp(-read)
    # d read / d logits_t = sum_s weights_t weights_s (goodness_t - goodness_s). Differences first:
    # where one weight is 1 to rounding, its goodness less what is read would be rounding too.
    pairs = log_weights[:, :, None] + log_weights[:, None, :] - _log_scale(log_weights)
    differences = rows.goodness[:, :, None] - rows.goodness[:, None, :]
    # Of a token with itself the difference is 0, and the exponent may be large.
    pairs = np.where(differences == 0, 0.0, pairs)
    of_logits = np.sum(np.exp(pairs) * differences, axis=2)
    factors = -losses / len(losses)
    gradient = np.einsum("n,nt,ntd,ne->de", factors, of_logits, rows.tokens, rows.queries)
    return float(losses.mean()), gradient, weights


def gradient_scale(W: Float[np.ndarray, "d d"], rows: Rows) -> float:
    """The largest weight that is not the largest of its row."""
    return float(np.exp(_log_scale(_log_weights(W, rows))))


def _log_weights(W: Float[np.ndarray, "d d"], rows: Rows) -> Float[np.ndarray, "n T"]:
    logits = np.einsum("ntd,de,ne->nt", rows.tokens, W, rows.queries)
    return logits - logsumexp(logits, axis=1, keepdims=True)


def _log_scale(log_weights: Float[np.ndarray, "n T"]) -> float:
    """The largest of the second largest weights of rows, as a logarithm."""
    return float(np.sort(log_weights, axis=1)[:, -2].max())


def constraints(rows: Rows, chosen: Int[np.ndarray, " n"]) -> Float[np.ndarray, "m d d"]:
    """A of every constraint <A, W> >= 1: (x_chosen - x_t) z^T."""
    n, T, _ = rows.tokens.shape
    best = rows.tokens[np.arange(n), chosen]
    differences = best[:, None] - rows.tokens
    outer = differences[..., :, None] * rows.queries[:, None, None, :]
    is_other = np.arange(T) != chosen[:, None]
    return outer[is_other]


def hard_margin(A: Float[np.ndarray, "m ..."]) -> Float[np.ndarray, "..."]:
    """The W of least Frobenius norm with <A_j, W> >= 1 for all j.

    It is p / ||p||^2, where p is the point of the convex hull of all A_j that is nearest to 0:
    non-negative least squares finds it, to rounding.

    Raises:
      ValueError: no W separates.
    """
    flat = A.reshape(len(A), -1)
    # ||A^T b||^2 + (1 - sum b)^2 is least at a multiple of the hull's point.
    system = np.concatenate([flat.T, np.ones((1, len(flat)))])
    target = np.zeros(len(system))
    target[-1] = 1.0
    weights, _ = nnls(system, target)
    point = flat.T @ (weights / weights.sum())
    W = point / np.sum(point**2)
    margin = float(np.min(flat @ W))
    if not margin > 1 - 1e-6:
        raise ValueError(f"A: got a margin of {margin:.3g}, expected tokens that can be separated")
    return W.reshape(A.shape[1:])


def nuclear_margin(A: Float[np.ndarray, "m d d"]) -> Float[np.ndarray, "d d"]:
    """The W of least nuclear norm with <A_j, W> >= 1 for all j.

    That is (||K||^2 + ||Q||^2) / 2 at its least for W = K Q^T with square K and Q. From the
    Frobenius solution, which separates.
    """
    d = A.shape[1]
    u, singular, vt = np.linalg.svd(hard_margin(A))
    root = np.sqrt(singular)
    start = np.stack([u * root, vt.T * root])

    def objective(flat: Float[np.ndarray, " n"]) -> tuple[float, Float[np.ndarray, " n"]]:
        return 0.5 * float(flat @ flat), flat

    def slack(flat: Float[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
        K, Q = flat.reshape(2, d, d)
        return np.einsum("mde,de->m", A, K @ Q.T) - 1

    def slack_gradient(flat: Float[np.ndarray, " n"]) -> Float[np.ndarray, "m n"]:
        K, Q = flat.reshape(2, d, d)
        of_k = A @ Q
        of_q = np.swapaxes(A, 1, 2) @ K
        return np.stack([of_k, of_q], axis=1).reshape(len(A), -1)

    solution = minimize(
        objective,
        start.reshape(-1),
        jac=True,
        method="SLSQP",
        constraints={"type": "ineq", "fun": slack, "jac": slack_gradient},
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    K, Q = solution.x.reshape(2, d, d)
    return K @ Q.T


def cosine(a: Float[np.ndarray, "..."], b: Float[np.ndarray, "..."]) -> float:
    """Of two arrays, as vectors."""
    return float(np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b)))


@dataclasses.dataclass(frozen=True)
class AttentionSVM:
    """Gradient descent beside the two support vector machines of what it chose.

    Attributes:
      trained: "W", or "K, Q" from small random matrices.
      norms: the direction is looked at when ||W|| has grown to each of these.
      num_rows: n.
      num_tokens: T.
      width: d.
      lr: the length of every step, as in the paper.
      start: the deviation of the entries of K and Q.
    """

    trained: str
    norms: tuple[int, ...] = (1, 3, 10, 30, 100, 300, 1000)
    num_rows: int = 6
    num_tokens: int = 5
    width: int = 8
    lr: float = 0.02
    start: float = 0.01

    def __call__(self, seed: int) -> dict[str, float]:
        rng = np.random.default_rng(seed)
        rows = draw_rows(rng, self.num_rows, self.num_tokens, self.width)
        snapshots = self._descended(rows, rng)
        W = snapshots[max(snapshots)]
        _, _, weights = loss_and_gradient(W, rows)
        chosen = weights.argmax(axis=1)
        A = constraints(rows, chosen)
        machines = {"frobenius": hard_margin(A), "nuclear": nuclear_margin(A)}
        values = {
            "least_weight": float(weights.max(axis=1).min()),
            "best_chosen": float(np.mean(chosen == rows.goodness.argmax(axis=1))),
            "rank": effective_rank(W),
        }
        for name, machine in machines.items():
            for norm, then in snapshots.items():
                values[f"{name}@{norm}"] = cosine(then, machine)
            values[f"{name}_rank"] = effective_rank(machine)
        return values

    def _descended(
        self, rows: Rows, rng: np.random.Generator
    ) -> dict[int, Float[np.ndarray, "d d"]]:
        """W at the first step at which it has each of the norms."""
        K, Q = self.start * rng.normal(size=(2, self.width, self.width))
        W = np.zeros((self.width, self.width))
        snapshots: dict[int, Float[np.ndarray, "d d"]] = {}
        while len(snapshots) < len(self.norms):
            if self.trained == "W":
                _, gradient, _ = loss_and_gradient(W, rows)
                W = W - self.lr * gradient / np.linalg.norm(gradient)
            else:
                _, gradient, _ = loss_and_gradient(K @ Q.T, rows)
                of_k, of_q = gradient @ Q, gradient.T @ K
                length = np.sqrt(np.sum(of_k**2) + np.sum(of_q**2))
                K = K - self.lr * of_k / length
                Q = Q - self.lr * of_q / length
                W = K @ Q.T
            wanted = self.norms[len(snapshots)]
            if np.linalg.norm(W) >= wanted:
                snapshots[wanted] = W
        return snapshots


def effective_rank(W: Float[np.ndarray, "d d"]) -> float:
    """Nuclear norm over spectral norm: 1 of a matrix of rank 1, d of a rotation."""
    singular = np.linalg.svd(W, compute_uv=False)
    return float(singular.sum() / singular[0])
