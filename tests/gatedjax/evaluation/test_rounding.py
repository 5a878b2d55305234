"""Activations rounded to few bits: the formula, and where in a model it applies."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from helpers import rel_rms
from tiny_run import random_batch

from gatedjax.config import FrozenDict, GatedAttentionConfig, GatedMLPConfig, ModelConfig
from gatedjax.evaluation.rounding import rounded, rounded_activations, rounded_eval_step
from gatedjax.layers import GatedMLP
from gatedjax.model import LanguageModel

R = np.random.default_rng(0)


def test_a_tensor_is_whole_steps_of_its_largest_magnitude():
    x = R.normal(size=(3, 50)).astype(np.float32)
    x[1, 7] = -40.0
    for bits in (2, 8, 16):
        step = 40.0 / (2 ** (bits - 1) - 1)
        expected = np.round(np.float64(x) / step) * step
        np.testing.assert_allclose(rounded(jnp.asarray(x), bits), expected, atol=1e-5)
    # The outlier takes the bits of the others; without it they have them.
    assert np.count_nonzero(rounded(jnp.asarray(x), 4)) < 5
    x[1, 7] = 1.0
    assert np.count_nonzero(rounded(jnp.asarray(x), 4)) > 75
    np.testing.assert_array_equal(rounded(jnp.zeros(3), 8), 0)


def test_what_a_layer_takes_gives_and_multiplies_is_rounded():
    """A SwiGLU, by hand."""
    config = GatedMLPConfig(hidden=6)
    x = jnp.asarray(R.normal(size=(1, 3, 4)), jnp.float32)
    module = GatedMLP(config, 0.5)
    params = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    params = jax.tree.map(lambda p: jnp.asarray(R.normal(size=p.shape), p.dtype), params)
    with rounded_activations(5):
        y = module.apply({"params": params}, x)
    low = lambda x: np.asarray(rounded(jnp.asarray(x, jnp.float32), 5), np.float64)
    gate, up, down = (np.asarray(params[name]["kernel"]) for name in ("gate", "up", "down"))
    g = low(x) @ gate
    hidden = g / (1 + np.exp(-g)) * (low(x) @ up)
    assert rel_rms(y, low(low(hidden) @ down)) < 1e-5
    assert rel_rms(module.apply({"params": params}, x), y) > 1e-3, "outside nothing is rounded"


def test_a_model_rounds_its_residual_stream_and_no_parameter():
    """Counted in the program, which is not compiled."""
    model = ModelConfig(
        vocab_size=32,
        width=16,
        mixers=FrozenDict(attention=GatedAttentionConfig(num_heads=2, head_dim=8)),
        ffns=FrozenDict(mlp=GatedMLPConfig(hidden=16)),
        num_layers=1,
        scan_layers=False,
    )
    batch = random_batch()
    params = jax.eval_shape(LanguageModel(model).init, jax.random.key(0), batch.tokens)["params"]
    step = rounded_eval_step.__wrapped__
    program = str(jax.make_jaxpr(lambda p, b: step(8, model, p, b))(params, batch))
    # Mixer and MLP: in and out, and the stream; projections of q, k, v, gate, and out.
    assert program.count("round[") + program.count("round ") >= 2 * 2 + 1 + 5
