"""Runs transformers' ViT on given numbers, where torch is installed:

    python vit_peer.py IN.npz OUT.npz

In: parameters by their names here ("p/..."), "pixels" [B, H, W, C], and what logits are weighted
by. Out: "logits", and the gradients "d name" of their weighted sum.
"""

import sys

import numpy as np
import torch
from torch.func import functional_call
from transformers.models.vit import modeling_vit as vit

torch.set_num_threads(1)

LAYERS = 2
PATCH = 2


def matrix(kernel, inputs=1):
    """Our [*in, *out] as theirs, [out, in]."""
    return kernel.flatten(0, inputs - 1).flatten(1).T


def weights_of(p, channels):
    """Ours by their names."""
    kernel = p["patches/projection/kernel"].reshape(PATCH, PATCH, channels, -1)
    weights = {
        "vit.embeddings.cls_token": p["patches/class_token"][None, None],
        "vit.embeddings.position_embeddings": p["patches/positions"][None],
        "vit.embeddings.patch_embeddings.projection.weight": kernel.permute(3, 2, 0, 1),
        "vit.embeddings.patch_embeddings.projection.bias": p["patches/projection/bias"],
        "vit.layernorm.weight": p["final_norm/scale"],
        "vit.layernorm.bias": p["final_norm/bias"],
        "classifier.weight": p["head"],
        "classifier.bias": torch.zeros(len(p["head"])),
    }
    for layer in range(LAYERS):
        of_layer = f"vit.layers.{layer}"
        parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
        for ours, theirs in parts.items():
            kernel = p[f"periods/layer_0/mixer/{ours}/kernel"][layer]
            bias = p[f"periods/layer_0/mixer/{ours}/bias"][layer]
            inputs = 2 if ours == "out" else 1
            weights[f"{of_layer}.attention.{theirs}.weight"] = matrix(kernel, inputs)
            weights[f"{of_layer}.attention.{theirs}.bias"] = bias.flatten()
        for ours, theirs in {"up": "fc1", "down": "fc2"}.items():
            kernel = p[f"periods/layer_0/ffn/{ours}/kernel"][layer]
            weights[f"{of_layer}.mlp.{theirs}.weight"] = kernel.T
            weights[f"{of_layer}.mlp.{theirs}.bias"] = p[f"periods/layer_0/ffn/{ours}/bias"][layer]
        norms = {"mixer_norm": "layernorm_before", "ffn_norm": "layernorm_after"}
        for ours, theirs in norms.items():
            scale = p[f"periods/layer_0/{ours}/scale"][layer]
            weights[f"{of_layer}.{theirs}.weight"] = scale
            weights[f"{of_layer}.{theirs}.bias"] = p[f"periods/layer_0/{ours}/bias"][layer]
    return weights


def main(source, target):
    arrays = {name: torch.from_numpy(a) for name, a in np.load(source).items()}
    pixels = arrays.pop("pixels")
    weight = arrays.pop("weight")
    p = {name.removeprefix("p/"): a.requires_grad_() for name, a in arrays.items()}
    _, height, _, channels = pixels.shape
    config = vit.ViTConfig(
        hidden_size=p["head"].shape[1],
        num_hidden_layers=LAYERS,
        num_attention_heads=p["periods/layer_0/mixer/query/kernel"].shape[2],
        intermediate_size=p["periods/layer_0/ffn/up/kernel"].shape[2],
        hidden_act="gelu_pytorch_tanh",
        image_size=height,
        patch_size=PATCH,
        num_channels=channels,
        num_labels=len(p["head"]),
        attn_implementation="eager",
    )
    model = vit.ViTForImageClassification(config).eval()
    weights = weights_of(p, channels)
    assert weights.keys() == model.state_dict().keys(), weights.keys() ^ model.state_dict().keys()
    inputs = {"pixel_values": pixels.permute(0, 3, 1, 2)}
    logits = functional_call(model, weights, (), inputs).logits
    (logits * weight).sum().backward()
    found = {f"d {name}": a.grad.numpy() for name, a in p.items()}
    np.savez(target, logits=logits.detach().numpy(), **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
