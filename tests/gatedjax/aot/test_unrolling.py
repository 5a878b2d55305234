"""When the layers of a step are compiled one by one."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from gatedjax.aot.run_time import USUAL_UTILIZATION
from gatedjax.aot.targets import V5P
from gatedjax.aot.unrolling import SAVED_FRACTION, by_the_rule, unrolling
from gatedjax.config import Config, ModelConfig, TrainConfig
from gatedjax.training.flops import train_flops_per_token

MESH = SimpleNamespace(devices=np.array([SimpleNamespace(device_kind="TPU v5p")] * 4), size=4)
CPUS = SimpleNamespace(devices=np.array([SimpleNamespace(device_kind="cpu")]), size=1)


def run_of(steps: int, layers: int = 4, **model: object) -> Config:
    return Config(
        model=ModelConfig(vocab_size=1024, width=1024, num_layers=layers, **model),
        train=TrainConfig(steps=steps),
    )


def test_the_estimate():
    config = run_of(10_000)
    flops = 10_000 * 8 * 256 * train_flops_per_token(config.model, 256)
    found = unrolling(config, MESH)
    seconds = flops / (4 * USUAL_UTILIZATION * V5P.peak_flops)
    assert found.saved_seconds == pytest.approx(SAVED_FRACTION * seconds)
    assert found.compile_seconds == 33.0  # three layers more than the one of a loop
    assert unrolling(config, CPUS).saved_seconds == 0.0


@pytest.mark.parametrize(
    "steps, model, mesh, scan_layers",
    [
        (10**8, dict(unroll="auto"), MESH, False),
        (10**8, dict(), MESH, True),
        (10**8, dict(unroll="auto"), CPUS, True),
        (100, dict(unroll="auto"), MESH, True),
        (10**8, dict(unroll="auto", layers=40), MESH, True),
        (10**8, dict(unroll="auto", layers=1), MESH, True),
    ],
)
def test_the_rule(steps, model, mesh, scan_layers):
    config = run_of(steps, **model)
    compiled = by_the_rule(config, mesh)
    assert compiled.model.scan_layers == scan_layers
    # Nothing else differs.
    same = dataclasses.replace(compiled.model, scan_layers=config.model.scan_layers)
    assert dataclasses.replace(compiled, model=same) == config
    text = str(unrolling(config, mesh))
    assert "longer" in text
    if model.get("unroll") == "auto":
        assert ("layers: unrolled" in text) != scan_layers
