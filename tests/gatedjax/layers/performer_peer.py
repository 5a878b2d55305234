"""Runs performer-pytorch's attention on given numbers, where it is installed:

    python performer_peer.py IN.npz OUT.npz

In: q, k, v [B, T, H, D], the random matrix, and what outputs are weighted by. Out: outputs "o" of
attention in both directions and "causal" of the causal one, both with its softmax kernel, and the
gradients "dq", "dk", "dv" of the weighted sum of the first.
"""

import sys

import numpy as np
import torch
from performer_pytorch.performer_pytorch import (
    causal_linear_attention_noncuda,
    linear_attention,
    softmax_kernel,
)

torch.set_num_threads(1)


def main(source, target):
    given = {name: torch.tensor(value) for name, value in np.load(source).items()}
    q, k, v = (given[name].transpose(1, 2).requires_grad_() for name in "qkv")
    projection = given["projection"]
    phi_q = softmax_kernel(q, projection_matrix=projection, is_query=True)
    phi_k = softmax_kernel(k, projection_matrix=projection, is_query=False)
    o = linear_attention(phi_q, phi_k, v).transpose(1, 2)
    gradients = torch.autograd.grad((o * given["weights"]).sum(), (q, k, v), retain_graph=True)
    causal = causal_linear_attention_noncuda(phi_q, phi_k, v, chunk_size=4).transpose(1, 2)
    out = {"o": o, "causal": causal}
    out |= {f"d{name}": g.transpose(1, 2) for name, g in zip("qkv", gradients)}
    np.savez(target, **{name: value.detach().numpy() for name, value in out.items()})


main(*sys.argv[1:])
