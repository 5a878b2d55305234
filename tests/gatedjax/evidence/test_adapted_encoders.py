"""The study of adapted encoders: the turned images, and what the adapted model starts from."""

import dataclasses

import numpy as np

from configs.studies import soft_adapters
from gatedjax.config import from_config_dict
from gatedjax.data.image_rows import row_of_image
from gatedjax.data.images import Example
from gatedjax.evidence.adapted_encoders import quarter_turn, started_from


def test_patches_of_turned_images():
    c = from_config_dict(soft_adapters.configured())
    pixels = np.random.default_rng(0).random((8, 8, 1), np.float32)
    upright, turned = (
        row_of_image(Example(image, 1), c.model.patches, c.data.images).patches
        for image in (pixels, np.ascontiguousarray(np.rot90(pixels)))
    )
    np.testing.assert_array_equal(quarter_turn(upright[None], c)[0], turned)


def test_what_has_no_name_in_the_base_starts_by_itself():
    own = {"head": 1, "layer": {"up": 2, "adapters": {"down": 3}}}
    before = {"head": 10, "layer": {"up": 20}, "gone": 30}
    expected = {"head": 10, "layer": {"up": 20, "adapters": {"down": 3}}}
    assert started_from(own, before) == expected


def test_all_ways_start_from_one_base():
    cells = soft_adapters.get_study(small=True).cells
    bases = {cell.experiment.base for cell in cells}
    assert len(bases) == 1
    (base,) = bases
    for cell in cells:
        config = cell.experiment.config
        assert dataclasses.replace(config.model, lora=base.model.lora, ffns=base.model.ffns) == (
            base.model
        )
