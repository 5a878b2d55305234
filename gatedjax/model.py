"""The language model: embed -> scan over periods of the layer pattern -> norm -> logits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.ad_checkpoint import checkpoint_policies
from jaxtyping import Float, Int

from gatedjax.config import ModelConfig
from gatedjax.layers import FEED_FORWARDS, MIXERS, TokenInfo
from gatedjax.layers.moe.lora import xlora_weights
from gatedjax.layers.norm import RMSNorm
from gatedjax.layers.projection import parameter
from kernels_pallas.ops import RESIDUAL_NAMES


def remat_policy(name: str):
    """The `jax.checkpoint` policy of `ModelConfig.remat`."""
    return {
        "full": checkpoint_policies.nothing_saveable,
        "dots": checkpoint_policies.dots_with_no_batch_dims_saveable,
        "kernels": checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES),
    }[name]


@struct.dataclass
class Caches:
    """Decoding state: the number of tokens seen, and for each layer of the period its cache, stacked over periods.

    first_pass: the same of the pass without experts, where there is one (`ModelConfig.first_pass`).
    """

    position: Int[Array, ""]
    layers: dict[str, struct.PyTreeNode]
    first_pass: "Caches | None" = None


class Block(nn.Module):
    """Pre-norm mixer and pre-norm feed-forward, each on the residual stream."""

    config: ModelConfig
    index: int  # within the period

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T M"], info: TokenInfo, cache, router_logits: Array | None
    ):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        mixer, ffn = c.layer(self.index)
        norm = lambda name: RMSNorm(c.norm_eps, c.zero_centered_norm, name=name)
        mix = MIXERS[mixer.kind][0](mixer, c.norm_eps, c.init_std, dtype, name="mixer")
        y, cache = mix(norm("mixer_norm")(x), info, cache)
        x = x + y
        feed_forward = FEED_FORWARDS[ffn.kind](ffn, c.init_std, dtype, name="ffn")
        y, statistics, new_logits = feed_forward(norm("ffn_norm")(x), info, router_logits)
        # Carried only by models whose routers have a gating residual.
        router_logits = None if router_logits is None else new_logits
        x = nn.with_logical_constraint(x + y, ("batch", "length", "embed_act"))
        self.sow("probes", "residual", x)
        return x, router_logits, cache, statistics


class Period(nn.Module):
    """The layers after which the pattern repeats. One is compiled; `nn.scan` runs it num_layers / period times."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "B T M"], Array | None],
        info: TokenInfo,
        caches: dict | None,
    ):
        x, router_logits = carry
        new_caches, statistics = {}, {}
        for i in range(self.config.period):
            name = f"layer_{i}"
            cache = None if caches is None else caches[name]
            block = Block(self.config, i, name=name)
            x, router_logits, new_caches[name], statistics[name] = block(
                x, info, cache, router_logits
            )
        return (x, router_logits), (None if caches is None else new_caches, statistics)


