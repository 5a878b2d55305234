"""Linear attention in both directions as a layer: LION, ViG, LINA, MALA and their relatives.

The order of a call: what queries, keys and values are made of; their positions and features; sums,
scans or kernels over all tokens; a local term; a norm; a gate; the output projection. Which of them
there are is the configuration's, and `config.BIDIRECTIONAL` has the papers' choices.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import BidirectionalLinearAttentionConfig
from gatedjax.errors import require
from gatedjax.layers.base import Mixer
from gatedjax.layers.bidirectional.decays import lion_decay, vector_decays
from gatedjax.layers.bidirectional.grid import (
    coordinates,
    grid_of,
    joined,
    serpentines,
    split,
)
from gatedjax.layers.bidirectional.landmarks import landmarks_of
from gatedjax.layers.bidirectional.local import depthwise_conv
from gatedjax.layers.bidirectional.local_terms import dynamic_kernel, local_conv
from gatedjax.layers.bidirectional.manhattan import manhattan_attention, manhattan_log_decay
from gatedjax.layers.bidirectional.scans import lion, vision_gla
from gatedjax.layers.bidirectional.softmax_free import softmax_free_attention
from gatedjax.layers.bidirectional.sums import SCALED, linear_attention
from gatedjax.layers.bidirectional.toeplitz import relative_linear_attention
from gatedjax.layers.feature_maps import Features, features_of, identity
from gatedjax.layers.gate_values import record
from gatedjax.layers.norm import LayerNorm, RMSNorm, layer_norm, unit_length
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection
from gatedjax.layers.rope import grid_angles, inverse_frequencies, rotate
from gatedjax.layers.token_info import TokenInfo

# Of queries, keys and values between Galerkin's norms: the published start (arXiv 2105.14995).
OPERATOR_GAIN = 1e-2
OPERATOR_DIAGONAL = 1e-2
ROPE_BASE = 10_000.0
OUTPUT_GATES = {
    "linear": identity,
    "swish": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
}


class BidirectionalLinearAttention(Mixer):
    """Every token of a document sees every other one, in time linear in their number."""

    config: BidirectionalLinearAttentionConfig

    @nn.compact
    def with_cache(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: Any = None,
    ) -> tuple[Float[Array, "B T M"], None]:
        c = self.config
        require(cache is None, "cache", type(cache).__name__, "None: tokens see later ones")
        grid = grid_of(c.grid, info.grid, x.shape[1])
        info = dataclasses.replace(info, grid=grid)
        self._check(x, info)
        local_input = None
        source = x
        if c.local == "first":
            # ViG: the convolution comes first, and is what the gate mixes in at the end.
            source = local_conv(self, x, info)
            local_input = source
        q, k, v = self._queries_keys_values(source, info)
        o = self._attended(q, k, v, source, info)
        if c.local in ("values", "dynamic"):
            o = o + self._of_values(v, x, info)
        elif c.local == "input":
            o = o + local_conv(self, x, info).reshape(o.shape)
        if c.local_gate:
            assert local_input is not None
            o = self._with_local_gate(o, local_input, x)
        o = self._normed(o)
        if c.output_gate != "none":
            o = self._gated(o, x)
        heads = {"heads": c.num_heads, "head_dim": o.shape[-1]}
        width = {"embed": x.shape[-1]}
        return Projection(heads, width, self.init_std, self.dtype, name="out")(o), None

    def _check(self, x: Array, info: TokenInfo) -> None:
        """What a call cannot have, by name."""
        c = self.config
        T = x.shape[1]
        if c.length is not None:
            require(c.length >= T, "length", c.length, f"at least the {T} tokens of a row")
        if info.grid is None:
            needs_grid = {"form": c.form == "manhattan", "order": c.order == "serpentine"}
            for name, is_set in needs_grid.items():
                expected = f"a height and a width with {name} {getattr(c, name)!r}"
                require(not is_set, "grid", c.grid, expected)
        elif c.positions == "rope":
            expected = "a multiple of 4 with positions 'rope' on a grid"
            require(c.key_dim % 4 == 0, "key_dim", c.key_dim, expected)
        if info.segment_ids is None:
            return
        options = {
            "grid": info.grid is not None,
            "form": c.form != "features",
            "positions": c.positions == "relative",
            "coordinates": c.coordinates,
            "local": c.local == "dynamic",
        }
        for name, is_set in options.items():
            expected = f"None with {name} {getattr(c, name)!r}: a row is one document"
            require(not is_set, "segment_ids", "documents", expected)

    # --- what queries, keys and values are made of

    def _queries_keys_values(self, x: Array, info: TokenInfo) -> tuple[Array, Array, Array]:
        c = self.config
        keys = {"heads": c.num_heads, "head_dim": c.key_dim}
        values = {"heads": c.num_heads, "head_dim": c.value_dim}
        q = self._from_input("query", x, keys)
        # SOFT's queries are its keys.
        k = q if c.form == "gaussian" else self._from_input("key", x, keys)
        v = self._from_input("value", x, values)
        if c.qk_norm:
            q, k = unit_length(q, self.norm_eps), unit_length(k, self.norm_eps)
        if c.operator_norm == "fourier":
            q = self._head_norm("query_norm", q)
        if c.operator_norm != "none":
            k = self._head_norm("key_norm", k)
        if c.operator_norm == "galerkin":
            v = self._head_norm("value_norm", v)
        if not c.coordinates:
            return q, k, v
        places = jnp.asarray(coordinates(x.shape[1], info.grid), q.dtype)
        places = places[None, :, None, :]

        def with_places(y: Array) -> Array:
            of_heads = jnp.broadcast_to(places, (*y.shape[:3], places.shape[-1]))
            return jnp.concatenate([of_heads, y], axis=-1)

        return with_places(q), with_places(k), with_places(v)

    def _from_input(self, name: str, x: Array, axes: dict[str, int]) -> Array:
        if self.config.operator_norm == "none":
            return self._project(name, x, axes)
        width = {"embed": x.shape[-1]}
        return Projection(
            width,
            axes,
            self.init_std,
            self.dtype,
            kernel_init=operator_start,
            name=name,
        )(x)

    def _head_norm(self, name: str, x: Array) -> Array:
        """LayerNorm of each head, with a scale and a bias of its own."""
        shape = x.shape[2:]
        axes = ["heads", "head_dim"]
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale = parameter(self, f"{name}_scale", axes=axes, shape=shape, init=ones)
        bias = parameter(self, f"{name}_bias", axes=axes, shape=shape, init=zeros)
        return layer_norm(x, scale, bias, self.norm_eps)

    # --- over all tokens

    def _attended(self, q: Array, k: Array, v: Array, x: Array, info: TokenInfo) -> Array:
        """What the tokens see of each other.

        Args:
          q, k, v: of the tokens.
          x: what they were made of, and decays are.
          info: about the tokens.
        """
        c = self.config
        if c.form == "gaussian":
            q = q * q.shape[-1] ** -0.25
            landmarks = landmarks_of(self, q, info)
            return softmax_free_attention(q, landmarks, v, iterations=c.iterations)
        if c.form == "manhattan":
            return self._manhattan(q, k, v, info)
        # A shift by all keys of a row would tell of other documents.
        phi = features_of(c, q, k, info.positions, shift_keys=info.segment_ids is None)
        if c.kv_gate:
            scales = self._position_scales(info)
            phi = Features(phi.q, phi.k * scales[0].astype(phi.k.dtype))
            v = v * scales[1].astype(v.dtype)
        if c.decay != "none":
            return self._scanned(phi, v, x, info)
        if c.positions == "relative":
            return relative_linear_attention(phi.q, phi.k, v, self._distance_bias(x.shape[1]))
        rotated = None
        if c.positions == "rope":
            rotated = (self._rotated(phi.q, info), self._rotated(phi.k, info))
        return linear_attention(
            phi.q,
            phi.k,
            v,
            normalization=c.normalization,
            scale=c.key_dim**-0.5 if c.normalization in SCALED else 1.0,
            rotated=rotated,
            segment_ids=info.segment_ids,
        )

    def _position_scales(self, info: TokenInfo) -> tuple[Array, Array]:
        """LINA's numbers of every position and head, for keys and for values."""
        c = self.config
        assert c.length is not None
        shape = [c.length, c.num_heads]
        axes = [None, "heads"]
        ones = nn.initializers.ones
        scales = []
        for name in ("key_gate", "value_gate"):
            of_positions = parameter(self, name, axes=axes, shape=shape, init=ones)
            scales.append(of_positions[info.positions][..., None])
        return scales[0], scales[1]

    def _distance_bias(self, num_tokens: int) -> Float[Array, "H _"]:
        """The bias of every distance that these tokens have, zero at the start."""
        c = self.config
        assert c.length is not None
        bias = parameter(
            self,
            "distance_bias",
            axes=["heads", None],
            shape=[c.num_heads, 2 * c.length - 1],
            init=nn.initializers.zeros,
        )
        unused = c.length - num_tokens
        return bias[:, unused : bias.shape[1] - unused]

    def _rotated(self, phi: Array, info: TokenInfo) -> Array:
        """Features rotated by place, in blocks of as many channels as keys have."""
        c = self.config
        B, T, H, F = phi.shape
        blocks = phi.reshape(B, T, H * F // c.key_dim, c.key_dim)
        if info.grid is not None:
            angles = jnp.asarray(grid_angles(info.grid, c.key_dim, ROPE_BASE))
        else:
            frequencies = inverse_frequencies(c.key_dim, ROPE_BASE)
            angles = info.positions[:, :, None, None].astype(jnp.float32) * frequencies
        return rotate(blocks, angles, interleaved=True).reshape(phi.shape)

    # --- decays

    def _scanned(self, phi: Features, v: Array, x: Array, info: TokenInfo) -> Array:
        c = self.config
        if c.decay == "vector":
            forward, backward = vector_decays(self, x)
            return vision_gla(
                phi.q,
                phi.k,
                v,
                forward,
                backward,
                segment_ids=info.segment_ids,
                chunk_size=c.chunk_size,
            )
        orders: tuple = (None,)
        if c.order == "serpentine":
            assert info.grid is not None
            orders = serpentines(info.grid)
        log_decays = [lion_decay(self, n, x, info) for n in range(len(orders))]
        return lion(
            phi.q,
            phi.k,
            v,
            log_decays,
            orders=orders,
            segment_ids=info.segment_ids,
            chunk_size=c.chunk_size,
        )

    # --- kernels that are no features

    def _manhattan(self, q: Array, k: Array, v: Array, info: TokenInfo) -> Array:
        c = self.config
        grid = info.grid
        assert grid is not None
        expected = "none with form 'manhattan': every token has a place on the grid"
        require(grid.extra == 0, "tokens before the grid", grid.extra, expected)
        values = split(v, grid)
        out = manhattan_attention(
            split(q, grid).image,
            split(k, grid).image,
            values.image,
            jnp.asarray(manhattan_log_decay(c.num_heads)),
            window=c.window,
            shift=c.window_shift,
        )
        return joined(values.before, out)

    # --- local terms, norm, gates

    def _of_values(self, v: Array, x: Array, info: TokenInfo) -> Array:
        """The local term of the values."""
        c = self.config
        flat = v.reshape(*v.shape[:2], -1)
        if c.local == "values":
            return local_conv(self, flat, info).reshape(v.shape)
        kernel = dynamic_kernel(self, x, info)
        return depthwise_conv(flat, kernel, info.grid).reshape(v.shape)

    def _with_local_gate(self, o: Array, local: Array, x: Array) -> Array:
        """ViG: g norm(o) + (1 - g) norm(local), each head by itself."""
        c = self.config
        axes = {"heads": c.num_heads, "head_dim": c.value_dim}
        logits = self._project("local_gate", x, axes, has_bias=True)
        gates = jax.nn.sigmoid(logits.astype(jnp.float32))
        record(self, "local_gates", gates)
        require(
            local.shape[-1] == c.num_heads * c.value_dim,
            "value_dim",
            c.value_dim,
            f"the width {local.shape[-1]} over num_heads = {c.num_heads} with a local gate",
        )
        of_tokens = RMSNorm(self.norm_eps, axis_name="head_dim", name="norm")(o)
        of_neighbors = RMSNorm(self.norm_eps, axis_name="head_dim", name="local_norm")(
            local.reshape(o.shape)
        )
        return (gates * of_tokens + (1 - gates) * of_neighbors).astype(o.dtype)

    def _normed(self, o: Array) -> Array:
        c = self.config
        if c.output_norm == "none":
            return o
        if c.output_norm == "rms":
            return RMSNorm(self.norm_eps, axis_name="head_dim", name="output_norm")(o)
        flat = o.reshape(*o.shape[:2], -1)
        return LayerNorm(self.norm_eps, axis_name="head_dim", name="output_norm")(flat).reshape(
            o.shape
        )

    def _gated(self, o: Array, x: Array) -> Array:
        """`o` times the output gate, in float32."""
        axes = {"heads": o.shape[2], "head_dim": o.shape[3]}
        logits = self._project("output_gate", x, axes)
        gates = OUTPUT_GATES[self.config.output_gate](logits.astype(jnp.float32))
        record(self, "gates", gates)
        return (o.astype(jnp.float32) * gates).astype(o.dtype)

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        c = self.config
        q_channels = c.num_heads * c.key_dim
        o_channels = c.num_heads * c.value_dim
        gates = int(c.output_gate != "none") + int(c.local_gate)
        num_queries = 1 if c.form == "gaussian" else 2
        projections = 2 * width * (num_queries * q_channels + (2 + gates) * o_channels)
        if c.form == "features":
            scans = 1 if c.decay == "none" else 2
            return projections + scans * 4 * c.num_heads * c.features_per_head * c.value_dim
        if c.form == "gaussian":
            landmarks = seq_len / c.landmark_size ** (2 if c.grid else 1)
            return projections + 2 * landmarks * (q_channels + 2 * o_channels)
        # Where the model says how patches lie, about a square.
        grid = c.grid or (round(seq_len**0.5),) * 2
        sides = sum(size if c.window is None else min(c.window, size) for size in grid)
        return projections + 2 * sides * (q_channels + o_channels)


def operator_start(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Xavier's uniform start times 0.01, and 0.01 on the diagonal (arXiv 2105.14995)."""
    inputs = shape[0]
    outputs = shape[1] * shape[2]
    uniform = nn.initializers.variance_scaling(OPERATOR_GAIN**2, "fan_avg", "uniform")
    noise = uniform(key, (inputs, outputs), dtype)
    return (noise + OPERATOR_DIAGONAL * jnp.eye(inputs, outputs, dtype=dtype)).reshape(shape)
