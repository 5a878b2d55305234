"""The TPU kernels of `expert_mlp`."""
