"""Small encoders of images: what a mixer learns in a few hundred steps, and what it costs.

A study of many mixers spends its time on tracing and compiling, and on rows that are made one by
one. So `EncoderRun` holds the images in memory and trains in one small program, which all seeds
share.
"""

import dataclasses
import functools
import time
from statistics import median
from typing import NamedTuple

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
from gatedjax.layers.tree import united
from gatedjax.training import trainable
from gatedjax.training.eval_step import batch_losses_and_correct
from gatedjax.training.run import Run, prepare
from gatedjax.training.state import TrainState, init_params
from gatedjax.training.step import jit_train_step


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
        params = start(self.config, jax.random.key(seed))
        _, measured = learned(self.config, params, images(self.config), seed)
        return measured


def learned(
    config: Config,
    params: PyTree,
    given: Images,
    seed: int,
) -> tuple[PyTree, dict[str, float]]:
    """The parameters that train, after training, and what the model says of images held out."""
    order = rows_of_steps(config, given, seed)
    ended, losses, correct = trained(config, params, given.patches, given.classes, order)
    # Behind the steps of training are those that only measure; the last of them is filled up.
    count = len(given.classes) - given.num_train
    held_out = [np.asarray(x)[config.train.steps :].reshape(-1)[:count] for x in (losses, correct)]
    loss, accuracy = (float(np.mean(x)) for x in held_out)
    return ended, {"loss": loss, "accuracy": accuracy}


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
def start(config: Config, key: Array) -> PyTree:
    """Parameters before the first step."""
    return nn.meta.unbox(init_params(config.model, key))


@functools.partial(careful_jit, static_argnums=0)
def trained(
    config: Config,
    params: PyTree,
    patches: Float[Array, "N T P"],
    classes: Int[Array, " N"],
    order: Int[Array, "steps B"],
) -> tuple[PyTree, Float[Array, "steps B"], Float[Array, "steps B"]]:
    """Parameters that train after `train.steps`; losses and hits of the images of every step.

    After `train.steps` the parameters rest. One body trains and measures: a second forward pass
    would take as long to compile.
    """
    optim = config.optim
    steps = config.train.steps
    rate = optax.warmup_cosine_decay_schedule(0.0, optim.lr, optim.warmup_steps, steps)
    tx = optax.adamw(rate, weight_decay=optim.weight_decay)
    begun, frozen = trainable.split(config, params)

    def loss(params: PyTree, chosen: Array) -> tuple[Array, tuple[Array, Array]]:
        batch = batch_of(patches[chosen], classes[chosen])
        losses, correct, _ = batch_losses_and_correct(
            config.model,
            united(params, frozen),
            batch,
        )
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

    numbered = (jnp.arange(len(order)), order)
    (ended, _), measured = jax.lax.scan(step, (begun, tx.init(begun)), numbered)
    return ended, *measured


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


# A step is taken up to MOST times within SECONDS, and FEWEST times within SECONDS_OF_FEWEST; one
# that takes longer, once.
FEWEST = 3
MOST = 40
SECONDS = 0.5
SECONDS_OF_FEWEST = 20


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Time and memory of a training step of an encoder on one image: forward, backward, AdamW.

    The time is the process's own, of all its threads: what else the machine does is not in it.

    Attributes:
      config: of the encoder; its batch has one image.
    """

    config: Config

    def __call__(self, seed: int) -> dict[str, float]:
        keep_freed_memory()
        run, step = _step_of(self.config)
        random = np.random.default_rng(seed)
        state = _any_state(run.abstract, random)
        patches = self.config.model.patches
        image = random.normal(size=(1, patches.num_tokens, patches.size))
        batch = batch_of(jnp.asarray(image, jnp.float32), jnp.zeros(1, jnp.int32))
        times: list[float] = []
        # The first one is not counted: it touches the memory.
        state, _ = jax.block_until_ready(step(state, batch))
        while not times or sum(times) < _seconds_for(len(times)):
            start = time.process_time()
            state, _ = jax.block_until_ready(step(state, batch))
            times.append(time.process_time() - start)
        memory = step.memory_analysis()
        assert memory is not None, "every backend says so"
        return {
            "step_ms": 1e3 * median(times),
            "temporary_mib": memory.temp_size_in_bytes / 2**20,
        }


def _seconds_for(taken: int) -> float:
    """Those after which no further step is taken, when so many are."""
    if taken >= MOST:
        return 0
    return SECONDS_OF_FEWEST if taken < FEWEST else SECONDS


@functools.lru_cache(maxsize=1)
def _step_of(config: Config) -> tuple[Run, jax.stages.Compiled]:
    """The step that `train.py` takes, compiled for one device; seeds share it."""
    run = prepare(config, jax.devices()[:1])
    tokens = config.model.patches.num_tokens
    patches = jax.ShapeDtypeStruct((1, tokens, config.model.patches.size), jnp.float32)
    batch = jax.eval_shape(batch_of, patches, jax.ShapeDtypeStruct((1,), jnp.int32))
    with jax.set_mesh(run.mesh):
        step = jit_train_step(run.config, run.tx, run.shardings)
        return run, step.lower(run.abstract, batch).compile()


def _any_state(abstract: TrainState, random: np.random.Generator) -> TrainState:
    """A state of these shapes. Its values do not matter, and compiling how a model starts takes as
    long as compiling its step.
    """
    zeros = jax.tree.map(lambda of: jnp.zeros(of.shape, of.dtype), abstract)
    params = jax.tree.map(
        lambda of: jnp.asarray(0.1 * random.normal(size=of.shape), of.dtype),
        abstract.params,
    )
    return zeros.replace(params=params)
