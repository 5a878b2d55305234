"""The arrays of a call of `expert_mlp`, by name, on their way from `api.py` to a backend."""

from typing import NamedTuple

from jax import Array
from jaxtyping import Float, Int


class ExpertMlpInputs(NamedTuple):
    """R rows of width M, sorted by expert; G experts of hidden width F."""

    rows: Float[Array, "R M"]
    gate: Float[Array, "G M F"]  # its product with the rows goes through the activation
    up: Float[Array, "G M F"]  # its product with the rows does not
    down: Float[Array, "G F M"]
    group_sizes: Int[Array, "G"]  # rows of each expert; their sum may be less than R
    weights: Float[Array, "R"] | None  # of each row's result
