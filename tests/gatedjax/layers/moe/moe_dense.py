"""The slow twin of the sparse mixture: every expert on every token, and a weight, mostly 0, for
each pair of them.

Built from ranks and masks, where the layer sorts and gathers: they share no code.
"""

import jax
import jax.numpy as jnp
import numpy as np

ACTIVATIONS = {
    "silu": lambda x: x / (1 + jnp.exp(-x)),
    "gelu": lambda x: jax.nn.gelu(x),
    "relu_squared": lambda x: jnp.where(x > 0, x * x, 0.0),
}
MATRICES = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
GATES = {
    "identity": lambda x: x,
    "tanh": jnp.tanh,
    "sigmoid": lambda x: 1 / (1 + jnp.exp(-x)),
    "gelu": jax.nn.gelu,
}


def chosen(preferred, k):
    """Mask of the k largest along the last axis: those that fewer than k others come before."""
    p = jax.lax.stop_gradient(preferred)
    earlier = np.tril(np.ones((p.shape[-1],) * 2, bool), -1)  # [i, j]: j has the lower id
    before = (p[..., None, :] > p[..., :, None]) | ((p[..., None, :] == p[..., :, None]) & earlier)
    return before.sum(-1) < k


def score(name, z, mask=None):
    """Scores of the masked logits alone; 0 elsewhere."""
    z = z if mask is None else jnp.where(mask, z, -1e30)
    if name == "sigmoid":
        return GATES["sigmoid"](z)
    if name == "softmax":
        e = jnp.exp(z - jax.lax.stop_gradient(z.max(-1, keepdims=True)))
        return e / e.sum(-1, keepdims=True)
    sizes = np.arange(1, z.shape[-1] + 1)
    threshold = ((jnp.cumsum(-jnp.sort(-z, axis=-1), axis=-1) - 1) / sizes).max(-1, keepdims=True)
    return jnp.maximum(z - threshold, 0)


def hashed(tokens, experts, k):
    """The mask of the k experts of each token id, in Python integers."""

    def first(h):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = ((h ^ (h >> shift)) * factor) % 2**32
        return (h ^ (h >> 16)) % experts

    ids = [[(first(int(t)) + j) % experts for j in range(k)] for t in np.ravel(tokens)]
    return jax.nn.one_hot(np.array(ids), experts).sum(1).reshape(*tokens.shape, experts) > 0


def combine_weights(r, k, z, bias=0.0, importance=1.0, tokens=None, noise=0.0):
    """[B, T, E]: what the router `r` multiplies each expert's output by, from logits over the
    temperature.
    """
    z = z + noise
    s = score(r.scoring, z)
    preferred = s + bias
    if r.selection == "expert_choice":
        T, E = z.shape[-2:]
        mask = jnp.moveaxis(chosen(jnp.moveaxis(s, -1, -2), min(T, -(-k * T // E))), -1, -2)
        return r.scale * s * mask
    if r.selection == "hash":
        mask = hashed(tokens, z.shape[-1], k)
    elif r.selection == "grouped_topk":
        groups = jnp.stack(jnp.split(preferred, r.num_groups, -1), -2)
        best = jnp.sort(groups, -1)[..., -(2 if r.group_score == "sum_top2" else 1) :].sum(-1)
        allowed = jnp.repeat(chosen(best, r.kept_groups), groups.shape[-1], -1)
        mask = chosen(jnp.where(allowed, preferred, -1e9), k)
    else:
        mask = chosen(preferred, k)
    w = {
        "scores": lambda: s,
        "uniform": lambda: jnp.full_like(s, 1 / k),
        "selected": lambda: score(r.scoring, z, mask),
    }
    w = w[r.weighting]() * mask
    if r.selection == "gumbel":
        w = (mask + w - jax.lax.stop_gradient(w)) * mask
    if r.renormalize:
        w = w / w.sum(-1, keepdims=True)
    return r.scale * jnp.where(importance * s < r.threshold, 0.0, w)


def mlp(c, p, x):
    """One expert: its matrices, and its biases where it has some."""
    plus = lambda name, y: y @ p[name] + p.get(f"{name}_bias", 0.0)
    up = plus("up", x)
    if not c.gated:
        return plus("down", ACTIVATIONS[c.activation](up))
    gate = plus("gate", x)
    if c.activation == "clamped_swiglu":
        # gpt-oss: the gate is cut from above, up on both sides.
        gate = jnp.where(gate > c.swiglu_limit, c.swiglu_limit, gate)
        up = jnp.where(jnp.abs(up) > c.swiglu_limit, jnp.sign(up) * c.swiglu_limit, up)
        return plus("down", (up + 1) * gate / (1 + jnp.exp(-1.702 * gate)))
    return plus("down", ACTIVATIONS[c.activation](gate) * up)


def dense_moe(c, p, x, state=None, tokens=None, previous=None):
    """The layer's output [B, T, M], capacity aside; parameters and state as the layer has them."""
    r, state = c.router, state or {}
    m = {**GATES, "unit": lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)}[
        r.modified_input
    ](x)
    h = m @ p["router"]["kernel"]
    if r.residual and previous is not None:
        h = h + previous @ p["router_residual"]["kernel"]
    h = GATES[r.activation](h) + p.get("router_bias", 0.0)
    state_of = lambda name, otherwise: state.get(name, otherwise)
    z = h / state_of("temperature", r.temperature)
    weights = combine_weights(
        r, c.experts_per_token, z, state_of("bias", 0.0), state_of("importance", 1.0), tokens
    )
    n = c.num_experts
    low = x @ p["latent_down"]["kernel"] if c.latent else x
    y = jnp.zeros_like(low)
    names = [name for name in MATRICES if name in p]
    for e in range(n):
        w = weights[..., e : e + 1]
        into = low * w if r.weight_input else low
        out = mlp(c, {name: p[name][e] for name in names}, into)
        y = y + (out * (w != 0) if r.weight_input else out * w)
    if c.latent:
        y = y @ p["latent_up"]["kernel"]
    n += c.zero_experts
    y = y + weights[..., n : n + c.copy_experts].sum(-1, keepdims=True) * x
    n += c.copy_experts
    for i in range(c.constant_experts):
        a = score("softmax", x @ p["constant_mixer"][:, i])
        y = y + weights[..., n + i, None] * (a[..., :1] * x + a[..., 1:] * p["constant"][i])
    if c.shared_hidden:
        s = {name: q["kernel"] for name, q in p["shared"].items()}
        s |= {f"{name}_bias": q["bias"] for name, q in p["shared"].items() if "bias" in q}
        shared = mlp(c, s, x)
        y = y + shared * (
            GATES["sigmoid"](x @ p["shared_gate"]["kernel"]) if c.shared_gate else 1.0
        )
    return y
