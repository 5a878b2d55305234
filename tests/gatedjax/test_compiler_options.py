"""What a compiler is told of a training step and of the first state, by chip and mesh."""

from types import SimpleNamespace

import numpy as np
import pytest

from gatedjax.compiler_options import (
    ASYNCHRONOUS_COLLECTIVES,
    LARGER_PRODUCTS,
    OPTIMIZATION_LEVEL,
    SCOPED_VMEM,
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
    without = for_training(mesh, False)
    assert not without.keys() & ASYNCHRONOUS_COLLECTIVES.keys()
    assert for_training(mesh, True) == without | (ASYNCHRONOUS_COLLECTIVES if is_told else {})


def test_products_take_more_vmem_on_v6e_unless_a_flag_says_how_much(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_other=true")
    v6e = mesh_of("tpu", "TPU v6 lite", 1)
    assert for_training(v6e, True) == LARGER_PRODUCTS
    assert for_training(mesh_of("tpu", "TPU v5", 1), True) == {}
    assert for_training(mesh_of("gpu", "NVIDIA H100 80GB HBM3", 8), True) == {}
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{SCOPED_VMEM}=98304")
    assert for_training(v6e, True) == {}


def test_runs_on_cpus_compile_quickly_unless_a_flag_says_how(monkeypatch):
    cpu = mesh_of("cpu", "cpu", 1)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    assert quick_on_cpus(cpu) == {OPTIMIZATION_LEVEL: "1"}
    assert for_training(cpu, True) == {OPTIMIZATION_LEVEL: "1"}
    assert quick_on_cpus(mesh_of("gpu", "NVIDIA H100 80GB HBM3", 1)) == {}
    monkeypatch.setenv("XLA_FLAGS", f"--{OPTIMIZATION_LEVEL}=0")
    assert quick_on_cpus(cpu) == {}
    assert for_training(cpu, True) == {}
