"""Ops of torch and of flash-linear-attention at the shapes of `cases.torch_timed`."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import cases
from benchmarks.gpu.cases import (
    AttentionShape,
    Cost,
    DeltaShape,
    GroupedShape,
    ScanShape,
)

BACKENDS = {
    cases.TORCH_FLASH: SDPBackend.FLASH_ATTENTION,
    cases.TORCH_CUDNN: SDPBackend.CUDNN_ATTENTION,
}


class TorchBuilt(NamedTuple):
    """Leaves whose gradients are wanted, and the function of them."""

    inputs: list[Tensor]
    function: Callable[..., Tensor]


class TorchProgram(NamedTuple):
    """Both passes of an op at a shape. `build` may fail: a library is missing, or refuses it."""

    case: str
    implementation: str
    build: Callable[[], TorchBuilt]
    costs: dict[str, Cost]


def torch_programs(dry: bool) -> list[TorchProgram]:
    """All of them, in the order of `cases.torch_timed`."""
    device = "cpu" if dry else "cuda"
    found = []
    for shape, implementations in cases.torch_timed(dry):
        for implementation in implementations:
            match shape:
                case ScanShape():
                    build = partial(build_scan, shape, device)
                case DeltaShape():
                    build = partial(build_delta, shape, device)
                case AttentionShape():
                    build = partial(build_attention, shape, implementation, device)
                case GroupedShape():
                    build = partial(build_grouped, shape, device)
                case _:
                    raise ValueError(f"shape: got {shape}, expected one that torch has an op for")
            program = TorchProgram(shape.case, implementation, build, shape.costs())
            found.append(program)
    return found


def normal(*shape: int, device: str) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16).requires_grad_()


def log_decays(*shape: int, device: str) -> Tensor:
    """Of GLA's size, float32."""
    logits = torch.randn(*shape, device=device, dtype=torch.bfloat16)
    return (F.logsigmoid(logits.float()) / 16).requires_grad_()


def build_scan(shape: ScanShape, device: str) -> TorchBuilt:
    """fla's chunkwise gated linear attention."""
    B, T, H, K, V, decay = shape
    if decay == "vector":
        from fla.ops.gla import chunk_gla as op

        logs = log_decays(B, T, H, K, device=device)
    else:
        from fla.ops.simple_gla import chunk_simple_gla as op

        logs = log_decays(B, T, H, device=device)
    inputs = [
        normal(B, T, H, K, device=device),
        normal(B, T, H, K, device=device),
        normal(B, T, H, V, device=device),
        logs,
    ]

    def function(*arguments: Tensor) -> Tensor:
        return op(*arguments)[0]

    return TorchBuilt(inputs, function)


def build_delta(shape: DeltaShape, device: str) -> TorchBuilt:
    """fla's chunkwise gated delta rule, and its Kimi Delta Attention."""
    B, T, H, K, V, decay = shape
    if decay == "vector":
        from fla.ops.kda import chunk_kda as op

        logs = log_decays(B, T, H, K, device=device)
    else:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as op

        logs = log_decays(B, T, H, device=device)
    inputs = [
        normal(B, T, H, K, device=device),
        normal(B, T, H, K, device=device),
        normal(B, T, H, V, device=device),
        logs,
        torch.rand(B, T, H, device=device, dtype=torch.float32).requires_grad_(),
    ]

    def function(*arguments: Tensor) -> Tensor:
        return op(*arguments, use_qk_l2norm_in_kernel=True)[0]

    return TorchBuilt(inputs, function)


def build_attention(shape: AttentionShape, implementation: str, device: str) -> TorchBuilt:
    B, T, H, Hk, D, _, _ = shape
    inputs = [
        normal(B, T, H, D, device=device),
        normal(B, T, Hk, D, device=device),
        normal(B, T, Hk, D, device=device),
    ]
    if implementation == cases.FLA_ATTENTION:
        from fla.ops.attn.parallel import parallel_attn

        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return parallel_attn(q, k, v)

    else:
        backend = BACKENDS[implementation]

        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                # torch wants heads before tokens.
                return F.scaled_dot_product_attention(
                    q.transpose(1, 2),
                    k.transpose(1, 2),
                    v.transpose(1, 2),
                    is_causal=True,
                    enable_gqa=Hk != H,
                )

    return TorchBuilt(inputs, function)


def build_grouped(shape: GroupedShape, device: str) -> TorchBuilt:
    """Equal groups."""
    M, K, N, G = shape
    ends = torch.arange(1, G + 1, device=device, dtype=torch.int32) * (M // G)
    inputs = [
        normal(M, K, device=device),
        normal(G, K, N, device=device),
    ]

    def function(rows: Tensor, matrices: Tensor) -> Tensor:
        return torch._grouped_mm(rows, matrices, offs=ends)

    return TorchBuilt(inputs, function)
