"""What a family is, and what all of them share: layers into patterns, and a model's function."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gatedjax.config import (
    Difference,
    FeedForwardConfig,
    FrozenDict,
    MixerConfig,
    ModelConfig,
    differing_keys,
    to_dict,
)
from gatedjax.errors import InputError
from gatedjax.interop.hf_config import HFConfig
from gatedjax.interop.links import Link

# The shapes of tensors in a file, by name.
Shapes = Mapping[str, tuple[int, ...]]
# Layers before the first period that are looked for.
_LONGEST_PREFIX = 64


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of checkpoint: its config.json, and its tensors.

    model_type: the name in config.json.
    architecture: the class of transformers, or of fla.
    to_model: from a config.json.
    to_json: back; what of the model it does not express is found by reading it again.
    links: all tensors of a model.
    links_as_saved: the same where their shapes may differ from file to file.
    renamed: rules "OLD -> NEW" for names in other versions of the checkpoint; the links have NEW.
    left_out: patterns of tensors that are no part of the language model.
    also: other names of the model type.
    """

    model_type: str
    architecture: str
    to_model: Callable[[HFConfig], ModelConfig]
    to_json: Callable[[ModelConfig], dict[str, Any]]
    links: Callable[[ModelConfig], Iterator[Link]]
    links_as_saved: Callable[[ModelConfig, Shapes], Iterator[Link]] | None = None
    renamed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


class NamedLayer(NamedTuple):
    """A layer, by the names under which ModelConfig will have its parts."""

    mixer: str
    ffn: str


def assembled(
    layers: Sequence[NamedLayer],
    mixers: Mapping[str, MixerConfig],
    ffns: Mapping[str, FeedForwardConfig],
    **values: Any,
) -> ModelConfig:
    """The model with these layers: as few blocks as there can be.

    Args:
      layers: all, in order.
      mixers: by name; those that no layer has are left out.
      ffns: likewise.
      **values: the rest of the model.
    """
    mixer_names = tuple(layer.mixer for layer in layers)
    ffn_names = tuple(layer.ffn for layer in layers)
    first, period, after = _cut(layers)
    repeated = slice(first, first + period)
    last = slice(len(layers) - after, None)
    return ModelConfig(
        num_layers=len(layers),
        mixers=FrozenDict({name: mixers[name] for name in dict.fromkeys(mixer_names)}),
        pattern=_shortest(mixer_names[repeated]),
        prefix=mixer_names[:first],
        suffix=mixer_names[last],
        ffns=FrozenDict({name: ffns[name] for name in dict.fromkeys(ffn_names)}),
        ffn_pattern=_shortest(ffn_names[repeated]),
        ffn_prefix=ffn_names[:first],
        ffn_suffix=ffn_names[last],
        **values,
    )


