"""Compiles for an absent NVIDIA GPU, and reads what the code of each kernel needs: registers,
spills, shared memory, instructions.

Static facts only: no trip counts, no latencies, no model of caches or HBM, hence no time. Without
autotuning (which needs the device) XLA's own matrix products are compiled with default tiles: look
at the Pallas kernels, not at those. Registers, spills and warnings come from NVIDIA's `ptxas`,
counts of instructions from its `nvdisasm`, if they are on the PATH or in the environment's wheels
(triton brings an nvdisasm). The ptxas is the one that XLA takes: `kernels_pallas.common.ptxas`.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies

from gatedjax.aot.report import GpuKernel
from gatedjax.aot.targets import Gpu
from kernels_pallas.common.ptxas import find_ptxas

# Of a streaming multiprocessor, from NVIDIA's occupancy tables.
_WARP = 32
_REGISTER_UNIT = 256  # registers are given to a warp in units of this many
_MAX_BLOCKS = 32
_SHARED_RESERVED = 1024  # bytes of shared memory that every block takes on top of its own

# Groups: the kernel's name, its parameters, its directives, its body.
_ENTRY = re.compile(r"\.(?:visible )?\.?entry\s+([\w$]+)\s*\((.*?)\)(.*?)\n\{(.*?)\n\}", re.S)
_LAUNCH = re.compile(
    r"\]\s+([\w$.]+) grid: \[[\d, ]+\] threads: \[[\d, ]+\](?:\s+shared_memory: (\d+))?",
)
# The name of the constant that a launch by Mosaic GPU has for its shared memory.
_MOSAIC_SHARED = re.compile(r"\bdynamic_shared_memory_size (%\w+)")
# A machine instruction after its address: /*0010*/ @!P0 BRA `(.L_x_1) ;
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+([^;]+);")
_LABEL = re.compile(r"\s*\.(L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*\.(L_x_\d+)")
_MATRIX = re.compile(r"\b(?:HG?MMA|QG?MMA|IG?MMA)\b")
# Of Ampere, and of the copy engine of Hopper: tiles, and bytes in a row.
_ASYNC_COPY = re.compile(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b")
# ptxas names a warning by a code, and the function it is about: (C7515) Potential Performance Loss
_WARNING = re.compile(r"\((C75\d\d)\).*function '([^']+)'")


class Code(NamedTuple):
    """Counts of a kernel's machine code."""

    instructions: int
    # Of the shortest loop that multiplies matrices; None without one.
    tile_instructions: int | None
    # Instructions that copy from memory to shared memory while others run.
    async_copies: int = 0


class Assembled(NamedTuple):
    """What the assembler tells of the kernels of a file, by their names."""

    measured: dict[str, dict[str, int]]
    warnings: dict[str, tuple[str, ...]]
    code: dict[str, Code]


def devices(gpu: Gpu, count: int = 1) -> list:
    """`count` GPUs that are not there.

    Raises:
      RuntimeError: jax's CUDA plugin is not installed.
    """
    try:
        description = topologies.get_topology_desc(
            platform="cuda",
            target_config=target_config(gpu),
            topology=f"1x1x{count}",
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
        f"gpu_device_info {{ {fields} {capability} }} "
        "runtime_version: { major: 13 minor: 0 patch: 0 } "
        'platform_name: "CUDA" '
        "dnn_version_info { major: 9 minor: 10 } "
        f'device_description_str: "NVIDIA {gpu.name.upper()}"'
    )


