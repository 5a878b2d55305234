"""Runs layers of timm on given numbers, where torch and timm are installed:

    python mixing_peers.py IN.npz OUT.npz

In: the inputs of every case, named "case/input", and what outputs are weighted by. Out: the outputs
"case/o", and the gradients "case/d input" of their weighted sum.
"""

import sys

import numpy as np
import torch
from timm.models.convit import GPSA
from timm.models.mlp_mixer import SpatialGatingUnit
from torch.func import functional_call

torch.set_num_threads(1)


def gpsa(p):
    """ConViT's attention, with our numbers."""
    heads, width = p["positions"].shape[0], p["x"].shape[-1]
    layer = GPSA(width, num_heads=heads)
    qk = [p[n].reshape(width, width).T for n in ("query", "key")]
    weights = {
        "qk.weight": torch.cat(qk),
        "v.weight": p["value"].reshape(width, width).T,
        "proj.weight": p["out"].reshape(width, width).T,
        "proj.bias": p["out_bias"],
        "pos_proj.weight": p["positions"],
        "pos_proj.bias": torch.zeros(heads, dtype=p["x"].dtype),
        "gating_param": p["gate"],
    }
    return functional_call(layer.double(), weights, (p["x"],))


def spatial_gating_unit(p):
    """gMLP's gate."""
    layer = SpatialGatingUnit(p["x"].shape[-1], p["x"].shape[1]).double()
    layer.norm.eps = 1e-6
    weights = {
        "norm.weight": p["norm_scale"],
        "norm.bias": p["norm_bias"],
        "proj.weight": p["matrix"].T,
        "proj.bias": p["bias"],
    }
    return functional_call(layer, weights, (p["x"],))


CASES = {"gpsa": gpsa, "spatial_gating_unit": spatial_gating_unit}


def main(source, target):
    given = np.load(source)
    out = {}
    for case, run in CASES.items():
        names = [n.partition("/")[2] for n in given.files if n.startswith(f"{case}/")]
        p = {n: torch.tensor(given[f"{case}/{n}"], dtype=torch.float64) for n in names}
        weight = p.pop("weight")
        for x in p.values():
            x.requires_grad_()
        y = run(p)
        gradients = torch.autograd.grad((y * weight).sum(), list(p.values()))
        out[f"{case}/o"] = y.detach().numpy()
        out |= {f"{case}/d {n}": g.numpy() for n, g in zip(p, gradients)}
    np.savez(target, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
