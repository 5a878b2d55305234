"""The scan of gated linear attention: RetNet, Mamba-2, GLA, HGRN2, RWKV-6, or no decay at all."""

from kernels_pallas.linear_scan.api import linear_scan, linear_scan_step
from kernels_pallas.linear_scan.sharded import linear_scan_sharded

__all__ = ["linear_scan", "linear_scan_sharded", "linear_scan_step"]