def compile_lowered(
    lowered: jax.stages.Lowered,
    gpu: Gpu,
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
        with _mosaic_dumps(folder):
            compiled = lowered.compile(compiler_options=options)
        return compiled, kernels_of(Path(folder), gpu)


@contextlib.contextmanager
def _mosaic_dumps(folder: str) -> Iterator[None]:
    """Mosaic GPU writes its PTX here too: it compiles by itself, and has no other option."""
    changed = {"MOSAIC_GPU_DUMP_TO": folder}
    nvdisasm = find_nvdisasm()
    if nvdisasm is not None:
        # It writes machine code as well, and complains where bin/ of this has no nvdisasm.
        changed["MOSAIC_GPU_CUDA_ROOT"] = str(Path(nvdisasm).parents[1])
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def kernels_of(folder: Path, gpu: Gpu) -> tuple[GpuKernel, ...]:
    """Every kernel of a dump, the one with the most matrix instructions first."""
    dynamic_shared = _dynamic_shared_memory(folder)
    kernels: dict[str, GpuKernel] = {}
    for path in sorted(folder.glob("*.ptx")):
        assembled = assemble(path, gpu)
        mosaic_shared = _mosaic_shared_memory(path)
        for name, _, head, body in _ENTRY.findall(path.read_text()):
            if name in kernels:
                continue
            found = kernel(
                name,
                head,
                body,
                dynamic_shared.get(name, mosaic_shared),
                assembled.measured.get(name),
                gpu,
            )
            code = assembled.code.get(name)
            kernels[name] = dataclasses.replace(
                found,
                instructions=None if code is None else code.instructions,
                tile_instructions=None if code is None else code.tile_instructions,
                async_copies=None if code is None else code.async_copies,
                warnings=assembled.warnings.get(name, ()),
            )
    return tuple(sorted(kernels.values(), key=lambda k: -(k.wgmma + k.mma)))


def _dynamic_shared_memory(folder: Path) -> dict[str, int]:
    """Bytes by kernel, from the dumped list of launches."""
    found = {}
    for path in folder.glob("*thunk_sequence.txt"):
        for name, size in _LAUNCH.findall(path.read_text()):
            found[name] = int(size or 0)
    return found


def _mosaic_shared_memory(path: Path) -> int:
    """Bytes of the kernel that Mosaic GPU wrote this PTX of; 0 for one of XLA or Triton."""
    passes = path.with_suffix(".mlir-passes.log")
    if not passes.exists():
        return 0
    text = passes.read_text()
    size = _MOSAIC_SHARED.search(text)
    if size is None:
        return 0
    constant = re.search(rf"{size[1]} = arith.constant (\d+)", text)
    return 0 if constant is None else int(constant[1])


def kernel(
    name: str,
    head: str,
    body: str,
    dynamic_shared: int,
    measured: dict[str, int] | None,
    gpu: Gpu,
) -> GpuKernel:
    """A kernel from its PTX and what ptxas said of it.

    Args:
      name: of its entry.
      head: the directives between its parameters and its body, where the block's size is.
      body: its instructions.
      dynamic_shared: bytes of shared memory that the launch asks for.
      measured: what `parse_ptxas` found, None without ptxas.
      gpu: on which blocks must fit.

    Returns:
      The kernel, with None for what ptxas would have told.
    """
    measured = measured or {}
    bound = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head)
    threads = int(bound[1]) if bound else None
    registers = measured.get("registers")
    shared = dynamic_shared + measured.get("shared", 0)
    blocks = None
    occupancy = None
    if registers and threads:
        blocks = resident_blocks(registers, threads, shared, gpu)
        warps = blocks * _warps(threads)
        occupancy = warps * _WARP / gpu.threads_per_core
    return GpuKernel(
        name=name,
        threads=threads,
        registers=registers,
        spill_bytes=measured.get("spills"),
        shared_memory_bytes=shared,
        blocks_per_core=blocks,
        occupancy=occupancy,
        wgmma=len(re.findall(r"\bwgmma\.mma_async", body)),
        mma=len(re.findall(r"\bmma\.sync", body)),
    )


