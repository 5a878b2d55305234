"""The configuration of a run: model, data, optimizer, mesh, loop."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from flax.core import FrozenDict

from gatedjax.config.checks import (
    LARGEST_COUNT,
    LARGEST_SIZE,
    BelowOne,
    Checked,
    Count,
    CountOrZero,
    Fraction,
    NonNegative,
    Positive,
    Range,
    Seed,
    Size,
    SizeOrZero,
)
from gatedjax.config.layers import (
    FeedForwardConfig,
    GatedAttentionConfig,
    GatedMLPConfig,
    MixerConfig,
)
from gatedjax.config.moe import LoRAMixtureConfig, SparseMoEConfig
from gatedjax.config.patterns import check_factors, check_renaming
from gatedjax.config.recurrent import RWKV7ChannelMixConfig, RWKV7Config
from gatedjax.errors import require

Remat = Literal["none", "full", "dots", "kernels"]

HeldOut = Annotated[float, Range(0, 1, includes_low=False, words="a fraction from above 0 to 1")]


def _one_attention() -> Mapping[str, MixerConfig]:
    return FrozenDict(attention=GatedAttentionConfig())


def _one_mlp() -> Mapping[str, FeedForwardConfig]:
    return FrozenDict(mlp=GatedMLPConfig())


@dataclass(frozen=True)
class LoRAConfig(Checked):
    """Low-rank updates of projections (LoRA, arXiv 2106.09685): `x W + (alpha / rank) x A B`.

    A and B train, and beside them only what `optim.trainable` names. Off where the rank is 0.
    """

    rank: SizeOrZero = 0
    alpha: Positive = 16.0
    # patterns of projections: "*.mixer.query", "*.ffn.*", "*"
    targets: tuple[str, ...] = ()

    def check(self) -> None:
        require(
            self.rank > 0 or not self.targets,
            "rank",
            self.rank,
            f"at least 1 with targets = {self.targets}",
        )
        require(
            len(self.targets) > 0 or not self.rank,
            "targets",
            self.targets,
            f"at least one pattern with rank = {self.rank}",
        )


@dataclass(frozen=True)
class ModelConfig(Checked):
    """A decoder: `pattern` names entries of `mixers`, `ffn_pattern` of `ffns`.

    Both patterns repeat until all layers have a mixer and a feed-forward.
    """

    # 0: what the tokenizer has
    vocab_size: SizeOrZero = 0
    width: Size = 128
    num_layers: Annotated[int, Range(1, 4096)] = 2
    mixers: Mapping[str, MixerConfig] = field(default_factory=_one_attention)
    pattern: tuple[str, ...] = ("attention",)
    ffns: Mapping[str, FeedForwardConfig] = field(default_factory=_one_mlp)
    ffn_pattern: tuple[str, ...] = ("mlp",)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    norm_eps: Annotated[float, Range(0, 1, includes_low=False)] = 1e-6
    zero_centered_norm: bool = False
    tie_embeddings: bool = True
    init_std: NonNegative = 0.02
    # of activations; parameters are float32
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # What the backward pass finds in memory. none: everything; kernels: only what the kernels name;
    # dots: the outputs of matmuls; full: nothing, all is computed again.
    remat: Remat = "none"
    # false: every layer compiled by itself; small models run faster (nothing is stacked)
    scan_layers: bool = True
    # tokens of a device whose logits exist at once; 0 for all of them
    loss_chunk: CountOrZero = 0
    # weight of logsumexp(logits)^2
    z_loss: NonNegative = 0.0

    def check(self) -> None:
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

        for name in self.pattern:
            mixer = self.mixers[name]
            if isinstance(mixer, RWKV7Config):
                require(
                    mixer.width == self.width,
                    f"mixers.{name}.num_heads",
                    mixer.num_heads,
                    f"num_heads x head_dim = width = {self.width}",
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

    @property
    def first_rwkv7(self) -> int | None:
        """The first layer with RWKV-7's mixer, whose values the others see; None without one."""
        for i, name in enumerate(self.pattern):
            if isinstance(self.mixers[name], RWKV7Config):
                return i
        return None

    @property
    def starts_by_depth(self) -> bool:
        """Whether a layer's parameters start by its place in the model."""
        has_channel_mix = any(isinstance(ffn, RWKV7ChannelMixConfig) for ffn in self._used_ffns())
        return has_channel_mix or self.first_rwkv7 is not None

    def layer(self, i: int) -> tuple[MixerConfig, FeedForwardConfig]:
        """The mixer and the feed-forward of layer i."""
        mixer = self.pattern[i % len(self.pattern)]
        ffn = self.ffn_pattern[i % len(self.ffn_pattern)]
        return self.mixers[mixer], self.ffns[ffn]


