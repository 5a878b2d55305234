"""Runs transformers' sparse blocks on given weights: python moe_peers.py IN.npz OUT.npz, where
torch is installed.

In: x [B, T, M], weight (of the output's sum), router [M, E], gate, up [E, M, F], down [E, F, M],
bias [E], gate_bias, up_bias [E, F], down_bias [E, M], latent_down [M, L], latent_up [L, M], low_up
[E, L, F], low_down [E, F, L], shared_* . Out, for each model: y, and the gradients of
sum(y * weight) by x, router and down; and the balance loss of Mixtral.
"""

import sys

import numpy as np
import torch
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.nemotron_h import modeling_nemotron_h as nemotron
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

COMMON = dict(hidden_size=16, hidden_act="silu")
given = {name: torch.tensor(a) for name, a in np.load(sys.argv[1]).items()}
E, M, F = given["gate"].shape


def blocks():
    sizes = dict(**COMMON, num_experts_per_tok=2)
    yield (
        "mixtral",
        mixtral.MixtralSparseMoeBlock(
            mixtral.MixtralConfig(**sizes, intermediate_size=F, num_local_experts=E)
        ),
    )
    for name, norm in (("qwen3", True), ("qwen3_unnormalized", False)):
        config = qwen.Qwen3MoeConfig(
            **sizes, moe_intermediate_size=F, num_experts=E, norm_topk_prob=norm
        )
        yield name, qwen.Qwen3MoeSparseMoeBlock(config)
    config = deepseek.DeepseekV3Config(
        **COMMON,
        num_experts_per_tok=3,
        moe_intermediate_size=F,
        n_routed_experts=E,
        num_local_experts=E,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    yield "deepseek_v3", deepseek.DeepseekV3MoE(config)
    config = gpt_oss.GptOssConfig(
        hidden_size=16,
        intermediate_size=F,
        num_local_experts=E,
        num_experts_per_tok=2,
        swiglu_limit=0.1,
    )
    yield "gpt_oss", gpt_oss.GptOssMLP(config)
    config = nemotron.NemotronHConfig(
        hidden_size=16,
        n_routed_experts=E,
        num_experts_per_tok=3,
        moe_intermediate_size=F,
        moe_shared_expert_intermediate_size=F,
        moe_latent_size=given["latent_down"].shape[1],
        routed_scaling_factor=2.5,
    )
    yield "nemotron_h", nemotron.NemotronHMoE(config)


def fill_gpt_oss(block):
    """Its matrices are [in, out]; gate and up take turns."""
    experts = block.experts
    with torch.no_grad():
        block.router.weight.copy_(given["router"].T)
        block.router.bias.copy_(given["bias"])
        for i, name in enumerate(("gate", "up")):
            experts.gate_up_proj[..., i::2] = given[name]
            experts.gate_up_proj_bias[..., i::2] = given[f"{name}_bias"]
        experts.down_proj.copy_(given["down"])
        experts.down_proj_bias.copy_(given["down_bias"])


def fill_nemotron(block):
    with torch.no_grad():
        block.gate.weight.copy_(given["router"].T)
        block.gate.e_score_correction_bias.copy_(given["bias"])
        block.fc1_latent_proj.weight.copy_(given["latent_down"].T)
        block.fc2_latent_proj.weight.copy_(given["latent_up"].T)
        block.experts.up_proj.copy_(given["low_up"].transpose(1, 2))
        block.experts.down_proj.copy_(given["low_down"].transpose(1, 2))
        block.shared_experts.up_proj.weight.copy_(given["shared_up"].T)
        block.shared_experts.down_proj.weight.copy_(given["shared_down"].T)


def fill(block):
    """Their matrices are [out, in], gate and up in one."""
    with torch.no_grad():
        block.gate.weight.copy_(given["router"].T)
        block.experts.gate_up_proj.copy_(
            torch.cat([given["gate"], given["up"]], -1).transpose(1, 2)
        )
        block.experts.down_proj.copy_(given["down"].transpose(1, 2))
        if hasattr(block, "shared_experts"):
            block.gate.e_score_correction_bias.copy_(given["bias"])
            for name in ("gate", "up", "down"):
                getattr(block.shared_experts, f"{name}_proj").weight.copy_(
                    given[f"shared_{name}"].T
                )


results = {}
filled_by = {"gpt_oss": fill_gpt_oss, "nemotron_h": fill_nemotron}
for name, block in blocks():
    block.float()
    filled_by.get(name, fill)(block)
    x = given["x"].clone().requires_grad_()
    y = block(x)
    y = y[0] if isinstance(y, tuple) else y
    (y * given["weight"]).sum().backward()
    router = block.router if name == "gpt_oss" else block.gate
    results |= {f"{name}.y": y, f"{name}.x": x.grad, f"{name}.router": router.weight.grad.T}
    down = block.experts.down_proj.grad
    results[f"{name}.down"] = down if name == "gpt_oss" else down.transpose(1, 2)
logits = (given["x"] @ given["router"]).reshape(-1, E)
results["balance_loss"] = mixtral.load_balancing_loss_func((logits,), E, 2)
np.savez(sys.argv[2], **{name: a.detach().numpy() for name, a in results.items()})
