"""Freed memory is kept, seen as page faults in a process of its own."""

import platform
import subprocess
import sys

import pytest

# Page faults of the second of two equal blocks of 128 MiB, allocated by a thread that is not the
# main one.
FAULTS = """
import resource, sys, threading
import numpy as np
from gatedjax.runtime.host_memory import keep_freed_memory, large_blocks_given_back
if sys.argv[1] != "default":
    assert keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def blocks():
    np.ones(2**24)
    before = faults()
    np.ones(2**24)
    print(faults() - before)
def given_back():
    with large_blocks_given_back():
        blocks()
    blocks()
thread = threading.Thread(target=given_back if sys.argv[1] == "give back" else blocks)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_the_second_block_reuses_the_pages_of_the_first(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    faults = {}
    for mode in ("keep", "give back", "default"):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True
        )
        faults[mode] = [int(line) for line in done.stdout.split()]
    (default,) = faults["default"]
    (kept,) = faults["keep"]
    while_reading, afterwards = faults["give back"]
    assert kept < 100
    assert default > 50 + kept  # 32,768 small pages, or 64 huge ones
    assert while_reading > 50 + kept
    assert afterwards < 100