@dataclass(frozen=True)
class StreamConfig(Checked):
    """How a source of kind hf is read, document by document, while the model trains."""

    # of a dataset that has several; "": its default
    subset: str = ""
    split: str = "train"
    # "": the documents that are held out stand at the beginning of `split`
    validation_split: str = ""
    # that many, the first ones, are held out
    validation_documents: Size = 1000
    # put in random order together, anew in each pass; 0: the order of the dataset
    shuffle_documents: SizeOrZero = 0

    def check(self) -> None:
        require(self.split != "", "split", self.split, "a split of the dataset, such as 'train'")
        require(
            self.validation_split != self.split,
            "validation_split",
            self.validation_split,
            "another split than `split`, or '' to hold out its first documents",
        )


@dataclass(frozen=True)
class SourceConfig(Checked):
    """One source of text."""

    # hf: read by the datasets library, streaming. chat: JSON lines of messages, to learn answers
    kind: Literal[
        "python_stdlib",
        "text",
        "jsonl",
        "parquet",
        "array_record",
        "hf_disk",
        "hf",
        "chat",
    ] = "python_stdlib"
    # a folder or file, for hf a name on the Hugging Face hub too; the standard library needs none
    path: str = ""
    # of kind hf
    stream: StreamConfig = field(default_factory=StreamConfig)
    # of a JSON record or a table; "" for an ArrayRecord of plain text. Messages of kind chat are
    # found under messages or conversations, too.
    field: str = "text"
    # how often it is drawn from, relative to the other sources
    weight: Positive = 1.0

    def check(self) -> None:
        is_default = self.stream == StreamConfig()
        require(
            self.kind == "hf" or is_default,
            "kind",
            self.kind,
            f"'hf' with stream = {self.stream}",
        )


def _standard_library() -> Mapping[str, SourceConfig]:
    return FrozenDict(main=SourceConfig())


@dataclass(frozen=True)
class DataConfig(Checked):
    """What is read, and how it is cut into windows."""

    sources: Mapping[str, SourceConfig] = field(default_factory=_standard_library)
    # or the path of a tokenizer.json or of its folder, or a name on the Hugging Face hub
    tokenizer: str = "bytes"
    # the tokenizer's token for it; "": the first of the usual names that it has
    end_of_document: str = ""
    # of sources of kind chat: a .jinja file, a tokenizer_config.json or its folder; "": what is
    # beside the tokenizer's file
    chat_template: str = ""
    # which answers of a conversation are learned
    chat_answers: Literal["all", "last"] = "all"
    seq_len: Annotated[int, Range(2, LARGEST_SIZE)] = 256
    # 1 holds out every document: there is nothing left to train on, and all of it to evaluate.
    # Sources of kind hf hold out stream.validation_documents instead.
    validation_fraction: HeldOut = 0.05
    # "": gatedjax under the user's cache directory
    cache_dir: str = ""
    seed: Seed = 0

    def check(self) -> None:
        require(len(self.sources) > 0, "sources", "none", "at least one")
        require(
            self.tokenizer != "",
            "tokenizer",
            self.tokenizer,
            "'bytes', a path or a name on the hub",
        )


