"""Three layers of Gated DeltaNet to one of gated attention, 340M (as Qwen3-Next mixes them).

    python train.py --config=configs/gated_deltanet_hybrid_340m.py --config.mesh.fsdp=8 \
      --config.data.tokenizer=tokenizer.json --config.data.sources.main.kind=parquet \
      --config.data.sources.main.path=DIR

Hardware: not run here; one TPU v5p-8, where its step takes 58.6 of 88.5 GiB, or 8 H100.
Trained like configs/gla_340m.py.
"""

from gatedjax.config import config_dict, layer


def get_config():
    c = config_dict()
    c.model.vocab_size = 32_000
    c.model.width = 1024
    c.model.num_layers = 20
    c.model.mixers = {
        "delta": layer(
            "delta_attention",
            num_heads=6,
            key_dim=128,
            value_dim=256,
        ),
        "attention": layer(
            "gated_attention",
            num_heads=8,
            num_kv_heads=8,
            head_dim=128,
        ),
    }
    c.model.pattern = ("delta", "delta", "delta", "attention")
    c.model.ffns = {"mlp": layer("gated_mlp", hidden=2816)}
    c.model.ffn_pattern = ("mlp",)
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
