"""The accelerators that can be compiled for: their public figures, and how to name a slice of them.

TPU memory, bandwidth and peak are those of cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x} (2026):
capacities in GB as printed there, ICI as one direction of a chip's links together (half of the
"bidirectional" figure), DCN as the pod's figure over its chips where none is given by chip. A clock
is derived: peak / (2 cores MXUs side^2 rows per cycle). GPU figures are those of NVIDIA's data
sheets (A100 80GB SXM, H100 SXM, H200 SXM), dense bfloat16.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Tpu:
    """One TPU generation. Figures are per chip, on v7x per TensorCore, which there is a device of
    its own.
    """

    name: str
    topology: str  # the smallest that libtpu can describe
    accelerator_type: str  # silences libtpu's questions; need not match the topology
    clock_hz: float
    cores: int  # TensorCores that share a program
    mxus: int  # a core's matrix units
    mxu_side: int
    # of a float32 left-hand side through a matrix unit; bfloat16 packs 16 rows in twice that
    cycles_per_8_rows: int
    branch_delay: int  # bundles after a branch that still run
    vmem_bytes: int
    hbm_bytes: float
    hbm_bytes_per_second: float
    peak_flops: float  # bfloat16
    ici_bytes_per_second: float
    dcn_bytes_per_second: float

    platform = "tpu"
    dma_granule = 32  # bytes that one unit of a DMA's size stands for
    hbm_latency_cycles = 680  # fitted on one published v5e time (128-wide blocks at 4096)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU. `core_clock_hz` is the boost clock."""

    name: str
    compute_capability: tuple[int, int]
    core_count: int  # streaming multiprocessors
    core_clock_hz: float
    shared_memory_per_core: int
    shared_memory_per_block: int  # after opting in
    l2_bytes: int
    hbm_bytes: float
    hbm_bytes_per_second: float
    peak_flops: float  # bfloat16, dense

    platform = "cuda"
    registers_per_core = 65_536
    threads_per_core = 2048

    @property
    def architecture(self) -> str:
        """ptxas's name: Hopper's matrix instructions need the "a"."""
        major, minor = self.compute_capability
        return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


MIB = 2**20
TPUS = {
    t.name: t
    for t in (
        Tpu(
            "v5e",
            "v5e:2x2",
            "v5litepod-4",
            1.50e9,
            1,
            4,
            128,
            8,
            4,
            128 * MIB,
            16e9,
            819e9,
            197e12,
            200e9,
            3.1e9,
        ),
        Tpu(
            "v5p",
            "v5p:2x2x1",
            "v5p-8",
            1.75e9,
            2,
            4,
            128,
            8,
            4,
            64 * MIB,
            95e9,
            2765e9,
            459e12,
            600e9,
            6.25e9,
        ),
        Tpu(
            "v6e",
            "v6e:2x2",
            "v6e-4",
            1.75e9,
            1,
            2,
            256,
            4,
            4,
            128 * MIB,
            32e9,
            1640e9,
            918e12,
            400e9,
            12.5e9,
        ),
        Tpu(
            "v7x",
            "tpu7x:2x2x1",
            "tpu7x-8",
            2.20e9,
            1,
            2,
            256,
            4,
            6,
            64 * MIB,
            96e9,
            3690e9,
            1153.5e12,
            300e9,
            6.25e9,
        ),
    )
}
GPUS = {
    g.name: g
    for g in (
        Gpu("a100", (8, 0), 108, 1.41e9, 167_936, 166_912, 41_943_040, 80e9, 2039e9, 312e12),
        Gpu("h100", (9, 0), 132, 1.98e9, 233_472, 232_448, 52_428_800, 80e9, 3350e9, 989.4e12),
        Gpu("h200", (9, 0), 132, 1.98e9, 233_472, 232_448, 62_914_560, 141e9, 4800e9, 989.4e12),
    )
}
TARGETS = {f"tpu:{name}": t for name, t in TPUS.items()} | {
    f"cuda:{name}": g for name, g in GPUS.items()
}


def target(name: str) -> Tpu | Gpu:
    """The target called `name`, such as "tpu:v5p" or "cuda:h200".

    Raises:
      ValueError: there is none of that name.
    """
    if name not in TARGETS:
        raise ValueError(f"target: got {name!r}, expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that a program is compiled for: `num_slices` of the shape `topology`, joined by the
    data center network.
    """

    chip: Tpu
    topology: str  # as libtpu names it
    num_slices: int


def parse_slice(text: str) -> Slice:
    """The slice called "v5p:8x8x4", or "2*v5p:8x8x4" for two of them.

    Raises:
      ValueError: not of that form, or of an unknown chip.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)+)", text)
    if not match or match[2] not in TPUS or match[1] == "0":
        expected = (
            f"[SLICES*]CHIP:SHAPE such as v5p:8x8x4 or 2*v5e:16x16, CHIP one of {', '.join(TPUS)}"
        )
        raise ValueError(f"slice: got {text!r}, expected {expected}")
    chip = TPUS[match[2]]
    return Slice(chip, f"{chip.topology.split(':')[0]}:{match[3]}", int(match[1] or 1))


# Beginnings of jax's `device_kind` -> dense bfloat16 FLOP/s of such a device. TPU v4 has no target:
# it is run on, not compiled for.
PEAK_FLOPS_BY_KIND = {
    "TPU v4": 275e12,
    "TPU v5 lite": TPUS["v5e"].peak_flops,
    "TPU v5": TPUS["v5p"].peak_flops,
    "TPU v6 lite": TPUS["v6e"].peak_flops,
    "TPU v6e": TPUS["v6e"].peak_flops,
    "TPU7x": TPUS["v7x"].peak_flops,
    "NVIDIA A100": GPUS["a100"].peak_flops,
    "NVIDIA H100": GPUS["h100"].peak_flops,
    "NVIDIA H200": GPUS["h200"].peak_flops,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one device that jax calls so; None if it is not in the table."""
    names = [name for name in PEAK_FLOPS_BY_KIND if device_kind.startswith(name)]
    if not names:
        return None
    # "TPU v5 lite" begins with "TPU v5" too.
    return PEAK_FLOPS_BY_KIND[max(names, key=len)]
