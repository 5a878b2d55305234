"""Linear attention in both directions: feature maps, sums, scans, local terms; arithmetic alone.

`layers/bidirectional_linear_attention.py` is the layer that puts them together.
"""

from gatedjax.layers.bidirectional.manhattan import manhattan_attention
from gatedjax.layers.bidirectional.scans import lion, vision_gla
from gatedjax.layers.bidirectional.softmax_free import newton_inverse, softmax_free_attention
from gatedjax.layers.bidirectional.sums import linear_attention
from gatedjax.layers.bidirectional.toeplitz import relative_linear_attention

__all__ = [
    "linear_attention",
    "lion",
    "manhattan_attention",
    "newton_inverse",
    "relative_linear_attention",
    "softmax_free_attention",
    "vision_gla",
]
