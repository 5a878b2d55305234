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
)
from gatedjax.config.lora import LoRAConfig
from gatedjax.config.model_checks import check_model
from gatedjax.config.moe import LoRAMixtureConfig, SparseMoEConfig
from gatedjax.config.output import OutputConfig
from gatedjax.config.recurrent import RWKV7ChannelMixConfig, RWKV7Config
from gatedjax.config.rwkv6 import RWKV6ChannelMixConfig, RWKV6Config
from gatedjax.config.shared_router import SharedRouterConfig
from gatedjax.config.sources import GatedMemoryConfig, cross_decoder, takes_keys

Remat = Literal["none", "projections", "kernels", "full"]

# Where the norms of a block stand: x + f(norm(x)), x + norm(f(x)), x + norm(f(norm(x))).
NormPlacement = Literal["pre", "post", "sandwich"]


def _one_attention() -> Mapping[str, MixerConfig]:
    return FrozenDict(attention=GatedAttentionConfig())


def _one_mlp() -> Mapping[str, FeedForwardConfig]:
    return FrozenDict(mlp=GatedMLPConfig())


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

    @property
    def decay_floors(self) -> tuple[int, int] | None:
        """Heads and channels of forget gates whose floors rise with the depth; None without."""
        mixer = self.mixer
        if isinstance(mixer, GatedLinearAttentionConfig) and mixer.decay_floor == "by_depth":
            return mixer.num_heads, mixer.key_dim
        return None


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
    # before all layers
    shared_router: SharedRouterConfig = field(default_factory=SharedRouterConfig)
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
    # everything; projections: what matrices and kernels return, queries and keys as attention's
    # kernels read them, the residual stream between mixer and feed-forward and a number a token of
    # each RMSNorm (what norms multiply and activations run again); kernels: what the kernels return
    # but for rotations, and the rows that exchange "ragged_all_to_all" has brought (matrices run
    # again, a third of their time); full: each period's input.
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
        check_model(self)

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
        placement = self.norm_placement.get(self.mixer_name(layers[0]), "pre")
        return BlockConfig(name, layers, is_repeated, mixer, feed_forward, placement)

    def layer(self, i: int) -> tuple[MixerConfig, FeedForwardConfig]:
        """The mixer and the feed-forward of layer i."""
        ffn = _at(i, self.num_layers, self.ffn_prefix, self.ffn_pattern, self.ffn_suffix)
        return self.mixers[self.mixer_name(i)], self.ffns[ffn]

    def mixer_name(self, i: int) -> str:
        """The key in `mixers` of the mixer of layer i."""
        return _at(i, self.num_layers, self.prefix, self.pattern, self.suffix)

    def used_attention(self) -> dict[str, GatedAttentionConfig]:
        """The attention layers of the program, by the names of their mixers."""
        used = {}
        for block in self.blocks:
            if isinstance(block.mixer, GatedAttentionConfig):
                used[self.mixer_name(block.layers[0])] = block.mixer
        return used

    def _used_ffns(self) -> list[FeedForwardConfig]:
        return [block.feed_forward for block in self.blocks]

    def sparse_ffns(self) -> list[SparseMoEConfig]:
        """The sparse feed-forwards of the program."""
        return [ffn for ffn in self._used_ffns() if isinstance(ffn, SparseMoEConfig)]

    def given_ffns(self) -> list[SparseMoEConfig]:
        """Those whose experts a router before all layers chooses, or a caller."""
        return [ffn for ffn in self.sparse_ffns() if ffn.router.selection == "given"]

    def first_passes(self) -> set[LoRAMixtureConfig]:
        """The mixtures whose weights come from a first pass; checked to be one at most."""
        mixtures = [ffn for ffn in self._used_ffns() if isinstance(ffn, LoRAMixtureConfig)]
        return {mixture for mixture in mixtures if mixture.first_pass}

    @property
    def router_residual(self) -> int:
        """Experts whose logits each sparse layer passes to the next.

        0 where no router has a gating residual.
        """
        numbers_of_experts = [
            ffn.total_experts for ffn in self.sparse_ffns() if ffn.router.residual
        ]
        return max(numbers_of_experts, default=0)

    @property
    def first_pass(self) -> LoRAMixtureConfig | LoRAConfig | None:
        """The mixture whose weights come from a first pass of the model without experts (X-LoRA).

        None if there is no such mixture.
        """
        if self.lora.num_experts:
            return self.lora
        return next(iter(self.first_passes()), None)

    @property
    def given_experts(self) -> int:
        """Experts that a router before all layers chooses among."""
        return max((ffn.total_experts for ffn in self.given_ffns()), default=0)

    @property
    def router_model(self) -> "ModelConfig | None":
        """The model whose hidden states the router before all layers goes by; None without one."""
        router = self.shared_router
        if not router.num_layers:
            return None
        attention = GatedAttentionConfig(
            num_heads=router.num_heads,
            num_kv_heads=router.num_heads,
            head_dim=router.head_dim,
        )
        return ModelConfig(
            vocab_size=self.vocab_size,
            width=self.width,
            num_layers=router.num_layers,
            mixers=FrozenDict(attention=attention),
            ffns=FrozenDict(mlp=GatedMLPConfig(hidden=router.hidden)),
            dtype=self.dtype,
        )

    @property
    def value_bank(self) -> tuple[int, int, int] | None:
        """(slots, key heads, channels) of the value bank; None where no layer has one."""
        for mixer in self.used_attention().values():
            if mixer.value_bank:
                return mixer.value_bank, mixer.kv_heads, mixer.head_dim
        return None

    @property
    def shares_weights(self) -> bool:
        """Whether some attention layer has the weights of another one."""
        return any(mixer.shares_weights for mixer in self.used_attention().values())

    @property
    def shares_cache(self) -> bool:
        """Whether some attention layer has the keys and values of another one."""
        return any(takes_keys(block.mixer) for block in self.blocks)

    @property
    def shares_memory(self) -> bool:
        """Whether some layer gates what another one reads from its state."""
        return any(isinstance(block.mixer, GatedMemoryConfig) for block in self.blocks)

    @property
    def cross_decoder(self) -> str | None:
        """The block with which a second decoder begins that sees of a prompt its last token alone.

        None without one.
        """
        # A first pass gives its layers weights of all tokens, a router its experts.
        if self.first_pass is not None or self.router_model is not None:
            return None
        return cross_decoder(self.blocks)

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
        floors = (block.decay_floors for block in self.blocks)
        return next((sizes for sizes in floors if sizes is not None), None)

    @property
    def starts_by_depth(self) -> bool:
        """Whether a layer starts or computes by its place in the model."""
        channel_mixes = RWKV6ChannelMixConfig | RWKV7ChannelMixConfig
        has_channel_mix = any(isinstance(ffn, channel_mixes) for ffn in self._used_ffns())
        has_rwkv6 = any(isinstance(block.mixer, RWKV6Config) for block in self.blocks)
        is_told = self.first_rwkv7 is not None or self.decay_floors is not None
        return has_channel_mix or has_rwkv6 or is_told


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
