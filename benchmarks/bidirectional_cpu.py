"""Layers of linear attention in both directions on this CPU, by the number of tokens.

    taskset -c 0 python benchmarks/bidirectional_cpu.py [--tokens=256,1024,4096]
        [--names=lion_d,mala ...] [--repeats=5] [--json=FILE]

Forward and backward of one layer (width 64, 4 heads of 16 channels) on a row of a square image; a
time is the median of the process's own. "growth" is the last time over the first one: 16 where time
grows as the number of tokens does from 256 to 4096, 256 where it grows as its square. Last comes
softmax attention, of all pairs.
"""

import os
import time
from statistics import median

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn
import jax
import jax.numpy as jnp
from report import parser, table, write_json

from gatedjax.config import (
    BIDIRECTIONAL,
    BidirectionalLinearAttentionConfig,
    GatedAttentionConfig,
)
from gatedjax.layers import BidirectionalLinearAttention, GatedAttention

WIDTH, HEADS = 64, 4
SOFTMAX = "softmax"
WARM_UP = 2


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--tokens", default="256,1024,4096", help="squares of multiples of 8")
    flags.add_argument("--names", default=",".join([*BIDIRECTIONAL, SOFTMAX]))
    flags.add_argument("--repeats", type=int, default=5)
    args = flags.parse_args()
    tokens = [int(number) for number in args.tokens.split(",")]
    records = []
    for name in args.names.split(","):
        times = [milliseconds(name, number, args.repeats) for number in tokens]
        records.append({"name": name, "ms": times, "growth": times[-1] / times[0]})
    header = ("layer", *(f"{number} tokens, ms" for number in tokens), "growth")
    print(table(header, map(row, records)))
    if args.json:
        write_json(args.json, {"layers": records}, {})


def row(record: dict) -> tuple[str, ...]:
    times = (f"{value:.1f}" for value in record["ms"])
    return (record["name"], *times, f"{record['growth']:.1f}")


def made(name: str, tokens: int) -> nn.Module:
    if name == SOFTMAX:
        config = GatedAttentionConfig(
            num_heads=HEADS,
            head_dim=WIDTH // HEADS,
            gate_position="none",
            causal=False,
        )
        return GatedAttention(config)
    side = round(tokens**0.5)
    config = BidirectionalLinearAttentionConfig(
        num_heads=HEADS,
        key_dim=WIDTH // HEADS,
        value_dim=WIDTH // HEADS,
        grid=(side, side),
        length=tokens,
        # 64 landmarks and windows of 8 x 8 whatever the size of the image.
        **{"landmark_size": side // 8, "window": 8} | BIDIRECTIONAL[name],
    )
    return BidirectionalLinearAttention(config)


def milliseconds(name: str, tokens: int, repeats: int) -> float:
    """The median of the process's time for a gradient."""
    layer = made(name, tokens)
    x = jax.random.normal(jax.random.key(0), (1, tokens, WIDTH))
    params = jax.jit(layer.init)(jax.random.key(1), x)
    gradient = jax.jit(jax.grad(lambda params, x: jnp.sum(layer.apply(params, x) ** 2), (0, 1)))
    times = []
    for i in range(WARM_UP + repeats):
        start = time.process_time()
        jax.block_until_ready(gradient(params, x))
        if i >= WARM_UP:
            times.append(1e3 * (time.process_time() - start))
    return median(times)


if __name__ == "__main__":
    main()
