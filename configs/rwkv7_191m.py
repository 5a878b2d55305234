"""RWKV-7 (arXiv 2503.14456), 191M, the smallest of the paper: time mixing and channel mixing.

    python train.py --config=configs/rwkv7_191m.py --config.mesh.fsdp=8 \
      --config.data.tokenizer=tokenizer.json --config.data.sources.main.kind=parquet \
      --config.data.sources.main.path=DIR

Hardware: not run here; one TPU v5p-8, where its step takes 75.2 of 88.5 GiB, or 8 H100. Sizes and
vocabulary are the paper's. Norms of the blocks are RMSNorm here, LayerNorm there; trained like
configs/gla_340m.py.
"""

from gatedjax.config import config_dict, layer


def get_config():
    c = config_dict()
    c.model.vocab_size = 65_536
    c.model.width = 768
    c.model.num_layers = 12
    c.model.mixers = {
        "rwkv": layer(
            "rwkv7",
            num_heads=12,
            head_dim=64,
            decay_rank=64,
            rate_rank=64,
            value_rank=32,
            output_gate_rank=128,
        ),
    }
    c.model.pattern = ("rwkv",)
    c.model.ffns = {"mix": layer("rwkv7_channel_mix", hidden=3072)}
    c.model.ffn_pattern = ("mix",)
    c.model.norm_eps = 1e-5
    c.model.tie_embeddings = False
    c.model.remat = "kernels"
    c.model.loss_chunk = 2048

    c.data.seq_len = 2048
    c.optim.lr = 3e-4
    c.optim.warmup_steps = 1000
    c.optim.weight_decay = 0.01
    c.optim.final_lr_fraction = 0.1
    c.train.steps = 30_000
    c.train.batch_size = 256
    c.train.eval_every = 1000
    c.train.checkpoint_every = 1000
    return c
