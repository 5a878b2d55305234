"""Runs other projects' delta rules and layers on given numbers, where torch is installed:

    python recurrent_peers.py IN.npz OUT.npz

In: the inputs of every case, named "case/input", and what outputs are weighted by. Out: the outputs
"case/output", and the gradients "case/d input" of their weighted sum.

transformers: the functions of Qwen3-Next and Kimi-Linear in torch, their layers and Mamba-2's.
fla-core: the naive functions, loaded as files. rwkv: RWKV-7 by its author.
"""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import torch

# Where it can import fla, transformers calls its GPU kernels in place of its own functions.
FLA = Path(importlib.util.find_spec("fla").submodule_search_locations[0])
sys.modules["fla"] = None
torch.set_num_threads(1)
# The package has RWKV-7 beside older models, and compiles unless told not to.
os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
from rwkv.model import RWKV_x070_CMix_seq, RWKV_x070_TMix_one, RWKV_x070_TMix_seq  # noqa: E402
from torch.func import functional_call  # noqa: E402
from transformers.models.kimi_linear import modeling_kimi_linear as kimi  # noqa: E402
from transformers.models.mamba2 import modeling_mamba2 as mamba2  # noqa: E402
from transformers.models.qwen3_next import modeling_qwen3_next as qwen  # noqa: E402


