"""What studies of rates take of a trained model: singular values by width, curvature by batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gatedjax.data import Batch, batches, make_dataset
from gatedjax.layers.tree import flatten_dict
from gatedjax.sharding import global_batch, my_rows
from gatedjax.study.trained import Trained
from gatedjax.training.curvature import largest_eigenvalue
from gatedjax.training.eval_step import batch_losses
from gatedjax.training.muon import Matrices, split_matrices
from gatedjax.training.optim import FUSED_GATES, muon_dimensions
from gatedjax.training.optim_rules import width_factors, width_probe
from gatedjax.training.state import init_params, param_axes

Values = dict[str, float]
# Rows of the batches whose curvature is looked at, whatever the model was trained on.
SIZES = (1, 4, 16)
# Batches whose eigenvalues are averaged, for each size.
BATCHES = 2
# Products with the Hessian.
ITERATIONS = 12


def singular_values(trained: Trained) -> Values:
    """The probe of 2510.15262, over all matrices but tables."""
    config = trained.run.config
    optim = config.optim
    boxed = jax.eval_shape(lambda key: init_params(config.model, key), jax.random.key(0))
    axes = flatten_dict(param_axes(boxed))
    matrices = []
    for path, value in flatten_dict(trained.params).items():
        names: Any = axes.get(path)
        # The state of routers has none.
        dimensions: Any = None if names is None else muon_dimensions(names)
        if dimensions is not None:
            gate = FUSED_GATES.get(names[-1], "none")
            held = Matrices(dimensions[0], dimensions[1], gate)
            matrices.extend(np.asarray(part) for part in split_matrices(jnp.asarray(value), held))
    rate = optim.lr
    decay = optim.weight_decay
    if optim.base_width:
        of_rate, of_decay = width_factors(config.model.width, optim.base_width)
        rate *= of_rate
        decay *= of_decay
    return {"width_probe": width_probe(matrices, rate, decay, config.model.width)}


def curvature(trained: Trained) -> Values:
    """hessian@B for each B of SIZES: means over a few batches of training text each."""
    values = {}
    for size in SIZES:
        found = [_eigenvalue(trained, size, batch) for batch in range(BATCHES)]
        values[f"hessian@{size}"] = float(np.mean(found))
    return values


def _eigenvalue(trained: Trained, size: int, index: int) -> float:
    """Of batch `index` of `size` rows."""
    run = trained.run
    dataset = make_dataset(
        run.config.data,
        "train",
        batch_size=size,
        rows=my_rows(run.mesh, size),
        seed=run.config.data.seed,
    )
    stream = batches(dataset, index * size)
    batch = global_batch(run.mesh, next(stream), size)

    def loss(params: Any, batch: Batch) -> jax.Array:
        losses = batch_losses(run.config.model, params, batch)
        return losses.cross_entropy / losses.count

    key = jax.random.key(index)
    return largest_eigenvalue(loss, trained.params, key, ITERATIONS, (batch,))
