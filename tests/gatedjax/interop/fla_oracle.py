"""What fla's models compute, token by token in float64, from the tensors of their files.

Read from its layers and its naive functions: GLA, retention, HGRN2, the gated delta rule and its
product, RWKV-6 and RWKV-7.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(0, x)


def normed(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def unit(x):
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def convolved(x, weight):
    """Causal, depthwise, taps oldest first, then SiLU; x [T, F], weight [F, 1, W]."""
    width = weight.shape[-1]
    padded = np.concatenate([np.zeros((width - 1, x.shape[1])), x])
    taps = [padded[j : j + len(x)] * weight[:, 0, j] for j in range(width)]
    return silu(sum(taps))


def rotated(x, base=10_000.0):
    """Half of a head's channels with the other half; x [T, H, K]."""
    tokens, _, channels = x.shape
    frequencies = base ** (-np.arange(0, channels, 2) / channels)
    angles = np.arange(tokens)[:, None, None] * frequencies
    left, right = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def scanned(q, k, v, log_decay):
    """S <- decay S + k v; o = q S / sqrt(K). log_decay [T, H, K] or [H]."""
    tokens, heads, channels = q.shape
    log_decay = np.broadcast_to(log_decay, (tokens, heads, channels))
    state = np.zeros((heads, channels, v.shape[-1]))
    outputs = np.zeros(v.shape)
    for t in range(tokens):
        state = np.exp(log_decay[t])[..., None] * state + k[t][..., None] * v[t][:, None]
        outputs[t] = np.einsum("hk,hkv->hv", q[t], state) * channels**-0.5
    return outputs


def delta_scanned(q, k, v, log_decay, beta):
    """S <- decay S; S += k beta (v - k S); o = q S / sqrt(K), with q and k of length 1."""
    tokens, heads, channels = q.shape
    state = np.zeros((heads, channels, v.shape[-1]))
    outputs = np.zeros(v.shape)
    for t in range(tokens):
        state = np.exp(log_decay[t])[:, None, None] * state
        error = beta[t][:, None] * (v[t] - np.einsum("hk,hkv->hv", unit(k[t]), state))
        state = state + unit(k[t])[..., None] * error[:, None]
        outputs[t] = np.einsum("hk,hkv->hv", unit(q[t]), state) * channels**-0.5
    return outputs


