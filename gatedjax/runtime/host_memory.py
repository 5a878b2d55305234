"""Host memory of a run on CPU: kept for the next step instead of given back to the system."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import jax

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8

_SETTINGS = (
    (_M_ARENA_MAX, 1),  # the main arena alone: the others hold blocks of up to 64 MiB
    (_M_MMAP_MAX, 0),  # large blocks come from the heap too
    (_M_TRIM_THRESHOLD, 2**31 - 1),  # freed memory at the heap's end stays
)
# Large blocks that are mapped each for itself, at most: glibc's default.
_MOST_MAPPED = 65536
# Whether this process keeps what it frees; a set, so that a function can change it.
_kept: set[bool] = set()
_GPU_FILES = ("/dev/nvidia0", "/dev/kfd")


def keep_freed_memory() -> bool:
    """Lets the allocator keep freed memory, if this process will compute on the CPU under glibc.

    XLA on CPU allocates a program's temporary memory anew at every call. glibc maps blocks of that
    size and unmaps them when they are freed, so every step pays a page fault for each 4 KiB it
    touches: a third of the step of `configs/tiny.py`. The heap can only keep blocks of the main
    arena (others hold 64 MiB), hence a single arena. A process then stays as large as it once was:
    compiling `configs/tiny.py` leaves it at 2.3 GB instead of 1.4.

    Call it before jax starts its threads: a thread keeps the arena of its first allocation.

    Returns:
      Whether the allocator was told.
    """
    if platform.libc_ver()[0] != "glibc" or not _computes_on_cpu():
        return False
    libc = ctypes.CDLL(None)
    accepted = [libc.mallopt(parameter, value) for parameter, value in _SETTINGS]
    _kept.add(True)
    return all(accepted)


@contextlib.contextmanager
def large_blocks_given_back() -> Iterator[None]:
    """Inside, large blocks go back to the system when they are freed, as glibc has it.

    Reading a whole model allocates and frees, once, several times its size. In a heap that keeps
    everything the holes between what stays add up to more than the model.
    """
    if not _kept:
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, _MOST_MAPPED)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_MAX, 0)


def _computes_on_cpu() -> bool:
    """Whether jax will find no accelerator. Asking jax itself would start its threads."""
    platforms = jax.config.jax_platforms or os.environ.get("JAX_PLATFORMS")
    if platforms == "cpu":
        return True
    no_tpu = os.environ.get("TPU_SKIP_MDS_QUERY") == "1"  # set by jax when it is imported
    no_gpu = not any(Path(file).exists() for file in _GPU_FILES)
    return no_tpu and no_gpu
