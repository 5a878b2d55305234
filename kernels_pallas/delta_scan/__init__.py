"""The scan of the delta rule: DeltaNet, Gated DeltaNet, Kimi Delta Attention, RWKV-7 and kin."""

from kernels_pallas.delta_scan.api import delta_scan, delta_scan_step
from kernels_pallas.delta_scan.normalize import l2_normalized
from kernels_pallas.delta_scan.sharded import delta_scan_sharded
from kernels_pallas.delta_scan.sub_steps import (
    delta_product_scan,
    delta_product_scan_step,
    rwkv7_scan,
    rwkv7_scan_step,
)

__all__ = [
    "delta_product_scan",
    "delta_product_scan_step",
    "delta_scan",
    "delta_scan_sharded",
    "delta_scan_step",
    "l2_normalized",
    "rwkv7_scan",
    "rwkv7_scan_step",
]
