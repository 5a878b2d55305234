"""The losses that keep experts in use, and what the log says of the loads.

One normalization for all: `E sum_i f_i P_i`, f_i the fraction of all assignments that expert i got,
P_i its mean router probability. Both sum to 1, so the loss is 1 at perfect balance and E when one
expert gets everything. It is taken over the global batch, all devices and all micro-batches (arXiv
2501.11873), for every layer by itself; layers are summed. Every token counts once, whatever it
weighs in the model's own loss; padding does not count. Elsewhere the same loss has another size; a
weight w from there becomes `weight_here(codebase, w, ...)` here:

  codebase       its loss                                            at balance    its loss / ours
  switch         E sum f P (f of first choices; summed over layers)  1             1
  megablocks     E / (T k) sum count P, mean over layers             1             1 / L
  huggingface    E sum f P, f sums to k, layers (alike) pooled       k             k / L
  maxtext        E^2 mean(f P), f sums to k, within sequences        k             k
  deepseek       sum f P, f = E / (k T) count, within sequences      1             1
  moe++          sum eta f P, f sums to k                            k / E         k / E

The last two go with `sequence_loss` and with `zero_computation_weight` (tau, the eta of experts
that cost nothing).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import ModelConfig, SparseMoEConfig
from gatedjax.layers.moe.statistics import Statistics as Statistics
from gatedjax.layers.moe.statistics import fraction, loads


def weight_here(
    codebase: str,
    weight: float,
    num_experts: int,
    experts_per_token: int,
    num_layers: int = 1,
) -> float:
    """The weight of `balance_loss` (or `sequence_loss`) that acts as `weight` does in another
    codebase.

    Args:
      codebase: a row of the table above.
      weight: the weight there.
      num_experts: E.
      experts_per_token: k.
      num_layers: L, the sparse layers of the model.

    Returns:
      The weight here.

    Raises:
      ValueError: a codebase that the table does not have.
    """
    factors = {
        "switch": 1,
        "megablocks": 1 / num_layers,
        "huggingface": experts_per_token / num_layers,
        "maxtext": experts_per_token,
        "deepseek": 1,
        "moe++": experts_per_token / num_experts,
    }
    if codebase not in factors:
        expected = f"one of {', '.join(factors)}"
        raise ValueError(f"weight_here: codebase: got {codebase!r}, expected {expected}")
    return weight * factors[codebase]


def balance_loss(
    counts: Float[Array, "... E"],
    probability: Float[Array, "... E"],
    eta: Float[Array, " E"] | float = 1.0,
) -> Float[Array, "..."]:
    """`E sum_i eta_i f_i P_i` from assignments and mean probabilities.

    arXiv 2101.03961, eq. 4; eta: 2410.07348, eq. 7.
    """
    load = jax.lax.stop_gradient(loads(counts))
    return counts.shape[-1] * jnp.sum(eta * load * probability, axis=-1)


def expert_weights(config: SparseMoEConfig) -> Float[Array, " E"]:
    """MoE++'s eta: 1 for experts that compute, `zero_computation_weight` for the others."""
    free = config.total_experts - config.num_experts
    weights = [1.0] * config.num_experts + [config.zero_computation_weight] * free
    return jnp.asarray(weights, jnp.float32)


def router_losses(
    config: ModelConfig,
    statistics: Statistics,
    counts: Mapping[str, Array] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The router losses of a step, or of a micro-batch of it.

    They are linear in the statistics once the counts are given: the losses of micro-batches, with
    statistics that are parts of the step's (`statistics.as_part`) and the counts of all of them,
    add up to the loss of the step.

    Args:
      config: of the model, with the losses' weights.
      statistics: of the step, or a micro-batch's part of them.
      counts: of the whole step, by block; None where they are those of `statistics`.

    Returns:
      The weighted sum of all losses, and means for the log; {} without sparse layers.
    """
    total = jnp.float32(0.0)
    # For the log: a value for every layer, in arrays of one block each.
    logged = {
        "balance_loss": [],
        "router_z_loss": [],
        "router_entropy": [],
        "dropped_fraction": [],
    }
    for block in config.blocks:
        ffn = block.feed_forward
        if not isinstance(ffn, SparseMoEConfig):
            continue
        s = statistics[block.name]
        of_step = s["counts"] if counts is None else counts[block.name]
        balance = balance_loss(of_step, s["probability"], expert_weights(ffn))
        weighted = [
            (ffn.balance_loss, balance),
            (ffn.sequence_loss, s["sequence_loss"]),
            (ffn.z_loss, s["z_loss"]),
        ]
        # A layer has V-MoE's losses only where they have a weight (`noisy.py`).
        if ffn.importance_loss:
            weighted.append((ffn.importance_loss, s["importance_loss"]))
        if ffn.load_loss:
            weighted.append((ffn.load_loss, s["load_loss"]))
        for weight, loss in weighted:
            # A loss that is turned off is left out: 0 times what may not be finite is not 0.
            if weight:
                total = total + jnp.sum(weight * loss)
        logged["balance_loss"].append(balance)
        logged["router_z_loss"].append(s["z_loss"])
        logged["router_entropy"].append(s["entropy"])
        logged["dropped_fraction"].append(fraction(s["dropped"], jnp.sum(s["counts"], axis=-1)))
    if not logged["balance_loss"]:
        return total, {}
    means = {name: jnp.mean(jnp.concatenate(blocks)) for name, blocks in logged.items()}
    return total, {"aux_loss": total} | means


def load_metrics(config: ModelConfig, counts: Mapping[str, Array]) -> dict[str, Array]:
    """What the log says of the loads of a whole step; {} without sparse layers.

    expert_load         [layers, E]  fraction of assignments x E: 1 at balance; NaN where a layer
                                     has no such expert
    load_max_over_mean  the largest of them;  dead_experts: how many, over all layers, got nothing
    """
    if not counts:
        return {}
    load_of_layer = {}
    for block in config.blocks:
        if block.name not in counts:
            continue
        of_block = counts[block.name]
        load = loads(of_block) * of_block.shape[-1]
        load_of_layer |= dict(zip(block.layers, load))
    most_experts = max(row.shape[0] for row in load_of_layer.values())
    rows = []
    for i in sorted(load_of_layer):
        # Layers may have different numbers of experts; the table is as wide as the widest.
        missing = most_experts - load_of_layer[i].shape[0]
        rows.append(jnp.pad(load_of_layer[i], (0, missing), constant_values=jnp.nan))
    load = jnp.stack(rows)
    return {
        "expert_load": load,
        "load_max_over_mean": jnp.nanmax(load),
        "dead_experts": jnp.sum(load == 0.0),
    }
