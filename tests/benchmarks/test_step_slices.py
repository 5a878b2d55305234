"""What is put together from two projects' compiled steps: the rows of benchmarks/step_slices.py."""

from pathlib import Path

import pytest

from gatedjax.aot.hlo import Collective

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def step_slices(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import step_slices

    return step_slices


def test_a_mesh_is_a_slice_and_axes(step_slices):
    for mesh in step_slices.MESHES:
        topology, axes = step_slices.parsed(mesh)
        chips = step_slices.num_chips(topology)
        assert axes["fsdp"] * axes.get("data", 1) == chips
        config = step_slices.configuration(mesh, is_asynchronous=False)
        assert config.train.batch_size == 4 * chips
        assert config.mesh.fsdp == axes["fsdp"]


def test_both_projects_have_one_function(step_slices):
    from step import TUNED

    model = step_slices.configuration(step_slices.MESHES[0], is_asynchronous=True).model
    (block,) = set(model.blocks)
    assert model.width == TUNED["base_emb_dim"]
    assert model.num_layers == TUNED["base_num_decoder_layers"]
    assert block.mixer.num_kv_heads == TUNED["base_num_kv_heads"]
    assert block.feed_forward.hidden == TUNED["base_mlp_dim"]


def test_what_a_chip_sends(step_slices):
    gathers = Collective("all-gather", 2, 400, asynchronous_bytes=300, asynchronous_count=1)
    reduction = Collective("all-reduce", 1, 50)
    found = step_slices.sent((gathers, reduction), parameters=100)
    # An all-reduce is sent twice.
    assert found["sent_bytes"] == 400 + 2 * 50
    assert found["bytes_a_parameter"] == 5.0
    assert found["blocking_bytes"] == 100 + 2 * 50
    assert found["collectives"]["all-gather"]["asynchronous_count"] == 1
    row = step_slices.line(("ours", "v5p"), found | dict(temporary_bytes=0, compile_seconds=1.0))
    assert len(row) == len(step_slices.HEADER)
    assert len(step_slices.line(("ours", "v5p"), {"error": "it broke"})) == len(row)
