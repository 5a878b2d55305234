"""The configuration of Gated KalmaNet."""

from dataclasses import dataclass
from typing import Annotated, Literal

from gatedjax.config.checks import Checked, Range, Size


@dataclass(frozen=True)
class KalmaNetConfig(Checked):
    """Gated KalmaNet (arXiv 2511.21016): queries solve a ridge regression on the keys so far."""

    kind: Literal["kalmanet"] = "kalmanet"
    num_heads: Size = 4
    # channels per head
    key_dim: Size = 32
    value_dim: Size = 32
    # lambda = ridge |H|, where H = sum k k^T with its decay and |H| its Frobenius norm. At 0.02 no
    # system has a condition above 51.
    ridge: Annotated[float, Range(1e-4, 10.0)] = 0.02
    # of Chebyshev: 30 leave an error of 4e-4 at a ridge of 0.02
    iterations: Annotated[int, Range(1, 200)] = 30
    # keys and values times sigmoid(x W), as in the published code; the paper's results have none
    write_gate: bool = True
    output_gate: Literal["swish", "sigmoid", "none"] = "swish"
    # causal depthwise convolution and SiLU on q, k, v; 0 for none
    conv_width: Annotated[int, Range(0, 256)] = 4
    # of the norm of the heads' outputs; None: the model's
    norm_eps: Annotated[float, Range(0, 1, includes_low=False)] | None = None
    chunk_size: Size = 64
