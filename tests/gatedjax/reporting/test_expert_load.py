"""Expert loads on their way from a step's metrics to the picture."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from gatedjax.errors import InputError
from gatedjax.reporting.expert_load import draw_expert_load, expert_loads, plot_expert_load
from gatedjax.reporting.writers import Jsonl, TensorBoard, Writers, read_records


def test_arrays_go_to_the_record_and_only_there(tmp_path):
    """NaN (no such expert) becomes null; TensorBoard, which knows scalars only, does not choke."""
    load = jnp.array([[0.1234567, 1.5], [2.0, jnp.nan]])
    with Writers([Jsonl(tmp_path), TensorBoard(tmp_path)]) as writers:
        writers.write(3, {"loss": jnp.float32(2.0), "expert_load": load})
    assert read_records(tmp_path / "metrics.jsonl") == [
        {"step": 3, "split": "train", "loss": 2.0, "expert_load": [[0.12346, 1.5], [2.0, None]]}
    ]


def records(count):
    load = lambda i: [[1.0, 1.0, 1.0, None], [0.1 * i, 4.0 - 0.1 * i, 0.0, 2.0]]
    rows = [
        {"step": 5 * i, "split": "train", "loss": 1.0, "expert_load": load(i)}
        for i in range(1, count + 1)
    ]
    return [*rows, {"step": 7, "split": "validation", "loss": 1.0}]


def test_the_picture_shows_what_was_recorded(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(4)))
    assert plot_expert_load(tmp_path).read_bytes().startswith(b"\x89PNG")
    steps, load = expert_loads(records(4))
    assert steps.tolist() == [5, 10, 15, 20] and load.shape == (4, 2, 4)
    panels = draw_expert_load(steps, load, "run").axes[:2]
    narrow, wide = (np.asarray(p.collections[0].get_array()).reshape(-1, 4) for p in panels)
    np.testing.assert_allclose(narrow, 1.0)  # the layer with three experts has three rows
    np.testing.assert_allclose(
        wide, [[0.25, 0.25, 0.3, 0.4], [3.9, 3.8, 3.7, 3.6], [0.25] * 4, [2.0] * 4]
    )
    assert (
        narrow.shape == (3, 4)
        and "1.00" in panels[0].get_title("right")
        and "3.60" in panels[1].get_title("right")
    )


def test_a_run_without_sparse_layers_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 2.0}\n')
    with pytest.raises(
        InputError, match="holds no expert_load to draw; the model has no sparse layers"
    ):
        plot_expert_load(tmp_path)
    with pytest.raises(InputError, match="could not read"):
        plot_expert_load(tmp_path / "absent")
