"""The GPU kernels of `delta_scan`."""
