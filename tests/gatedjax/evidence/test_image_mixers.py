"""The studies of mixers of patches: what each step sees, what is measured, what was seen."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gatedjax.config import from_config_dict
from gatedjax.data.image_rows import row_of_image
from gatedjax.data.images import Example
from gatedjax.evidence import encoders
from gatedjax.evidence.encoders import EncoderRun, Images, StepCost
from gatedjax.study.image_mixers import LINEAR, Sizes, encoder

ROOT = Path(__file__).parents[3]
TINY = Sizes(image=(4, 4), patch=(2, 2), block=(1, 2), grid=(1, 2), landmark=1)


def tiny(name: str, **train):
    c = encoder(name, TINY, num_layers=1)
    c.data.sources = {"main": {"kind": "mnist1d"}}
    c.model.vocab_size = 2
    c.optim.warmup_steps = 1
    c.train.update({"steps": 5, "batch_size": 4, **train})
    return from_config_dict(c)


def test_each_image_is_seen_once_an_epoch_and_held_out_ones_at_the_end():
    given = Images(np.zeros((13, 4, 4)), np.zeros(13, int), num_train=10)
    config = tiny("Activator")
    rows = encoders.rows_of_steps(config, given, seed=0)
    assert rows.shape == (6, 4)
    seen = rows[:5].reshape(-1)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(rows[5]) == [10, 11, 12, 10]
    assert (rows[:5] != encoders.rows_of_steps(config, given, seed=1)[:5]).any()


def test_rows_are_those_of_training():
    config = tiny("softmax")
    pixels = np.random.default_rng(0).random((4, 4, 1), np.float32)
    row = row_of_image(Example(pixels, 1), config.model.patches, config.data.images)
    batch = encoders.batch_of(jnp.asarray(row.patches)[None], jnp.array([1]))
    for field in dataclasses.fields(row):
        np.testing.assert_array_equal(getattr(batch, field.name)[0], getattr(row, field.name))


@pytest.mark.slow
def test_an_encoder_learns_and_its_measure_is_of_held_out_images(monkeypatch):
    random = np.random.default_rng(0)
    classes = random.integers(0, 2, 40)
    patches = random.normal(size=(40, 4, 4)).astype(np.float32) + 4 * classes[:, None, None]
    # Half of those that are held out have the wrong class.
    wrong = classes.copy()
    wrong[36:] = 1 - wrong[36:]
    monkeypatch.setattr(encoders, "images", lambda config: Images(patches, wrong, 32))
    values = EncoderRun(tiny("softmax", steps=60))(0)
    assert values["accuracy"] == 0.5 and values["loss"] > 0.3


def test_a_step_has_a_time_and_a_memory():
    values = StepCost(tiny("Activator", batch_size=1))(0)
    assert 0 < values["step_ms"] < 100 and 0 < values["temporary_mib"] < 1


def test_time_and_memory_grow_as_the_number_of_patches_where_they_should():
    path = ROOT / "results" / "image_mixer_costs" / "cpu" / "runs.jsonl"
    values = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        labels = record["labels"]
        values[labels["mixer"], labels["tokens"], record["seed"]] = record["values"]

    for seed in (0, 1):

        def growth(name: str, value: str, seed: int = seed) -> float:
            return values[name, 4096, seed][value] / values[name, 1024, seed][value]

        for name in LINEAR:
            assert growth(name, "temporary_mib") < 6, name
            assert growth(name, "step_ms") < 5.5, name
        for name in ("softmax", "Sinkhorn", "QR", "ConViT", "gMLP"):
            assert growth(name, "step_ms") > 7, name
