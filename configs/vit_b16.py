r"""ViT-B/16 (arXiv 2010.11929) with a gate after attention (arXiv 2505.06708), on a folder of
images of 1,000 classes; batch, rate and 90 epochs as of ViT-S/16 in arXiv 2205.01580.

    python train.py --config=configs/vit_b16.py --config.mesh.fsdp=4 \
      --config.data.sources.main.path=imagenet     (imagenet/train/CLASS/*.JPEG, imagenet/val/...)
    python train.py --config=configs/vit_b16.py --config.mesh.fsdp=8 --aot=v5e:4x4

Hardware: not run here; compiled for 16 chips of TPU v5e by the second command: 5.2 of 14.9 GiB a
chip, a step of at least 40 ms by its roofline. Not as published: images are cut from the middle
and moved by a few pixels, where the papers crop, mix and distort them.
"""

from gatedjax.config import config_dict, layer


def get_config():
    c = config_dict()
    c.model.task = "classify"
    c.model.vocab_size = 1000
    c.model.patches.height = 224
    c.model.patches.width = 224
    c.model.patches.channels = 3
    c.model.patches.patch_height = 16
    c.model.patches.patch_width = 16
    c.model.width = 768
    c.model.num_layers = 12
    c.model.mixers = {
        "attention": layer(
            "gated_attention",
            num_heads=12,
            head_dim=64,
            gate_granularity="headwise",
            bias="all",
            qk_norm=False,
            rope_fraction=0.0,
            causal=False,
        ),
    }
    c.model.ffns = {"mlp": layer("mlp", hidden=3072, activation="gelu", bias=True)}
    c.model.norm_kind = "layer"
    c.model.remat = "projections"

    c.data.sources.main.kind = "images"
    c.data.seq_len = 197  # 14 x 14 patches and the class token
    c.data.images.fit = "resize"
    c.data.images.crop_padding = 16
    c.data.images.flip = True
    c.optim.lr = 1e-3
    c.optim.warmup_steps = 10_000
    c.optim.weight_decay = 0.1
    c.optim.final_lr_fraction = 0.0
    c.train.steps = 112_600
    c.train.batch_size = 1024
    c.train.eval_every = 1000
    c.train.eval_batches = 49  # all of ImageNet's
    c.train.checkpoint_every = 1000
    return c
