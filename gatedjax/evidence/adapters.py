"""What adapters learn beside a frozen encoder: it has learned half of the classes, they learn the
other half.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int, PyTree

from gatedjax.compiler_options import careful_jit
from gatedjax.config import Config
from gatedjax.evidence.encoders import Images, held_out, images, rows_of_steps, trained
from gatedjax.layers.tree import flatten_dict, unflatten_dict, united
from gatedjax.training import trainable
from gatedjax.training.flops import forward_flops_per_token
from gatedjax.training.step import init_params


@dataclasses.dataclass(frozen=True)
class AdapterRun:
    """Trains an encoder on some classes, freezes it, and trains what it is given on the others.

    Attributes:
      base: the encoder, its images and its training.
      adapted: the same with what is added; `optim.trainable` says what trains. The output matrix
        and what the base does not have start fresh.
    """

    base: Config
    adapted: Config

    def __call__(self, seed: int) -> dict[str, float]:
        of_base = images(self.base)
        half = self.base.model.vocab_size
        before = base_params(self.base, seed)
        given = of_classes(of_base, half, 2 * half)
        start = started(self.adapted, before, seed)
        moving, resting = trainable.split(self.adapted, start)
        order = rows_of_steps(self.adapted, given, seed)
        _, steps = _trained(self.adapted, moving, resting, given.patches, given.classes, order)
        model, length = self.adapted.model, self.adapted.data.seq_len
        return {
            **held_out(self.adapted, given, *steps),
            "trained": float(_count(moving)),
            "mflop": forward_flops_per_token(model, length) * length / 1e6,
        }


def of_classes(given: Images, first: int, end: int) -> Images:
    """The images of classes first ... end - 1, which are counted from 0.

    Args:
      given: images of all classes.
      first: of those that are kept.
      end: the class after the last one.
    """
    kept = (given.classes >= first) & (given.classes < end)
    num_train = int(np.sum(kept[: given.num_train]))
    return Images(given.patches[kept], given.classes[kept] - first, num_train)


@functools.lru_cache(maxsize=4)
def base_params(config: Config, seed: int) -> PyTree:
    """The parameters of a base that has learned the first classes; made once for all adapters."""
    given = of_classes(images(config), 0, config.model.vocab_size)
    order = rows_of_steps(config, given, seed)
    params = _initial(config, jax.random.key(seed))
    return _trained(config, params, {}, given.patches, given.classes, order)[0]


def started(config: Config, before: PyTree, seed: int) -> PyTree:
    """The base's parameters where there are such, but for the output matrix; others fresh.

    Args:
      config: of the adapted model.
      before: of the base.
      seed: of what is fresh.
    """
    fresh = flatten_dict(_initial(config, jax.random.key(seed)))
    known = {path: x for path, x in flatten_dict(before).items() if path != ("head",)}
    return united(unflatten_dict(fresh), unflatten_dict(known))


@functools.partial(careful_jit, static_argnums=0)
def _initial(config: Config, key: Array) -> PyTree:
    return nn.meta.unbox(init_params(config.model, key))


@functools.partial(careful_jit, static_argnums=0)
def _trained(
    config: Config,
    params: PyTree,
    frozen: PyTree,
    patches: Float[Array, "N T P"],
    classes: Int[Array, " N"],
    order: Int[Array, "steps B"],
) -> tuple[PyTree, Any]:
    return trained(config, params, frozen, patches, classes, order)


def _count(params: PyTree) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
