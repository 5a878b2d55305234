"""Gated linear attention (arXiv 2312.06635) on `kernels_pallas.linear_scan`; RetNet and Mamba-2 by config."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Float

from gatedjax.config import GatedLinearAttentionConfig
from gatedjax.layers.conv import causal_conv
from gatedjax.layers.norm import RMSNorm
from gatedjax.layers.projection import Projection, parameter
from gatedjax.layers.rope import apply_rope, inverse_frequencies
from gatedjax.layers.token_info import TokenInfo
from gatedjax.sharding import is_cut, mesh_axis, per_shard
from kernels_pallas import linear_scan, linear_scan_step
from kernels_pallas.linear_scan.sharded import linear_scan_sharded


@struct.dataclass
class ScanCache:
    """The matrix state of every head (one more value column when normalized), and the convolution's last inputs."""

    state: Float[Array, "B H K V"]
    conv_tail: Float[Array, "B W F"]


def logsigmoid_decay(logits: Float[Array, "..."], temperature: float) -> Float[Array, "..."]:
    """GLA's log decay, `log sigmoid(logits) / temperature`, float32 (arXiv 2312.06635, section 4.4)."""
    return jax.nn.log_sigmoid(logits.astype(jnp.float32)) / temperature


def retention_decay(num_heads: int) -> Float[np.ndarray, " H"]:
    """RetNet's log decay per head, `log(1 - 2^(-5 - h))` (arXiv 2307.08621, equation 8)."""
    return np.log1p(-(2.0 ** (-5.0 - np.arange(num_heads)))).astype(np.float32)


FEATURE_MAPS = {
    "identity": lambda x: x,
    "silu": jax.nn.silu,
    "elu_plus_one": lambda x: jax.nn.elu(x) + 1.0,
}


