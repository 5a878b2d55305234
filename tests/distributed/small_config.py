"""One layer of everything that a mesh can cut, small enough to compile in seconds: for tests with
many processes.
"""

from gatedjax.config import config_dict, layer


def get_config():
    c = config_dict()
    c.model.width = 32
    c.model.num_layers = 1
    c.model.mixers = {
        "attention": layer("gated_attention", num_heads=4, num_kv_heads=4, head_dim=8)
    }
    c.model.pattern = ("attention",)
    c.model.ffns = {"mlp": layer("gated_mlp", hidden=64)}
    c.model.ffn_pattern = ("mlp",)
    c.model.init_std = 0.05
    c.model.dtype = "float32"
    c.data.seq_len = 32
    c.data.sources.main.kind = "text"
    c.optim.lr = 3e-3
    c.optim.warmup_steps = 2
    c.train.steps = 12
    c.train.batch_size = 8
    c.train.log_every = 1
    c.train.eval_every = 1000
    c.train.eval_batches = 2
    c.train.checkpoint_every = 4
    c.train.sample_tokens = 1
    return c
