"""What an encoder learns of new images with few of its parameters: small experts beside its
feed-forwards (Soft-MoA, arXiv 2402.00828), low-rank updates of them, or its head alone.

It is trained on images, and adapted to the same images a quarter turned.
"""

import dataclasses
import functools

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, PyTree

from gatedjax.config import Config
from gatedjax.evidence.encoders import images, learned, start
from gatedjax.layers.tree import flatten_dict, unflatten_dict, united


@dataclasses.dataclass(frozen=True)
class AdaptedEncoder:
    """Trains an encoder, then what `optim.trainable` says of another one that starts from it.

    Attributes:
      base: of the encoder that is trained first, on images as they are.
      config: of the one that is adapted; its parameters are the base's where their names and shapes
        are, else at their own start.
    """

    base: Config
    config: Config

    def __call__(self, seed: int) -> dict[str, float]:
        given = images(self.base)
        turned = given._replace(patches=quarter_turn(given.patches, self.config))
        before, _ = _base(self.base, seed)
        own = start(self.config, jax.random.key(seed))
        adapted, measured = learned(self.config, started_from(own, before), turned, seed)
        count = sum(leaf.size for leaf in jax.tree.leaves(adapted))
        return measured | {"parameters": float(count)}


@functools.lru_cache(maxsize=2)
def _base(config: Config, seed: int) -> tuple[PyTree, dict[str, float]]:
    """The encoder before it is adapted; what is adapted to all ways shares it."""
    return learned(config, start(config, jax.random.key(seed)), images(config), seed)


def started_from(own: PyTree, before: PyTree) -> PyTree:
    """Parameters with another model's in the place of those of the same name."""
    shared = flatten_dict(own).keys() & flatten_dict(before).keys()
    values = {path: leaf for path, leaf in flatten_dict(before).items() if path in shared}
    return united(own, unflatten_dict(values))


def quarter_turn(
    patches: Float[np.ndarray | Array, "N T P"],
    config: Config,
) -> Float[np.ndarray, "N T P"]:
    """Patches of the same square images, a quarter turned."""
    shape = config.model.patches
    rows, columns = shape.grid
    inner = (shape.patch_height, shape.patch_width, -1)
    pixels = np.asarray(patches).reshape(len(patches), rows, columns, *inner)
    image = pixels.transpose(0, 1, 3, 2, 4, 5).reshape(
        len(patches),
        rows * inner[0],
        columns * inner[1],
        -1,
    )
    turned = np.rot90(image, axes=(1, 2))
    cut = turned.reshape(len(patches), rows, inner[0], columns, inner[1], -1)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(patches.shape)
