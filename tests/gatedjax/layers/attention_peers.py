"""Runs the attention layers of transformers on given numbers, where torch is installed:

    python attention_peers.py IN.npz OUT.npz

In: the inputs of every case, named "case/input", and what outputs are weighted by. Out: the outputs
"case/o", and the gradients "case/d input" of their weighted sum.
"""

import math
import sys

import numpy as np
import torch
from torch.func import functional_call
from transformers.models.bailing_hybrid import modeling_bailing_hybrid as ling
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.inkling2 import modeling_inkling2 as inkling
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.laguna import modeling_laguna as laguna
from transformers.models.olmo_hybrid import modeling_olmo_hybrid as olmo
from transformers.models.qwen2 import modeling_qwen2 as qwen2

torch.set_num_threads(1)


def matrix(kernel, inputs=1):
    """Our [*in, *out] as theirs, [out, in]."""
    return kernel.flatten(0, inputs - 1).flatten(1).T


def projections(p, names):
    """Weights and biases of `{theirs: ours}`; the output contracts heads and channels."""
    weights = {}
    for theirs, ours in names.items():
        inputs = 2 if ours == "out" else 1
        weights[f"{theirs}.weight"] = matrix(p[f"{ours}/kernel"], inputs)
        if f"{ours}/bias" in p:
            weights[f"{theirs}.bias"] = p[f"{ours}/bias"].flatten()
    return weights


QKVO = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}


def causal(x, window=None):
    """Zeros where a token sees another one, -inf elsewhere."""
    i = torch.arange(x.shape[1])
    seen = i[:, None] >= i
    if window is not None:
        seen &= i[:, None] - i < window
    return torch.zeros(seen.shape).masked_fill(~seen, -math.inf)[None, None]


def angles(rotary, x):
    return rotary(x, torch.arange(x.shape[1])[None])


# --- latent attention


def latent_sizes(p, x):
    heads, value_dim, _ = p["out/kernel"].shape
    rank = len(p["kv_norm/scale"])
    key_dim = p["kv_up/kernel"].shape[2] - value_dim
    return dict(
        hidden_size=x.shape[-1],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        kv_lora_rank=rank,
        q_lora_rank=len(p["query_norm/scale"]) if "query_norm/scale" in p else None,
        qk_nope_head_dim=key_dim,
        qk_rope_head_dim=p["kv_down/kernel"].shape[1] - rank,
        v_head_dim=value_dim,
        num_hidden_layers=1,
        attn_implementation="eager",
    )


def latent_weights(p):
    names = {"kv_a_proj_with_mqa": "kv_down", "kv_b_proj": "kv_up", "o_proj": "out"}
    if "query/kernel" in p:
        weights = projections(p, names | {"q_proj": "query"})
    else:
        weights = projections(p, names | {"q_a_proj": "query_down", "q_b_proj": "query_up"})
        weights["q_a_layernorm.weight"] = p["query_norm/scale"]
    return weights | {"kv_a_layernorm.weight": p["kv_norm/scale"]}


def deepseek_layer(p, x):
    rope = dict(
        rope_type="yarn",
        rope_theta=1e4,
        factor=8.0,
        original_max_position_embeddings=64,
        mscale=0.7,
        mscale_all_dim=0.9,
    )
    sizes = latent_sizes(p, x)
    config = deepseek.DeepseekV3Config(
        **sizes, head_dim=sizes["qk_rope_head_dim"], rope_parameters=rope
    )
    layer = deepseek.DeepseekV3Attention(config, 0).eval()
    turned = angles(deepseek.DeepseekV3RotaryEmbedding(config), x)
    return functional_call(layer, latent_weights(p), (x, turned, causal(x)))[0]


def kimi_layer(p, x):
    config = kimi.KimiLinearConfig(**latent_sizes(p, x), layer_types=["full_attention"])
    layer = kimi.KimiLinearAttention(config, 0).eval()
    return functional_call(layer, latent_weights(p), (x, causal(x)))[0]


def ling_layer(p, x):
    rope = dict(rope_type="default", rope_theta=1e4)
    config = ling.BailingHybridConfig(
        **latent_sizes(p, x), layer_types=["full_attention"], rope_parameters=rope
    )
    layer = ling.BailingHybridAttention(config, 0).eval()
    weights = latent_weights(p) | {"g_proj.weight": matrix(p["gate/projection/kernel"])}
    turned = angles(ling.BailingHybridRotaryEmbedding(config), x)
    return functional_call(layer, weights, (x, turned, causal(x)))[0]


# --- grouped-query attention


