"""Recurrent layers with rows, heads and tokens cut over eight devices: as on one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gatedjax.config import (
    DeltaAttentionConfig,
    Mamba2Config,
    MeshConfig,
    RWKV6ChannelMixConfig,
    RWKV6Config,
    RWKV7ChannelMixConfig,
    RWKV7Config,
)
from gatedjax.layers import (
    RWKV6,
    RWKV7,
    DeltaAttention,
    Mamba2,
    RWKV6ChannelMix,
    RWKV7ChannelMix,
    TokenInfo,
)
from gatedjax.layers.depth import Depth
from gatedjax.sharding import RULES, make_mesh

B, T, M = 2, 256, 16
DELTA = dict(num_heads=4, num_key_heads=2, key_dim=4, value_dim=4)
FEEDBACK = dict(state_feedback=True, output_feedback=0.5)
LAYERS = {
    "Mamba-2": Mamba2(Mamba2Config(num_heads=4, head_dim=4, state_dim=4), 1e-5, 0.4),
    "two groups": Mamba2(
        Mamba2Config(num_heads=4, head_dim=4, state_dim=4, num_groups=2), 1e-5, 0.4
    ),
    "RWKV-7": RWKV7(RWKV7Config(num_heads=4, head_dim=4, decay_rank=2)),
    "RWKV-6": RWKV6(RWKV6Config(num_heads=4, key_dim=4, value_dim=4, shift_rank=2, decay_rank=2)),
    "RWKV-6's channel mixing": RWKV6ChannelMix(RWKV6ChannelMixConfig(hidden=32)),
    "DeltaProduct": DeltaAttention(DeltaAttentionConfig(**DELTA, num_householder=2), 1e-5, 0.4),
    "Comba": DeltaAttention(DeltaAttentionConfig(**DELTA, **FEEDBACK), 1e-5, 0.4),
    "channel mixing": RWKV7ChannelMix(RWKV7ChannelMixConfig(hidden=32)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_eight_devices_equal_one(name):
    """Values and gradients of packed rows; documents begin inside of a device's tokens."""
    module = LAYERS[name]
    normal = np.random.default_rng(3).normal
    x = normal(size=(B, T, M)).astype(np.float32)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    ids = jnp.asarray(np.arange(T) // 90 + np.arange(B)[:, None] + 1)
    depth = Depth(index=1, first_values=jnp.asarray(normal(size=x.shape), jnp.float32))
    info = TokenInfo(positions, ids, depth=depth)
    params = jax.jit(module.init)(jax.random.key(0), x[:, :2])["params"]
    params = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )

    def loss(params, x):
        y = module.apply({"params": params}, x, info)
        return (y**2).sum(), y

    def run(x):
        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)

    single = run(x)
    mesh = make_mesh(MeshConfig(tensor=2, context=4))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        many = run(jax.device_put(x, NamedSharding(mesh, P(None, "context"))))
    for one, other in zip(jax.tree.leaves(single), jax.tree.leaves(many)):
        assert rel_rms(other, one) < 2e-5
