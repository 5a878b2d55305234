"""The configuration of a run: frozen, validated dataclasses."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from flax.core import FrozenDict

from gatedjax.config.layers import (
    FeedForwardConfig,
    GatedAttentionConfig,
    GatedMLPConfig,
    MixerConfig,
)
from gatedjax.config.moe import LoRAMixtureConfig, SparseMoEConfig
from gatedjax.errors import require as _require

Remat = Literal["none", "full", "dots", "kernels"]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: `pattern` names entries of `mixers`, `ffn_pattern` of `ffns`; both repeat to fill the layers."""

    vocab_size: int = 0  # 0: what the tokenizer has
    width: int = 128
    num_layers: int = 2
    mixers: Mapping[str, MixerConfig] = field(
        default_factory=lambda: FrozenDict(attention=GatedAttentionConfig())
    )
    pattern: tuple[str, ...] = ("attention",)
    ffns: Mapping[str, FeedForwardConfig] = field(
        default_factory=lambda: FrozenDict(mlp=GatedMLPConfig())
    )
    ffn_pattern: tuple[str, ...] = ("mlp",)
    norm_eps: float = 1e-6
    zero_centered_norm: bool = False
    tie_embeddings: bool = True
    init_std: float = 0.02
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations; parameters are float32
    remat: Remat = "none"  # kernels: keep only what the kernels name; dots: keep matmul outputs; full: keep nothing
    # false: every layer compiled by itself; small models run faster (nothing is stacked)
    scan_layers: bool = True
    loss_chunk: int = 0  # tokens of a device whose logits exist at once; 0 for all of them
    z_loss: float = 0.0  # weight of logsumexp(logits)^2

    def __post_init__(self):
        # A plain dict is accepted; the dataclass must be hashable, as it is a static argument of jit.
        object.__setattr__(self, "mixers", FrozenDict(self.mixers))
        object.__setattr__(self, "ffns", FrozenDict(self.ffns))
        for name in self.pattern:
            _require(
                name in self.mixers, "pattern", name, f"one of mixers: {', '.join(self.mixers)}"
            )
        for name in self.ffn_pattern:
            _require(name in self.ffns, "ffn_pattern", name, f"one of ffns: {', '.join(self.ffns)}")
            reason = self.ffns[name].not_causal
            _require(
                reason is None,
                f"ffns.{name}",
                reason,
                "a causal feed-forward: this model predicts the next token",
            )
        _require(
            len(self.pattern) > 0 and len(self.ffn_pattern) > 0, "pattern", (), "at least one layer"
        )
        sparse = [f for f in map(self.ffns.get, self.ffn_pattern) if isinstance(f, SparseMoEConfig)]
        same = (
            not any(f.router.residual for f in sparse)
            or len({f.total_experts for f in sparse}) == 1
        )
        _require(
            same,
            "ffns",
            "router.residual",
            "the same number of experts in all sparse feed-forwards",
        )
        first = {f for f in map(self.ffns.get, self.ffn_pattern) if getattr(f, "first_pass", False)}
        _require(
            len(first) <= 1,
            "ffns",
            "first_pass",
            "one mixture at most whose weights come from a first pass",
        )
        whole = self.num_layers >= 1 and self.num_layers % self.period == 0
        _require(whole, "num_layers", self.num_layers, f"a multiple of the period {self.period}")

    @property
    def period(self) -> int:
        """Layers after which both patterns repeat."""
        return math.lcm(len(self.pattern), len(self.ffn_pattern))

    @property
    def block_names(self) -> tuple[str, ...]:
        """The names of the blocks of one period, in parameters, caches and statistics."""
        return tuple(f"layer_{i}" for i in range(self.period))

    @property
    def router_residual(self) -> int:
        """Experts whose logits each sparse layer hands to the next; 0 where no router has a gating residual."""
        sparse = [f for f in map(self.ffns.get, self.ffn_pattern) if isinstance(f, SparseMoEConfig)]
        return max((f.total_experts for f in sparse if f.router.residual), default=0)

    @property
    def first_pass(self) -> LoRAMixtureConfig | None:
        """The mixture whose weights come from a first pass of the model without experts (X-LoRA), if there is one."""
        return next(
            (f for f in map(self.ffns.get, self.ffn_pattern) if getattr(f, "first_pass", False)),
            None,
        )

    def layer(self, i: int) -> tuple[MixerConfig, FeedForwardConfig]:
        """The mixer and the feed-forward of layer i."""
        return self.mixers[self.pattern[i % len(self.pattern)]], self.ffns[
            self.ffn_pattern[i % len(self.ffn_pattern)]
        ]


@dataclass(frozen=True)
class SourceConfig:
    """One source of text. `path`: a folder or file; the standard library needs none."""

    kind: Literal["python_stdlib", "text", "jsonl", "parquet", "array_record", "hf_disk"] = (
        "python_stdlib"
    )
    path: str = ""
    field: str = "text"  # of a JSON record or a table
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is cut into windows."""

    sources: Mapping[str, SourceConfig] = field(
        default_factory=lambda: FrozenDict(main=SourceConfig())
    )
    tokenizer: str = "bytes"  # or the path of a tokenizer.json
    seq_len: int = 256
    validation_fraction: float = 0.05
    cache_dir: str = ""  # "": gatedjax under the user's cache directory
    seed: int = 0

    def __post_init__(self):
        is_fraction = 0.0 < self.validation_fraction < 1.0
        _require(
            is_fraction,
            "validation_fraction",
            self.validation_fraction,
            "a fraction between 0 and 1",
        )
        _require(self.seq_len >= 2, "seq_len", self.seq_len, "at least 2")
        _require(len(self.sources) > 0, "sources", "none", "at least one")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, schedule and the guard against bad steps."""

    name: Literal["adamw", "muon", "lion", "adabelief", "schedule_free"] = "adamw"
    lr: float = 1e-3
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: int = 20
    final_lr_fraction: float = 0.1  # of the peak rate, at the last step
    decay_fraction: float = 0.2  # wsd: share of the steps that decay
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # 0 for none
    ema_decay: float = 0.0  # of the averaged parameters kept for evaluation; 0 for none
    skip_factor: float = 0.0  # a step whose gradient norm exceeds this many times its running mean is skipped; 0: never
    max_skips: int = 10  # in a row; one more ends the run

    def __post_init__(self):
        _require(self.lr > 0, "lr", self.lr, "above 0")
        _require(0.0 <= self.ema_decay < 1.0, "ema_decay", self.ema_decay, "between 0 and 1")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis. `data = 0` takes all devices that the others leave."""

    data: int = 0
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1


@dataclass(frozen=True)
class TrainConfig:
    """The loop. `batch_size` counts rows of a whole optimizer step, over all devices and micro-batches."""

    steps: int = 100
    batch_size: int = 8
    accumulation_steps: int = 1
    seed: int = 0
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 8
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    # without progress: stacks are written; after as many again the run ends; 0: never
    stuck_seconds: float = 1800.0
    sample_prompt: str = "def "
    sample_tokens: int = 200

    def __post_init__(self):
        expected = f"a multiple of accumulation_steps = {self.accumulation_steps}"
        _require(
            self.batch_size % self.accumulation_steps == 0, "batch_size", self.batch_size, expected
        )
        for name in ("steps", "log_every", "eval_every", "eval_batches", "checkpoint_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(
            self.stuck_seconds >= 0, "stuck_seconds", self.stuck_seconds, "0 for never, or seconds"
        )


@dataclass(frozen=True)
class Config:
    """Everything that a run is made from, except the directory it writes to."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
