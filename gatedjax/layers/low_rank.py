"""LoRA (arXiv 2106.09685): which projections have a low-rank update, and what it is once merged.

`y = x W + (alpha / rank) x A B`, with A random and B zero at first: the first pass is the one
without it, to the bit. W is a parameter as ever; that it does not train is the optimizer's matter
(`training.trainable`).
"""

import contextlib
import contextvars
import string
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import LoRAConfig
from gatedjax.config.patterns import matches_any, unmatched
from gatedjax.errors import require
from gatedjax.layers.ternary import ternary
from gatedjax.layers.tree import Path, flatten_dict, unflatten_dict

KERNEL = "kernel"
# The submodule of a projection that holds its A and B.
UPDATE = "lora"
# Of an update: what it is multiplied by, where the configuration asks for it.
GATE = "gate"
# Names in a message.
SHOWN = 5

_config: contextvars.ContextVar[LoRAConfig | None] = contextvars.ContextVar("lora", default=None)
_weights: contextvars.ContextVar[Array | None] = contextvars.ContextVar("weights", default=None)


@contextlib.contextmanager
def low_rank_updates(config: LoRAConfig) -> Iterator[None]:
    """Inside this block, the projections that `config.targets` names have a low-rank update.

    Not an argument of every layer: no layer does anything with it.
    """
    token = _config.set(config)
    try:
        yield
    finally:
        _config.reset(token)


@contextlib.contextmanager
def expert_weights(weights: Float[Array, "B T E"] | None) -> Iterator[None]:
    """Inside this block, of one layer, mixtures of updates have these weights; None: no updates."""
    token = _weights.set(weights)
    try:
        yield
    finally:
        _weights.reset(token)


def weights_of(projection: Path, x: Float[Array, "..."]) -> Float[Array, "B T E"] | None:
    """The weights of the experts of a projection, for what it is applied to.

    Raises:
      InputError: x is not of the tokens that the weights are of.
    """
    weights = _weights.get()
    if weights is None:
        return None
    require(
        x.shape[:2] == weights.shape[:2],
        "config.model.lora.targets",
        ".".join(projection),
        "projections of tokens, with num_experts",
    )
    return weights


def lora_experts(
    x: Float[Array, "... I"],
    weights: Float[Array, "... E"],
    a: Float[Array, "E I r"],
    b: Float[Array, "E r O"],
) -> Float[Array, "... O"]:
    """`sum_e weight_e x A_e B_e`, every expert on every token: they are thin.

    Args:
      x: the tokens.
      weights: of every expert.
      a: the matrices down to the rank.
      b: the matrices up from it.

    Returns:
      The weighted sum, float32.
    """
    # All experts at once: E r columns are few beside the dense matrix.
    h = jnp.einsum("...i,eir->...er", x, a, preferred_element_type=jnp.float32)
    # An expert without weight is left out, not multiplied by 0: its product may have overflowed.
    weight = weights[..., None]
    h = (weight * jnp.where(weight == 0, 0.0, h)).astype(x.dtype)
    return jnp.einsum("...er,ero->...o", h, b, preferred_element_type=jnp.float32)


def update_of(projection: Path) -> LoRAConfig | None:
    """What the update of a projection is; None if it has none."""
    config = _config.get()
    if config is None or not matches_any(config.targets, ".".join(projection)):
        return None
    return config


def is_update(path: Path) -> bool:
    """Whether a parameter is the A or B of a low-rank update."""
    return UPDATE in path


def updated_projections(params: Mapping[str, Any]) -> list[Path]:
    """The projections that have an update, by the parameters of a model."""
    return [path[:-2] for path in flatten_dict(params) if path[-2:] == (UPDATE, "a")]


def require_targets(config: LoRAConfig, params: Mapping[str, Any]) -> None:
    """InputError if one of the patterns names no projection of the model.

    Args:
      config: of the updates.
      params: of the model, arrays or their shapes.
    """
    names = [".".join(path) for path in updated_projections(params)]
    pattern = unmatched(config.targets, names)
    if pattern is not None:
        kernels = [path[:-1] for path in flatten_dict(params) if path[-1] == KERNEL]
        known = ", ".join(".".join(path) for path in kernels[:SHOWN])
        require(
            False,
            "config.model.lora.targets",
            pattern,
            f"a pattern of projections, such as {known}",
        )


def merged(params: Mapping[str, Any], config: LoRAConfig) -> Mapping[str, Any]:
    """The parameters of the model without updates that computes the same.

    Args:
      params: of a model with updates.
      config: of the updates.

    Returns:
      The parameters without A, B and gates, each W (rounded, if ternary) with
      `(alpha / rank) A B`, times its gate, added to it.

    Raises:
      InputError: a mixture, whose updates are other ones for every token.
    """
    expected = "0: a mixture is another matrix for every token"
    require(not config.num_experts, "config.model.lora.num_experts", config.num_experts, expected)
    flat = flatten_dict(params)
    for projection in updated_projections(params):
        a = flat.pop((*projection, UPDATE, "a"))
        b = flat.pop((*projection, UPDATE, "b"))
        kernel = flat[*projection, KERNEL]
        update = _product(a, b, kernel.ndim)
        num_stacked = _num_stacked(a, b, kernel.ndim)
        gate = flat.pop((*projection, UPDATE, GATE), None)
        if gate is not None:
            # One of every matrix of the stack.
            update = gate.reshape(*gate.shape, *[1] * (kernel.ndim - num_stacked)) * update
        if config.ternary:
            kernel = ternary(kernel, num_stacked)
        flat[*projection, KERNEL] = kernel + config.alpha / config.rank * update
    return unflatten_dict(flat)


def _num_stacked(a: Array, b: Array, ndim: int) -> int:
    """The axes of the stack (layers under scan): those that both have beside the rank's."""
    return a.ndim + b.ndim - 2 - ndim


def _product(a: Array, b: Array, ndim: int) -> Float[Array, "..."]:
    """`A [*stack, *in, r] B [*stack, r, *out] -> [*stack, *in, *out]`, of `ndim` axes."""
    num_stacked = _num_stacked(a, b, ndim)
    letters = iter(string.ascii_lowercase)
    stack = "".join(next(letters) for _ in range(num_stacked))
    inputs = "".join(next(letters) for _ in range(a.ndim - num_stacked - 1))
    outputs = "".join(next(letters) for _ in range(b.ndim - num_stacked - 1))
    rank = next(letters)
    return jnp.einsum(
        f"{stack}{inputs}{rank},{stack}{rank}{outputs}->{stack}{inputs}{outputs}",
        a,
        b,
        precision="highest",
    )
