"""The TPU kernels of `grouped_matmul`."""
