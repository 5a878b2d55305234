"""Parameters for tests of layers and models, without the start that each of them would compile."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def random_parameters(module: nn.Module, *inputs, std: float = 0.3):
    """Normal numbers in the shapes that `module` starts with; scales are around 1.

    The start is only traced, for its shapes: running it would compile the module once more. So
    what a test says of a module is said of any parameters, not of those it starts with.
    """
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))
    normal = np.random.default_rng(1).normal

    def value_of(path, leaf):
        noise = normal(size=leaf.shape).astype(np.float32)
        return jnp.asarray(1 + 0.1 * noise if "scale" in path[-1].key else std * noise)

    return jax.tree_util.tree_map_with_path(value_of, nn.meta.unbox(shapes)["params"])