def resident_blocks(registers: int, threads: int, shared: int, gpu: Gpu) -> int:
    """Blocks that fit on one SM at a time.

    Args:
      registers: of a thread; they are given out in units of 256 a warp.
      threads: of a block.
      shared: bytes of shared memory of a block, which takes 1 KiB on top.
      gpu: whose SM it is.

    Returns:
      The smallest of what registers, shared memory, threads and the hardware allow.
    """
    units_per_warp = -(-registers * _WARP // _REGISTER_UNIT)
    registers_per_block = units_per_warp * _REGISTER_UNIT * _warps(threads)
    return min(
        gpu.registers_per_core // registers_per_block,
        gpu.shared_memory_per_core // (shared + _SHARED_RESERVED),
        gpu.threads_per_core // threads,
        _MAX_BLOCKS,
    )


def _warps(threads: int) -> int:
    """Of a block; the last may be half empty."""
    return -(-threads // _WARP)


def assemble(path: Path, gpu: Gpu) -> Assembled:
    """What ptxas and nvdisasm tell of a file of PTX; empty without them.

    Raises:
      RuntimeError: ptxas refuses the code.
    """
    ptxas = find_ptxas()
    if ptxas is None:
        return Assembled({}, {}, {})
    cubin = path.with_suffix(".cubin")
    command = [
        ptxas,
        "-v",
        f"-arch={gpu.architecture}",
        str(path),
        "-o",
        str(cubin),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        first_line = done.stderr.strip().splitlines()[0]
        raise RuntimeError(f"aot: {first_line}")
    said = done.stderr + done.stdout
    return Assembled(parse_ptxas(said), parse_warnings(said), disassemble(cubin))


def disassemble(cubin: Path) -> dict[str, Code]:
    """Counts of the machine code by kernel; empty without nvdisasm, or with one that is too old."""
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        return {}
    done = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True)
    return {} if done.returncode else parse_code(done.stdout)


def parse_code(text: str) -> dict[str, Code]:
    """Counts by kernel from the output of `nvdisasm -c`."""
    found = {}
    for section in re.split(r"\.section\s+\.text\.", text)[1:]:
        name = re.match(r"[\w$]+", section)
        assert name is not None
        found[name[0]] = _counts(section.splitlines())
    return found


def _counts(lines: list[str]) -> Code:
    """Of one kernel."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    shortest = None
    for line in lines:
        label = _LABEL.match(line)
        if label is not None:
            labels[label[1]] = len(instructions)
        instruction = _INSTRUCTION.search(line)
        if instruction is None:
            continue
        instructions.append(instruction[1])
        branch = _BRANCH.search(instruction[1])
        # A branch to a label that was there before closes a loop.
        if branch is None or branch[1] not in labels:
            continue
        body = instructions[labels[branch[1]] :]
        if any(_MATRIX.search(x) for x in body):
            shortest = min(shortest or len(body), len(body))
    copies = sum(1 for x in instructions if _ASYNC_COPY.search(x))
    return Code(len(instructions), shortest, copies)


def parse_warnings(text: str) -> dict[str, tuple[str, ...]]:
    """The codes of ptxas's warnings about performance (C75xx), by kernel."""
    found: dict[str, tuple[str, ...]] = {}
    for code, name in _WARNING.findall(text):
        codes = {*found.get(name, ()), code}
        found[name] = tuple(sorted(codes))
    return found


def parse_ptxas(text: str) -> dict[str, dict[str, int]]:
    """The figures in the output of `ptxas -v`."""
    found: dict[str, dict[str, int]] = {}
    current: dict[str, int] = {}
    for line in text.splitlines():
        name = re.search(r"Compiling entry function '([^']+)'", line)
        if name is not None:
            current = found.setdefault(name[1], {})
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if spills is not None:
            current["spills"] = int(spills[1]) + int(spills[2])
        registers = re.search(r"Used (\d+) registers", line)
        if registers is not None:
            current["registers"] = int(registers[1])
        shared = re.search(r"(\d+) bytes smem", line)
        if shared is not None:
            current["shared"] = int(shared[1])
    return found


def find_nvdisasm() -> str | None:
    """In triton's or NVIDIA's wheels, or on the PATH."""
    packages = Path(sys.prefix).glob("lib/python3*/site-packages")
    for folder in packages:
        wheels = [*folder.glob("triton/backends/nvidia/bin/nvdisasm")]
        wheels += folder.glob("nvidia/*/bin/nvdisasm")
        for path in wheels:
            return str(path)
    return shutil.which("nvdisasm")
