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
from gatedjax.layers.bidirectional.grid import (
    coordinates,
    grid_of,
    joined,
    serpentines,
    split,
)
from gatedjax.layers.bidirectional.local import depthwise_conv, taps
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
            source = self._conv(x, info)
            local_input = source
        q, k, v = self._queries_keys_values(source, info)
        o = self._attended(q, k, v, source, info)
        if c.local in ("values", "dynamic"):
            o = o + self._of_values(v, x, info)
        elif c.local == "input":
            o = o + self._conv(x, info).reshape(o.shape)
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
            landmarks = self._landmarks(q, info)
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
            forward, backward = self._vector_decays(x)
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
        log_decays = [self._lion_decay(n, x, info) for n in range(len(orders))]
        return lion(
            phi.q,
            phi.k,
            v,
            log_decays,
            orders=orders,
            segment_ids=info.segment_ids,
            chunk_size=c.chunk_size,
        )

    def _lion_decay(
        self,
        number: int,
        x: Array,
        info: TokenInfo,
    ) -> Float[Array, "H"] | Float[Array, "B T H"]:
        """LION's log decay along one order: sigmoid(a_h), or 1 - sigmoid(x W + b)."""
        c = self.config
        name = "decay" if number == 0 else f"decay_{number + 1}"
        if c.decay == "constant":
            logits = parameter(
                self,
                name,
                axes=["heads"],
                shape=[c.num_heads],
                init=nn.initializers.normal(1.0),
            )
            return jax.nn.log_sigmoid(logits)
        log_decay = jax.nn.log_sigmoid(-self._per_head(name, x, c.num_heads, has_bias=True))
        if info.grid is not None:
            # Nothing is forgotten at a class token.
            is_on_grid = jnp.arange(x.shape[1]) >= info.grid.extra
            log_decay = jnp.where(is_on_grid[:, None], log_decay, 0.0)
        record(self, "log_decay" if number == 0 else f"log_decay_{number + 1}", log_decay)
        return log_decay

    def _vector_decays(self, x: Array) -> tuple[Array, Array]:
        """ViG's two log decays of every key channel, logsigmoid(x W1 W2 + b) / temperature."""
        c = self.config
        width = {"embed": x.shape[-1]}
        rank = {"rank": c.decay_rank}
        low = Projection(width, rank, self.init_std, self.dtype, name="decay_down")(x)
        decays = []
        for direction in ("forward", "backward"):
            logits = Projection(
                rank,
                {"heads": c.num_heads, "head_dim": c.key_dim},
                self.init_std,
                self.dtype,
                has_bias=True,
                name=f"{direction}_decay",
            )(low)
            log_decay = jax.nn.log_sigmoid(logits.astype(jnp.float32)) / c.decay_temperature
            record(self, f"{direction}_log_decay", log_decay)
            decays.append(log_decay)
        return decays[0], decays[1]

    # --- kernels that are no features

    def _landmarks(self, q: Float[Array, "B T H K"], info: TokenInfo) -> Float[Array, "B m H K"]:
        """GELU(LayerNorm(W q)) of all queries of a square or a stretch, for every head alike."""
        c = self.config
        r = c.landmark_size
        B, T, H, K = q.shape
        if info.grid is not None:
            h, w = info.grid.rows, info.grid.columns
            fits = h % r == 0 and w % r == 0
            require(fits, "landmark_size", r, f"a divisor of the grid's sides {(h, w)}")
            image = split(q, info.grid).image.reshape(B, h // r, r, w // r, r, H, K)
            blocks = jnp.moveaxis(image, 3, 2).reshape(B, -1, r * r, H, K)
        else:
            require(T % r == 0, "landmark_size", r, f"a divisor of the {T} tokens of a row")
            blocks = q.reshape(B, T // r, r, H, K)
        kernel = parameter(
            self,
            "landmark",
            axes=[None, None, None],
            shape=[blocks.shape[2], K, K],
            init=nn.initializers.normal((blocks.shape[2] * K) ** -0.5),
        )
        landmarks = jnp.einsum("bmrhk,rkd->bmhd", blocks, kernel.astype(q.dtype))
        normed = LayerNorm(self.norm_eps, axis_name="head_dim", name="landmark_norm")(landmarks)
        return jax.nn.gelu(normed, approximate=False)

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

    def _conv(self, x: Float[Array, "B T F"], info: TokenInfo) -> Float[Array, "B T F"]:
        """A depthwise convolution with a bias on what has a place."""
        c = self.config
        count = taps(c.local_width, info.grid)
        F = x.shape[-1]
        kernel = parameter(
            self,
            "local",
            axes=[None, None],
            shape=[count, F],
            init=nn.initializers.normal(count**-0.5),
        )
        bias = parameter(self, "local_bias", axes=[None], shape=[F], init=nn.initializers.zeros)
        y = depthwise_conv(x, kernel, info.grid, info.segment_ids) + bias.astype(x.dtype)
        if info.grid is None:
            return y
        # Tokens without a place: nothing is added to them, and what comes first leaves them alone.
        before = info.grid.extra
        others = x[:, :before] if c.local == "first" else jnp.zeros_like(x[:, :before])
        return jnp.concatenate([others, y[:, before:]], axis=1)

    def _of_values(self, v: Array, x: Array, info: TokenInfo) -> Array:
        """The local term of the values."""
        c = self.config
        flat = v.reshape(*v.shape[:2], -1)
        if c.local == "values":
            return self._conv(flat, info).reshape(v.shape)
        kernel = self._dynamic_kernel(x, info)
        return depthwise_conv(flat, kernel, info.grid).reshape(v.shape)

    def _dynamic_kernel(self, x: Array, info: TokenInfo) -> Float[Array, "B W F"]:
        """InLine's convolution: weights from the mean over tokens, by two layers for each head."""
        c = self.config
        H, V = c.num_heads, c.value_dim
        count = taps(c.local_width, info.grid)
        M = x.shape[-1]
        require(M % H == 0, "num_heads", H, f"a divisor of the width {M}")
        mean = jnp.mean(x, axis=1).reshape(x.shape[0], H, M // H)
        zeros = nn.initializers.zeros
        hidden_axes = ["heads", None, None]
        start = nn.initializers.normal((M // H) ** -0.5)
        shape = [H, M // H, V]
        up = parameter(self, "dynamic_up", axes=hidden_axes, shape=shape, init=start)
        up_bias = parameter(self, "dynamic_up_bias", axes=hidden_axes[:2], shape=[H, V], init=zeros)
        hidden = jnp.einsum("bhm,hmv->bhv", mean, up.astype(mean.dtype)) + up_bias
        hidden = jax.nn.gelu(hidden, approximate=False)
        start = nn.initializers.normal((V * count) ** -0.5)
        shape = [H, V, V, count]
        axes = ["heads", None, None, None]
        down = parameter(self, "dynamic_down", axes=axes, shape=shape, init=start)
        shape = [H, V, count]
        bias = parameter(self, "dynamic_down_bias", axes=axes[:3], shape=shape, init=zeros)
        kernel = jnp.einsum("bhv,hvdw->bhdw", hidden, down.astype(hidden.dtype)) + bias
        return jnp.moveaxis(kernel.reshape(x.shape[0], H * V, count), -1, 1)

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
