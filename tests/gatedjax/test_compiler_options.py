"""What a compiler is told of a training step and of the first state, by chip and mesh."""

from types import SimpleNamespace

import numpy as np
import pytest

from gatedjax.compiler_options import (
    ASYNCHRONOUS_COLLECTIVES,
    OPTIMIZATION_LEVEL,
    for_training,
    quick_on_cpus,
)


def mesh_of(platform: str, kind: str, devices: int):
    device = SimpleNamespace(platform=platform, device_kind=kind)
    return SimpleNamespace(devices=np.array([device] * devices), size=devices)


@pytest.mark.parametrize(
    "platform, kind, devices, is_told",
    [
        ("tpu", "TPU v5", 4, True),
        ("tpu", "TPU v5p", 4, True),
        ("tpu", "TPU v6 lite", 4, True),
        ("tpu", "TPU7x", 4, True),
        ("tpu", "TPU v5", 1, False),
        ("tpu", "TPU v5 lite", 4, False),
        ("tpu", "TPU v4", 4, False),
        ("cpu", "cpu", 8, False),
        ("gpu", "NVIDIA H100 80GB HBM3", 8, False),
    ],
)
def test_collectives_run_beside_where_there_are_sparse_cores(platform, kind, devices, is_told):
    mesh = mesh_of(platform, kind, devices)
    assert for_training(mesh, True) == (ASYNCHRONOUS_COLLECTIVES if is_told else {})
    assert for_training(mesh, False) == {}


def test_runs_on_cpus_compile_quickly_unless_a_flag_says_how(monkeypatch):
    cpu = mesh_of("cpu", "cpu", 1)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    assert quick_on_cpus(cpu) == {OPTIMIZATION_LEVEL: "1"}
    assert for_training(cpu, True) == {OPTIMIZATION_LEVEL: "1"}
    assert quick_on_cpus(mesh_of("gpu", "NVIDIA H100 80GB HBM3", 1)) == {}
    monkeypatch.setenv("XLA_FLAGS", f"--{OPTIMIZATION_LEVEL}=0")
    assert quick_on_cpus(cpu) == {}
    assert for_training(cpu, True) == {}
