"""Compiles for an absent NVIDIA GPU, and reads what the code of each kernel needs: registers,
spills, shared memory.

Static facts only: no trip counts, no latencies, no model of caches or HBM, hence no time. Without
autotuning (which needs the device) XLA's own matrix products are compiled with default tiles: look
at the Pallas kernels, not at those. Registers and spills come from NVIDIA's `ptxas`, if there is
one on the PATH or in the environment's wheels.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
from jax.experimental import topologies

from gatedjax.aot.report import GpuKernel
from gatedjax.aot.targets import Gpu

_WARP, _REGISTER_UNIT, _MAX_BLOCKS, _SHARED_RESERVED = (
    32,
    256,
    32,
    1024,
)  # of an SM, from NVIDIA's occupancy tables
_ENTRY = re.compile(r"\.(?:visible )?\.?entry\s+([\w$]+)\s*\((.*?)\)(.*?)\n\{(.*?)\n\}", re.S)


def devices(gpu: Gpu, count: int = 1) -> list:
    """`count` GPUs that are not there.

    Raises:
      RuntimeError: jax's CUDA plugin is not installed.
    """
    try:
        description = topologies.get_topology_desc(
            platform="cuda", target_config=target_config(gpu), topology=f"1x1x{count}"
        )
    except NotImplementedError:
        raise RuntimeError(
            "aot: jax's CUDA plugin is not installed; pip install 'gatedjax[cuda-aot]'"
        ) from None
    return list(description.devices)


def target_config(gpu: Gpu) -> str:
    """XLA's description of the device, a text protocol buffer (GpuTargetConfigProto)."""
    major, minor = gpu.compute_capability
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": _WARP,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_core": gpu.shared_memory_per_core,
        "threads_per_core_limit": gpu.threads_per_core,
        "core_count": gpu.core_count,
        "fpus_per_core": 128 if major >= 9 else 64,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "memory_bandwidth": int(gpu.hbm_bytes_per_second),
        "l2_cache_size": gpu.l2_bytes,
        "clock_rate_ghz": gpu.core_clock_hz / 1e9,
        "device_memory_size": int(gpu.hbm_bytes),
        "shared_memory_per_block_optin": gpu.shared_memory_per_block,
        "registers_per_core_limit": gpu.registers_per_core,
        "registers_per_block_limit": gpu.registers_per_core,
    }
    fields = " ".join(f"{name}: {value}" for name, value in info.items())
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return (
        f"gpu_device_info {{ {fields} {capability} }} runtime_version: {{ major: 13 minor: 0 patch: 0 }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} '
        f'device_description_str: "NVIDIA {gpu.name.upper()}"'
    )


def compile_lowered(
    lowered: jax.stages.Lowered, gpu: Gpu
) -> tuple[jax.stages.Compiled, tuple[GpuKernel, ...]]:
    """The compiled program, and its kernels from the PTX that the compiler dumps on the way."""
    with tempfile.TemporaryDirectory(prefix="gatedjax-aot-") as folder:
        options = {
            "xla_dump_to": folder,
            "xla_dump_hlo_as_text": True,
            "xla_dump_emitter_re": "ptx",  # else the compiler keeps its PTX to itself
            "xla_gpu_autotune_level": 0,  # there is nothing to tune on
            "xla_gpu_enable_command_buffer": "",
        }
        compiled = lowered.compile(compiler_options=options)
        return compiled, kernels_of(Path(folder), gpu)


def kernels_of(folder: Path, gpu: Gpu) -> tuple[GpuKernel, ...]:
    """Every kernel of a dump, the one with the most matrix instructions first."""
    dynamic = {}
    for path in folder.glob("*thunk_sequence.txt"):
        launch = (
            r"\]\s+([\w$.]+) grid: \[[\d, ]+\] threads: \[[\d, ]+\](?:\s+shared_memory: (\d+))?"
        )
        dynamic |= {name: int(size or 0) for name, size in re.findall(launch, path.read_text())}
    kernels = {}
    for path in sorted(folder.glob("*.ptx")):
        measured = assemble(path, gpu)
        for name, _, head, body in _ENTRY.findall(path.read_text()):
            kernels.setdefault(
                name, kernel(name, head, body, dynamic.get(name, 0), measured.get(name), gpu)
            )
    return tuple(sorted(kernels.values(), key=lambda k: -(k.wgmma + k.mma)))


def kernel(
    name: str, head: str, body: str, dynamic_shared: int, measured: dict | None, gpu: Gpu
) -> GpuKernel:
    """A kernel from its PTX and what ptxas said of it."""
    bound = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head)
    threads = int(bound[1]) if bound else None
    measured = measured or {}
    registers, shared = measured.get("registers"), dynamic_shared + measured.get("shared", 0)
    blocks = resident_blocks(registers, threads, shared, gpu) if registers and threads else None
    warps = None if blocks is None else blocks * -(-threads // _WARP)
    return GpuKernel(
        name=name,
        threads=threads,
        registers=registers,
        spill_bytes=measured.get("spills"),
        shared_memory_bytes=shared,
        blocks_per_core=blocks,
        occupancy=None if warps is None else warps * _WARP / gpu.threads_per_core,
        wgmma=len(re.findall(r"\bwgmma\.mma_async", body)),
        mma=len(re.findall(r"\bmma\.sync", body)),
    )


def resident_blocks(registers: int, threads: int, shared: int, gpu: Gpu) -> int:
    """Blocks that fit on one SM at a time: registers go out in units of 256 a warp, a block's
    shared memory + 1 KiB.
    """
    warps = -(-threads // _WARP)
    per_warp = -(-registers * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    by_shared = gpu.shared_memory_per_core // (shared + _SHARED_RESERVED)
    return min(
        gpu.registers_per_core // (per_warp * warps),
        by_shared,
        gpu.threads_per_core // threads,
        _MAX_BLOCKS,
    )


def assemble(path: Path, gpu: Gpu) -> dict[str, dict[str, int]]:
    """By kernel: registers, spills (bytes stored and loaded) and static shared memory; empty
    without ptxas.

    Raises:
      RuntimeError: ptxas refuses the code.
    """
    ptxas = find_ptxas()
    if ptxas is None:
        return {}
    command = [
        ptxas,
        "-v",
        f"-arch={gpu.architecture}",
        str(path),
        "-o",
        str(path.with_suffix(".cubin")),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"aot: {done.stderr.strip().splitlines()[0]}")
    return parse_ptxas(done.stderr + done.stdout)


def parse_ptxas(text: str) -> dict[str, dict[str, int]]:
    """The figures in the output of `ptxas -v`."""
    found, current = {}, {}
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '([^']+)'", line):
            current = found.setdefault(match[1], {})
        if match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current["spills"] = int(match[1]) + int(match[2])
        if match := re.search(r"Used (\d+) registers", line):
            current["registers"] = int(match[1])
        if match := re.search(r"(\d+) bytes smem", line):
            current["shared"] = int(match[1])
    return found


def find_ptxas() -> str | None:
    """In NVIDIA's wheels, for whose version XLA writes its PTX where they are installed, or on the
    PATH.
    """
    wheels = Path(sys.prefix).glob("lib/python3*/site-packages/nvidia/*/bin/ptxas")
    return next((str(p) for p in sorted(wheels)), None) or shutil.which("ptxas")
