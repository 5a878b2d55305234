"""The TPU kernels of `linear_scan`."""