def _cut(layers: Sequence[Any]) -> tuple[int, int, int]:
    """(layers before the first period, of a period, after the last): the fewest of all."""
    count = len(layers)
    # Nothing repeats: all layers are one period.
    best = (0, count, 0)
    for first in range(min(count, _LONGEST_PREFIX)):
        for period in range(1, (count - first) // 2 + 1):
            if first + period >= sum(best):
                break
            # How far the layers go on as one period before.
            end = first + period
            while end < count and layers[end] == layers[end - period]:
                end += 1
            repeats = (end - first) // period
            after = count - first - repeats * period
            if repeats > 1 and first + period + after < sum(best):
                best = (first, period, after)
    return best


def _shortest(names: tuple[str, ...]) -> tuple[str, ...]:
    """The least of names that gives the others when it is repeated."""
    count = len(names)
    for period in range(1, count):
        if count % period == 0 and names[:period] * (count // period) == names:
            return names[:period]
    return names


# What changes how a model is computed or trained, and not what it computes.
_NO_FUNCTION = frozenset(
    {
        "balance_loss",
        "bias_rate",
        "capacity_factor",
        "capacity_order",
        "chunk_size",
        "dtype",
        "exchange",
        "exchange_factor",
        "ffn_fraction",
        "importance_loss",
        "init_std",
        "load_loss",
        "loss_chunk",
        "noise",
        "pid_gains",
        "remat",
        "scan_layers",
        "sequence_loss",
        "unroll",
        "z_loss",
        "zero_computation_weight",
    }
)
# Names of layers are the user's own: layers are compared one by one.
_OF_LAYERS = frozenset(
    {
        "mixers",
        "pattern",
        "prefix",
        "suffix",
        "ffns",
        "ffn_pattern",
        "ffn_prefix",
        "ffn_suffix",
        "norm_placement",
    }
)


def function_of(model: ModelConfig) -> dict[str, Any]:
    """What a model computes, without the names of its parts."""
    values = to_dict(model)
    values = _without({name: values[name] for name in values if name not in _OF_LAYERS})
    for block in model.blocks:
        of_block = {
            "mixer": _without(to_dict(block.mixer)),
            "ffn": _without(to_dict(block.feed_forward)),
            "norm": block.norm,
        }
        for i in block.layers:
            values[f"layer {i}"] = of_block
    return values


def _without(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in values.items():
        if name not in _NO_FUNCTION:
            kept[name] = _without(value) if isinstance(value, Mapping) else value
    # How many key heads there are may be said or left to the heads.
    if kept.get("num_kv_heads", 0) is None:
        kept["num_kv_heads"] = kept["num_heads"]
    if kept.get("num_key_heads", 0) is None:
        kept["num_key_heads"] = kept["num_heads"]
    # Without extension the length before it says nothing.
    if kept.get("yarn_factor") == 1.0:
        kept.pop("yarn_original_length")
        kept.pop("yarn_truncate", None)
    if kept.get("llama3_factor") == 1.0:
        for name in ("llama3_low", "llama3_high", "llama3_original_length"):
            kept.pop(name)
    if kept.get("rope_fraction") == 0.0 or kept.get("rope") == "none":
        kept.pop("rope_base")
    # A limit, a norm or groups that are not used.
    if kept.get("activation") != "clamped_swiglu":
        kept.pop("swiglu_limit", None)
    if kept.get("qk_norm") is False:
        kept.pop("qk_norm_kind")
        kept.pop("zero_centered_norm")
    if kept.get("gate_position") == "none":
        for name in [name for name in kept if name.startswith("gate_")]:
            kept.pop(name)
    if kept.get("shared_hidden") == 0:
        kept.pop("shared_gate")
    return kept


def differences(family: Family, model: ModelConfig) -> list[Difference]:
    """What of a model the family's config.json cannot say."""
    again = family.to_model(HFConfig(family.to_json(model)))
    return differing_keys(function_of(model), function_of(again), "model")


def the_layer[T](model: ModelConfig, kind: type[T], family: str) -> T:
    """The mixer or feed-forward of this kind that a model has, the first of several.

    Raises:
      InputError: it has none: it is no model of the family.
    """
    for i in range(model.num_layers):
        for part in model.layer(i):
            # Not a subclass: a converted layer is another one.
            if type(part) is kind:
                return part
    raise InputError(f"{family}: got a model without {kind.__name__}, expected one")


def model_values(config: HFConfig, tied: bool = False) -> dict[str, Any]:
    """What all families say in the same words: vocabulary, width, norms, tied embeddings."""
    return dict(
        vocab_size=config.size("vocab_size"),
        width=config.size("hidden_size"),
        norm_eps=config.number("rms_norm_eps", default=1e-6),
        tie_embeddings=config.flag("tie_word_embeddings", tied),
        init_std=config.number("initializer_range", default=0.02),
    )


def json_values(model: ModelConfig) -> dict[str, Any]:
    """The same, back."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.num_layers,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "hidden_act": "silu",
    }


def kinds_of_layers(
    config: HFConfig,
    default: Iterable[str],
    known: Sequence[str],
) -> list[str]:
    """`layer_types`, checked; `default` where the file has none.

    Args:
      config: of the checkpoint.
      default: the family's own.
      known: what a layer may be.
    """
    count = config.size("num_hidden_layers")
    kinds = list(config.texts("layer_types") or default)
    if len(kinds) != count or not set(kinds) <= set(known):
        raise config.refuse("layer_types", f"{count} of {', '.join(known)}")
    return kinds
