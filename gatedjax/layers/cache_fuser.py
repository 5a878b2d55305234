"""One model's keys and values in another one's cache (Cache-to-Cache, arXiv 2510.03215).

    h = f(W [source; target])                          f: x + W_2 gelu(W_1 norm(x))
    target + gate * sigmoid(head(h)) * out(h)          for keys and for values apart

The gate is one number of a layer: sigmoid((l + Gumbel noise) / temperature) while it learns, with
l = 0 at first and a temperature that falls; afterwards 1 where l > 0 and 0 elsewhere, so a fuser
that has not trained leaves the target's cache as it is, to the bit.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import BlockConfig, GatedAttentionConfig, ModelConfig
from gatedjax.errors import InputError, require
from gatedjax.layers.kv_cache import KVCache
from gatedjax.layers.norm import RMSNorm
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection

NORM_EPS = 1e-6
FIRST_TEMPERATURE = 1.0
LAST_TEMPERATURE = 1e-3


def gate_temperature(fraction: Float[Array, ""] | float) -> Float[Array, ""] | float:
    """From 1 to 0.001, exponentially, over the fraction of training that is done."""
    return FIRST_TEMPERATURE * (LAST_TEMPERATURE / FIRST_TEMPERATURE) ** fraction


def noisy_gate(
    logit: Float[Array, ""],
    noise: Float[Array, "..."],
    temperature: Float[Array, ""] | float,
) -> Float[Array, "..."]:
    """`sigmoid((logit + noise) / temperature)`: what the gate is while it learns.

    Args:
      logit: of the layer.
      noise: Gumbel's, of every token and head.
      temperature: the lower, the nearer to 0 and 1.
    """
    return jax.nn.sigmoid((logit + noise) / temperature)


def fused(
    target: Float[Array, "B S H D"],
    projected: Float[Array, "B S H D"],
    weight_logits: Float[Array, "B S H"],
    gate: Float[Array, "..."],
) -> Float[Array, "B S H D"]:
    """`target + gate sigmoid(weight_logits) projected`, in float32 and target's dtype.

    Args:
      target: of the model whose cache it is.
      projected: what the source brings.
      weight_logits: of every token and head.
      gate: [B, S, H] or a number; where it is 0 the target's bits stay.
    """
    dtype = jnp.promote_types(target.dtype, jnp.float32)
    weight = gate * jax.nn.sigmoid(weight_logits.astype(dtype))
    added = weight[..., None] * projected.astype(dtype)
    y = (target.astype(dtype) + added).astype(target.dtype)
    return jnp.where(jnp.broadcast_to(gate, weight_logits.shape)[..., None] == 0, target, y)


class Pair(NamedTuple):
    """Two layers of attention, by number: what `source` holds goes into the cache of `target`."""

    source: int
    target: int


def attention_places(config: ModelConfig) -> dict[int, tuple[BlockConfig, int]]:
    """The layers of attention with keys and values of every token: layer -> (block, its place).

    Raises:
      InputError: there is none, or one that keeps other things in its cache.
    """
    places = {}
    for block in config.blocks:
        mixer = block.mixer
        if not isinstance(mixer, GatedAttentionConfig) or mixer.kind != GatedAttentionConfig.kind:
            continue
        others = {
            "window": mixer.window is not None,
            "shares_weights": mixer.shares_weights,
            "selective_rope": mixer.selective_rope != "none",
            "token_sinks": mixer.token_sinks,
            "similarity": mixer.similarity != "product",
        }
        for name, is_set in others.items():
            expected = "attention whose cache is keys and values of all tokens alone"
            require(not is_set, f"mixers of layer {block.layers[0]}", name, expected)
        for place, layer in enumerate(block.layers):
            places[layer] = (block, place)
    kinds = sorted({block.mixer.kind for block in config.blocks})
    require(bool(places), "mixers", kinds, "at least one layer of gated_attention")
    return places


def paired_layers(source: ModelConfig, target: ModelConfig) -> tuple[Pair, ...]:
    """The last layers of attention together, then those before them, as far as both have some.

    Raises:
      InputError: a model without attention whose cache can be fused, or another vocabulary.
    """
    require(
        source.vocab_size == target.vocab_size,
        "vocab_size of the source",
        source.vocab_size,
        f"that of the target, {target.vocab_size}",
    )
    of_source, of_target = (sorted(attention_places(c), reverse=True) for c in (source, target))
    return tuple(Pair(*layers) for layers in zip(of_source, of_target))


def cache_of(
    config: ModelConfig,
    layers: dict[str, KVCache],
    layer: int,
) -> KVCache:
    """The keys and values of one layer.

    Args:
      config: of the model.
      layers: of its `Caches`.
      layer: its number.
    """
    block, place = attention_places(config)[layer]
    cache = layers[block.name]
    if not isinstance(cache, KVCache):
        raise InputError(f"layer {layer}: got a cache of {type(cache).__name__}, expected KVCache")
    if not block.is_repeated:
        return cache
    return KVCache(cache.k[place], cache.v[place])


def with_cache_of(
    config: ModelConfig,
    layers: dict[str, KVCache],
    layer: int,
    cache: KVCache,
) -> dict[str, KVCache]:
    """The caches of a model with other keys and values in one layer.

    Args:
      config: of the model.
      layers: of its `Caches`.
      layer: its number.
      cache: the new one.
    """
    block, place = attention_places(config)[layer]
    if block.is_repeated:
        old = layers[block.name]
        cache = KVCache(old.k.at[place].set(cache.k), old.v.at[place].set(cache.v))
    return layers | {block.name: cache}


class Noise(NamedTuple):
    """What the gates of a fuser have while they learn."""

    key: Array
    temperature: Float[Array, ""] | float


class CacheFuser(nn.Module):
    """Fuses the caches of two models, layer by layer.

    Attributes:
      source: the model whose keys and values are brought.
      target: the model into whose cache they go.
      hidden: channels of the networks; 1024 in the paper.
      depth: blocks between the matrices in and out.
    """

    source: ModelConfig
    target: ModelConfig
    hidden: int = 128
    depth: int = 2

    @nn.compact
    def __call__(
        self,
        source: dict[str, KVCache],
        target: dict[str, KVCache],
        noise: Noise | None = None,
    ) -> dict[str, KVCache]:
        """The caches of the target with what the source brings.

        Args:
          source: the `layers` of its `Caches`.
          target: the `layers` of its `Caches`, of the same tokens.
          noise: while it learns; None: a gate is open or closed.

        Returns:
          The `layers` of the target's caches.

        Raises:
          InputError: caches of another number of rows or slots.
        """
        result = target
        for number, pair in enumerate(paired_layers(self.source, self.target)):
            brought = cache_of(self.source, source, pair.source)
            held = cache_of(self.target, target, pair.target)
            require(
                brought.k.shape[:2] == held.k.shape[:2],
                "source",
                f"caches of {brought.k.shape[:2]} rows and slots",
                f"{held.k.shape[:2]}, as the target's",
            )
            of_keys = Fuser(self.hidden, self.depth, name=f"k_{pair.target}")
            of_values = Fuser(self.hidden, self.depth, name=f"v_{pair.target}")
            cache = KVCache(
                of_keys(brought.k, held.k, _part(noise, 2 * number)),
                of_values(brought.v, held.v, _part(noise, 2 * number + 1)),
            )
            result = with_cache_of(self.target, result, pair.target, cache)
        return result


def _part(noise: Noise | None, number: int) -> Noise | None:
    """The noise of one of the gates."""
    if noise is None:
        return None
    return noise._replace(key=jax.random.fold_in(noise.key, number))


class Fuser(nn.Module):
    """The network and the gate for the keys, or for the values, of one layer.

    Attributes:
      hidden: channels of the network.
      depth: its blocks: the first is common to what is brought and to its weights.
    """

    hidden: int
    depth: int

    @nn.compact
    def __call__(
        self,
        source: Float[Array, "B S _ _"],
        target: Float[Array, "B S H D"],
        noise: Noise | None,
    ) -> Float[Array, "B S H D"]:
        """
        Args:
          source: keys or values of one model.
          target: those of the other.
          noise: while it learns; None: the gate is open or closed.
        """
        heads, channels = target.shape[2:]
        flat = [x.reshape(*x.shape[:2], -1).astype(jnp.float32) for x in (source, target)]
        h = self._linear("in", jnp.concatenate(flat, axis=-1), self.hidden, has_bias=True)
        h = self._block("common", h)
        weights = self._block("weights_0", h)
        weight_logits = self._linear("weights_out", weights, heads, has_bias=True)
        for i in range(self.depth - 1):
            h = self._block(f"values_{i}", h)
        projected = self._linear("out", h, heads * channels, has_bias=True)
        logit = parameter(self, "gate", axes=(), shape=(), init=nn.initializers.zeros)
        if noise is None:
            gate = (logit > 0).astype(jnp.float32)
        else:
            gumbel = jax.random.gumbel(noise.key, weight_logits.shape)
            gate = noisy_gate(logit, gumbel, noise.temperature)
        return fused(target, projected.reshape(target.shape), weight_logits, gate)

    def _block(self, name: str, x: Float[Array, "B S F"]) -> Float[Array, "B S F"]:
        """`x + W_2 gelu(W_1 norm(x))`."""
        y = RMSNorm(NORM_EPS, name=f"{name}_norm")(x)
        y = jax.nn.gelu(self._linear(f"{name}_up", y, self.hidden), approximate=False)
        return x + self._linear(f"{name}_down", y, self.hidden)

    def _linear(
        self,
        name: str,
        x: Float[Array, "B S _"],
        size: int,
        has_bias: bool = False,
    ) -> Float[Array, "B S _"]:
        """A matrix, from torch's own start.

        Args:
          name: of the matrix.
          x: what is multiplied.
          size: of the result.
          has_bias: starts from 0.
        """
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        axes = {"embed": x.shape[-1]}, {"mlp": size}
        linear = Projection(*axes, 0.0, jnp.float32, init, has_bias, name=name)
        return linear(x)
