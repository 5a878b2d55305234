"""What layers with rotary positions check."""

from typing import Annotated

from gatedjax.config.checks import Range
from gatedjax.errors import require

# Below 1 the slowest channels would rotate the fastest, and overflow.
RopeBase = Annotated[float, Range(1)]


def check_rope(rotary_dim: int, rope_fraction: float, selective_rope: str) -> None:
    """InputError unless channels rotate in pairs, and some do where tokens turn them."""
    require(
        rotary_dim % 2 == 0,
        "rope_fraction",
        rope_fraction,
        "an even number of rotated channels",
    )
    require(
        selective_rope == "none" or rotary_dim > 0,
        "rope_fraction",
        rope_fraction,
        f"channels that rotate with selective_rope {selective_rope!r}",
    )
