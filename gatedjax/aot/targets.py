"""The accelerators that can be compiled for: their public figures, and how to name a slice of them.

This is the project's one table of chips: whatever needs a peak, a bandwidth or a memory size reads
it here.

TPU memory, bandwidth and peak are those of cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x} (2026):
capacities in GB as printed there, ICI as one direction of a chip's links together (half of the
"bidirectional" figure), DCN as the pod's figure over its chips where none is given by chip. A clock
is derived: peak / (2 cores MXUs side^2 rows per cycle). GPU figures are those of NVIDIA's data
sheets (A100 80GB SXM, H100 SXM, H200 SXM), dense bfloat16.
"""

import dataclasses
import re

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Tpu:
    """One TPU generation. Figures are per chip; on v7x they are per TensorCore, because a
    TensorCore is a device of its own there.
    """

    name: str
    topology: str  # the smallest that libtpu can describe
    accelerator_type: str  # silences libtpu's questions; need not match the topology
    clock_hz: float
    cores: int  # TensorCores that share a program
    mxus: int  # matrix units of one core
    mxu_side: int
    # For a float32 left-hand side; bfloat16 packs 16 rows into twice as many cycles.
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
    hbm_latency_cycles = 680  # fitted to one published v5e time (128-wide blocks at 4096)


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
        suffix = "a" if major >= 9 else ""
        return f"sm_{major}{minor}{suffix}"


V5E = Tpu(
    name="v5e",
    topology="v5e:2x2",
    accelerator_type="v5litepod-4",
    clock_hz=1.50e9,
    cores=1,
    mxus=4,
    mxu_side=128,
    cycles_per_8_rows=8,
    branch_delay=4,
    vmem_bytes=128 * MIB,
    hbm_bytes=16e9,
    hbm_bytes_per_second=819e9,
    peak_flops=197e12,
    ici_bytes_per_second=200e9,
    dcn_bytes_per_second=3.1e9,
)
V5P = Tpu(
    name="v5p",
    topology="v5p:2x2x1",
    accelerator_type="v5p-8",
    clock_hz=1.75e9,
    cores=2,
    mxus=4,
    mxu_side=128,
    cycles_per_8_rows=8,
    branch_delay=4,
    vmem_bytes=64 * MIB,
    hbm_bytes=95e9,
    hbm_bytes_per_second=2765e9,
    peak_flops=459e12,
    ici_bytes_per_second=600e9,
    dcn_bytes_per_second=6.25e9,
)
V6E = Tpu(
    name="v6e",
    topology="v6e:2x2",
    accelerator_type="v6e-4",
    clock_hz=1.75e9,
    cores=1,
    mxus=2,
    mxu_side=256,
    cycles_per_8_rows=4,
    branch_delay=4,
    vmem_bytes=128 * MIB,
    hbm_bytes=32e9,
    hbm_bytes_per_second=1640e9,
    peak_flops=918e12,
    ici_bytes_per_second=400e9,
    dcn_bytes_per_second=12.5e9,
)
V7X = Tpu(
    name="v7x",
    topology="tpu7x:2x2x1",
    accelerator_type="tpu7x-8",
    clock_hz=2.20e9,
    cores=1,
    mxus=2,
    mxu_side=256,
    cycles_per_8_rows=4,
    branch_delay=6,
    vmem_bytes=64 * MIB,
    hbm_bytes=96e9,
    hbm_bytes_per_second=3690e9,
    peak_flops=1153.5e12,
    ici_bytes_per_second=300e9,
    dcn_bytes_per_second=6.25e9,
)
A100 = Gpu(
    name="a100",
    compute_capability=(8, 0),
    core_count=108,
    core_clock_hz=1.41e9,
    shared_memory_per_core=167_936,
    shared_memory_per_block=166_912,
    l2_bytes=40 * MIB,
    hbm_bytes=80e9,
    hbm_bytes_per_second=2039e9,
    peak_flops=312e12,
)
H100 = Gpu(
    name="h100",
    compute_capability=(9, 0),
    core_count=132,
    core_clock_hz=1.98e9,
    shared_memory_per_core=233_472,
    shared_memory_per_block=232_448,
    l2_bytes=50 * MIB,
    hbm_bytes=80e9,
    hbm_bytes_per_second=3350e9,
    peak_flops=989.4e12,
)
H200 = Gpu(
    name="h200",
    compute_capability=(9, 0),
    core_count=132,
    core_clock_hz=1.98e9,
    shared_memory_per_core=233_472,
    shared_memory_per_block=232_448,
    l2_bytes=60 * MIB,
    hbm_bytes=141e9,
    hbm_bytes_per_second=4800e9,
    peak_flops=989.4e12,
)

