"""Triton's own interpreter on CPU, without torch: what a kernel takes for tensors, and how a test
runs a program that interprets kernels.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]


class Storage:
    def __init__(self, a):
        self.a = a

    def data_ptr(self):
        return self.a.ctypes.data

    def cpu(self):
        return self

    def copy_(self, other):
        assert other.a is self.a
        return self


class Tensor:
    """The part of torch.Tensor that the interpreter touches, over a numpy array."""

    def __init__(self, a):
        self.a = np.ascontiguousarray(a)

    dtype = property(lambda self: self.a.dtype.name)
    shape = property(lambda self: self.a.shape)

    def data_ptr(self):
        return self.a.ctypes.data

    def untyped_storage(self):
        return Storage(self.a)

    def new_empty(self, *_, **__):
        return Tensor(np.empty(0, self.a.dtype))

    def set_(self, storage, offset, size, stride):
        self.a = storage.a
        return self

    def storage_offset(self):
        return 0

    def size(self):
        return self.a.shape

    def stride(self):
        return tuple(s // self.a.itemsize for s in self.a.strides)

    def element_size(self):
        return self.a.itemsize


def interpreted(program: Path, *arguments: str) -> dict[str, list[float]]:
    """What `program` prints as JSON in its last line: a process of its own, as Triton wants."""
    command = [sys.executable, "-W", "ignore", str(program), *arguments]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