class GatedLinearAttention(nn.Module):
    """Low-rank vector gate, per-head norm, swish output gate (arXiv 2312.06635, 4.4); other decays by config."""

    config: GatedLinearAttentionConfig
    norm_eps: float
    std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T M"], info: TokenInfo, cache: ScanCache | None = None
    ) -> tuple[Float[Array, "B T M"], ScanCache | None]:
        """Training: no cache. Prefill: T tokens onto a cache. Decode: one token, T = 1."""
        c = self.config
        q, k, v = self._projected(x)
        q, k, v, tail = self._convolved(q, k, v, info, cache)
        q, k = FEATURE_MAPS[c.feature_map](q), FEATURE_MAPS[c.feature_map](k)
        if c.rotary_dim:
            frequencies = inverse_frequencies(c.rotary_dim, c.rope_base)
            q, k = (apply_rope(y, info.positions, frequencies) for y in (q, k))
        log_decay, v = self._decay(x, v)
        if log_decay is not None:
            self.sow("probes", "log_decay", log_decay)
        o, state = self._scan(q, k, v, log_decay, info, cache)
        o = RMSNorm(self.norm_eps, axis_name="head_dim", name="norm")(o)
        if c.output_gate != "none":
            gate = self._project("output_gate", x, "heads", c.num_heads, c.value_dim).astype(
                jnp.float32
            )
            activation = jax.nn.silu if c.output_gate == "swish" else jax.nn.sigmoid
            score = activation(gate)
            self.sow("probes", "score", score)
            o = (o.astype(jnp.float32) * score).astype(o.dtype)
        heads = {"heads": c.num_heads, "head_dim": c.value_dim}
        y = Projection(heads, {"embed": x.shape[-1]}, self.std, self.dtype, name="out")(o)
        return y, None if cache is None else ScanCache(state, tail)

    def _project(self, name: str, x: Array, heads: str, num_heads: int, channels: int) -> Array:
        axes = {heads: num_heads, "head_dim": channels}
        y = Projection({"embed": x.shape[-1]}, axes, self.std, self.dtype, name=name)(x)
        return nn.with_logical_constraint(y, ("batch", "length", heads, None))

    def _projected(self, x: Array) -> tuple[Array, Array, Array]:
        c = self.config
        q = self._project("query", x, "heads", c.num_heads, c.key_dim)
        k = self._project("key", x, "kv_heads", c.kv_heads, c.key_dim)
        v = self._project("value", x, "kv_heads", c.kv_heads, c.value_dim)
        return q, k, v

    def _convolved(self, q, k, v, info: TokenInfo, cache: ScanCache | None):
        """q, k, v after the short convolution and SiLU, and the inputs that the next token will need."""
        width = self.config.conv_width
        if width == 0:
            return q, k, v, cache.conv_tail if cache is not None else None
        flat = jnp.concatenate([y.reshape(*y.shape[:2], -1) for y in (q, k, v)], axis=-1)
        kernel = parameter(
            self, "conv", [None, None], [width, flat.shape[-1]], nn.initializers.normal(width**-0.5)
        )
        tail = cache.conv_tail if cache is not None else None
        mixed, tail = causal_conv(flat, kernel, info.segment_ids, tail)
        parts = jnp.split(jax.nn.silu(mixed), np.cumsum([q[0, 0].size, k[0, 0].size]), axis=-1)
        return *(part.reshape(y.shape) for part, y in zip(parts, (q, k, v))), tail

    def _decay(self, x: Array, v: Array) -> tuple[Array | None, Array]:
        """The log decay in the rank that the scan wants, and the values, which Mamba-2's step size scales."""
        c = self.config
        if c.decay == "none":
            return None, v
        if c.decay == "constant":
            return jnp.asarray(retention_decay(c.num_heads)), v
        if c.decay_form == "softplus":
            return self._softplus_decay(x, v)
        out = {"heads": c.num_heads} | ({"head_dim": c.key_dim} if c.decay == "vector" else {})
        low = Projection(
            {"embed": x.shape[-1]}, {"rank": c.decay_rank}, self.std, self.dtype, name="decay_down"
        )(x)
        logits = Projection({"rank": c.decay_rank}, out, self.std, self.dtype, name="decay_up")(low)
        bias = parameter(self, "decay_bias", list(out), list(out.values()), nn.initializers.zeros)
        return logsigmoid_decay(logits + bias, c.decay_temperature), v

    def _softplus_decay(self, x: Array, v: Array) -> tuple[Array, Array]:
        """g = -exp(A_log) dt, and v dt; dt = softplus(x W + bias), float32 (arXiv 2405.21060 and its code)."""
        c = self.config
        raw = Projection(
            {"embed": x.shape[-1]}, {"heads": c.num_heads}, self.std, self.dtype, name="dt"
        )(x)
        bias = parameter(
            self, "dt_bias", ["heads"], [c.num_heads], _inverse_softplus_of_log_uniform
        )
        a_log = parameter(
            self,
            "a_log",
            ["heads"],
            [c.num_heads],
            lambda *a: jnp.log(1 + 15 * jax.random.uniform(*a)),
        )
        dt = jax.nn.softplus(raw.astype(jnp.float32) + bias)
        return -jnp.exp(a_log) * dt, (v * dt[..., None]).astype(v.dtype)

    def _scan(self, q, k, v, log_decay, info: TokenInfo, cache: ScanCache | None):
        c = self.config
        if cache is not None and q.shape[1] == 1:
            g = log_decay[:, 0] if log_decay is not None and log_decay.ndim > 1 else log_decay
            o, state = linear_scan_step(
                q[:, 0], k[:, 0], v[:, 0], cache.state, g, normalize=c.normalize
            )
            return o[:, None], state
        tokens = ("batch", "length")
        heads, kv_heads = (*tokens, "heads", None), (*tokens, "kv_heads", None)
        decay = () if log_decay is None else {1: ("heads",), 3: heads[:3], 4: heads}[log_decay.ndim]
        state = ("batch", "heads", None, None)
        options = dict(normalize=c.normalize, chunk_size=c.chunk_size)

        def scan(q, k, v, log_decay, segment_ids, state=None):
            kept = dict(
                initial_state=state,
                return_final_state=state is not None,
                segment_ids=segment_ids,
                **options,
            )
            if is_part:  # the states go on from device to device
                return linear_scan_sharded(
                    q, k, v, log_decay, axis_name=mesh_axis("length"), **kept
                )
            return linear_scan(q, k, v, log_decay, **kept)

        # Every device scans its own rows, heads and tokens.
        is_part = is_cut("length", q.shape[1])
        inputs, axes = (
            (q, k, v, log_decay, info.segment_ids),
            (heads, kv_heads, kv_heads, decay, tokens),
        )
        if cache is None:
            return per_shard(scan, axes, heads)(*inputs), None
        return per_shard(scan, (*axes, state), [heads, state])(*inputs, cache.state)


def init_cache(
    config: GatedLinearAttentionConfig, batch: int, length: int, dtype: jnp.dtype
) -> ScanCache:
    """An empty cache; its size does not depend on `length`."""
    c = config
    state = (batch, c.num_heads, c.key_dim, c.value_dim + int(c.normalize))
    channels = c.num_heads * c.key_dim + c.kv_heads * (c.key_dim + c.value_dim)
    return ScanCache(
        jnp.zeros(state, jnp.float32), jnp.zeros((batch, max(c.conv_width - 1, 0), channels), dtype)
    )


def _inverse_softplus_of_log_uniform(key: Array, shape, dtype) -> Array:
    """b with softplus(b) log-uniform in [1e-3, 1e-1]: Mamba-2's step sizes at the start."""
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, np.log(1e-3), np.log(1e-1)))
    return dt + jnp.log(-jnp.expm1(-dt))