TPUS = {chip.name: chip for chip in (V5E, V5P, V6E, V7X)}
GPUS = {chip.name: chip for chip in (A100, H100, H200)}
TARGETS: dict[str, Tpu | Gpu] = {
    **{f"tpu:{name}": chip for name, chip in TPUS.items()},
    **{f"cuda:{name}": chip for name, chip in GPUS.items()},
}

# Beginnings of jax's `device_kind` -> dense bfloat16 FLOP/s of such a device. TPU v4 has no target:
# it is not compiled for here, but runs are trained on it.
PEAK_FLOPS_BY_KIND = {
    "TPU v4": 275e12,
    "TPU v5 lite": V5E.peak_flops,
    "TPU v5": V5P.peak_flops,
    "TPU v6 lite": V6E.peak_flops,
    "TPU v6e": V6E.peak_flops,
    "TPU7x": V7X.peak_flops,
    "NVIDIA A100": A100.peak_flops,
    "NVIDIA H100": H100.peak_flops,
    "NVIDIA H200": H200.peak_flops,
}


def target(name: str) -> Tpu | Gpu:
    """The target called `name`, such as "tpu:v5p" or "cuda:h200".

    Raises:
      ValueError: there is none of that name.
    """
    if name not in TARGETS:
        raise ValueError(f"target: got {name!r}, expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one device that jax calls so; None if it is not in the table."""
    names = [name for name in PEAK_FLOPS_BY_KIND if device_kind.startswith(name)]
    if not names:
        return None
    # "TPU v5 lite" begins with "TPU v5" too: the longest name is the chip's own.
    return PEAK_FLOPS_BY_KIND[max(names, key=len)]


@dataclasses.dataclass(frozen=True)
class Slice:
    """The chips that a program is compiled for: `num_slices` slices of the shape `topology`, joined
    by the data center network; or one chip of one.
    """

    chip: Tpu
    topology: str  # as libtpu names it
    num_slices: int
    is_one_chip: bool = False


def parse_slice(text: str) -> Slice:
    """The slice called "v5p:8x8x4", "2*v5p:8x8x4" for two of them, "v5p:1" for one chip.

    Raises:
      ValueError: not of that form, or of an unknown chip.
    """
    alone = re.fullmatch(r"(\w+):1", text)
    if alone is not None and alone[1] in TPUS:
        chip = TPUS[alone[1]]
        return Slice(chip, chip.topology, num_slices=1, is_one_chip=True)
    match = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)+)", text)
    if match is None or match[2] not in TPUS or match[1] == "0":
        example = "[SLICES*]CHIP:SHAPE such as v5p:8x8x4, 2*v5e:16x16 or v5p:1"
        chips = ", ".join(TPUS)
        raise ValueError(f"slice: got {text!r}, expected {example}, CHIP one of {chips}")
    chip = TPUS[match[2]]
    shape = match[3]
    # libtpu calls v7x "tpu7x": the part of the topology before the colon is its name.
    libtpu_name = chip.topology.split(":")[0]
    return Slice(
        chip=chip,
        topology=f"{libtpu_name}:{shape}",
        num_slices=int(match[1] or 1),
    )
