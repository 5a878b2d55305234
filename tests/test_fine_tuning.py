"""Fine-tuning as a person meets it, in real processes: a base, low-rank updates on conversations,
merged, evaluated; what is wrong is one line and exit code 2.
"""

import json
import re
from pathlib import Path

import pytest
from test_start_from_weights import EVALUATE, python

from gatedjax.training.checkpoint import read_config

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SMALL = [
    "--config.data.seq_len=64",
    "--config.optim.warmup_steps=2",
    "--config.optim.lr=0.01",
    "--config.train.steps=20",
    "--config.train.log_every=4",
    "--config.train.eval_every=20",
    "--config.train.eval_batches=2",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with conversations, a template and a trained base."""
    pytest.importorskip("jinja2")
    folder = tmp_path_factory.mktemp("fine_tuning")
    lines = []
    for i in range(60):
        messages = [
            {"role": "user", "content": f"{i % 7} or {i % 5}?"},
            {"role": "assistant", "content": f"It is {max(i % 7, i % 5)}."},
        ]
        lines.append(json.dumps({"messages": messages}))
    (folder / "chats.jsonl").write_text("\n".join(lines))
    (folder / "template.jinja").write_text(TEMPLATE)
    (folder / "text").mkdir()
    for i in range(8):
        (folder / "text" / f"{i}.txt").write_text(f"{i} or more? It is {i}.\n" * 40)
    base = [
        "--config.data.sources.main.kind=text",
        f"--config.data.sources.main.path={folder / 'text'}",
        "--config.train.sample_tokens=0",
    ]
    trained = train(folder, "base", "configs/xlora.py:base", *base)
    assert trained.returncode == 0, trained.stderr
    return folder


def train(place: Path, workdir: str, config: str, *flags: str):
    return python(
        place,
        "train.py",
        f"--config={config}",
        f"--workdir={place / workdir}",
        f"--config.data.cache_dir={place / 'tokens'}",
        *SMALL,
        *flags,
    )


def tune(place: Path, workdir: str, method: str, *flags: str):
    return train(
        place,
        workdir,
        f"configs/sft.py:{method}={place / 'base'}",
        f"--config.data.sources.main.path={place / 'chats.jsonl'}",
        *flags,
    )


def loss(place: Path, workdir: str) -> float:
    """Of the answers of all conversations that are held out."""
    done = python(place, "eval.py", f"--checkpoint={place / workdir}", *EVALUATE)
    assert done.returncode == 0, done.stderr
    return float(re.search(r"^loss\s+(\S+)", done.stdout, re.M)[1])


def test_low_rank_updates_learn_the_answers_and_merge(place):
    template = f"--config.data.chat_template={place / 'template.jinja'}"
    tuned = tune(place, "tuned", "lora", template)
    assert tuned.returncode == 0, tuned.stderr
    records = (place / "tuned" / "metrics.jsonl").read_text().splitlines()
    losses = [r["loss"] for r in map(json.loads, records) if r["split"] == "train"]
    assert losses[-1] < 0.9 * losses[0]
    # The run is whole without the template's file.
    kept = json.loads((place / "tuned" / "tokenizer_config.json").read_text())
    assert kept["chat_template"] == TEMPLATE
    (place / "template.jinja").rename(place / "elsewhere.jinja")
    merged = python(
        place,
        "-m",
        "gatedjax.merge_lora",
        f"--checkpoint={place / 'tuned'}",
        f"--workdir={place / 'merged'}",
    )
    (place / "elsewhere.jinja").rename(place / "template.jinja")
    assert merged.returncode == 0, merged.stderr
    assert read_config(place / "merged")["model"]["lora"]["rank"] == 0
    assert loss(place, "merged") == pytest.approx(loss(place, "tuned"), abs=2e-4)


def test_all_weights(place):
    template = f"--config.data.chat_template={place / 'template.jinja'}"
    tuned = tune(place, "full", "full", template)
    assert tuned.returncode == 0, tuned.stderr
    assert "start fresh: none" in tuned.stdout or "0 start fresh" in tuned.stdout


def test_bad_input_is_one_line_and_writes_nothing(place):
    no_template = tune(place, "none", "full")
    assert no_template.returncode == 2
    assert "config.data.chat_template: empty" in no_template.stderr.splitlines()[-1]
    no_run = train(place, "none", f"configs/sft.py:full={place / 'nowhere'}")
    assert no_run.returncode == 2
    assert "config.train.init_from" in no_run.stderr.splitlines()[-1]
    assert not (place / "none").exists()
