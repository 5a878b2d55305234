"""Small encoders of images: what a mixer learns in a few hundred steps, and what it costs.

A study of many mixers spends its time on tracing and compiling, and on rows that are made one by
one. So `EncoderRun` holds the images in memory and trains in one small program, which all seeds
share.
"""

import dataclasses
import functools
import time
from statistics import median
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int, PyTree

from gatedjax.compiler_options import careful_jit
from gatedjax.config import Config
from gatedjax.data import Batch, image_corpora
from gatedjax.data.image_rows import row_of_image
from gatedjax.evidence.allocator import keep_freed_memory
from gatedjax.layers import MIXERS
from gatedjax.layers.token_info import Grid, default_info
from gatedjax.training.step import batch_losses_and_correct, init_params


class Images(NamedTuple):
    """Patches and classes of images, those that are held out behind the others."""

    patches: Float[np.ndarray | Array, "N T P"]
    classes: Int[np.ndarray | Array, " N"]
    num_train: int


@dataclasses.dataclass(frozen=True)
class EncoderRun:
    """Trains an encoder by AdamW and measures it on all images that are held out.

    Attributes:
      config: of the encoder and its images, which are not augmented; of its training the rate, the
        warmup, the decay, the steps and the batch size.
    """

    config: Config

    def __call__(self, seed: int) -> dict[str, float]:
        given = images(self.config)
        order = rows_of_steps(self.config, given, seed)
        steps = _trained(self.config, jax.random.key(seed), given.patches, given.classes, order)
        # Behind the steps of training are those that only measure.
        losses, correct = (np.asarray(x)[self.config.train.steps :] for x in steps)
        # The last of them is filled up.
        count = len(given.classes) - given.num_train
        return {
            "loss": float(np.mean(losses.reshape(-1)[:count])),
            "accuracy": float(np.mean(correct.reshape(-1)[:count])),
        }


@functools.lru_cache(maxsize=1)
def images(config: Config) -> Images:
    """All images of a configuration with one source."""
    (corpus,) = image_corpora(config.data).values()
    patches = config.model.patches
    rows = []
    num_train = 0
    for split in ("train", "validation"):
        for example in corpus.examples(split, patches, config.data.images):
            rows.append(row_of_image(example, patches, config.data.images))
        num_train = num_train or len(rows)
    of_images = np.stack([np.asarray(row.patches) for row in rows])
    return Images(of_images, np.stack([row.targets[0] for row in rows]), num_train)


def rows_of_steps(config: Config, given: Images, seed: int) -> Int[np.ndarray, "steps B"]:
    """Which images each step sees.

    Those to train on in a random order, then in another one; at last all that are held out.
    """
    random = np.random.default_rng(seed)
    needed = config.train.steps * config.train.batch_size
    epochs = -(-needed // given.num_train)
    order = np.concatenate([random.permutation(given.num_train) for _ in range(epochs)])[:needed]
    held_out = np.arange(given.num_train, len(given.classes))
    filling = np.full(-len(held_out) % config.train.batch_size, held_out[0])
    return np.concatenate([order, held_out, filling]).reshape(-1, config.train.batch_size)


@functools.partial(careful_jit, static_argnums=0)
def _trained(
    config: Config,
    key: Array,
    patches: Float[Array, "N T P"],
    classes: Int[Array, " N"],
    order: Int[Array, "steps B"],
) -> tuple[Float[Array, "steps B"], Float[Array, "steps B"]]:
    """Losses and hits of the images of every step; after `train.steps` the parameters rest.

    One body trains and measures: a second forward pass would take as long to compile.
    """
    optim = config.optim
    steps = config.train.steps
    rate = optax.warmup_cosine_decay_schedule(0.0, optim.lr, optim.warmup_steps, steps)
    tx = optax.adamw(rate, weight_decay=optim.weight_decay)

    def loss(params: PyTree, chosen: Array) -> tuple[Array, tuple[Array, Array]]:
        batch = batch_of(patches[chosen], classes[chosen])
        losses, correct, _ = batch_losses_and_correct(config.model, params, batch)
        return jnp.mean(losses.cross_entropy), (losses.cross_entropy, correct)

    def step(
        state: tuple[PyTree, PyTree], inputs: tuple[Array, Array]
    ) -> tuple[tuple[PyTree, PyTree], tuple[Array, Array]]:
        params, moments = state
        number, chosen = inputs
        gradient, measured = jax.grad(loss, has_aux=True)(params, chosen)
        updates, moments = tx.update(gradient, moments, params)
        moved = optax.apply_updates(params, updates)
        params = jax.tree.map(lambda new, old: jnp.where(number < steps, new, old), moved, params)
        return (params, moments), measured

    params = nn.meta.unbox(init_params(config.model, key))
    numbered = (jnp.arange(len(order)), order)
    return jax.lax.scan(step, (params, tx.init(params)), numbered)[1]


def batch_of(patches: Float[Array, "B T P"], classes: Int[Array, " B"]) -> Batch:
    """A row for every image, whose class is the target of its first token."""
    shape = patches.shape[:2]
    is_first = jnp.arange(shape[1]) == 0
    return Batch(
        tokens=jnp.zeros(shape, jnp.int32),
        targets=jnp.where(is_first, classes[:, None], 0),
        segment_ids=jnp.ones(shape, jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape),
        loss_mask=jnp.broadcast_to(is_first.astype(jnp.float32), shape),
        patches=patches,
    )


# A gradient is taken at least FEWEST times, and up to MOST times within SECONDS.
FEWEST = 3
MOST = 40
SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class MixerCost:
    """Time and memory of the gradient of one layer, for one image.

    The time is the process's own, of all its threads: what else the machine does is not in it.

    Attributes:
      config: of an encoder whose only mixer it is.
    """

    config: Config

    def __call__(self, seed: int) -> dict[str, float]:
        keep_freed_memory()
        model = self.config.model
        (mixer,) = model.mixers.values()
        layer = MIXERS[mixer.kind](mixer)
        tokens = self.config.data.seq_len
        x = jax.random.normal(jax.random.key(seed), (1, tokens, model.width))
        rows, columns = model.patches.grid
        info = dataclasses.replace(default_info(x), grid=Grid(rows, columns))
        # Their values do not matter; compiling how a layer starts takes as long as its gradient.
        random = np.random.default_rng(seed)
        params = jax.tree.map(
            lambda of: jnp.asarray(0.1 * random.normal(size=of.shape), of.dtype),
            jax.eval_shape(layer.init, jax.random.key(1), x, info),
        )

        def loss(params: PyTree, x: Array) -> Array:
            y: Any = layer.apply(params, x, info)
            return jnp.sum(y**2)

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile()
        times: list[float] = []
        # The first one is not counted: it touches the memory.
        jax.block_until_ready(compiled(params, x))
        while len(times) < FEWEST or (sum(times) < SECONDS and len(times) < MOST):
            start = time.process_time()
            jax.block_until_ready(compiled(params, x))
            times.append(time.process_time() - start)
        memory = compiled.memory_analysis()
        assert memory is not None, "every backend says so"
        return {
            "cpu_ms": 1e3 * median(times),
            "temporary_mib": memory.temp_size_in_bytes / 2**20,
        }
