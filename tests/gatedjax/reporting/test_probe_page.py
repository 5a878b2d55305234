"""The page of probes, of made-up numbers of many layers; and the rows that are measured."""

import html.parser
import re

import jax.numpy as jnp
import numpy as np
import pytest

from gatedjax.data import ByteTokenizer
from gatedjax.errors import InputError
from gatedjax.evaluation.layer_statistics import massive_channels
from gatedjax.reporting.probe_page import summary, write_page

R = np.random.default_rng(0)


def probes_of(layers):
    """Attention in every other layer, with 5 heads in some and 3 in others; states in the rest."""
    found = {}
    for layer in range(layers):
        values = {
            "max_activation": np.float64(3000.0 if layer == 4 else 5.0),
            "massive_channels": np.array([3000.0 if layer == 4 else 5.0, 120.0, 2.0]),
            "massive_channel_ids": np.array([17.0, 3.0, 5.0]),
            "median_activation": np.float64(0.5),
            "kurtosis": np.float64(3 + layer),
        }
        if layer % 2:
            heads = 5 if layer % 4 == 1 else 3
            values["first_token_fraction"] = R.random(heads)
            values["attention_entropy"] = np.append(np.log(np.arange(1, 64)), np.nan)
            values["expert_load"] = R.random(300)
        else:
            values["half_life"] = R.random(64) * 100
        for name, of_layer in values.items():
            found.setdefault(name, {})[layer] = of_layer
    return found


def test_a_line_for_each_layer():
    columns, rows = summary(probes_of(6))
    assert columns[0] == "layer" and "mean gate" not in columns
    assert [row[0] for row in rows] == [str(layer) for layer in range(6)]
    by_column = dict(zip(columns, rows[4]))
    # Above a hundred and a thousand times the median: one of the three channels.
    assert by_column["massive channels"] == "17 (3e+03)"
    assert by_column["sink, mean over heads"] == "" and by_column["half-life, longest"] != ""
    assert dict(zip(columns, rows[5]))["massive channels"] == ""


def test_the_page_needs_no_other_file(tmp_path):
    pytest.importorskip("matplotlib")
    *others, path = write_page(probes_of(9), tmp_path / "new", "<run> & co", ["a note"])
    text = path.read_text()
    html.parser.HTMLParser().feed(text)
    assert "&lt;run&gt; &amp; co" in text and "a note" in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    drawn = {path.stem for path in others if path.suffix == ".png"}
    assert text.count("data:image/png;base64,") == len(drawn)
    assert {"massive_channels", "first_token_fraction", "half_life", "expert_load"} <= drawn


def test_massive_channels_by_hand():
    x, is_real = R.normal(size=(2, 30, 8)), np.ones((2, 30), bool)
    x[0, 3, 5], x[1, 0, 2] = -70.0, 9.0
    x[1, 20:], is_real[1, 20:] = 1e6, False
    found = massive_channels(jnp.asarray(x), jnp.asarray(is_real))
    assert found["massive_channel_ids"].tolist()[:2] == [5, 2]
    np.testing.assert_allclose(found["massive_channels"][:2], [70.0, 9.0])
    np.testing.assert_allclose(found["median_activation"], np.median(np.abs(x[is_real])), rtol=1e-6)


def test_rows_begin_as_documents_do():
    from gatedjax.probe import rows_of_texts

    batch = rows_of_texts(["abcdefgh", "", "xy"], ByteTokenizer(), [256], rows=4, length=4)
    assert batch.tokens.tolist() == [
        [256, 97, 98, 99],
        [256, 100, 101, 102],
        [256, 103, 104, 0],
        [256, 120, 121, 0],
    ]
    assert batch.segment_ids.tolist()[2] == [1, 1, 1, 0]
    assert batch.positions.tolist()[2] == [0, 1, 2, 0]
    with pytest.raises(InputError, match="--text"):
        rows_of_texts(["", ""], ByteTokenizer(), [256], rows=4, length=4)
    with pytest.raises(InputError, match="--length: got 2"):
        rows_of_texts(["a"], ByteTokenizer(), [256], rows=4, length=2)
