"""CONTRIBUTING.md followed to the letter: a toy mixer, in three files of a copy, trains."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# 1. gatedjax/layers/running_mean.py
LAYER = '''
"""A gated mean over the tokens so far."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float

from gatedjax.config.layers import RunningMeanConfig
from gatedjax.layers.base import Mixer
from gatedjax.layers.gate_values import record
from gatedjax.layers.projection import Projection
from gatedjax.layers.token_info import TokenInfo


@struct.dataclass
class MeanCache:
    """The sum of the values so far."""

    total: Float[Array, "B F"]


class RunningMean(Mixer):
    """`(sigmoid(x W_gate) * mean of x W_value) W_out`."""

    config: RunningMeanConfig

    @nn.compact
    def with_cache(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: MeanCache | None = None,
    ) -> tuple[Float[Array, "B T M"], MeanCache | None]:
        width = {"embed": x.shape[-1]}
        channels = {"mlp": self.config.channels}
        value = Projection(width, channels, self.init_std, self.dtype, name="value")(x)
        logits = Projection(width, channels, self.init_std, self.dtype, name="gate")(x)
        gates = jax.nn.sigmoid(logits.astype(jnp.float32))
        record(self, "gates", gates)
        total = running_sum(value.astype(jnp.float32), info)
        if cache is not None:
            total = total + cache.total[:, None]
            cache = MeanCache(total[:, -1])
        mean = total / (info.positions[..., None] + 1)
        out = (gates * mean).astype(self.dtype)
        y = Projection(channels, width, self.init_std, self.dtype, name="out")(out)
        return y, cache

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> MeanCache:
        return MeanCache(jnp.zeros((batch, self.config.channels), jnp.float32))

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        return 2 * 3 * width * self.config.channels


def running_sum(value: Float[Array, "B T F"], info: TokenInfo) -> Float[Array, "B T F"]:
    """The sum over the tokens of the same document up to each."""
    time = jnp.arange(value.shape[1])
    seen = time[:, None] >= time
    if info.segment_ids is not None:
        seen = seen & (info.segment_ids[:, :, None] == info.segment_ids[:, None, :])
    seen = jnp.broadcast_to(seen, (value.shape[0], *seen.shape[-2:]))
    return jnp.einsum("bts,bsf->btf", seen.astype(jnp.float32), value)
'''

# 2. gatedjax/config/layers.py
CONFIG = '''
from gatedjax.config.checks import Size


@dataclass(frozen=True)
class RunningMeanConfig(Checked):
    """A gated mean over the tokens so far."""

    kind: Literal["running_mean"] = "running_mean"
    channels: Size = 8


MixerConfig = RunningMeanConfig | '''

# 3. gatedjax/layers/__init__.py
IMPORT = "from gatedjax.layers.running_mean import RunningMean\n"
LINE = '    "running_mean": RunningMean,\n'

USE = """
import dataclasses
import jax, jax.numpy as jnp, numpy as np
import gatedjax
from gatedjax.config import config_dict, from_config_dict, layer, to_dict
from gatedjax.data import Batch
from gatedjax.evaluation.probes import measure
from gatedjax.evaluation.sampling import generate
from gatedjax.layers import MIXERS
from gatedjax.model import init_caches
from gatedjax.training.flops import train_flops_per_token
from gatedjax.training.run import fresh_state, prepare
from gatedjax.training.eval_step import batch_losses
from gatedjax.training.state import params_for_evaluation
from gatedjax.training.step import jit_train_step

assert gatedjax.__file__.startswith({copy!r}), gatedjax.__file__
c = config_dict()
c.model.vocab_size, c.model.width, c.model.dtype = 32, 16, "float32"
c.model.mixers = {{"mean": layer("running_mean", channels=12)}}
c.model.pattern = ("mean",)
c.model.ffns.mlp = layer("gated_mlp", hidden=24)
c.data.seq_len, c.train.batch_size, c.optim.warmup_steps, c.optim.lr = 24, 4, 1, 1e-2
config = from_config_dict(c)
assert from_config_dict(to_dict(config)) == config
assert train_flops_per_token(config.model, 24) == 3 * 2 * 16 * (2 * 3 * (12 + 24) + 32)

run = prepare(config, jax.devices()[:1])
state, step = fresh_state(run), jit_train_step(config, run.tx, run.shardings)
tokens = np.random.default_rng(0).integers(0, 32, (4, 24)).astype(np.int32)
halves = np.arange(24) // 12  # two documents a row
row = lambda x: np.tile(np.asarray(x, np.int32), (4, 1))
mask = np.ones((4, 24), np.float32)
batch = Batch(tokens, np.roll(tokens, -1, 1), row(halves + 1), row(np.arange(24) % 12), mask)
losses = []
for _ in range(15):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
assert losses[-1] < losses[0] - 0.1, losses

params = params_for_evaluation(state)
sums = batch_losses(config.model, params, batch)
assert np.isfinite(float(sums.cross_entropy))
found = measure(config.model, params, batch)
assert sorted(found["gate_mean"]) == [0, 1] and 0.3 < found["gate_mean"][0] < 0.7

model = gatedjax.LanguageModel(config.model)
full, *_ = model.apply({{"params": params}}, tokens)
caches = init_caches(config.model, 4, 24)
y, caches, _ = model.apply({{"params": params}}, tokens[:, :20], caches=caches)
y, caches, _ = model.apply({{"params": params}}, tokens[:, 20:21], caches=caches)
np.testing.assert_allclose(y[:, 0], full[:, 20], atol=1e-4)
sampled = list(generate(config.model, params, tokens[:1, :5], 3, vocab_size=32))
assert len(sampled) == 3

layer = MIXERS["running_mean"](config.model.mixers["mean"])
x = jnp.ones((1, 5, 16))
y, params = layer.init_with_output(jax.random.key(0), x)
assert gatedjax.gate_values(layer, params, x)["gates"].shape == (1, 5, 12)
"""


def replace_once(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path}: {old!r} is there {text.count(old)} times"
    path.write_text(text.replace(old, new))


def test_a_mixer_in_three_files(tmp_path):
    for package in ("gatedjax", "kernels_pallas"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    layers = tmp_path / "gatedjax" / "layers"
    (layers / "running_mean.py").write_text(LAYER)
    replace_once(tmp_path / "gatedjax" / "config" / "layers.py", "\nMixerConfig = ", CONFIG)
    last_import = "from gatedjax.layers.token_info import Grid, TokenInfo\n"
    replace_once(layers / "__init__.py", last_import, IMPORT + last_import)
    replace_once(
        layers / "__init__.py",
        '    "gated_attention": GatedAttention,\n',
        '    "gated_attention": GatedAttention,\n' + LINE,
    )
    use = USE.format(copy=str(tmp_path))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", use]
    subprocess.run(command, check=True, timeout=600, cwd=tmp_path, env=environment)


def test_every_op_has_the_files_that_contributing_names():
    """All have an api and kernels for TPUs; the others as far as it says."""
    ops = {path.parent for path in (ROOT / "kernels_pallas").glob("*/api.py")}
    assert len(ops) >= 4
    for op in ops:
        assert (op / "tpu" / "op.py").is_file(), op
        assert (op / "reference.py").is_file() or op.name == "expert_mlp", op
        assert (op / "gpu" / "op.py").is_file() == (op / "gpu").is_dir(), op
