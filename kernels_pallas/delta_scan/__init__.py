"""The scan of the delta rule: DeltaNet, Gated DeltaNet, Kimi Delta Attention, RWKV-7 and kin."""

from kernels_pallas.delta_scan.api import delta_scan, delta_scan_step

__all__ = ["delta_scan", "delta_scan_step"]
