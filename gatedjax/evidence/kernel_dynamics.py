"""When gradient descent fits one layer: softmax and a Gaussian kernel (arXiv 2411.07538).

    y = sum_h S(X W_Q, X W_K) X W_V W_O
    S(q, k) = softmax(q k^T / sqrt(d))   or   exp(-|q - k|^2 / (2 sqrt(d)))

Rows X and their answers are random, so that only a layer with enough freedom fits them. The paper:
descent from a good start fits them with either kernel; of W_Q alone, the Gaussian kernel still
does, whereas softmax may end at a point that is only locally best.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

Params = dict[str, Array]


def weights(
    q: Float[Array, "... n K"],
    k: Float[Array, "... n K"],
    kernel: str,
) -> Float[Array, "... n n"]:
    """S(q, k); the Gaussian kernel's rows do not sum to 1."""
    root = q.shape[-1] ** 0.5
    products = jnp.einsum("...ik,...jk->...ij", q, k)
    if kernel == "softmax":
        return jax.nn.softmax(products / root, axis=-1)
    squares_of_q = jnp.sum(q**2, axis=-1)[..., :, None]
    squares_of_k = jnp.sum(k**2, axis=-1)[..., None, :]
    return jnp.exp((products - squares_of_q / 2 - squares_of_k / 2) / root)


def predict(params: Params, x: Float[Array, "N n D"], kernel: str) -> Float[Array, "N n"]:
    """One number for each token of each row."""
    q = jnp.einsum("bnd,hdk->bhnk", x, params["query"])
    k = jnp.einsum("bnd,hdk->bhnk", x, params["key"])
    v = jnp.einsum("bnd,hdk->bhnk", x, params["value"])
    return jnp.einsum("bhij,bhjk,hk->bi", weights(q, k, kernel), v, params["out"])


@dataclasses.dataclass(frozen=True)
class KernelDescent:
    """Descends with every rate and says how far the best one came.

    Attributes:
      kernel: "softmax" or "gaussian".
      trained: "query" for W_Q alone, or "all".
      width: D of a token, and of a head.
      rows: N.
      tokens: n.
      heads: how many.
      steps: of descent.
      rates: of it, each tried.
    """

    kernel: str
    trained: str
    width: int = 16
    rows: int = 16
    tokens: int = 4
    heads: int = 2
    steps: int = 3_000
    rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

    def __call__(self, seed: int) -> dict[str, float]:
        keys = jax.random.split(jax.random.key(seed), 3)
        x = jax.random.normal(keys[0], (self.rows, self.tokens, self.width))
        x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        answers = jax.random.normal(keys[1], (self.rows, self.tokens))
        params = initial(keys[2], self.heads, self.width)
        losses = _descended(self, params, x, answers, jnp.asarray(self.rates))
        # A rate that is too high ends in no number.
        last = jnp.where(jnp.isfinite(losses[:, -1]), losses[:, -1], jnp.inf)
        best = losses[jnp.argmin(last)]
        values = {"rate": self.rates[int(jnp.argmin(last))], "error at start": float(best[0])}
        for step in (self.steps // 100, self.steps // 10, self.steps):
            values[f"error@{step}"] = float(best[step - 1])
        return values


def initial(rng: Array, heads: int, width: int) -> Params:
    """Random matrices that keep lengths."""
    keys = jax.random.split(rng, 4)
    shape = (heads, width, width)
    names = ("query", "key", "value")
    params = {name: jax.random.normal(key, shape) * width**-0.5 for name, key in zip(names, keys)}
    return {**params, "out": jax.random.normal(keys[3], (heads, width))}


@functools.partial(jax.jit, static_argnums=0)
def _descended(
    run: KernelDescent,
    params: Params,
    x: Array,
    answers: Array,
    rates: Float[Array, " R"],
) -> Float[Array, "R steps"]:
    """The losses before each step, for each rate."""
    names = tuple(params) if run.trained == "all" else (run.trained,)
    trained = {name: params[name] for name in names}

    def loss(trained: Params) -> Array:
        return jnp.mean((predict({**params, **trained}, x, run.kernel) - answers) ** 2)

    def descend(rate: Array) -> Array:
        def step(trained: Params, _: Any) -> tuple[Params, Array]:
            value, gradient = jax.value_and_grad(loss)(trained)
            return jax.tree.map(lambda w, g: w - rate * g, trained, gradient), value

        return jax.lax.scan(step, trained, length=run.steps)[1]

    return jax.vmap(descend)(rates)
