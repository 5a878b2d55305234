"""The configuration of a run: model, data, optimizer, mesh, loop."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from flax.core import FrozenDict

from gatedjax.config import checks
from gatedjax.config.checks import Checked, above_zero, at_least, below_one, fractions
from gatedjax.config.layers import (
    FeedForwardConfig,
    GatedAttentionConfig,
    GatedMLPConfig,
    MixerConfig,
)
from gatedjax.config.moe import LoRAMixtureConfig, SparseMoEConfig
from gatedjax.errors import require

Remat = Literal["none", "full", "dots", "kernels"]


def _one_attention() -> Mapping[str, MixerConfig]:
    return FrozenDict(attention=GatedAttentionConfig())


def _one_mlp() -> Mapping[str, FeedForwardConfig]:
    return FrozenDict(mlp=GatedMLPConfig())


@dataclass(frozen=True)
class ModelConfig(Checked):
    """A decoder: `pattern` names entries of `mixers`, `ffn_pattern` of `ffns`.

    Both patterns repeat until all layers have a mixer and a feed-forward.
    """

    # 0: what the tokenizer has
    vocab_size: int = 0
    width: int = 128
    num_layers: int = 2
    mixers: Mapping[str, MixerConfig] = field(default_factory=_one_attention)
    pattern: tuple[str, ...] = ("attention",)
    ffns: Mapping[str, FeedForwardConfig] = field(default_factory=_one_mlp)
    ffn_pattern: tuple[str, ...] = ("mlp",)
    norm_eps: float = 1e-6
    zero_centered_norm: bool = False
    tie_embeddings: bool = True
    init_std: float = 0.02
    # of activations; parameters are float32
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # What the backward pass finds in memory. none: everything; kernels: only what the kernels name;
    # dots: the outputs of matmuls; full: nothing, all is computed again.
    remat: Remat = "none"
    # false: every layer compiled by itself; small models run faster (nothing is stacked)
    scan_layers: bool = True
    # tokens of a device whose logits exist at once; 0 for all of them
    loss_chunk: int = 0
    # weight of logsumexp(logits)^2
    z_loss: float = 0.0

    def check(self) -> None:
        at_least(self, 0, "vocab_size", "init_std", "loss_chunk", "z_loss")
        at_least(self, 1, "width", "num_layers")
        above_zero(self, "norm_eps")
        self._check_patterns()
        self._check_sparse()
        require(
            self.num_layers % self.period == 0,
            "num_layers",
            self.num_layers,
            f"a multiple of the period {self.period}",
        )

    def _check_patterns(self) -> None:
        require(len(self.pattern) > 0, "pattern", self.pattern, "at least one layer")
        require(len(self.ffn_pattern) > 0, "ffn_pattern", self.ffn_pattern, "at least one layer")
        for name in self.pattern:
            known = ", ".join(self.mixers)
            require(name in self.mixers, "pattern", name, f"one of mixers: {known}")
        for name in self.ffn_pattern:
            known = ", ".join(self.ffns)
            require(name in self.ffns, "ffn_pattern", name, f"one of ffns: {known}")
            reason = self.ffns[name].not_causal
            require(
                reason is None,
                f"ffns.{name}",
                reason,
                "a causal feed-forward: this model predicts the next token",
            )

    def _check_sparse(self) -> None:
        sparse = self._sparse_ffns()
        numbers_of_experts = {ffn.total_experts for ffn in sparse}
        has_residual = any(ffn.router.residual for ffn in sparse)
        require(
            not has_residual or len(numbers_of_experts) == 1,
            "ffns",
            "router.residual",
            "the same number of experts in all sparse feed-forwards",
        )
        require(
            len(self._first_passes()) <= 1,
            "ffns",
            "first_pass",
            "one mixture at most whose weights come from a first pass",
        )

    def _used_ffns(self) -> list[FeedForwardConfig]:
        return [self.ffns[name] for name in self.ffn_pattern]

    def _sparse_ffns(self) -> list[SparseMoEConfig]:
        return [ffn for ffn in self._used_ffns() if isinstance(ffn, SparseMoEConfig)]

    def _first_passes(self) -> set[LoRAMixtureConfig]:
        mixtures = [ffn for ffn in self._used_ffns() if isinstance(ffn, LoRAMixtureConfig)]
        return {mixture for mixture in mixtures if mixture.first_pass}

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
        """Experts whose logits each sparse layer passes to the next.

        0 where no router has a gating residual.
        """
        numbers_of_experts = [
            ffn.total_experts for ffn in self._sparse_ffns() if ffn.router.residual
        ]
        return max(numbers_of_experts, default=0)

    @property
    def first_pass(self) -> LoRAMixtureConfig | None:
        """The mixture whose weights come from a first pass of the model without experts (X-LoRA).

        None if there is no such mixture.
        """
        return next(iter(self._first_passes()), None)

    def layer(self, i: int) -> tuple[MixerConfig, FeedForwardConfig]:
        """The mixer and the feed-forward of layer i."""
        mixer = self.pattern[i % len(self.pattern)]
        ffn = self.ffn_pattern[i % len(self.ffn_pattern)]
        return self.mixers[mixer], self.ffns[ffn]


@dataclass(frozen=True)
class SourceConfig(Checked):
    """One source of text."""

    kind: Literal["python_stdlib", "text", "jsonl", "parquet", "array_record", "hf_disk"] = (
        "python_stdlib"
    )
    # a folder or file; the standard library needs none
    path: str = ""
    # of a JSON record or a table; "" for an ArrayRecord of plain text
    field: str = "text"
    # how often it is drawn from, relative to the other sources
    weight: float = 1.0

    def check(self) -> None:
        above_zero(self, "weight")


def _standard_library() -> Mapping[str, SourceConfig]:
    return FrozenDict(main=SourceConfig())


@dataclass(frozen=True)
class DataConfig(Checked):
    """What is read, and how it is cut into windows."""

    sources: Mapping[str, SourceConfig] = field(default_factory=_standard_library)
    # or the path of a tokenizer.json
    tokenizer: str = "bytes"
    seq_len: int = 256
    validation_fraction: float = 0.05
    # "": gatedjax under the user's cache directory
    cache_dir: str = ""
    seed: int = 0

    def check(self) -> None:
        require(len(self.sources) > 0, "sources", "none", "at least one")
        require(self.tokenizer != "", "tokenizer", self.tokenizer, "'bytes' or a path")
        at_least(self, 2, "seq_len")
        is_proper = 0.0 < self.validation_fraction < 1.0
        require(
            is_proper,
            "validation_fraction",
            self.validation_fraction,
            "a fraction between 0 and 1",
        )
        checks.seed(self)


@dataclass(frozen=True)
class OptimConfig(Checked):
    """Optimizer, schedule and the guard against bad steps."""

    name: Literal["adamw", "muon", "lion", "adabelief", "schedule_free"] = "adamw"
    lr: float = 1e-3
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: int = 20
    # of the peak rate, at the last step
    final_lr_fraction: float = 0.1
    # wsd: fraction of the steps that decay
    decay_fraction: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    # 0 for none
    clip_norm: float = 1.0
    # of the averaged parameters kept for evaluation; 0 for none
    ema_decay: float = 0.0
    # a step whose gradient norm exceeds this many times its running mean is skipped; 0: never
    skip_factor: float = 0.0
    # in a row; one more ends the run
    max_skips: int = 10

    def check(self) -> None:
        above_zero(self, "lr", "eps")
        # A negative clip_norm would reverse the gradient, silently.
        at_least(self, 0, "warmup_steps", "weight_decay", "clip_norm", "skip_factor", "max_skips")
        fractions(self, "final_lr_fraction", "decay_fraction")
        below_one(self, "beta1", "beta2", "ema_decay")


@dataclass(frozen=True)
class MeshConfig(Checked):
    """Devices along each axis. `data = 0` takes all devices that the others leave."""

    data: int = 0
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    def check(self) -> None:
        at_least(self, 0, "data")
        at_least(self, 1, "fsdp", "context", "tensor", "expert")


@dataclass(frozen=True)
class TrainConfig(Checked):
    """The loop."""

    steps: int = 100
    # rows of a whole optimizer step, over all devices and micro-batches
    batch_size: int = 8
    # micro-batches of an optimizer step
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

    def check(self) -> None:
        at_least(self, 1, "steps", "batch_size", "accumulation_steps", "log_every", "eval_every")
        at_least(self, 1, "eval_batches", "checkpoint_every", "keep_checkpoints")
        at_least(self, 0, "stuck_seconds", "sample_tokens")
        checks.seed(self)
        require(
            self.batch_size % self.accumulation_steps == 0,
            "batch_size",
            self.batch_size,
            f"a multiple of accumulation_steps = {self.accumulation_steps}",
        )


@dataclass(frozen=True)
class Config(Checked):
    """Everything that a run is made from, except the directory it writes to."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
