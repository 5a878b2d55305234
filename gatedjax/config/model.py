"""The configuration of a model: which layers it has, in which order, and what they share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from flax.core import FrozenDict

from gatedjax.config.checks import (
    Checked,
    CountOrZero,
    Fraction,
    NonNegative,
    Positive,
    Range,
    Size,
    SizeOrZero,
)
from gatedjax.config.encoder import PatchConfig, Task
from gatedjax.config.layers import (
    FeedForwardConfig,
    GatedAttentionConfig,
    GatedLinearAttentionConfig,
    GatedMLPConfig,
    MixerConfig,
    NoFeedForwardConfig,
    NoMixerConfig,
)
from gatedjax.config.mixing import AssociativeMemoryConfig
from gatedjax.config.moe import LoRAMixtureConfig, SparseMoEConfig, Temperature
from gatedjax.config.on_demand import VersatileMLPConfig
from gatedjax.config.output import OutputConfig
from gatedjax.config.recurrent import RWKV7ChannelMixConfig, RWKV7Config
from gatedjax.config.sources import GatedMemoryConfig, check_sources, takes_keys
from gatedjax.errors import require

Remat = Literal["none", "projections", "kernels", "full"]
# Where the norms of a block stand: x + f(norm(x)), x + norm(f(x)), x + norm(f(norm(x))).
NormPlacement = Literal["pre", "post", "sandwich"]


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
    # W itself, as the targets use it, is -1, 0 or 1 times its mean magnitude; it trains as if it
    # were not rounded (BitNet b1.58, arXiv 2402.17764)
    ternary: bool = False
    # What those W are multiplied with has 8 bits: 255 steps between a token's largest magnitude and
    # its negative. Updates see it as it is.
    eight_bit_inputs: bool = False
    # Updates are multiplied by a learned number of each projection, which starts here (Hybrid Gated
    # Flow, arXiv 2602.05269); 0: by none.
    gate_start: Fraction = 0.0
    # E updates of each projection, weighted token by token and layer by layer by
    # softmax(h W / temperature), h of a first pass without updates (X-LoRA, arXiv 2402.07148);
    # 0: one. The W are `lora_classifier`, which only `optim.trainable` trains, as with it A and B.
    num_experts: SizeOrZero = 0
    # 0: all
    experts_per_token: SizeOrZero = 0
    temperature: Temperature = 1.0

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
        require(
            self.ternary or not self.eight_bit_inputs,
            "eight_bit_inputs",
            self.eight_bit_inputs,
            "false without ternary",
        )
        require(
            self.rank > 0 or not self.num_experts,
            "rank",
            self.rank,
            f"at least 1 with num_experts = {self.num_experts}",
        )
        require(
            self.experts_per_token <= self.num_experts,
            "experts_per_token",
            self.experts_per_token,
            f"between 0 (all) and num_experts = {self.num_experts}",
        )


@dataclass(frozen=True)
class BlockConfig:
    """A block of a model's program: one layer, or the layer at one place of every period.

    `ModelConfig.blocks` makes them.

    Attributes:
      name: in parameters, caches and statistics: prefix_0, layer_0, suffix_0 and so on.
      layers: the numbers of its layers in the model, which counts from 0.
      is_repeated: it stands in the period. Its arrays are stacked over periods, and its parameters
        lie under "periods".
      mixer: of these layers.
      feed_forward: of these layers.
      norm: where their norms stand.
    """

    name: str
    layers: range
    is_repeated: bool
    mixer: MixerConfig
    feed_forward: FeedForwardConfig
    norm: NormPlacement

    @property
    def path(self) -> tuple[str, ...]:
        """Where its parameters lie among those of the model."""
        return ("periods", self.name) if self.is_repeated else (self.name,)


@dataclass(frozen=True)
class ModelConfig(Checked):
    """A model's layers: `pattern` names entries of `mixers`, `ffn_pattern` of `ffns`.

    Both patterns repeat until all layers have a mixer and a feed-forward. Layers that are no part
    of that stand before (`prefix`) or after it (`suffix`).
    """

    # What is predicted: the next token; or by an encoder, whose tokens see each other in both
    # directions: tokens that were masked (masked_lm), the class of an image (classify).
    task: Task = "lm"
    # of images
    patches: PatchConfig = field(default_factory=PatchConfig)
    # 0: what the tokenizer has; of task classify: classes, 0 for those of the data
    vocab_size: SizeOrZero = 0
    width: Size = 128
    # all of them: prefix, periods and suffix
    num_layers: Annotated[int, Range(1, 4096)] = 2
    mixers: Mapping[str, MixerConfig] = field(default_factory=_one_attention)
    pattern: tuple[str, ...] = ("attention",)
    ffns: Mapping[str, FeedForwardConfig] = field(default_factory=_one_mlp)
    ffn_pattern: tuple[str, ...] = ("mlp",)
    # the mixers of the layers before the first period, and their feed-forwards, as many
    prefix: tuple[str, ...] = ()
    ffn_prefix: tuple[str, ...] = ()
    # the same after the last period
    suffix: tuple[str, ...] = ()
    ffn_suffix: tuple[str, ...] = ()
    # Of a layer, by the name of its mixer: pre, x + f(norm(x)), where there is no entry; post,
    # x + norm(f(x)) (OLMo 2); sandwich, both. It holds for mixer and feed-forward.
    norm_placement: Mapping[str, NormPlacement] = field(default_factory=FrozenDict)
    # w of a residual stream w x + sqrt(1 - w^2) f(x), for mixer and feed-forward (shaped
    # transformers, arXiv 2306.17759); None for x + f(x)
    residual_weight: Fraction | None = None
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    # of the residual stream. rms: RMSNorm; layer: LayerNorm, with a bias (RWKV-7)
    norm_kind: Literal["rms", "layer"] = "rms"
    # a norm behind the embeddings (RWKV-7)
    embedding_norm: bool = False
    # of all norms but those that have an eps of their own
    norm_eps: Annotated[float, Range(0, 1, includes_low=False)] = 1e-6
    # RMSNorms of the residual stream scale by 1 + w (Qwen3-Next)
    zero_centered_norm: bool = False
    tie_embeddings: bool = True
    init_std: NonNegative = 0.02
    # of activations; parameters are float32
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # What the backward pass finds in memory of the layers; the rest it computes again. none:
    # everything; projections: what matrices and kernels return (norms, activations, rotations run
    # again); kernels: what the kernels return, and the rows that exchange "ragged_all_to_all" has
    # brought (matrices run again, a third of their time); full: each period's input.
    remat: Remat = "none"
    # false: every layer compiled by itself; small models run faster (nothing is stacked)
    scan_layers: bool = True
    # With scan_layers. auto: a training step compiles each layer by itself where the steps of the
    # run save ten times what compiling them takes longer (`aot/unrolling.py`).
    unroll: Literal["never", "auto"] = "never"
    # tokens of a device whose logits exist at once; 0 for all of them
    loss_chunk: CountOrZero = 0
    # weight of logsumexp(logits)^2
    z_loss: NonNegative = 0.0
    # what stands in the place of softmax and cross-entropy
    output: OutputConfig = field(default_factory=OutputConfig)

    def check(self) -> None:
        self.output.check_model(self.vocab_size, self.tie_embeddings, self.z_loss)
        require(len(self.pattern) > 0, "pattern", self.pattern, "at least one layer")
        require(len(self.ffn_pattern) > 0, "ffn_pattern", self.ffn_pattern, "at least one layer")
        self._check_names()
        self._check_direction()
        self._check_number()
        require(
            self.norm_kind == "rms" or not self.zero_centered_norm,
            "zero_centered_norm",
            self.zero_centered_norm,
            f"false with norm_kind {self.norm_kind!r}",
        )
        self._check_blocks()
        self._check_sparse()
        self._check_attention()

    def _check_names(self) -> None:
        """Everything that is named is there."""
        known = ", ".join(self.mixers)
        for key in ("pattern", "prefix", "suffix", "norm_placement"):
            for name in getattr(self, key):
                require(name in self.mixers, key, name, f"one of mixers: {known}")
        known = ", ".join(self.ffns)
        for key in ("ffn_pattern", "ffn_prefix", "ffn_suffix"):
            for name in getattr(self, key):
                require(name in self.ffns, key, name, f"one of ffns: {known}")

    def _check_direction(self) -> None:
        """The layers see as far as the task allows, and have what it gives them."""
        mixers = {*self.prefix, *self.pattern, *self.suffix}
        ffns = {*self.ffn_prefix, *self.ffn_pattern, *self.ffn_suffix}
        layers: dict[str, MixerConfig | FeedForwardConfig] = {}
        layers |= {f"mixers.{name}": self.mixers[name] for name in sorted(mixers)}
        layers |= {f"ffns.{name}": self.ffns[name] for name in sorted(ffns)}
        for key, layer in layers.items():
            what = "mixer" if key.startswith("mixers.") else "feed-forward"
            reason = getattr(layer, "not_causal", None)
            expected = f"a causal {what}: this model predicts the next token"
            if self.task != "lm":
                causal = f"kind {layer.kind!r}: tokens do not see later ones"
                reason = getattr(layer, "only_causal", causal)
                expected = f"a {what} for both directions: model.task is {self.task!r}"
            require(reason is None, key, reason, expected)
            if self.task == "classify":
                self._check_layer_of_images(key, layer)
            else:
                has_grid = isinstance(layer, GatedAttentionConfig) and layer.rope_grid
                expected = f"false with model.task {self.task!r}: text has no grid"
                require(not has_grid, f"{key}.rope_grid", True, expected)
        if self.task == "classify":
            self._check_images()

    def _check_layer_of_images(self, key: str, layer: MixerConfig | FeedForwardConfig) -> None:
        """Patches have no ids."""
        by_id = {}
        if isinstance(layer, GatedAttentionConfig):
            by_id["value_bank"] = layer.value_bank > 0
        if isinstance(layer, SparseMoEConfig):
            by_id["router.selection"] = layer.router.selection == "hash"
            by_id["router.second_kind"] = len(layer.router.second_kind) > 0
        if isinstance(layer, LoRAMixtureConfig):
            by_id["first_pass"] = layer.first_pass
        for name, is_set in by_id.items():
            expected = "another value with model.task 'classify': patches have no token ids"
            require(not is_set, f"{key}.{name}", "one that goes by token ids", expected)

    def _check_images(self) -> None:
        require(
            not self.lora.num_experts,
            "lora.num_experts",
            self.lora.num_experts,
            "0 with model.task 'classify': patches have no token ids",
        )
        require(
            self.patches.positions != "sincos" or self.width % 4 == 0,
            "width",
            self.width,
            "a multiple of 4 with patches.positions 'sincos'",
        )

    def _check_number(self) -> None:
        """The layers are a prefix, periods, at least one, and a suffix."""
        for key in ("prefix", "suffix"):
            ffns = getattr(self, f"ffn_{key}")
            expected = len(getattr(self, key))
            require(
                len(ffns) == expected,
                f"ffn_{key}",
                ffns,
                f"as many as in {key}, {expected}",
            )
        others = len(self.prefix) + len(self.suffix)
        repeated = self.num_layers - others
        beside = f"{others} of prefix and suffix and " if others else ""
        require(
            repeated > 0 and repeated % self.period == 0,
            "num_layers",
            self.num_layers,
            f"{beside}a multiple of the period {self.period}",
        )

    def _check_blocks(self) -> None:
        for block in self.blocks:
            has_mixer = not isinstance(block.mixer, NoMixerConfig)
            require(
                has_mixer or not isinstance(block.feed_forward, NoFeedForwardConfig),
                "ffns",
                f"none in layer {block.layers[0]}",
                "a feed-forward in a layer without a mixer",
            )
            if isinstance(block.feed_forward, VersatileMLPConfig):
                is_plain = block.norm == "pre" and self.residual_weight is None
                expected = "norm_placement 'pre' and no residual_weight: it has its norm itself"
                require(is_plain, "ffns", block.feed_forward.kind, expected)
            floors = _decay_floors(block.mixer)
            require(
                floors is None or floors == self.decay_floors,
                f"mixers.{self._mixer_name(block.layers[0])}.decay_floor",
                "by_depth",
                "as many heads and channels in all layers that have it",
            )
            if isinstance(block.mixer, RWKV7Config):
                require(
                    block.mixer.width == self.width,
                    f"mixers.{self._mixer_name(block.layers[0])}.num_heads",
                    block.mixer.num_heads,
                    f"num_heads x head_dim = width = {self.width}",
                )
            if isinstance(block.mixer, AssociativeMemoryConfig):
                require(
                    block.mixer.width == self.width,
                    f"mixers.{self._mixer_name(block.layers[0])}.width",
                    block.mixer.width,
                    f"the model's width {self.width}",
                )

    def _check_attention(self) -> None:
        """What attention layers have in common with each other and with the model."""
        banks = set()
        for name, mixer in self._used_attention().items():
            divided = {
                "num_heads": mixer.num_heads if mixer.gate_input == "head" else 1,
                "num_kv_heads": mixer.kv_heads if mixer.selective_rope != "none" else 1,
            }
            for key, parts in divided.items():
                expected = f"a divisor of the width {self.width}"
                require(self.width % parts == 0, f"mixers.{name}.{key}", parts, expected)
            if mixer.value_bank:
                banks.add((mixer.value_bank, mixer.kv_heads, mixer.head_dim))
        expected = "one bank: the same value_bank, key heads and head_dim in all layers with one"
        require(len(banks) <= 1, "mixers", sorted(banks), expected)
        for blocks in (self.prefix_blocks, self.repeated_blocks, self.suffix_blocks):
            self._check_shared_weights(blocks)
        check_sources(self.blocks, lambda b: f"mixers.{self._mixer_name(b.layers[0])}")

    def _check_shared_weights(self, blocks: tuple[BlockConfig, ...]) -> None:
        """A layer that shares weights comes after one, in the same period, that has its own."""
        first = None
        for block in blocks:
            mixer = block.mixer
            # A converted layer has no weights to share.
            if mixer.kind != GatedAttentionConfig.kind:
                continue
            assert isinstance(mixer, GatedAttentionConfig)
            key = f"mixers.{self._mixer_name(block.layers[0])}"
            if not mixer.shares_weights:
                first = mixer
                continue
            require(
                first is not None,
                f"{key}.shares_weights",
                True,
                "a layer before it with weights of its own, in the same prefix, pattern or suffix",
            )
            assert first is not None
            expected = mixer.with_weights_of(first)
            for name, value in vars(expected).items():
                own = getattr(mixer, name)
                require(own == value, f"{key}.{name}", own, f"{value}, as the layer that it shares")

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
        require(
            not self._first_passes() or not self.lora.num_experts,
            "lora.num_experts",
            self.lora.num_experts,
            "0 with a mixture in ffns whose weights come from a first pass too",
        )

    def _used_attention(self) -> dict[str, GatedAttentionConfig]:
        """The attention layers of the program, by the names of their mixers."""
        used = {}
        for block in self.blocks:
            if isinstance(block.mixer, GatedAttentionConfig):
                used[self._mixer_name(block.layers[0])] = block.mixer
        return used

    def _used_ffns(self) -> list[FeedForwardConfig]:
        return [block.feed_forward for block in self.blocks]

    def _sparse_ffns(self) -> list[SparseMoEConfig]:
        return [ffn for ffn in self._used_ffns() if isinstance(ffn, SparseMoEConfig)]

    def _first_passes(self) -> set[LoRAMixtureConfig]:
        mixtures = [ffn for ffn in self._used_ffns() if isinstance(ffn, LoRAMixtureConfig)]
        return {mixture for mixture in mixtures if mixture.first_pass}

    @property
    def has_head(self) -> bool:
        """Whether the output matrix is one of its own, and not the embedding table."""
        return not self.tie_embeddings or self.task == "classify"

    @property
    def period(self) -> int:
        """Layers after which both patterns repeat."""
        return math.lcm(len(self.pattern), len(self.ffn_pattern))

    @property
    def num_periods(self) -> int:
        """How often they do."""
        return (self.num_layers - len(self.prefix) - len(self.suffix)) // self.period

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """The blocks of the program: of the prefix, of one period, of the suffix."""
        return (*self.prefix_blocks, *self.repeated_blocks, *self.suffix_blocks)

    @property
    def prefix_blocks(self) -> tuple[BlockConfig, ...]:
        """The layers before the first period."""
        numbers = range(len(self.prefix))
        return tuple(self._block(f"prefix_{i}", range(i, i + 1)) for i in numbers)

    @property
    def repeated_blocks(self) -> tuple[BlockConfig, ...]:
        """The blocks of one period."""
        first = len(self.prefix)
        end = self.num_layers - len(self.suffix)
        blocks = []
        for i in range(self.period):
            layers = range(first + i, end, self.period)
            blocks.append(self._block(f"layer_{i}", layers, is_repeated=True))
        return tuple(blocks)

    @property
    def suffix_blocks(self) -> tuple[BlockConfig, ...]:
        """The layers after the last period."""
        first = self.num_layers - len(self.suffix)
        blocks = []
        for i in range(len(self.suffix)):
            blocks.append(self._block(f"suffix_{i}", range(first + i, first + i + 1)))
        return tuple(blocks)

    def _block(
        self,
        name: str,
        layers: range,
        is_repeated: bool = False,
    ) -> BlockConfig:
        mixer, feed_forward = self.layer(layers[0])
        placement = self.norm_placement.get(self._mixer_name(layers[0]), "pre")
        return BlockConfig(name, layers, is_repeated, mixer, feed_forward, placement)

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
    def first_pass(self) -> LoRAMixtureConfig | LoRAConfig | None:
        """The mixture whose weights come from a first pass of the model without experts (X-LoRA).

        None if there is no such mixture.
        """
        if self.lora.num_experts:
            return self.lora
        return next(iter(self._first_passes()), None)

    @property
    def value_bank(self) -> tuple[int, int, int] | None:
        """(slots, key heads, channels) of the value bank; None where no layer has one."""
        for mixer in self._used_attention().values():
            if mixer.value_bank:
                return mixer.value_bank, mixer.kv_heads, mixer.head_dim
        return None

    @property
    def shares_weights(self) -> bool:
        """Whether some attention layer has the weights of another one."""
        return any(mixer.shares_weights for mixer in self._used_attention().values())

    @property
    def shares_cache(self) -> bool:
        """Whether some attention layer has the keys and values of another one."""
        return any(takes_keys(block.mixer) for block in self.blocks)

    @property
    def shares_memory(self) -> bool:
        """Whether some layer gates what another one reads from its state."""
        return any(isinstance(block.mixer, GatedMemoryConfig) for block in self.blocks)

    @property
    def first_rwkv7(self) -> int | None:
        """The first layer with RWKV-7's mixer, whose values the others see; None without one."""
        for block in self.blocks:
            if isinstance(block.mixer, RWKV7Config):
                return block.layers[0]
        return None

    @property
    def decay_floors(self) -> tuple[int, int] | None:
        """Heads and channels of the forget gates whose floors rise with the depth; None if none."""
        floors = (_decay_floors(block.mixer) for block in self.blocks)
        return next((sizes for sizes in floors if sizes is not None), None)

    @property
    def starts_by_depth(self) -> bool:
        """Whether a layer starts or computes by its place in the model."""
        has_channel_mix = any(isinstance(ffn, RWKV7ChannelMixConfig) for ffn in self._used_ffns())
        is_told = self.first_rwkv7 is not None or self.decay_floors is not None
        return has_channel_mix or is_told

    def layer(self, i: int) -> tuple[MixerConfig, FeedForwardConfig]:
        """The mixer and the feed-forward of layer i."""
        ffn = _at(i, self.num_layers, self.ffn_prefix, self.ffn_pattern, self.ffn_suffix)
        return self.mixers[self._mixer_name(i)], self.ffns[ffn]

    def _mixer_name(self, i: int) -> str:
        return _at(i, self.num_layers, self.prefix, self.pattern, self.suffix)


def _at(
    i: int,
    num_layers: int,
    prefix: tuple[str, ...],
    pattern: tuple[str, ...],
    suffix: tuple[str, ...],
) -> str:
    """The name for layer i."""
    if i < len(prefix):
        return prefix[i]
    after = i - (num_layers - len(suffix))
    if after >= 0:
        return suffix[after]
    return pattern[(i - len(prefix)) % len(pattern)]


def _decay_floors(mixer: MixerConfig) -> tuple[int, int] | None:
    """Heads and channels of a mixer's forget gates whose floors rise with the depth."""
    has_gate = isinstance(mixer, GatedLinearAttentionConfig)
    if has_gate and mixer.decay_floor == "by_depth":
        return mixer.num_heads, mixer.key_dim
    return None
