"""What exits say of held-out text: to calibrate thresholds on one half, and to measure on the
other.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

from gatedjax.data import Batch
from gatedjax.evaluation import exits as early
from gatedjax.evaluation.exit_learning import predictions, token_losses
from gatedjax.evaluation.exits import DepthGate, Exits
from gatedjax.evaluation.learning import held_out_text
from gatedjax.training.run import Run


class Said(NamedTuple):
    """What the exits say of many tokens, in numpy; the end is the last column.

    confidence: the probability of the likeliest token, before the end.
    gates: of the exits.
    losses: nats. is_right: whether the likeliest token was the next one.
    depths: the exit that a gate of the depth chooses; the end without one.
    """

    confidence: Float[np.ndarray, "N E"]
    gates: Float[np.ndarray, "N E"]
    losses: Float[np.ndarray, "N E+1"]
    is_right: Float[np.ndarray, "N E+1"]
    depths: Int[np.ndarray, " N"]


def halves_of(
    run: Run,
    params: PyTree,
    exits: Exits,
    layers: tuple[int, ...],
    most_batches: int,
    depth: DepthGate | None = None,
) -> tuple[Said, Said]:
    """What the exits say of validation tokens: to calibrate on, and to measure on.

    Args:
      run: of the model.
      params: of it.
      exits: their parameters.
      layers: after how many layers each exit is.
      most_batches: of each half.
      depth: a gate that chooses the depth, or None.

    Raises:
      InputError: there is less than two batches of validation text.
    """
    model = run.config.model

    @jax.jit
    def look(exits: Exits, params: PyTree, batch: Batch):
        seen = predictions(model, layers, params, exits, batch)
        numbers = [early.features(p) for p in seen.of_exits]
        gates = [early.gate_values(exits, i, n) for i, n in enumerate(numbers)]
        losses = [token_losses(p, batch) for p in seen.all]
        is_right = [jnp.argmax(p, axis=-1) == jnp.asarray(batch.targets) for p in seen.all]
        chosen = jnp.full(seen.first.shape[:2], len(layers))
        if depth is not None:
            chosen = jnp.argmax(early.depth_logits(depth, seen.first, model.norm_eps), axis=-1)
        groups = ([n[..., 0] for n in numbers], gates, losses, is_right, [chosen])
        return [jnp.stack(group, axis=-1) for group in groups]

    found: list[list[np.ndarray]] = []
    for batch in held_out_text(run, 2 * most_batches, least=2):
        is_counted = np.asarray(batch.loss_mask).reshape(-1) > 0
        groups = look(exits, params, batch)
        found.append([np.asarray(g).reshape(-1, g.shape[-1])[is_counted] for g in groups])
    half = len(found) // 2
    halves = []
    for part in (found[:half], found[half:]):
        confidence, gates, losses, is_right, depths = (
            np.concatenate(group).astype(np.float64) for group in zip(*part)
        )
        halves.append(Said(confidence, gates, losses, is_right, depths[:, 0].astype(int)))
    calibration, measured = halves
    return calibration, measured