class LanguageModel(nn.Module):
    """A decoder-only language model with any pattern of mixers and feed-forwards.

    without_experts: weights of low-rank experts that a first pass would give are 0: this is that pass.
    """

    config: ModelConfig
    without_experts: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        caches: Caches | None = None,
    ) -> tuple[Float[Array, "B T M"], Caches | None, dict[str, dict[str, Array]]]:
        """Returns the normed hidden states (`logits` turns them into scores), the caches, and feed-forward statistics.

        Without caches: training or scoring of (packed) rows. With empty caches: prefill. With filled ones and T = 1:
        decoding; positions then come from the caches. Statistics are stacked over periods: [L / period, ...].
        Routers that select with noise take it from the random stream "router", and do without where there is none.
        """
        c = self.config
        start = 0 if caches is None else caches.position
        if positions is None:
            positions = jnp.broadcast_to(
                start + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape
            )
        init = nn.initializers.normal(c.init_std)
        table = parameter(
            self, "embedding", ["vocab", "embed_vocab"], [c.vocab_size, c.width], init
        )
        if not c.tie_embeddings:
            parameter(self, "head", ["vocab", "embed_vocab"], [c.vocab_size, c.width], init)
        # Whole rows for the lookup: XLA can move a result cut along its width only by replicating it.
        table = nn.with_logical_constraint(table.astype(c.dtype), ("vocab", None))
        x = jnp.take(table, tokens, axis=0)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed_act"))
        layers = None if caches is None else caches.layers
        first_logits = None
        if c.router_residual:
            first_logits = jnp.zeros((*tokens.shape, c.router_residual), jnp.float32)
            first_logits = nn.with_logical_constraint(first_logits, ("batch", "length", None))
        lora_weights, first = self._lora_weights(tokens, positions, segment_ids, caches)
        info = TokenInfo(positions, segment_ids, tokens, lora_weights)
        (x, _), (layers, statistics) = layers_of(c)((x, first_logits), info, layers)
        x = RMSNorm(c.norm_eps, c.zero_centered_norm, name="final_norm")(x)
        if caches is not None:
            caches = Caches(caches.position + tokens.shape[1], layers, first)
        return x, caches, statistics

    def _lora_weights(self, tokens, positions, segment_ids, caches: Caches | None):
        """Weights of low-rank experts by the model's own last hidden states without them, None if no layer wants any;
        and the caches of that pass. Gradients end at the classifier. Source: X-LoRA, arXiv 2402.07148.
        """
        c = self.config.first_pass
        if c is None:
            return None, None
        none = jnp.zeros((*tokens.shape, c.num_experts), jnp.float32)
        shape, init = (
            [self.config.width, c.num_experts],
            nn.initializers.normal(self.config.init_std),
        )
        classifier = parameter(self, "lora_classifier", ["embed", "router"], shape, init)
        if self.without_experts or self.is_initializing():
            return none, None
        # A module of its own, so that what the layers `sow` is of the second pass alone.
        model = LanguageModel(self.config, without_experts=True, parent=None)
        variables = jax.lax.stop_gradient({"params": self.variables["params"]})
        hidden, first, _ = model.apply(
            variables, tokens, positions, segment_ids, caches and caches.first_pass
        )
        return xlora_weights(hidden, classifier, c.temperature, c.experts_per_token), first


def layers_of(c: ModelConfig) -> nn.Module:
    """All layers, as a module "periods": ((x, router logits), info, caches) -> (the same, (caches, statistics))."""
    # Outside a loop XLA would merge what is computed again with what was computed first, and keep it after all.
    remat = lambda: nn.remat(Period, prevent_cse=not c.scan_layers, policy=remat_policy(c.remat))
    period = Period if c.remat == "none" else remat()
    periods = c.num_layers // c.period
    scanned = nn.scan(
        period,
        variable_axes={"params": 0, "probes": 0},
        split_rngs={"params": True, "router": True},
        in_axes=(nn.broadcast, 0),
        length=periods,
        unroll=1 if c.scan_layers else periods,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(c, name="periods")


def head_weights(params) -> Float[Array, "X M"]:
    """The output matrix: the head, or the embedding table when they are tied."""
    return params["head"] if "head" in params else params["embedding"]


def logits(hidden: Float[Array, "... M"], weights: Float[Array, "X M"]) -> Float[Array, "... X"]:
    """Scores of the next token, float32: operands in hidden's dtype, accumulated in float32."""
    return jnp.einsum(
        "...m,xm->...x", hidden, weights.astype(hidden.dtype), preferred_element_type=jnp.float32
    )


def init_caches(config: ModelConfig, batch: int, length: int) -> Caches:
    """Empty caches for `length` tokens of `batch` rows."""
    periods, dtype = config.num_layers // config.period, jnp.dtype(config.dtype)

    def stacked(i: int):
        mixer, _ = config.layer(i)
        cache = MIXERS[mixer.kind][1](mixer, batch, length, dtype)
        return jax.tree.map(lambda x: jnp.zeros((periods, *x.shape), x.dtype), cache)

    empty = lambda: Caches(jnp.int32(0), {f"layer_{i}": stacked(i) for i in range(config.period)})
    return empty() if config.first_pass is None else empty().replace(first_pass=empty())
