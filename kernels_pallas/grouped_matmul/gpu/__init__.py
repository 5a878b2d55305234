"""The GPU kernels of `grouped_matmul`."""
