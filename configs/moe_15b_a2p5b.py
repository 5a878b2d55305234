r"""The 15A2B mixture of experts of arXiv 2505.06708, table 1, row 5: gated attention, 128 experts,
8 per token.

    python train.py --config=configs/moe_15b_a2p5b.py \
      --config.mesh.fsdp=16 --config.mesh.expert=16 \
      --config.data.tokenizer=tokenizer.json --config.data.sources.main.kind=parquet \
      --config.data.sources.main.path=DIR

Hardware: not run here; compiled for a TPU v5p slice of 256 chips, where it takes 29 of 88 GiB a
chip (11 with --config.model.remat=full, which computes every kernel's result twice):

    python train.py --config=configs/moe_15b_a2p5b.py --aot=v5p:8x8x4 \
      --config.mesh.fsdp=16 --config.mesh.expert=16

The paper's perplexity on its own data after 400B tokens: 5.761 (6.026 without the gate).
"""

from gatedjax.config import config_dict, layer


def get_config():
    c = config_dict()
    c.model.vocab_size = 151_936
    c.model.width = 2048
    c.model.num_layers = 24
    c.model.mixers = {
        "attention": layer(
            "gated_attention",
            num_heads=32,
            num_kv_heads=4,
            head_dim=128,
        )
    }
    c.model.pattern = ("attention",)
    c.model.ffns = {
        "moe": layer(
            "sparse_moe",
            num_experts=128,
            experts_per_token=8,
            hidden=768,
            balance_loss=0.001,
        )
    }
    c.model.ffn_pattern = ("moe",)
    c.model.tie_embeddings = False
    c.model.remat = "kernels"
    c.model.loss_chunk = 2048

    c.data.seq_len = 4096
    c.optim.lr = 2e-3
    c.optim.warmup_steps = 1000
    c.optim.final_lr_fraction = 0.015
    c.train.steps = 100_000
    c.train.batch_size = 1024
    c.train.eval_every = 1000
    c.train.checkpoint_every = 1000
    return c
