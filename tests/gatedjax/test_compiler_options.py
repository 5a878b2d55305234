"""What a compiler is told of a training step and of the first state, by chip and mesh."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from gatedjax.aot import larger_products
from gatedjax.aot.larger_products import LARGER_PRODUCTS, SCOPED_VMEM
from gatedjax.compiler_options import (
    ASYNCHRONOUS_COLLECTIVES,
    OPTIMIZATION_LEVEL,
    for_training,
    quick_on_cpus,
)
from gatedjax.config import Config, ModelConfig, TrainConfig

SHORT = Config(model=ModelConfig(vocab_size=1024), train=TrainConfig(steps=100))
LONG = dataclasses.replace(SHORT, train=TrainConfig(steps=2 * 10**9))


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


@pytest.mark.parametrize(
    "kind, is_possible",
    [
        ("TPU v5", True),
        ("TPU v5p", True),
        ("TPU v6 lite", True),
        ("TPU7x", True),
        ("TPU v5 lite", False),
        ("TPU v4", False),
        ("NVIDIA H100 80GB HBM3", False),
        ("cpu", False),
    ],
)
def test_products_of_long_runs_take_more_vmem(kind, is_possible):
    mesh = mesh_of("other", kind, 1)
    assert larger_products.is_possible(mesh) == is_possible
    told = LARGER_PRODUCTS if is_possible else {}
    assert larger_products.options(LONG, mesh) == told
    assert larger_products.options(SHORT, mesh) == {}


def test_a_run_says_how_its_products_are_compiled():
    mesh = mesh_of("tpu", "TPU v5p", 1)
    assert "products: larger blocks" in larger_products.line(LONG, mesh)
    assert "own blocks; the run takes about 0.0 h" in larger_products.line(SHORT, mesh)


def test_another_amount_of_vmem_stays(monkeypatch):
    mesh = mesh_of("tpu", "TPU v6 lite", 1)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_other=true")
    assert larger_products.options(LONG, mesh)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{SCOPED_VMEM}=98304")
    assert not larger_products.is_possible(mesh)
    assert larger_products.options(LONG, mesh) == {}


def test_runs_on_cpus_compile_quickly_unless_a_flag_says_how(monkeypatch):
    cpu = mesh_of("cpu", "cpu", 1)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    assert quick_on_cpus(cpu) == {OPTIMIZATION_LEVEL: "1"}
    assert for_training(cpu, True) == {OPTIMIZATION_LEVEL: "1"}
    assert quick_on_cpus(mesh_of("gpu", "NVIDIA H100 80GB HBM3", 1)) == {}
    monkeypatch.setenv("XLA_FLAGS", f"--{OPTIMIZATION_LEVEL}=0")
    assert quick_on_cpus(cpu) == {}
    assert for_training(cpu, True) == {}
