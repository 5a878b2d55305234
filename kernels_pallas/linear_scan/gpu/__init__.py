"""The GPU kernels of `linear_scan`."""
