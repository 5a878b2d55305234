"""Given weights as a person meets them, in real processes: X-LoRA in its two phases, low-rank
updates trained, merged and evaluated; bad input is one line and exit code 2, nothing written.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gatedjax.training.checkpoint import Checkpointer, read_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SMALL = [
    "--config.data.seq_len=32",
    "--config.data.sources.main.kind=text",
    "--config.optim.warmup_steps=2",
    "--config.train.steps=24",
    "--config.train.log_every=4",
    "--config.train.eval_every=24",
    "--config.train.eval_batches=2",
    "--config.train.sample_tokens=4",
]
EVALUATE = ["--batches=4", "--prompt_tokens=8", "--decode_tokens=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with text and a trained base."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "text").mkdir()
    for i in range(8):
        lines = [f"line {j} of file {i}: {j * i}\n" for j in range(80)]
        (folder / "text" / f"{i}.txt").write_text("".join(lines))
    trained = train(folder, "base", "base")
    assert trained.returncode == 0, trained.stderr
    return folder


def python(place: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(place / "xla"),
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def train(place: Path, workdir: str, phase: str, *flags: str) -> subprocess.CompletedProcess:
    return python(
        place,
        "train.py",
        f"--config=configs/xlora.py:{phase}",
        *SMALL,
        f"--config.data.sources.main.path={place / 'text'}",
        f"--config.data.cache_dir={place / 'tokens'}",
        f"--workdir={place / workdir}",
        f"--compile_cache={place / 'xla'}",
        *flags,
    )


def from_(place: Path, workdir: str) -> str:
    return f"--config.train.init_from={place / workdir}"


def losses(place: Path, workdir: str) -> list[float]:
    lines = (place / workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record["loss"] for record in records if record["split"] == "train"]


def digests(place: Path, workdir: str) -> dict[str, str]:
    """Of the parameters of the newest checkpoint, by name."""
    with Checkpointer(place / workdir, read_only=True) as checkpointer:
        leaves = checkpointer.manifest()["leaves"]
    return {
        name.removeprefix("params."): leaf["digest"]
        for name, leaf in leaves.items()
        if name.startswith("params.")
    }


def optimizer_leaves(place: Path, workdir: str) -> list[str]:
    with Checkpointer(place / workdir, read_only=True) as checkpointer:
        leaves = checkpointer.manifest()["leaves"]
    return [name for name in leaves if name.startswith("opt_state.") and "periods" in name]


def test_xlora_in_two_phases(place):
    experts = train(place, "experts", "experts", from_(place, "base"))
    assert experts.returncode == 0, experts.stderr
    assert f"of step 24 of {place / 'base'}" in experts.stdout
    assert "7 start fresh: lora_classifier, periods.layer_0.ffn.down.lora_a" in experts.stdout
    router = train(place, "router", "router", from_(place, "experts"))
    assert router.returncode == 0, router.stderr

    base, after_experts, after_router = (
        digests(place, workdir) for workdir in ("base", "experts", "router")
    )
    for name, digest in base.items():
        # Every weight of the base is in the mixture, to the bit, and stays there.
        new_name = re.sub(r"(\.ffn\.\w+)\.kernel$", r"\1.frozen", name)
        assert after_experts[new_name] == after_router[new_name] == digest, name
    changed = {name for name in after_experts if after_experts[name] != after_router[name]}
    assert changed == {"lora_classifier"}
    kept = optimizer_leaves(place, "experts")
    assert kept and all(".lora_" in name for name in kept)
    assert losses(place, "experts")[-1] < losses(place, "base")[-1]
    assert losses(place, "router")[-1] < losses(place, "experts")[0]


def test_low_rank_updates_are_trained_and_merged(place):
    tuned = train(
        place,
        "tuned",
        "base",
        from_(place, "base"),
        "--config.train.init_fresh=('*.lora.*',)",
        "--config.model.lora.rank=4",
        "--config.model.lora.targets=('*.query','*.ffn.*')",
        "--config.optim.lr_by_name=('*.lora.b -> 16',)",
        "--config.optim.ema_decay=0.5",
    )
    assert tuned.returncode == 0, tuned.stderr
    assert "of which train" in tuned.stdout
    before, after = digests(place, "base"), digests(place, "tuned")
    assert all(after[name] == digest for name, digest in before.items())

    merge = ["-m", "gatedjax.merge_lora", f"--checkpoint={place / 'tuned'}"]
    merged = python(place, *merge, f"--workdir={place / 'merged'}")
    assert merged.returncode == 0, merged.stderr
    assert "4 projections merged: step 24 of " in merged.stdout
    assert read_config(place / "merged")["model"]["lora"]["rank"] == 0
    # The same names and shapes as the model without updates.
    assert digests(place, "merged").keys() == before.keys()
    shown = {}
    for workdir in ("base", "tuned", "merged"):
        result = python(place, "eval.py", f"--checkpoint={place / workdir}", *EVALUATE)
        assert result.returncode == 0, result.stderr
        found = re.search(r"loss +([\d.]+)", result.stdout)
        shown[workdir] = float(found[1])
    assert shown["merged"] == pytest.approx(shown["tuned"], abs=2e-4)
    assert shown["tuned"] < shown["base"]

    again = python(place, *merge, f"--workdir={place / 'merged'}")
    assert again.returncode == 2
    assert "which holds a run, expected a new folder" in again.stderr
    nothing = python(
        place,
        "-m",
        "gatedjax.merge_lora",
        f"--checkpoint={place / 'base'}",
        f"--workdir={place / 'nothing'}",
    )
    assert nothing.returncode == 2 and "has no low-rank updates" in nothing.stderr
    assert not (place / "nothing").exists()


def test_a_run_that_goes_on_does_not_look_there_again(place):
    flags = ["base", from_(place, "gone"), "--config.optim.trainable=('*.ffn.*',)"]
    (place / "base").rename(place / "gone")
    try:
        first = train(place, "more", *flags, "--config.train.steps=8")
    finally:
        (place / "gone").rename(place / "base")
    assert first.returncode == 0 and "weights: " in first.stdout, first.stderr
    # `gone` has gone by now.
    second = train(place, "more", *flags)
    assert second.returncode == 0, second.stderr
    assert "resuming after step 8 of 24" in second.stdout
    assert "weights: " not in second.stdout
    before, after = digests(place, "base"), digests(place, "more")
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {name for name in after if ".ffn." in name}
    kept = optimizer_leaves(place, "more")
    assert kept and all(".ffn." in name for name in kept)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config.train.init_from=NONE"], "config.train.init_from: NONE: holds no checkpoints"),
        (
            ["--config.train.init_from=BASE", "--config.model.width=32"],
            "config.train.init_from: embedding: got float32[288, 64] ",
        ),
        (
            ["--config.train.init_from=BASE", "--config.model.tie_embeddings=False"],
            "config.train.init_from: step 24 of BASE lacks 1 parameters of this model: head",
        ),
        (["--config.optim.trainable=('*.none',)"], "config.optim.trainable: got '*.none'"),
        (
            ["--config.optim.lr_by_name=('*.none -> 2',)"],
            "config.optim.lr_by_name: got '*.none'",
        ),
        (
            ["--config.model.lora.rank=0", "--config.model.lora.targets=('*.query',)"],
            "config.model.lora.rank: got 0, expected at least 1 with targets",
        ),
        (
            ["--config.model.lora.rank=2", "--config.model.lora.targets=('*.none',)"],
            "config.model.lora.targets: got '*.none', expected a pattern of projections",
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(place, flags, message):
    def filled(text: str) -> str:
        return text.replace("NONE", str(place / "none")).replace("BASE", str(place / "base"))

    result = train(place, "bad", "base", *map(filled, flags))
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(lines) == 1, result.stderr
    assert lines[0].startswith(f"error: {filled(message)}")
    assert not (place / "bad").exists()
