"""Mamba-2 (arXiv 2405.21060), 370M: 48 blocks of a mixer alone.

    python train.py --config=configs/mamba2_370m.py --config.mesh.fsdp=8 \
      --config.data.tokenizer=tokenizer.json --config.data.sources.main.kind=parquet \
      --config.data.sources.main.path=DIR

Hardware: not run here; one TPU v5p-8, where a step of two micro-batches takes 69.9 of 88.5 GiB (one
of the whole batch is 25 GiB too large), or 8 H100. Sizes and vocabulary (GPT-NeoX's, 50,277, to a
multiple of 16) are the paper's; trained like configs/gla_340m.py.
"""

from gatedjax.config import config_dict, layer


def get_config():
    c = config_dict()
    c.model.vocab_size = 50_288
    c.model.width = 1024
    c.model.num_layers = 48
    c.model.mixers = {
        "mamba": layer(
            "mamba2",
            num_heads=32,
            head_dim=64,
            state_dim=128,
        ),
    }
    c.model.pattern = ("mamba",)
    c.model.ffns = {"none": layer("none")}
    c.model.ffn_pattern = ("none",)
    c.model.norm_eps = 1e-5
    c.model.remat = "kernels"
    c.model.loss_chunk = 2048

    c.data.seq_len = 2048
    c.optim.lr = 3e-4
    c.optim.warmup_steps = 1000
    c.optim.weight_decay = 0.01
    c.optim.final_lr_fraction = 0.1
    c.train.steps = 30_000
    c.train.batch_size = 256
    c.train.accumulation_steps = 2
    c.train.eval_every = 1000
    c.train.checkpoint_every = 1000
    return c
