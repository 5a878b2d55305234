"""Tiny random models of other projects, as their packages write them: one a family.

Needs torch and transformers (`make test-oracles`). All parameters are perturbed, norms and biases
too: a mapping that drops one, or takes one for another, shows.
"""

from pathlib import Path
from typing import Any

import pytest
from torch_kernels import without_kernels

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB = 72

_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    max_position_embeddings=128,
)
_GATED_DELTA = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
)
_EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20)

_LATENT = dict(
    num_key_value_heads=4,
    kv_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=12,
)

# The class of the configuration, and what it does not share with the others.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        dict(
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
    ),
    "mistral": ("MistralConfig", dict(sliding_window=9)),
    "qwen2": ("Qwen2Config", dict()),
    "qwen3": ("Qwen3Config", dict(attention_bias=True, tie_word_embeddings=True)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(**_EXPERTS, norm_topk_prob=True, mlp_only_layers=[1])),
    "mixtral": ("MixtralConfig", dict(num_local_experts=6, num_experts_per_tok=2)),
    "qwen3_next": (
        "Qwen3NextConfig",
        dict(**_GATED_DELTA, **_EXPERTS, shared_expert_intermediate_size=24),
    ),
    "qwen3_5": ("Qwen3_5TextConfig", _GATED_DELTA),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        dict(**_GATED_DELTA, **_EXPERTS, shared_expert_intermediate_size=24),
    ),
    "olmo_hybrid": ("OlmoHybridConfig", dict(num_key_value_heads=4, linear_num_key_heads=4)),
    "gpt_oss": (
        "GptOssConfig",
        dict(num_local_experts=6, num_experts_per_tok=2, sliding_window=9),
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        dict(
            **_LATENT,
            num_hidden_layers=5,
            linear_head_dim=8,
            linear_num_heads=4,
            num_local_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
            n_group=1,
            topk_group=1,
            mlp_layer_types=["dense"] + ["sparse"] * 4,
        ),
    ),
    "nemotron_h": (
        "NemotronHConfig",
        dict(
            layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
            head_dim=12,
            ssm_state_size=16,
            mamba_num_heads=8,
            mamba_head_dim=12,
            n_groups=2,
            n_routed_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
            moe_latent_size=28,
            moe_shared_expert_intermediate_size=24,
        ),
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        dict(
            **_LATENT,
            head_dim=8,
            q_lora_rank=24,
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
            n_shared_experts=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
        ),
    ),
}


# fla's own. Their kernels run on GPUs only: what they compute is in fla_oracle.py.
FLA_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gla": ("GLAConfig", dict(use_short_conv=True)),
    "retnet": ("RetNetConfig", dict()),
    "hgrn2": ("HGRN2Config", dict(num_heads=None, expand_ratio=12)),
    "gated_deltanet": (
        "GatedDeltaNetConfig",
        dict(head_dim=8, num_heads=2, num_v_heads=4, allow_neg_eigval=True),
    ),
    "gated_deltaproduct": (
        "GatedDeltaProductConfig",
        dict(head_dim=8, num_heads=3, use_forget_gate=True, num_householder=2),
    ),
    "rwkv6": (
        "RWKV6Config",
        dict(expand_k=0.5, proj_low_rank_dim=7, gate_low_rank_dim=9),
    ),
    "rwkv7": (
        "RWKV7Config",
        dict(
            head_dim=12,
            decay_low_rank_dim=7,
            gate_low_rank_dim=11,
            a_low_rank_dim=9,
            v_low_rank_dim=5,
        ),
    ),
}
_FLA_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=2,
    num_heads=4,
    pad_token_id=0,
)


def tiny_config(family: str, **values: Any) -> Any:
    """The configuration of a tiny model, with other values of some keys."""
    name, own = CONFIGS[family]
    return getattr(transformers, name)(**_COMMON | own | values)


def tiny_model(family: str, seed: int = 0, **values: Any) -> Any:
    """A model with every parameter perturbed, in float32, ready to evaluate.

    Args:
      family: a key of `CONFIGS`.
      seed: of its parameters.
      **values: of its configuration that differ.
    """
    torch.manual_seed(seed)
    with without_kernels():
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **values))
    perturb(model)
    return plain(model)


def loaded(folder: Path) -> Any:
    """What transformers makes of a folder; it knows every tensor, and misses none."""
    with without_kernels():
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
        )
    assert not any(found.values()), found
    return plain(model)


def plain(model: Any) -> Any:
    """The plain paths of a model, in float32: no other package's kernel is compared with."""
    model.config._attn_implementation = "eager"
    model.config._experts_implementation = "eager"
    return model.float().eval()


def perturb(model: Any) -> None:
    """Moves every parameter, and the biases of routers, away from where they start."""
    buffers = [(n, b) for n, b in model.named_buffers() if "e_score" in n]
    with torch.no_grad():
        for _, x in [*model.named_parameters(), *buffers]:
            x.add_(0.1 * torch.randn_like(x))


def saved(family: str, folder: Path, dtype: str = "float32") -> Any:
    """The model, saved in a folder as the hub would have it."""
    model = tiny_model(family)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return model


def saved_by_fla(family: str, folder: Path) -> None:
    """One of fla's own models, saved in a folder."""
    models = pytest.importorskip("fla.models")
    name, own = FLA_CONFIGS[family]
    config = getattr(models, name)(**_FLA_COMMON | own)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
