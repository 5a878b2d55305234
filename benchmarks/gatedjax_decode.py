"""The worker of `decode_cpu.py` that is ours; see `peers/transformers_decode.py`."""

import json
import sys
import time

import flax.linen as nn
import jax
import numpy as np

from gatedjax.config import ModelConfig, config_dict, from_config_dict, layer
from gatedjax.evaluation.sampling import Decoder
from gatedjax.training.state import init_params


def main() -> None:
    """Sizes -> model -> rounds."""
    sizes = json.loads(sys.argv[1])
    model = model_of(sizes)
    params = jax.jit(lambda key: nn.meta.unbox(init_params(model, key)))(jax.random.key(0))
    decoder = Decoder(model, params, sizes["vocab_size"])
    generator = np.random.default_rng(0)
    prompt = generator.integers(0, sizes["vocab_size"], (sizes["rows"], sizes["prompt"]))
    clock = time.process_time if sizes["cpu_seconds"] else time.perf_counter

    def seconds(tokens: int) -> float:
        steps = decoder.generate(prompt, 1 + tokens, temperature=0.0)
        next(steps)
        start = clock()
        for _ in steps:
            pass
        return clock() - start

    # Compiles.
    seconds(sizes["tokens"])
    print(json.dumps({"jax": jax.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(seconds(int(line))), flush=True)


def model_of(sizes: dict) -> ModelConfig:
    """A Llama: grouped-query attention without gate and norm, dense feed-forwards."""
    c = config_dict()
    c.model.vocab_size = sizes["vocab_size"]
    c.model.width = sizes["width"]
    c.model.num_layers = sizes["layers"]
    c.model.mixers = {
        "attention": layer(
            "gated_attention",
            num_heads=sizes["heads"],
            num_kv_heads=sizes["kv_heads"],
            head_dim=sizes["width"] // sizes["heads"],
            gate_position="none",
            qk_norm=False,
        )
    }
    c.model.pattern = ("attention",)
    c.model.ffns = {"mlp": layer("gated_mlp", hidden=sizes["hidden"])}
    c.model.ffn_pattern = ("mlp",)
    c.model.tie_embeddings = False
    c.model.dtype = "float32"
    return from_config_dict(c).model


if __name__ == "__main__":
    main()
