"""The configuration of a run: data, optimizer, mesh, loop; the model is in `model.py`."""

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
from gatedjax.config.encoder import ImageConfig, MaskingConfig
from gatedjax.config.model import ModelConfig
from gatedjax.config.patterns import check_factors, check_renaming
from gatedjax.errors import require

# Kinds of sources that hold images and their classes.
IMAGE_KINDS = ("digits", "mnist1d", "images", "image_parquet")
# Kinds that need no path: they come with a package.
WITHOUT_PATH = ("python_stdlib", "digits", "mnist1d")

HeldOut = Annotated[float, Range(0, 1, includes_low=False, words="a fraction from above 0 to 1")]


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
    """One source of text, or of images."""

    # hf: read by the datasets library, streaming. chat: JSON lines of messages, to learn answers.
    # Of images: digits and mnist1d need no path; images: a folder with one folder for each class;
    # image_parquet: a column of files of images, and `label`.
    kind: Literal[
        "python_stdlib",
        "text",
        "jsonl",
        "parquet",
        "array_record",
        "hf_disk",
        "hf",
        "chat",
        "digits",
        "mnist1d",
        "images",
        "image_parquet",
    ] = "python_stdlib"
    # a folder or file, for hf a name on the Hugging Face hub too; the standard library needs none
    path: str = ""
    # of kind hf
    stream: StreamConfig = field(default_factory=StreamConfig)
    # of a JSON record or a table; "" for an ArrayRecord of plain text. Messages of kind chat are
    # found under messages or conversations, too.
    field: str = "text"
    # of kind image_parquet: the column of the classes
    label: str = "label"
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
    # of images: their patches, and the class token
    seq_len: Annotated[int, Range(2, LARGEST_SIZE)] = 256
    images: ImageConfig = field(default_factory=ImageConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
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
    # of TPUs with SparseCores (v5p, v6e, v7x): collectives run there while the chip computes
    async_collectives: bool = True


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
        self._check_task()
        # Positions of a batch are counted in int32.
        tokens = self.train.batch_size * self.data.seq_len
        require(
            tokens <= LARGEST_COUNT,
            "train.batch_size",
            self.train.batch_size,
            f"at most {LARGEST_COUNT // self.data.seq_len} rows of data.seq_len tokens",
        )

    def _check_task(self) -> None:
        """The data are of the kind that the model's task takes."""
        task = self.model.task
        is_of_images = task == "classify"
        for name, source in self.data.sources.items():
            require(
                (source.kind in IMAGE_KINDS) == is_of_images,
                f"data.sources.{name}.kind",
                source.kind,
                f"a kind of {'images' if is_of_images else 'text'} with model.task {task!r}",
            )
            require(
                task != "masked_lm" or source.kind not in ("hf", "chat"),
                f"data.sources.{name}.kind",
                source.kind,
                "files of text with model.task 'masked_lm'",
            )
        if not is_of_images:
            return
        patches = self.model.patches
        require(
            self.data.seq_len == patches.num_tokens,
            "data.seq_len",
            self.data.seq_len,
            f"the tokens of an image of model.patches, {patches.num_tokens}",
        )
        for name in ("mean", "std"):
            value = getattr(self.data.images, name)
            require(
                len(value) in (1, patches.channels),
                f"data.images.{name}",
                value,
                f"one number, or one for each of {patches.channels} channels",
            )
        require(
            self.mesh.context == 1,
            "mesh.context",
            self.mesh.context,
            "1 with model.task 'classify': an image is not cut over devices",
        )