def layer_normed(x, w, name, eps):
    centered = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(centered * centered, axis=-1, keepdims=True)
    return centered / np.sqrt(variance + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def rwkv6_logits(w: Tensors, config: Mapping[str, Any], tokens: np.ndarray) -> np.ndarray:
    """Of one row of tokens: LayerNorms, mixes of neighboring tokens that a token chooses."""
    eps = config["norm_eps"]
    x = w["model.embeddings.weight"][tokens]
    x = layer_normed(x, w, "model.layers.0.pre_norm", eps)
    for i in range(config["num_hidden_layers"]):
        place = f"model.layers.{i}."
        layer = {name.removeprefix(place): y for name, y in w.items() if name.startswith(place)}
        x = x + rwkv6_mixed(layer_normed(x, layer, "attn_norm", eps), layer, config)
        h = layer_normed(x, layer, "ffn_norm", eps)
        hidden = np.maximum(lerp_linear(h, layer, "ffn.key"), 0) ** 2
        gate = sigmoid(lerp_linear(h, layer, "ffn.receptance"))
        x = x + gate * (hidden @ layer["ffn.value.weight"].T)
    return layer_normed(x, w, "model.norm", eps) @ w["lm_head.weight"].T


def lerp_linear(x, w, name):
    return shifted(x, w[f"{name}.mu"]) @ w[f"{name}.linear.weight"].T


def rwkv6_mixed(x, w, config):
    width, heads, rank = x.shape[1], config["num_heads"], config["proj_low_rank_dim"]
    delta = np.concatenate([np.zeros((1, width)), x[:-1]]) - x
    low = np.tanh(lerp_linear(x, w, "attn.x_proj.0")).reshape(len(x), 5, rank)
    up = w["attn.x_proj.2.weight"].reshape(width, 5, rank)
    amounts = np.einsum("tnr,hnr->tnh", low, up) + w["attn.x_bias"]
    mixed = dict(zip("rwkvg", (x + delta * amounts[:, n] for n in range(5))))
    r, k, v, g = (mixed[n] @ w[f"attn.{n}_proj.linear.weight"].T for n in "rkvg")
    lora = "attn.w_proj.linear.lora"
    low = np.tanh(mixed["w"] @ w[f"{lora}.0.weight"].T)
    decay = np.exp(-np.exp(low @ w[f"{lora}.2.weight"].T + w[f"{lora}.2.bias"]))
    r, k, v, decay = (y.reshape(len(x), heads, -1) for y in (r, k, v, decay))
    state = np.zeros((heads, k.shape[-1], v.shape[-1]))
    outputs = np.zeros(v.shape)
    for t in range(len(x)):
        written = k[t][..., None] * v[t][:, None]
        seen = state + w["attn.bonus"][..., None] * written
        outputs[t] = np.einsum("hk,hkv->hv", r[t], seen)
        state = decay[t][..., None] * state + written
    centered = outputs - np.mean(outputs, axis=-1, keepdims=True)
    variance = np.mean(centered * centered, axis=-1, keepdims=True)
    normed = (centered / np.sqrt(variance + config["norm_eps"])).reshape(len(x), -1)
    o = normed * w["attn.g_norm.weight"] + w["attn.g_norm.bias"]
    return (o * silu(g)) @ w["attn.o_proj.weight"].T


def rwkv7_logits(w: Tensors, config: Mapping[str, Any], tokens: np.ndarray) -> np.ndarray:
    """Of one row of tokens: LayerNorms, values of the first layer, a mix of neighboring tokens."""
    eps = config["norm_eps"]
    x = w["model.embeddings.weight"][tokens]
    x = layer_normed(x, w, "model.layers.0.pre_norm", eps)
    first_values = None
    for i in range(config["num_hidden_layers"]):
        place = f"model.layers.{i}."
        layer = {name.removeprefix(place): y for name, y in w.items() if name.startswith(place)}
        h = layer_normed(x, layer, "attn_norm", eps)
        y, first_values = rwkv7_mixed(h, layer, config, first_values)
        x = x + y
        h = layer_normed(x, layer, "ffn_norm", eps)
        mixed = shifted(h, layer["ffn.x_k"])
        hidden = np.maximum(mixed @ layer["ffn.key.weight"].T, 0) ** 2
        x = x + hidden @ layer["ffn.value.weight"].T
    return layer_normed(x, w, "model.norm", eps) @ w["lm_head.weight"].T


def shifted(x, amount):
    previous = np.concatenate([np.zeros((1, x.shape[1])), x[:-1]])
    return x + (previous - x) * amount.reshape(-1)


def low_rank(x, w, name, activation=None):
    low = x @ w[f"attn.{name}_lora.lora.0.weight"].T
    low = low if activation is None else activation(low)
    return low @ w[f"attn.{name}_lora.lora.2.weight"].T + w.get(f"attn.{name}_lora.lora.2.bias", 0)


def rwkv7_mixed(x, w, config, first_values):
    r, k, v = (shifted(x, w[f"attn.x_{n}"]) @ w[f"attn.{n}_proj.weight"].T for n in "rkv")
    decay = np.exp(-np.exp(-0.5) * sigmoid(low_rank(shifted(x, w["attn.x_w"]), w, "w", np.tanh)))
    if first_values is None:
        first_values = v
    else:
        v = v + (first_values - v) * sigmoid(low_rank(shifted(x, w["attn.x_v"]), w, "v"))
    rate = sigmoid(low_rank(shifted(x, w["attn.x_a"]), w, "a"))
    gate = low_rank(shifted(x, w["attn.x_g"]), w, "g", sigmoid)
    shape = (len(x), -1, config["head_dim"])
    removal = (k * w["attn.k_k"]).reshape(shape)
    removal = removal / np.maximum(np.linalg.norm(removal, axis=-1, keepdims=True), 1e-12)
    k = k * (1 + (rate - 1) * w["attn.k_a"])
    r, k, v, decay, rate = (y.reshape(shape) for y in (r, k, v, decay, rate))
    state = np.zeros((r.shape[1], config["head_dim"], config["head_dim"]))
    outputs = np.zeros(r.shape)
    for t in range(len(x)):
        # What is found under the removal key is taken out, at the rate of each channel.
        found = np.einsum("hk,hkv->hv", removal[t], state)
        state = decay[t][..., None] * state - (removal[t] * rate[t])[..., None] * found[:, None]
        state = state + k[t][..., None] * v[t][:, None]
        outputs[t] = np.einsum("hk,hkv->hv", r[t], state)
    centered = outputs - np.mean(outputs, axis=-1, keepdims=True)
    variance = np.mean(centered * centered, axis=-1, keepdims=True)
    normed = centered / np.sqrt(variance + config["head_dim"] * config["norm_eps"])
    o = normed.reshape(len(x), -1) * w["attn.g_norm.weight"] + w["attn.g_norm.bias"]
    bonus = np.sum(r * k * w["attn.r_k"], axis=-1, keepdims=True) * v
    o = (o + bonus.reshape(len(x), -1)) * gate
    return o @ w["attn.o_proj.weight"].T, first_values


def logits(tensors: Tensors, config: Mapping[str, Any], tokens: np.ndarray) -> np.ndarray:
    """Of one row of tokens."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    if config["model_type"] in RWKV:
        return RWKV[config["model_type"]](w, config, tokens)
    eps = config["norm_eps"]
    mixer = MIXERS[config["model_type"]]
    x = w["model.embeddings.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        layer = {
            name.removeprefix(f"model.layers.{i}."): tensor
            for name, tensor in w.items()
            if name.startswith(f"model.layers.{i}.")
        }
        layer["floor"] = floors_of(w, config)[i]
        x = x + mixer(normed(x, layer["attn_norm.weight"], eps), layer, config)
        h = normed(x, layer["mlp_norm.weight"], eps)
        gate = silu(h @ layer["mlp.gate_proj.weight"].T)
        x = x + gate * (h @ layer["mlp.up_proj.weight"].T) @ layer["mlp.down_proj.weight"].T
    return normed(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def projected(x, w, names, heads):
    """Projections, convolved where there are convolutions; [T, heads, channels] each."""
    found = []
    for name, count in zip(names, heads):
        y = x @ w[f"attn.{name}_proj.weight"].T
        if f"attn.{name}_conv1d.weight" in w:
            y = convolved(y, w[f"attn.{name}_conv1d.weight"])
        found.append(y.reshape(len(x), count, -1))
    return found


def gated(o, x, w, norm, eps):
    gate = (x @ w["attn.g_proj.weight"].T).reshape(o.shape)
    o = normed(o, w[norm], eps) * silu(gate)
    return o.reshape(len(x), -1) @ w["attn.o_proj.weight"].T


def gla(x, w, config):
    heads = config["num_heads"]
    q, k, v = projected(x, w, "qkv", [heads] * 3)
    low = x @ w["attn.gk_proj.0.weight"].T
    logits = low @ w["attn.gk_proj.1.weight"].T + w["attn.gk_proj.1.bias"]
    log_decay = -softplus(-logits).reshape(q.shape) / 16
    o = scanned(q, k, v, log_decay)
    return gated(o, x, w, "attn.g_norm_swish_gate.weight", config["norm_eps"])


def retnet(x, w, config):
    heads = config["num_heads"]
    q, k, v = projected(x, w, "qkv", [heads] * 3)
    log_decay = np.log(1 - 2.0 ** (-5 - np.arange(heads)))[:, None]
    o = scanned(rotated(q), rotated(k), v, log_decay)
    return gated(o, x, w, "attn.g_norm_swish_gate.weight", config["norm_eps"])


def hgrn2(x, w, config):
    heads = config["num_heads"]
    q, f, v = projected(x, w, "qfi", [heads] * 3)
    alpha = w["floor"].reshape(f.shape[1:]) + (1 - w["floor"].reshape(f.shape[1:])) * sigmoid(f)
    o = scanned(silu(q), 1 - alpha, v, np.log(alpha)).reshape(len(x), -1)
    # Its kernel's own eps, not that of the file.
    return normed(o, w["attn.g_norm.weight"], 1e-5) @ w["attn.o_proj.weight"].T


def floors_of(w, config):
    """Of every layer: the sums of the fractions of the layers up to it, without the first's."""
    if not config.get("use_lower_bound"):
        return np.zeros((config["num_hidden_layers"], config["hidden_size"]))
    weights = np.exp(w["model.lower_bounds"])
    fractions = weights / weights.sum(axis=0)
    return np.cumsum(fractions, axis=0) - fractions[0]


def gated_deltanet(x, w, config):
    key_heads, heads = config["num_heads"], config["num_v_heads"]
    q, k, v = projected(x, w, "qkv", [key_heads, key_heads, heads])
    # A value head reads the key head of its group.
    q, k = (np.repeat(y, heads // key_heads, axis=1) for y in (q, k))
    largest = 2 if config["allow_neg_eigval"] else 1
    beta = largest * sigmoid(x @ w["attn.b_proj.weight"].T)
    logits = x @ w["attn.a_proj.weight"].T + w["attn.dt_bias"]
    log_decay = -np.exp(w["attn.A_log"]) * softplus(logits)
    o = delta_scanned(q, k, v, log_decay, beta)
    return gated(o, x, w, "attn.o_norm.weight", config["norm_eps"])


def gated_deltaproduct(x, w, config):
    heads, steps = config["num_heads"], config["num_householder"]
    q, k, v = projected(x, w, "qkv", [heads, steps * heads, steps * heads])
    largest = 2 if config["allow_neg_eigval"] else 1
    beta = largest * sigmoid(x @ w["attn.b_proj.weight"].T)
    logits = x @ w["attn.a_proj.weight"].T + w["attn.dt_bias"]
    log_decay = -np.exp(w["attn.A_log"]) * softplus(logits)
    # Every step is a token of the gated delta rule: a decay in the first, an output of the last.
    k, v, beta = (y.reshape(len(x) * steps, heads, *y.shape[2:]) for y in (k, v, beta))
    q = np.repeat(q, steps, axis=0)
    first = (np.arange(len(q)) % steps == 0)[:, None]
    o = delta_scanned(q, k, v, np.where(first, np.repeat(log_decay, steps, axis=0), 0), beta)
    return gated(o[steps - 1 :: steps], x, w, "attn.o_norm.weight", config["norm_eps"])


FAMILIES = ("gla", "retnet", "hgrn2", "gated_deltanet", "gated_deltaproduct", "rwkv6", "rwkv7")
RWKV = {"rwkv6": rwkv6_logits, "rwkv7": rwkv7_logits}
MIXERS = {
    "gla": gla,
    "retnet": retnet,
    "hgrn2": hgrn2,
    "gated_deltanet": gated_deltanet,
    "gated_deltaproduct": gated_deltaproduct,
}
