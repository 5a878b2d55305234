"""Tiny random models of other projects, as their packages write them: one a family.

Needs torch and transformers (`make test-oracles`). All parameters are perturbed, norms and biases
too: a mapping that drops one, or takes one for another, shows.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

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

Builder = Callable[[], Any]


def _config(name: str, **values: Any) -> Any:
    return getattr(transformers, name)(**_COMMON | values)


def llama() -> Any:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    return _config("LlamaConfig", rope_parameters=scaling, tie_word_embeddings=True)


def mistral() -> Any:
    return _config("MistralConfig", sliding_window=9)


def qwen3() -> Any:
    return _config("Qwen3Config", tie_word_embeddings=True)


def qwen3_moe() -> Any:
    return _config("Qwen3MoeConfig", **_EXPERTS, norm_topk_prob=True)


def mixtral() -> Any:
    return _config("MixtralConfig", num_local_experts=6, num_experts_per_tok=2)


def qwen3_next() -> Any:
    return _config(
        "Qwen3NextConfig",
        **_GATED_DELTA,
        **_EXPERTS,
        shared_expert_intermediate_size=24,
    )


def qwen3_5() -> Any:
    return _config("Qwen3_5TextConfig", **_GATED_DELTA)


def qwen3_5_moe() -> Any:
    return _config(
        "Qwen3_5MoeTextConfig",
        **_GATED_DELTA,
        **_EXPERTS,
        shared_expert_intermediate_size=24,
    )


def olmo_hybrid() -> Any:
    return _config(
        "OlmoHybridConfig",
        num_key_value_heads=4,
        linear_num_key_heads=4,
    )


def gpt_oss() -> Any:
    return _config(
        "GptOssConfig",
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=9,
    )


def kimi_linear() -> Any:
    return _config(
        "KimiLinearConfig",
        num_hidden_layers=5,
        num_key_value_heads=4,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=12,
        linear_head_dim=8,
        linear_num_heads=4,
        num_local_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        n_group=1,
        topk_group=1,
        mlp_layer_types=["dense"] + ["sparse"] * 4,
    )


def nemotron_h() -> Any:
    kinds = ["linear_attention", "moe", "full_attention", "mlp"]
    return _config(
        "NemotronHConfig",
        layers_block_type=kinds,
        head_dim=12,
        ssm_state_size=16,
        mamba_num_heads=8,
        mamba_head_dim=12,
        n_groups=2,
        n_routed_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        moe_shared_expert_intermediate_size=24,
    )


def deepseek_v3() -> Any:
    return _config(
        "DeepseekV3Config",
        num_key_value_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=12,
    )


CONFIGS: dict[str, Builder] = {
    builder.__name__: builder
    for builder in (
        llama,
        mistral,
        qwen3,
        qwen3_moe,
        mixtral,
        qwen3_next,
        qwen3_5,
        qwen3_5_moe,
        olmo_hybrid,
        gpt_oss,
        kimi_linear,
        nemotron_h,
        deepseek_v3,
    )
}


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """transformers takes fla's Triton kernels where fla is installed, also without a GPU."""
    held = {name: sys.modules.get(name) for name in ("fla", "mamba_ssm", "causal_conv1d")}
    # None stops an import, which transformers takes for a package that is not there.
    sys.modules.update(dict.fromkeys(held))
    try:
        yield
    finally:
        for name, module in held.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def tiny_model(family: str, seed: int = 0) -> Any:
    """A model with every parameter perturbed, in float32, ready to evaluate."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    with without_kernels():
        model = transformers.AutoModelForCausalLM.from_config(config)
    perturb(model)
    # The plain paths: no kernel of another package decides what is compared with.
    model.config._attn_implementation = "eager"
    model.config._experts_implementation = "eager"
    return model.float().eval()


def perturb(model: Any) -> None:
    """Moves every parameter, and the biases of routers, away from where they start."""
    buffers = [(n, b) for n, b in model.named_buffers() if "e_score" in n]
    with torch.no_grad():
        for _, x in [*model.named_parameters(), *buffers]:
            x.add_(0.1 * torch.randn_like(x))


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The model, saved in a folder as the hub would have it."""
    model = tiny_model(family)
    model.to(dtype).save_pretrained(folder, **options)
    return model