def sizes(p, x):
    heads, head_dim, _ = p["out/kernel"].shape
    return dict(
        hidden_size=x.shape[-1],
        num_attention_heads=heads,
        num_key_value_heads=p["key/kernel"].shape[1],
        head_dim=head_dim,
        num_hidden_layers=1,
        attn_implementation="eager",
    )


def gpt_oss_layer(p, x):
    rope = dict(
        rope_type="yarn",
        rope_theta=1.5e5,
        factor=32.0,
        original_max_position_embeddings=4096,
        truncate=False,
    )
    config = gpt_oss.GptOssConfig(
        **sizes(p, x), layer_types=["sliding_attention"], sliding_window=7, rope_parameters=rope
    )
    layer = gpt_oss.GptOssAttention(config, 0).eval()
    weights = projections(p, QKVO) | {"sinks": p["sink_logits"]}
    turned = angles(gpt_oss.GptOssRotaryEmbedding(config), x)
    return functional_call(layer, weights, (x, turned, causal(x, window=7)))[0]


def qwen2_layer(p, x):
    rope = dict(rope_type="default", rope_theta=1e4)
    config = qwen2.Qwen2Config(**sizes(p, x), rope_parameters=rope)
    layer = qwen2.Qwen2Attention(config, 0).eval()
    turned = angles(qwen2.Qwen2RotaryEmbedding(config), x)
    return functional_call(layer, projections(p, QKVO), (x, turned, causal(x)))[0]


def olmo_layer(p, x):
    rope = dict(rope_type="default", rope_theta=1e4)
    # Its configuration wants a layer of each kind.
    both = dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    config = olmo.OlmoHybridConfig(**sizes(p, x) | both, rope_parameters=rope, rms_norm_eps=1e-5)
    layer = olmo.OlmoHybridAttention(config, 1).eval()
    weights = projections(p, QKVO) | {
        "q_norm.weight": p["query_norm/scale"].flatten(),
        "k_norm.weight": p["key_norm/scale"].flatten(),
    }
    turned = angles(olmo.OlmoHybridRotaryEmbedding(config), x)
    return functional_call(layer, weights, (x, turned, causal(x)))[0]


def laguna_layer(p, x):
    rope = {"full_attention": dict(rope_type="default", rope_theta=1e4)}
    config = laguna.LagunaConfig(
        **sizes(p, x), layer_types=["full_attention"], rope_parameters=rope, rms_norm_eps=1e-5
    )
    layer = laguna.LagunaAttention(config, 0, config.num_attention_heads).eval()
    weights = projections(p, QKVO | {"g_proj": "gate/projection"}) | {
        "q_norm.weight": p["query_norm/scale"],
        "k_norm.weight": p["key_norm/scale"],
    }
    rotary = laguna.LagunaRotaryEmbedding(config)
    turned = rotary(x, torch.arange(x.shape[1])[None], "full_attention")
    return functional_call(layer, weights, (x, turned, causal(x)))[0]


def inkling_sinks(p, x):
    """Its function of attention with sinks of tokens, on projections like ours."""
    q, k, v = (
        torch.einsum("btm,mhd->bhtd", x, p[f"{name}/kernel"]) for name in ("query", "key", "value")
    )
    module = torch.nn.Module()
    module.num_key_value_groups = q.shape[1] // k.shape[1]
    sinks = (x @ p["token_sinks/kernel"]).transpose(1, 2)[..., None]
    o, _ = inkling.eager_attention_forward(
        module, q, k, v, causal(x), scaling=q.shape[-1] ** -0.5, dropout=0.0, sinks=sinks
    )
    return torch.einsum("bthd,hdm->btm", o, p["out/kernel"])


LAYERS = {
    "DeepSeek-V3": deepseek_layer,
    "Kimi-Linear": kimi_layer,
    "Ling 3": ling_layer,
    "gpt-oss": gpt_oss_layer,
    "Qwen2": qwen2_layer,
    "OLMo-Hybrid": olmo_layer,
    "Laguna": laguna_layer,
    "Inkling 2's sinks": inkling_sinks,
}


def main() -> None:
    given: dict[str, dict[str, torch.Tensor]] = {}
    for path, array in np.load(sys.argv[1]).items():
        case, name = path.split("/", 1)
        given.setdefault(case, {})[name] = torch.tensor(array)
    results = {}
    for case, arrays in given.items():
        weight = arrays.pop("weight")
        for array in arrays.values():
            array.requires_grad_()
        o = LAYERS[case](arrays, arrays["x"])
        gradients = torch.autograd.grad((o * weight).sum(), list(arrays.values()))
        results[f"{case}/o"] = o
        for name, gradient in zip(arrays, gradients):
            results[f"{case}/d {name}"] = gradient
    np.savez(sys.argv[2], **{name: a.detach().numpy() for name, a in results.items()})


main()
