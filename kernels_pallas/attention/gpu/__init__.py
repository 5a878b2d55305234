"""The GPU kernels of `attention`."""
