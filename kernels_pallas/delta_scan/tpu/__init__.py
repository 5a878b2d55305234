"""The TPU kernels of `delta_scan`."""