@dataclass(frozen=True)
class OptimConfig(Checked):
    """Optimizer, schedule and the guard against bad steps."""

    name: Literal["adamw", "muon", "lion", "adabelief", "schedule_free"] = "adamw"
    lr: Positive = 1e-3
    # rules "PATTERN -> FACTOR" of parameter names: the first that holds multiplies the rate
    lr_by_name: tuple[str, ...] = ()
    # patterns of parameter names; all others are frozen. (): all train, or with lora its A and B
    trainable: tuple[str, ...] = ()
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: CountOrZero = 20
    # of the peak rate, at the last step
    final_lr_fraction: Fraction = 0.1
    # wsd: fraction of the steps that decay
    decay_fraction: Fraction = 0.2
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    # 0 for none
    clip_norm: NonNegative = 1.0
    # of the averaged parameters kept for evaluation; 0 for none
    ema_decay: BelowOne = 0.0
    # a step whose gradient norm exceeds this many times its running mean is skipped; 0: never
    skip_factor: NonNegative = 0.0
    # in a row; one more ends the run
    max_skips: CountOrZero = 10

    def check(self) -> None:
        # A limit below the mean itself would skip most steps of a healthy run.
        require(
            self.skip_factor == 0 or self.skip_factor > 1,
            "skip_factor",
            self.skip_factor,
            "0, or above 1",
        )
        check_factors("lr_by_name", self.lr_by_name)
        if self.name == "schedule_free":
            self._check_schedule_free()

    def _check_schedule_free(self) -> None:
        require(
            self.schedule == "constant",
            "schedule",
            self.schedule,
            "'constant' with schedule_free",
        )
        # The average is (y - (1 - beta1) z) / beta1: rounding errors grow as 1 / beta1.
        require(
            self.beta1 >= 0.1,
            "beta1",
            self.beta1,
            "at least 0.1 with schedule_free",
        )

    def decay_steps(self, steps: int) -> int:
        """Of a run of `steps`: how many at the end decay under the schedule wsd."""
        return max(1, round(steps * self.decay_fraction))

    def check_schedule(self, steps: int, prefix: str = "") -> None:
        """InputError unless warm-up and decay fit into a run of `steps`.

        Args:
          steps: of the run.
          prefix: of the keys, for the message.
        """
        require(
            self.warmup_steps < steps,
            f"{prefix}warmup_steps",
            self.warmup_steps,
            f"fewer than train.steps = {steps}",
        )
        if self.schedule == "wsd":
            most = steps - self.decay_steps(steps)
            left = f"the {steps} steps without the {self.decay_steps(steps)} that decay"
            require(
                self.warmup_steps <= most,
                f"{prefix}warmup_steps",
                self.warmup_steps,
                f"at most {most}: {left}",
            )


@dataclass(frozen=True)
class MeshConfig(Checked):
    """Devices along each axis. `data = 0` takes all devices that the others leave."""

    data: SizeOrZero = 0
    fsdp: Size = 1
    context: Size = 1
    tensor: Size = 1
    expert: Size = 1


@dataclass(frozen=True)
class TrainConfig(Checked):
    """The loop."""

    steps: Count = 100
    # a run directory, or one step of it (RUN/checkpoints/400): a new run starts from its weights
    init_from: str = ""
    # rules "OLD -> NEW": how the names there become those of this model
    init_rename: tuple[str, ...] = ()
    # patterns of parameters that start fresh all the same
    init_fresh: tuple[str, ...] = ()
    # rows of a whole optimizer step, over all devices and micro-batches
    batch_size: Size = 8
    # micro-batches of an optimizer step
    accumulation_steps: Size = 1
    seed: Seed = 0
    log_every: Count = 10
    eval_every: Count = 100
    eval_batches: Count = 8
    checkpoint_every: Count = 100
    keep_checkpoints: Count = 3
    # without progress: stacks are written; after as many again the run ends; 0: never
    stuck_seconds: Annotated[float, Range(0, 1e8)] = 1800.0
    sample_prompt: str = "def "
    sample_tokens: SizeOrZero = 200

    def check(self) -> None:
        require(
            self.batch_size % self.accumulation_steps == 0,
            "batch_size",
            self.batch_size,
            f"a multiple of accumulation_steps = {self.accumulation_steps}",
        )
        check_renaming("init_rename", self.init_rename)
        for name in ("init_rename", "init_fresh"):
            rules = getattr(self, name)
            require(bool(self.init_from) or not rules, name, rules, "none without init_from")


@dataclass(frozen=True)
class Config(Checked):
    """Everything that a run is made from, except the directory it writes to."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def check(self) -> None:
        self.optim.check_schedule(self.train.steps, prefix="optim.")
        # Positions of a batch are counted in int32.
        tokens = self.train.batch_size * self.data.seq_len
        require(
            tokens <= LARGEST_COUNT,
            "train.batch_size",
            self.train.batch_size,
            f"at most {LARGEST_COUNT // self.data.seq_len} rows of data.seq_len tokens",
        )
