"""What a study is: its cells, what is measured in each, and how the result is shown.

A file of `configs/studies/` has one function, `get_study(small: bool) -> Study`; `small` is the
ten-minute version.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gatedjax.config import (
    FEED_FORWARDS,
    MIXERS,
    Config,
    RouterConfig,
    SourceConfig,
    to_dict,
)
from gatedjax.data.recall import RecallConfig

# Keys that the configuration was given after results had been recorded. A run that leaves them at
# their defaults is the run that it was before.
ADDED_LATER = (
    ("data", "chat_answers"),
    ("data", "chat_template"),
    ("data", "end_of_document"),
    ("data", "images"),
    ("data", "masking"),
    ("mesh", "async_collectives"),
    ("model", "embedding_norm"),
    ("model", "ffn_prefix"),
    ("model", "ffn_suffix"),
    ("model", "lora"),
    ("model", "norm_kind"),
    ("model", "norm_placement"),
    ("model", "output"),
    ("model", "patches"),
    ("model", "prefix"),
    ("model", "residual_weight"),
    ("model", "shared_router"),
    ("model", "suffix"),
    ("model", "task"),
    ("model", "unroll"),
    ("optim", "base_batch_size"),
    ("optim", "base_width"),
    ("optim", "lanton_alpha"),
    ("optim", "lr_by_name"),
    ("optim", "perpendicular"),
    ("optim", "record_l1_norm"),
    ("optim", "refined_from"),
    ("optim", "trainable"),
    ("train", "grow_batches"),
    ("train", "init_from"),
    ("train", "init_rename"),
    ("train", "init_fresh"),
    ("train", "most_accumulation_steps"),
    ("train", "teacher"),
)
# The same of layers, by their kind.
ADDED_LATER_TO_LAYERS = {
    "gated_attention": (
        "bias",
        "attention_scale",
        "causal",
        "rope_layout",
        "rope_grid",
        "yarn_truncate",
        "llama3_factor",
        "llama3_low",
        "llama3_high",
        "llama3_original_length",
        "token_sinks",
        "gate_hidden",
        "gate_start",
        "gate_fine_tuning",
        "value_bank",
        "shares_weights",
        "shares_cache",
        "selective_rope",
        "selective_rank",
        "selective_conv",
        "selective_activation",
        "selective_gate",
        "selective_bias",
        "exp_cap",
        "reluformer_loss",
        "similarity",
        "after_sdpa",
        "value_skip",
        "sinkhorn_iterations",
        "sinkhorn_epsilon",
        "prefix",
        "block_gate",
        "block_gate_loss",
        "block_gate_top",
        "block_gate_threshold",
    ),
    "delta_attention": (
        "conv_bias",
        "norm_eps",
        "num_householder",
        "state_feedback",
        "output_feedback",
    ),
    "gated_linear_attention": (
        "feature_length",
        "num_features",
        "feature_seed",
        "conv_bias",
        "decay_floor",
        "norm_heads",
        "norm_eps",
        "selective_rope",
        "selective_rank",
        "selective_conv",
        "selective_activation",
        "selective_gate",
        "selective_bias",
    ),
    "gated_unit": ("token_shift", "conv_width"),
    "spatial_gate": ("tiny_attention",),
    "gated_mlp": ("adapters", "bias", "norm", "swiglu_limit"),
    "mamba2": ("conv_bias",),
    "mlp": ("adapters", "neuron_gate", "neuron_temperature"),
    "rwkv7": ("norm_eps",),
    "sparse_moe": ("bias", "gated", "latent", "swiglu_limit", "importance_loss", "load_loss"),
}
# Likewise, of each router.
ADDED_LATER_TO_ROUTERS = ("second_kind", "second_threshold", "noise")
# Likewise, of each source.
ADDED_LATER_TO_SOURCES = ("stream", "label")

# A run that is not one training and its measures: a frozen dataclass, on a module's first level, of
# plain numbers, texts and a configuration, that is called with a seed (`gatedjax.evidence`).
Experiment = Callable[[int], Mapping[str, float]]

Measure = Literal[
    "validation",
    "recall",
    "probes",
    "lengths",
    "routing",
    "sinks",
    "speed",
    "spent",
    "width_probe",
    "curvature",
]
Label = str | int | float


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of a grid, trained once for each seed.

    labels: name -> value; they tell cells apart in the table.
    recall: a synthetic task in place of the configuration's text. `config.data.seq_len` is then the
      task's.
    lengths: for the measure "lengths", window lengths to evaluate at.
    yarn: for the measure "lengths", rotary positions are scaled to each length (arXiv 2309.00071).
    experiment: called with the seed in place of training and measuring; its result has the values.
    """

    labels: Mapping[str, Label]
    config: Config = dataclasses.field(default_factory=Config)
    recall: RecallConfig | None = None
    lengths: tuple[int, ...] = ()
    yarn: bool = False
    experiment: Experiment | None = None


