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


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of checkpoint: its config.json, and its tensors.

    model_type: the name in config.json.
    architecture: the class of transformers, or of fla.
    to_model: from a config.json.
    to_json: back; what of the model it does not express is found by reading it again.
    links: all tensors of a model.
    renamed: rules "OLD -> NEW" for names in other versions of the checkpoint; the links have NEW.
    left_out: patterns of tensors that are no part of the language model.
    also: other names of the model type.
    """

    model_type: str
    architecture: str
    to_model: Callable[[HFConfig], ModelConfig]
    to_json: Callable[[ModelConfig], dict[str, Any]]
    links: Callable[[ModelConfig], Iterator[Link]]
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
    """The model with these layers: the shortest pattern that repeats.

    Args:
      layers: all, in order.
      mixers: by name; those that no layer has are left out.
      ffns: likewise.
      **values: the rest of the model.
    """
    period = _period(layers)
    pattern = tuple(layer.mixer for layer in layers[:period])
    ffn_pattern = tuple(layer.ffn for layer in layers[:period])
    return ModelConfig(
        num_layers=len(layers),
        mixers=FrozenDict({name: mixers[name] for name in dict.fromkeys(pattern)}),
        pattern=_shortest(pattern),
        ffns=FrozenDict({name: ffns[name] for name in dict.fromkeys(ffn_pattern)}),
        ffn_pattern=_shortest(ffn_pattern),
        **values,
    )


def _period(layers: Sequence[Any]) -> int:
    """The least number of layers after which they repeat, to the end."""
    count = len(layers)
    for period in range(1, count):
        if count % period == 0 and list(layers) == list(layers[:period]) * (count // period):
            return period
    return count


def _shortest(names: tuple[str, ...]) -> tuple[str, ...]:
    return names[: _period(names)]


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
        "init_std",
        "loss_chunk",
        "pid_gains",
        "remat",
        "scan_layers",
        "sequence_loss",
        "z_loss",
        "zero_computation_weight",
    }
)
# Names of layers are the user's own: layers are compared one by one.
_OF_LAYERS = frozenset({"mixers", "pattern", "ffns", "ffn_pattern"})


def function_of(model: ModelConfig) -> dict[str, Any]:
    """What a model computes, without the names of its parts."""
    values = {name: value for name, value in to_dict(model).items() if name not in _OF_LAYERS}
    for i in range(model.num_layers):
        mixer, ffn = model.layer(i)
        values[f"layer {i}"] = {"mixer": to_dict(mixer), "ffn": to_dict(ffn)}
    return _without(values)


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
    if kept.get("rope_fraction") == 0.0:
        kept.pop("rope_base")
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
            if isinstance(part, kind):
                return part
    raise InputError(f"{family}: got a model without {kind.kind}, expected one")


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
