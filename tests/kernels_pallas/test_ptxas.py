"""Which ptxas is taken, and what is said of it."""

import logging

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import dispatch
from kernels_pallas.common import ptxas
from kernels_pallas.common.ptxas import Ptxas, find_ptxas, flaw


@pytest.fixture(autouse=True)
def unsaid():
    """Nothing has been found or said before, and nothing is kept for other tests."""
    kept = (ptxas.ptxas, ptxas.announce)
    for cached in kept:
        cached.cache_clear()
    yield
    for cached in kept:
        cached.cache_clear()


def made(folder, version: str) -> str:
    """An assembler that tells a version."""
    path = folder / "bin" / "ptxas"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {version}, V{version}.48\n")
    path.chmod(0o755)
    return str(path)


def test_the_order_is_that_of_xla(tmp_path, monkeypatch):
    on_path = made(tmp_path / "path", "13.0")
    in_root = made(tmp_path / "root", "13.5")
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    monkeypatch.setattr(ptxas.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("CUDA_ROOT", raising=False)
    assert find_ptxas() == on_path
    assert ptxas.ptxas() == Ptxas(on_path, (13, 0))
    monkeypatch.setenv("CUDA_ROOT", str(tmp_path / "root"))
    assert find_ptxas() == in_root
    monkeypatch.setenv("CUDA_ROOT", str(tmp_path / "nothing"))
    assert find_ptxas() == on_path


def test_only_an_old_one_on_hopper_is_flawed():
    old, new = Ptxas("/bin/ptxas", (13, 2)), Ptxas("/bin/ptxas", (13, 3))
    for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H20"):
        assert "ptxas 13.2 (/bin/ptxas) miscompiles" in flaw(old, kind)
        assert flaw(new, kind) is None
        assert flaw(None, kind) is None
    for kind in ("NVIDIA A100-SXM4-80GB", "NVIDIA B200", "cpu"):
        assert flaw(old, kind) is None


@pytest.mark.parametrize(
    "version, kind, level, words",
    [
        ((13, 5), "NVIDIA H100", "INFO", "assembled by ptxas 13.5 (/bin/ptxas)"),
        ((13, 0), "NVIDIA H100", "WARNING", "13.3 or newer does not (pip install"),
        ((13, 0), "NVIDIA A100", "INFO", "assembled by ptxas 13.0 (/bin/ptxas)"),
    ],
)
def test_it_is_said_once_when_a_kernel_is_first_used(
    version,
    kind,
    level,
    words,
    monkeypatch,
    caplog,
):
    monkeypatch.setattr(ptxas, "ptxas", lambda: Ptxas("/bin/ptxas", version))
    monkeypatch.setattr(ptxas, "device_kind", lambda: kind)
    x = jnp.ones((1, 16, 1, 16))
    refusals = {"tpu": lambda: "cannot", "gpu": lambda: None}

    def use(implementation: str, interpret: bool) -> None:
        dispatch.choose("attention", implementation, refusals)

        def identity(x):
            return dispatch.for_its_platform("attention", implementation, interpret, [x])[0]

        jax.eval_shape(identity, x)

    with caplog.at_level(logging.INFO, logger="kernels_pallas"):
        use("xla", interpret=False)
        use("gpu", interpret=True)
        assert caplog.records == []
        use("gpu", interpret=False)
        use("gpu", interpret=False)
    [record] = caplog.records
    assert record.levelname == level
    assert words in record.getMessage()


def test_what_cannot_be_found_is_said(monkeypatch, caplog):
    monkeypatch.setattr(ptxas, "find_ptxas", lambda: None)
    with caplog.at_level(logging.INFO, logger="kernels_pallas"):
        ptxas.announce()
    [record] = caplog.records
    assert "there is no ptxas" in record.getMessage()