def naive(op):
    """A file of fla-core that needs torch only."""
    path = FLA / "ops" / op / "naive.py"
    spec = importlib.util.spec_from_file_location(op.replace("/", "_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_heads(function, *inputs):
    """For functions of [B, H, T, D]."""
    o, state = function(*(x.transpose(1, 2) for x in inputs), output_final_state=True)
    return o.transpose(1, 2), state


# --- functions: from our names to (o, final state)

STATE = dict(output_final_state=True)


def delta_net(q, k, v, beta):
    return by_heads(naive("delta_rule").delta_rule_recurrence, q, k, v, beta[..., None])


def delta_product(q, k, v, beta, log_decay):
    n = k.shape[2]
    return naive("gated_delta_product").naive_recurrent_gated_delta_product(
        q=q,
        k=k.flatten(1, 2),
        v=v.flatten(1, 2),
        g=log_decay,
        beta=beta.flatten(1, 2),
        scale=q.shape[-1] ** -0.5,
        cu_seqlens=None,
        num_householder=n,
        **STATE,
    )


def rwkv7(q, k, v, log_decay, removal_key, rate):
    inputs = (q, k, v, -removal_key, removal_key * rate, log_decay)
    return by_heads(naive("generalized_delta_rule/dplr").dplr_recurrence, *inputs)


FUNCTIONS = {
    "transformers chunk": lambda q, k, v, beta, log_decay: qwen.torch_chunk_gated_delta_rule(
        q, k, v, log_decay, beta, use_qk_l2norm_in_kernel=True, chunk_size=16, **STATE
    ),
    "transformers recurrent": lambda q, k, v, beta, log_decay: (
        qwen.torch_recurrent_gated_delta_rule(
            q, k, v, log_decay, beta, use_qk_l2norm_in_kernel=True, **STATE
        )
    ),
    "transformers kimi chunk": lambda q, k, v, beta, log_decay: kimi.chunk_kimi_delta_attention(
        q, k, v, log_decay, beta, initial_state=None, use_qk_l2norm_in_kernel=True, **STATE
    ),
    "transformers kimi recurrent": lambda q, k, v, beta, log_decay: (
        kimi.recurrent_kimi_delta_attention(
            q, k, v, log_decay, beta, initial_state=None, use_qk_l2norm_in_kernel=True, **STATE
        )
    ),
    "fla delta_rule": delta_net,
    "fla gated_delta_rule": lambda q, k, v, beta, log_decay: naive(
        "gated_delta_rule"
    ).naive_recurrent_gated_delta_rule(q, k, v, beta, log_decay, **STATE),
    "fla kda": lambda q, k, v, beta, log_decay: naive("kda").naive_recurrent_kda(
        q, k, v, log_decay, beta, **STATE
    ),
    "fla gdn2": lambda q, k, v, log_decay, erase_gate, write: naive("gdn2").naive_recurrent_gdn2(
        q, k, v, log_decay, erase_gate, write, **STATE
    ),
    "fla comba": lambda q, k, v, beta, log_decay, p: naive("comba").naive_recurrent_comba(
        q, k, v, p, beta, log_decay, **STATE
    ),
    "fla gated_delta_product": delta_product,
    "fla dplr (RWKV-7)": rwkv7,
}

# --- layers: their weights, as functions of our parameters


def columns(*kernels):
    """Our matrices [M, ...] side by side, as one of theirs [out, in]."""
    return torch.cat([kernel.flatten(1) for kernel in kernels], 1).T


def qwen_layer(p, x):
    heads, value_dim = p["value/kernel"].shape[1:]
    key_heads, key_dim = p["key/kernel"].shape[1:]
    config = qwen.Qwen3NextConfig(
        hidden_size=x.shape[-1],
        linear_num_key_heads=key_heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=key_dim,
        linear_value_head_dim=value_dim,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        rms_norm_eps=1e-5,
    )
    # Their rows go by key head: its query, its key, the values and gates of its value heads.
    by_key_head = [p["query/kernel"], p["key/kernel"]]
    for name in ("value", "output_gate"):
        by_key_head.append(p[f"{name}/kernel"].unflatten(1, (key_heads, -1)).flatten(2))
    small = [p[f"{name}/kernel"].unflatten(1, (key_heads, -1)) for name in ("beta", "decay")]
    weights = {
        "in_proj_qkvz.weight": columns(torch.cat(by_key_head, 2)),
        "in_proj_ba.weight": columns(torch.cat(small, 2)),
        "conv1d.weight": p["conv"].T[:, None],
        "A_log": p["a_log"],
        "dt_bias": p["dt_bias"],
        "norm.weight": p["norm/scale"],
        "out_proj.weight": p["out/kernel"].flatten(0, 1).T,
    }
    return functional_call(qwen.Qwen3NextGatedDeltaNet(config, 0), weights, (x,))


def kimi_layer(p, x):
    heads, head_dim = p["value/kernel"].shape[1:]
    config = kimi.KimiLinearConfig(
        hidden_size=x.shape[-1],
        linear_num_heads=heads,
        linear_head_dim=head_dim,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        rms_norm_eps=1e-5,
    )
    weights = {
        "q_proj.weight": columns(p["query/kernel"]),
        "k_proj.weight": columns(p["key/kernel"]),
        "v_proj.weight": columns(p["value/kernel"]),
        "conv1d.weight": p["conv"].T[:, None],
        "b_proj.weight": columns(p["beta/kernel"]),
        "forget_gate.f_a_proj.weight": columns(p["decay_down/kernel"]),
        "forget_gate.f_b_proj.weight": columns(p["decay_up/kernel"]),
        "forget_gate.A_log": p["a_log"].reshape(1, 1, -1, 1),
        "forget_gate.dt_bias": p["dt_bias"].flatten(),
        "g_a_proj.weight": columns(p["output_gate_down/kernel"]),
        "g_b_proj.weight": columns(p["output_gate_up/kernel"]),
        "o_norm.weight": p["norm/scale"],
        "o_proj.weight": p["out/kernel"].flatten(0, 1).T,
    }
    return functional_call(kimi.KimiLinearDeltaAttention(config, 0), weights, (x,))


def mamba2_layer(p, x):
    heads, head_dim = p["value/kernel"].shape[1:]
    groups, state_dim = p["key/kernel"].shape[1:]
    config = mamba2.Mamba2Config(
        hidden_size=x.shape[-1],
        num_heads=heads,
        head_dim=head_dim,
        state_size=state_dim,
        n_groups=groups,
        expand=heads * head_dim // x.shape[-1],
        num_hidden_layers=1,
        time_step_limit=(0.02, 0.2),
        layer_norm_epsilon=1e-5,
        chunk_size=16,
    )
    names = ("output_gate", "value", "key", "query", "dt")
    weights = {
        "in_proj.weight": columns(*(p[f"{name}/kernel"] for name in names)),
        "conv1d.weight": p["conv"].T[:, None],
        "conv1d.bias": p["conv_bias"],
        "dt_bias": p["dt_bias"],
        "A_log": p["a_log"],
        "D": p["skip"],
        "norm.weight": p["norm_scale"].flatten(),
        "out_proj.weight": p["out/kernel"].flatten(0, 1).T,
    }
    return functional_call(mamba2.Mamba2Mixer(config, 0).eval(), weights, (x,))


def rwkv_weights(p):
    """In the order of the arguments of RWKV_x070_TMix_seq, from x_r on."""
    shifts = ("receptance", "decay", "key", "value", "rate", "output_gate")
    weights = [p[f"{name}_shift"] for name in shifts]
    for name, low_rank in (("decay", "decay"), ("rate", "rate"), ("value", "value_gate")):
        weights += [p[f"{name}_bias"].flatten(), p[f"{low_rank}_down/kernel"]]
        weights.append(p[f"{low_rank}_up/kernel"].flatten(1))
    weights += [p["output_gate_down/kernel"], p["output_gate_up/kernel"].flatten(1)]
    weights += [p[name].flatten() for name in ("removal_scale", "rate_weight", "bonus")]
    weights += [p[f"{name}/kernel"].flatten(1) for name in ("receptance", "key", "value")]
    weights.append(p["out/kernel"].flatten(0, 1))
    return [*weights, p["norm_scale"].flatten(), p["norm_bias"].flatten()]


def rwkv_layer(p, x, first_values=None):
    """One token after the other: the loop over a sequence writes in place, and has no gradient."""
    H, N = p["bonus"].shape
    layer = 0 if first_values is None else 1
    weights = rwkv_weights(p)
    rows = []
    for row in range(len(x)):
        state = torch.zeros(H, N, N)
        before = torch.zeros_like(x[row, 0])
        tokens = []
        for t in range(x.shape[1]):
            first = x[row, t] if layer == 0 else first_values[row, t]
            y, before, state, _ = RWKV_x070_TMix_one(
                layer, H, N, x[row, t], before, first, state, *weights
            )
            tokens.append(y)
        rows.append(torch.stack(tokens))
        if layer == 0:
            with torch.no_grad():
                zeros = torch.zeros(H, N, N)
                whole, *_ = RWKV_x070_TMix_seq(
                    0, H, N, x[row], zeros[0, 0].new_zeros(x.shape[-1]), x[row], zeros, *weights
                )
                torch.testing.assert_close(whole, rows[-1], rtol=1e-4, atol=1e-5)
    return torch.stack(rows)


def rwkv_channel_mix(p, x):
    weights = (p["shift"], p["up/kernel"], p["down/kernel"])
    zeros = torch.zeros(x.shape[-1])
    return torch.stack([RWKV_x070_CMix_seq(row, zeros, *weights)[0] for row in x])


LAYERS = {
    "transformers Gated DeltaNet": qwen_layer,
    "transformers Kimi Delta Attention": kimi_layer,
    "transformers Mamba-2": mamba2_layer,
    "rwkv time mixing, first layer": rwkv_layer,
    "rwkv time mixing, later layer": rwkv_layer,
    "rwkv channel mixing": rwkv_channel_mix,
}


def main() -> None:
    given: dict[str, dict[str, torch.Tensor]] = {}
    for path, array in np.load(sys.argv[1]).items():
        case, name = path.split("/", 1)
        given.setdefault(case, {})[name] = torch.tensor(array)
    results = {}
    for case, arrays in given.items():
        weights = [arrays.pop(name) for name in ("weight", "state_weight") if name in arrays]
        for array in arrays.values():
            array.requires_grad_()
        if case in FUNCTIONS:
            outputs = FUNCTIONS[case](**arrays)
        else:
            call = {name: arrays[name] for name in ("x", "first_values") if name in arrays}
            outputs = [LAYERS[case](arrays, **call)]
        loss = sum((y * weight).sum() for y, weight in zip(outputs, weights))
        gradients = torch.autograd.grad(loss, list(arrays.values()), allow_unused=True)
        for name, y in zip(("o", "state"), outputs):
            results[f"{case}/{name}"] = y
        for name, gradient in zip(arrays, gradients):
            # Weights of the value residual have no use in a first layer.
            results[f"{case}/d {name}"] = torch.zeros(()) if gradient is None else gradient
    np.savez(sys.argv[2], **{name: a.detach().numpy() for name, a in results.items()})


main()
