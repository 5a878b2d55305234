"""The TPU kernels of `attention`."""