@dataclasses.dataclass(frozen=True)
class Picture:
    """Lines of `y` over the label `x`; dots where `x` is text.

    y: a column. One that ends in "@" means all columns that begin so ("loss@256", "loss@512"): `x`
      is then what follows, a number or a name.
    line: a label; there is one line for each of its values.
    log_x: the horizontal axis is logarithmic: of `x`, or of the values where `x` is text.
    """

    x: str
    y: str
    line: str | None = None
    log_x: bool = False
    log_y: bool = False


class StudyFile(NamedTuple):
    """Where a study is from: `get_study(small)` of a Python file."""

    path: Path
    small: bool


@dataclasses.dataclass(frozen=True)
class Study:
    """A question, as a grid of runs.

    measures: what is taken of each trained model; see `measures.py` for the values of each. None
      where cells have experiments.
    columns: the values that the table shows, in this order.
    stop_at: with the measure "recall", training ends when validation accuracy reaches this.
    file: where it is from; None of a study that no file has.
    """

    title: str
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    measures: tuple[Measure, ...]
    columns: tuple[str, ...]
    pictures: tuple[Picture, ...] = ()
    stop_at: float | None = None
    file: StudyFile | None = None


def run_key(cell: Cell, seed: int, study: Study) -> str:
    """Names a run by all that its result depends on."""
    recall = None
    if cell.recall is not None:
        recall = dataclasses.asdict(cell.recall)
    if cell.experiment is not None:
        return _digest([type(cell.experiment).__name__, _values_of(cell.experiment), seed])
    depends_on = [
        _lasting_dict(cell.config),
        recall,
        cell.lengths,
        cell.yarn,
        seed,
        study.measures,
        study.stop_at,
    ]
    # Labels and titles are not part of it: they may be reworded without a new run.
    return _digest(depends_on)


def _values_of(experiment: Any) -> dict[str, Any]:
    """The fields of an experiment, a configuration among them as cells' own are written."""
    values = {}
    for field in dataclasses.fields(experiment):
        value = getattr(experiment, field.name)
        if isinstance(value, Config):
            value = _lasting_dict(value)
        values[field.name] = value
    return values


def _digest(depends_on: list[Any]) -> str:
    text = json.dumps(depends_on, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _lasting_dict(config: Config) -> dict[str, Any]:
    """A configuration as it was written before it had the keys that are at their defaults."""
    values = to_dict(config)
    defaults = to_dict(Config())
    for group, key in ADDED_LATER:
        if values[group][key] == defaults[group][key]:
            del values[group][key]
    model = values["model"]
    for layer in [*model["mixers"].values(), *model["ffns"].values()]:
        kind = layer["kind"]
        of_kind = dataclasses.asdict((MIXERS | FEED_FORWARDS)[kind]())
        for key in ADDED_LATER_TO_LAYERS.get(kind, ()):
            if layer[key] == of_kind[key]:
                del layer[key]
    of_router = to_dict(RouterConfig())
    for router in (ffn["router"] for ffn in model["ffns"].values() if "router" in ffn):
        for key in ADDED_LATER_TO_ROUTERS:
            if router[key] == of_router[key]:
                del router[key]
    of_source = to_dict(SourceConfig())
    for source in values["data"]["sources"].values():
        for key in ADDED_LATER_TO_SOURCES:
            if source[key] == of_source[key]:
                del source[key]
    return values
