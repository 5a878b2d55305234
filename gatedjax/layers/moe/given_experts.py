"""Experts that are given from outside: one for each token, the same in all layers.

    with given_experts(ids):
        hidden, *_ = LanguageModel(config).apply(params, tokens)

For routers with `selection="given"`, such as Read-ME's, which stands before all layers.
"""

import contextlib
import contextvars
from collections.abc import Iterator

from jax import Array
from jaxtyping import Float, Int

from gatedjax.errors import InputError

_ids: contextvars.ContextVar[Array | None] = contextvars.ContextVar("given_experts", default=None)


@contextlib.contextmanager
def given_experts(ids: Int[Array, "B T"]) -> Iterator[None]:
    """Inside this block, sparse layers with `selection="given"` send tokens to these experts."""
    token = _ids.set(ids)
    try:
        yield
    finally:
        _ids.reset(token)


def experts_given(logits: Float[Array, "B T E"]) -> Int[Array, "B T 1"]:
    """The experts of the tokens that have these logits.

    Raises:
      InputError: none are given, or those of other tokens.
    """
    ids = _ids.get()
    found = None if ids is None else ids.shape
    if ids is None or found != logits.shape[:2]:
        raise InputError(
            f"router.selection 'given': got experts of shape {found}, expected "
            f"{logits.shape[:2]}, by gatedjax.layers.moe.given_experts"
        )
    return ids[..., None]
