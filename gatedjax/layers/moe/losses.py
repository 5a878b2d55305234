"""The losses that keep experts in use, from each layer's statistics, and what the log says of the loads.

One normalization for all: `E sum_i f_i P_i`, f_i the share of all assignments that expert i got, P_i its mean share of
the scores. Both sum to 1, so the loss is 1 at perfect balance and E when one expert gets everything. It is taken over
the global batch, all devices and all micro-batches (arXiv 2501.11873), for every layer by itself; layers are summed.
Elsewhere the same loss has another size; a weight w from there becomes `weight_here(codebase, w, ...)` here:

  codebase       its loss                                            at balance    its loss / ours
  switch         E sum f P (f of first choices; summed over layers)  1             1
  megablocks     E / (T k) sum count P, mean over layers             1             1 / L
  huggingface    E sum f P, f sums to k, layers pooled               k             k / L (if all layers are alike)
  maxtext        E^2 mean(f P), f sums to k, within sequences        k             k
  deepseek       sum f P, f = E / (k T) count, within sequences      1             1
  moe++          sum eta f P, f sums to k                            k / E         k / E

The last two go with `sequence_loss` and with `zero_computation_weight` (tau, the eta of experts that cost nothing).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import ModelConfig, SparseMoEConfig

Statistics = Mapping[
    str, Mapping[str, Array]
]  # layer of the period -> `layers.moe.statistics`, stacked over periods


def weight_here(
    codebase: str, weight: float, num_experts: int, experts_per_token: int, num_layers: int = 1
) -> float:
    """The weight of `balance_loss` (or `sequence_loss`) that acts as `weight` does in another codebase.

    Raises:
      ValueError: a codebase that the table above does not have.
    """
    E, k, L = num_experts, experts_per_token, num_layers
    factors = {
        "switch": 1,
        "megablocks": 1 / L,
        "huggingface": k / L,
        "maxtext": k,
        "deepseek": 1,
        "moe++": k / E,
    }
    if codebase not in factors:
        raise ValueError(
            f"weight_here: codebase: got {codebase!r}, expected one of {', '.join(factors)}"
        )
    return weight * factors[codebase]


def balance_loss(
    counts: Float[Array, "... E"],
    probability: Float[Array, "... E"],
    eta: Float[Array, " E"] | float = 1.0,
) -> Float[Array, "..."]:
    """`E sum_i eta_i f_i P_i` from assignments and mean shares (arXiv 2101.03961, eq. 4; eta: 2410.07348, eq. 7)."""
    load = counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1.0)
    return counts.shape[-1] * jnp.sum(eta * jax.lax.stop_gradient(load) * probability, axis=-1)


def expert_weights(config: SparseMoEConfig) -> Float[Array, " E"]:
    """MoE++'s eta: 1 for experts that compute, `zero_computation_weight` for the others."""
    free = config.total_experts - config.num_experts
    return jnp.asarray(
        [1.0] * config.num_experts + [config.zero_computation_weight] * free, jnp.float32
    )


def router_losses(
    config: ModelConfig, statistics: Statistics, before: Mapping[str, Array]
) -> tuple[Float[Array, ""], dict[str, Array], dict[str, Array]]:
    """(weighted sum of all router losses, means for the log, counts) of one micro-batch.

    Args:
      before: counts of the micro-batches before this one: loads are those of the batch so far.
    """
    total, log, counts = jnp.float32(0.0), [], {}
    for name, s in statistics.items():
        if "counts" not in s:
            continue
        c = config.layer(int(name[6:]))[1]
        counts[name] = s["counts"] + before.get(name, 0.0)
        balance = balance_loss(counts[name], s["probability"], expert_weights(c))
        weighed = (
            c.balance_loss * balance + c.sequence_loss * s["sequence_loss"] + c.z_loss * s["z_loss"]
        )
        total = total + jnp.sum(weighed)
        dropped = s["dropped"] / jnp.maximum(jnp.sum(s["counts"], axis=-1), 1.0)
        log.append([balance, s["z_loss"], s["entropy"], dropped])
    if not counts:
        return total, {}, {}
    names = ("balance_loss", "router_z_loss", "router_entropy", "dropped_fraction")
    means = {name: jnp.mean(jnp.concatenate(layers)) for name, layers in zip(names, zip(*log))}
    return total, {"aux_loss": total} | means, counts


def load_metrics(config: ModelConfig, counts: Mapping[str, Array]) -> dict[str, Array]:
    """What the log says of the loads of a whole step; {} without sparse layers.

    expert_load         [layers, E]  share of assignments x E: 1 at balance; NaN past a layer's last expert
    load_max_over_mean  the largest of them;  dead_experts: how many, over all layers, got nothing
    """
    if not counts:
        return {}
    rows = {}
    for name, c in counts.items():
        load = c / jnp.maximum(jnp.sum(c, axis=-1, keepdims=True), 1.0) * c.shape[-1]
        rows |= {int(name[6:]) + period * config.period: row for period, row in enumerate(load)}
    widest = max(row.shape[0] for row in rows.values())
    padded = [
        jnp.pad(rows[i], (0, widest - rows[i].shape[0]), constant_values=jnp.nan)
        for i in sorted(rows)
    ]
    load = jnp.stack(padded)
    return {
        "expert_load": load,
        "load_max_over_mean": jnp.nanmax(load),
        "dead_experts": jnp.sum(load == 0.0),
    }
