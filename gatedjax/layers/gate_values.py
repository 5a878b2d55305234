"""What gates, decays and routers did for an input.

Recorded by the layers, handed out on request.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jax import Array

from gatedjax.layers.tree import flatten_dict

# The Flax collection of everything that is recorded.
COLLECTION = "probes"
# Recorded for the measurements of `evaluation.probes` and for who learns from the model
# (`training.teacher`); no gates.
NOT_GATES = (
    "q",
    "k",
    "v",
    "residual",
    "mixer_input",
    "mixer_output",
    "heads_output",
    "ffn_input",
    "ffn_output",
    "router_logits",
    "channels",
)


def record(
    module: nn.Module,
    name: str,
    value: Array,
) -> None:
    """Keeps `value` for whoever runs the module with `mutable=["probes"]`; free for all others
    under jit.

    Nothing is kept by `init`: its result holds parameters only.
    """
    if not module.is_initializing():
        module.sow(COLLECTION, name, value)


def gate_values(
    layer: nn.Module,
    params: Mapping[str, Any],
    x: Array,
    *args: Any,
) -> dict[str, Array]:
    """What the gates, decays and routers of `layer` did for the input `x`.

    Args:
      layer: a layer of `gatedjax.layers`, or a `LanguageModel`.
      params: the result of `layer.init`, or the parameters alone.
      x: what the layer is called with: [B, T, M], or the tokens [B, T] of a model.
      args: further arguments of the call, such as a `TokenInfo`.

    Returns:
      Arrays by name. Values of a layer inside another have the inner layer's name in front, as in
      "shared/gates"; those of a model's periods are stacked over periods: [P, ...].

        gates           of attention, linear attention or an MLP: after their activation
        value_gates     of the values and the vectors of a value bank
        log_decay       of linear attention
        router_probs    of a sparse mixture, over all experts
        experts         the experts that each token goes to; E marks an empty place
        expert_weights  what each of them is weighted by
        dispatch        of a soft mixture: what each slot takes of each token
        combine         of a soft mixture: what each token takes of each slot
        learners        of an adaptive MLP: how many a token has (learner_logits: of its gate)
        loops           of a versatile MLP: how many a token has
    """
    variables = {"params": params.get("params", params)}
    _, state = layer.apply(variables, x, *args, mutable=[COLLECTION])
    recorded: Any = state.get(COLLECTION, {})
    values = {}
    for path, recordings in flatten_dict(recorded).items():
        # A module that is called once records once.
        if path[-1] not in NOT_GATES:
            values["/".join(path)] = recordings[0]
    return values
