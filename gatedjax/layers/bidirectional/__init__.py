"""Linear attention in both directions, the parts of `layers/bidirectional_linear_attention.py`.

Arithmetic alone: `sums`, `scans`, `toeplitz`, `softmax_free`, `manhattan`, `local`, on a `grid`.
With parameters of the layer: `decays`, `landmarks`, `local_terms`.
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
