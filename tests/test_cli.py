"""The command line as a person meets it: real processes. Bad input is one line and exit code 2,
nothing overwritten.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from helpers import slow

ROOT = Path(__file__).parents[1]
# A run of seconds: two layers, windows of 32 bytes of a small text.
SMALL = [
    "--config=configs/tiny.py",
    "--config.model.num_layers=2",
    "--config.model.width=32",
    "--config.model.ffns.mlp.hidden=32",
    "--config.model.ffns.moe.hidden=16",
    "--config.data.seq_len=32",
    "--config.data.sources.main.kind=text",
    "--config.optim.warmup_steps=2",
    "--config.train.steps=24",
    "--config.train.log_every=1",
    "--config.train.eval_every=12",
    "--config.train.eval_batches=2",
    "--config.train.checkpoint_every=4",
    "--config.train.sample_tokens=8",
]

# Programs before the first evaluation.
MOST_COMPILED = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of text, and a compilation cache that all processes of this module share."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text").mkdir()
    for i in range(8):
        (folder / "text" / f"{i}.txt").write_text(
            "".join(f"line {j} of file {i}: {j * i}\n" for j in range(80))
        )
    return folder


def command(place: Path, workdir: str, *flags: str, script: str = "train.py") -> list[str]:
    common = [f"--compile_cache={place / 'xla'}"] if script == "train.py" else []
    sources = [
        f"--config.data.sources.main.path={place / 'text'}",
        f"--config.data.cache_dir={place / 'tokens'}",
    ]
    train = (
        [*SMALL, *sources, f"--workdir={place / workdir}", *common] if script == "train.py" else []
    )
    return [sys.executable, *script.split(), *train, *flags]


def run(
    place: Path, workdir: str, *flags: str, script: str = "train.py", **variables: str
) -> subprocess.CompletedProcess:
    args = command(place, workdir, *flags, script=script)
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(place / "xla"),
        "JAX_PLATFORMS": "cpu",
    }
    environment |= variables
    return subprocess.run(
        args, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def losses(place: Path, workdir: str) -> dict[int, float]:
    lines = (place / workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {r["step"]: r["loss"] for r in records if r["split"] == "train"}


@pytest.fixture(scope="module")
def finished(place):
    """A run from start to end, undisturbed."""
    result = run(place, "straight", "--profile_step=14", "--probes", JAX_LOG_COMPILES="1")
    assert result.returncode == 0, result.stderr
    return result


def test_little_is_compiled_before_the_first_step(finished):
    """The step once, though it is compiled before there is a state; and few small programs."""
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", finished.stderr)
    assert compiled.count("train_step") == compiled.count("make_state") == 1, compiled
    before_evaluation = compiled[: compiled.index("eval_step_by_row")]
    assert {"train_step", "make_state"} < set(before_evaluation)
    # Seeds, and the learning rate of the first line of the log.
    assert len(before_evaluation) <= MOST_COMPILED, before_evaluation


def test_a_run_shows_and_leaves_what_it_should(place, finished):
    out = finished.stdout
    for piece in (
        "M parameters",
        "sha256",
        "linear_scan: xla",
        "step 24/24",
        "validation",
        "bpb",
        "tok/s",
        "sample",
    ):
        assert piece in out, f"{piece!r} is missing from:\n{out}"
    workdir = place / "straight"
    assert (workdir / "curves.png").stat().st_size > 10_000
    events = b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())
    assert events.count(b"probes/gate_histogram") == 2, "at both evaluations"
    assert any((workdir / "tensorboard").iterdir())
    assert any((workdir / "profile").rglob("*.xplane.pb"))
    assert sorted(losses(place, "straight")) == list(range(1, 25))


def test_a_run_directory_explains_itself(place, finished):
    """Configuration, command, versions, what it was trained on, and all that was said."""
    workdir = place / "straight"
    config = json.loads((workdir / "config.json").read_text())
    assert config["train"]["steps"] == 24 and config["model"]["vocab_size"] >= 257
    (start,) = map(json.loads, (workdir / "starts.jsonl").read_text().splitlines())
    assert start["step"] == 0 and "--profile_step=14" in start["command"]
    assert start["versions"]["jax"] == jax.__version__ and "cpu" in start["devices"].lower()
    assert start["data"]["tokenizer"] == "bytes-1"
    assert len(start["data"]["sources"]["main"]["train"]) == 64
    logged = [line.partition("  ")[2] for line in (workdir / "log.txt").read_text().splitlines()]
    said = [line for line in finished.stdout.splitlines() if line.startswith("step")]
    assert said and set(said) <= set(logged)


def test_a_finished_run_is_not_trained_with_another_configuration(place, finished):
    """Not in silence; and nothing of it is touched."""
    before = {path: path.stat().st_mtime_ns for path in (place / "straight").iterdir()}
    result = run(place, "straight", "--config.optim.lr=1e-4")
    assert result.returncode == 2, result.stdout
    error = result.stderr.splitlines()[-1]
    for piece in (
        "this run is finished, after step 24",
        "config.optim.lr: 0.003 then, now 0.0001",
        "--workdir",
        "--fresh",
        "--config.train.steps",
    ):
        assert piece in error
    after = {path: path.stat().st_mtime_ns for path in (place / "straight").iterdir()}
    del before[place / "straight" / "lock"], after[place / "straight" / "lock"]
    assert after == before


@pytest.mark.slow
def test_what_a_finished_run_may_be_started_with(place, finished):
    """The same command, another mesh (of one device: its name), more steps, or --fresh."""
    folder = place / "again"
    shutil.copytree(place / "straight", folder)
    assert run(place, "again").returncode == 0
    result = run(place, "again", "--config.train.steps=26", "--config.optim.lr=1e-4")
    assert result.returncode == 0 and "changed since that checkpoint" in result.stdout
    assert max(losses(place, "again")) == 26
    starts = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 24, 24]
    result = run(place, "again", "--fresh", "--config.train.steps=4")
    assert result.returncode == 0, result.stderr
    assert f"the run in {folder} is kept as {folder}.1" in result.stdout
    assert max(losses(place, "again")) == 4 and max(losses(place, "again.1")) == 26


@pytest.mark.slow
def test_a_copied_run_on_another_machine(place, finished, tmp_path, monkeypatch):
    """Another user, and the text is not there."""
    shutil.copytree(place / "straight", tmp_path / "copy")
    shutil.copytree(place / "text", tmp_path / "text")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    checkpoint = f"--checkpoint={tmp_path / 'copy'}"
    few = ["--batches=2", "--prompt_tokens=16", "--decode_tokens=4"]
    result = run(place, "", checkpoint, "--tokens=4", script="-m gatedjax.generate")
    assert result.returncode == 0, result.stderr
    result = run(place, "", checkpoint, *few, script="eval.py")
    assert result.returncode == 2 and "--source=KIND:PATH" in result.stderr
    # The user's own run, but its text was moved.
    monkeypatch.delenv("XDG_STATE_HOME")
    (place / "text").rename(place / "moved")
    result = run(place, "", checkpoint, *few, script="eval.py")
    (place / "moved").rename(place / "text")
    assert result.returncode == 2 and "--source=KIND:PATH" in result.stderr
    source = f"--source=text:{tmp_path / 'text'}"
    result = run(place, "", checkpoint, source, *few, script="eval.py")
    assert result.returncode == 0 and "bits per byte" in result.stdout, result.stderr


@pytest.mark.slow
def test_killed_run_goes_on_to_the_bit(place, finished):
    """kill -9, right after a checkpoint began; then the same losses as undisturbed. More:
    benchmarks/faults.py.
    """
    for until in (13,):
        process = subprocess.Popen(
            command(place, "killed"),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for line in process.stdout:
            if line.startswith("step") and int(line.split()[1].split("/")[0]) >= until:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
    result = run(place, "killed")
    assert result.returncode == 0 and "resuming after step" in result.stdout, result.stderr
    assert losses(place, "killed") == losses(place, "straight")


@pytest.mark.slow
def test_two_runs_of_one_command_print_equal_losses(place, monkeypatch):
    """Compiled as users compile, not as the other tests; rows are one chunk of a scan."""
    monkeypatch.setenv("XLA_FLAGS", "")
    flags = ["--config.train.steps=3", "--config.train.eval_every=1"]
    printed = []
    for workdir in ("first", "second"):
        result = run(place, workdir, *flags)
        assert result.returncode == 0, result.stderr
        lines = (place / workdir / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        printed.append([(r["split"], r["step"], r["loss"]) for r in records])
    assert {split for split, _, _ in printed[0]} == {"train", "validation"}
    assert printed[0] == printed[1]


@pytest.mark.slow
def test_damaged_newest_checkpoint_is_reported_and_the_one_before_used(place, finished):
    source, damaged = place / "straight", place / "damaged"
    subprocess.run(["cp", "-r", source, damaged], check=True)
    largest = max(
        (damaged / "checkpoints" / "24").rglob("*"),
        key=lambda p: p.stat().st_size if p.is_file() else 0,
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    result = run(place, "damaged")
    assert result.returncode == 0, result.stderr
    assert (
        "step 24" in result.stdout
        and "damaged" in result.stdout
        and "resuming after step 20" in result.stdout
    )
    assert losses(place, "damaged") == losses(place, "straight")


def test_evaluation_and_generation_of_a_checkpoint(place, finished):
    checkpoint = f"--checkpoint={place / 'straight'}"
    flags = [checkpoint, "--batches=2", "--prompt_tokens=16", "--decode_tokens=4"]
    result = run(place, "", *flags, script="eval.py")
    assert result.returncode == 0, result.stderr
    for piece in (
        "loss",
        "perplexity",
        "bits per byte",
        "±",
        "gzip -9",
        "xz -9e",
        "cache",
        "prefill",
        "decode",
    ):
        assert piece in result.stdout
    result = run(place, "", checkpoint, "--probes", script="eval.py")
    assert result.returncode == 0, result.stderr
    written = {
        Path(line).name for line in result.stdout.split() if line.endswith((".json", ".png"))
    }
    assert {
        "probes.json",
        "first_token_fraction.png",
        "half_life.png",
        "expert_load.png",
    } <= written
    probes = json.loads((place / "straight" / "probes" / "probes.json").read_text())
    assert (
        len(probes["first_token_fraction"]["1"]) == 4
        and 0 < sum(probes["first_token_fraction"]["1"]) < 4
    )
    flags = [checkpoint, "--prompt=line", "--tokens=12", "--seed=3", "--top_k=5", "--top_p=0.9"]
    result = run(place, "", *flags, script="-m gatedjax.generate")
    assert result.returncode == 0 and result.stdout.startswith("line") and len(result.stdout) > 5, (
        result.stderr
    )


@pytest.mark.slow
def test_many_prompts_and_the_page_of_probes(place, finished, tmp_path):
    checkpoint = f"--checkpoint={place / 'straight'}"
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"id": 1, "prompt": "line"}, {"id": 2, "prompt": ""}, {"id": 3, "prompt": "a line of"}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    flags = [checkpoint, f"--prompts={prompts}", "--tokens=6", "--batch_size=2"]
    result = run(place, "", *flags, script="-m gatedjax.generate")
    assert result.returncode == 0, result.stderr
    written = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["id"] for row in written] == [1, 2, 3]
    assert all(row["tokens"] <= 6 and row["finish"] in ("stop", "length") for row in written)
    out = tmp_path / "out.jsonl"
    result = run(place, "", *flags, f"--out={out}", script="-m gatedjax.generate")
    assert [json.loads(line) for line in out.read_text().splitlines()] == written
    for bad, named in (
        (["--prompt=a"], "--prompts: got --prompt too"),
        (["--system=a"], "--system: got no --chat"),
        (["--stop="], "--stop: got ''"),
        (["--temperature=-1"], "temperature: got -1"),
        (["--chat"], "--chat_template"),
    ):
        result = run(place, "", *flags, *bad, script="-m gatedjax.generate")
        assert result.returncode == 2 and named in result.stderr, (bad, result.stderr)
    text = tmp_path / "text.txt"
    text.write_text("A line of text. " * 20)
    flags = [checkpoint, f"--text={text}", "--rows=2", f"--out={tmp_path / 'page'}"]
    result = run(place, "", *flags, script="-m gatedjax.probe")
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "page" / "probes.html").read_text()
    assert page.count("data:image/png") == len(list((tmp_path / "page").glob("*.png"))) > 4


@pytest.mark.slow
def test_evaluation_of_another_text_in_several_lengths_as_json(place, finished, tmp_path):
    text = tmp_path / "new.txt"
    text.write_text("A line of text. " * 40)
    flags = [
        f"--checkpoint={place / 'straight'}",
        f"--text={text}",
        "--lengths=16,32",
        "--batches=0",
        "--json",
        "--prompt_tokens=4",
        "--decode_tokens=2",
    ]
    result = run(place, "", *flags, script="eval.py")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["step"] == max(losses(place, "straight"))
    by_length = {found["length"]: found for found in report["evaluations"]}
    assert sorted(by_length) == [16, 32]
    # Every byte, and the end of the document.
    assert {found["tokens"] for found in by_length.values()} == {len(text.read_text()) + 1}
    assert all(found["loss_error"] > 0 for found in by_length.values())
    for bad in ("--lengths=1", "--lengths=x", "--config.data.seq_len=0", "--step=7", "--text=/no"):
        result = run(place, "", flags[0], bad, script="eval.py")
        assert result.returncode == 2, bad
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr


BAD = {
    "unknown key": (
        ["--config.model.widht=3"],
        "config.model.widht: unknown key; did you mean 'model.width'?",
    ),
    "wrong type": (["--config.train.steps=many"], "steps"),
    "wrong value": (
        ["--config.optim.name=sgdd"],
        "config.optim.name: got 'sgdd', expected one of adamw",
    ),
    "mesh": (["--config.mesh.fsdp=3"], "fsdp=3"),
    "missing file": (["--config.data.sources.main.path=nowhere"], "nowhere"),
    "missing tokenizer": (["--config.data.tokenizer=none.json"], "none.json"),
    "vocabulary": (
        ["--config.model.vocab_size=100"],
        "config.model.vocab_size: got 100, expected at least the 257",
    ),
    "missing config": (["--config=configs/none.py"], "configs/none.py"),
    "stray argument": (["steps=3"], "'steps=3' is not a flag"),
}


# Each is a process; the messages themselves are tested where they are made.
IN_QUICK = ("unknown key", "missing file", "stray argument")


@pytest.mark.parametrize("name", [name if name in IN_QUICK else slow(name) for name in BAD])
def test_bad_input_is_one_line_and_exit_code_2(place, name):
    flags, message = BAD[name]
    result = run(place, "never", *flags)
    errors = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 2, result.stderr
    assert errors[-1].startswith("error: ") and message in errors[-1], result.stderr
    assert "Traceback" not in result.stderr
    assert not (place / "never").exists(), "nothing is written for a run that cannot start"


def test_empty_corpus_is_one_line(place):
    (place / "empty").mkdir()
    result = run(place, "never", f"--config.data.sources.main.path={place / 'empty'}")
    assert (
        result.returncode == 2 and "error: " in result.stderr and "Traceback" not in result.stderr
    )


def test_checkpoint_of_another_model_is_refused_by_name(place, finished):
    before = losses(place, "straight")
    result = run(place, "straight", "--config.model.width=64", "--config.train.steps=30")
    assert result.returncode == 2 and "embedding" in result.stderr, result.stderr
    assert losses(place, "straight") == before


def test_generation_without_a_checkpoint_is_one_line(place):
    for flags in ([], [f"--checkpoint={place / 'nothing'}"]):
        result = run(place, "", *flags, script="-m gatedjax.generate")
        assert result.returncode == 2 and result.stderr.strip().splitlines()[-1].startswith(
            "error: "
        )


@pytest.mark.slow
def test_a_run_that_cannot_learn_gives_up_with_one_line(place):
    flags = ["--config.optim.lr=1e30", "--config.optim.max_skips=2", "--config.optim.clip_norm=0.0"]
    result = run(place, "diverged", *flags)
    assert result.returncode == 1, result.stdout
    (line,) = result.stderr.strip().splitlines()
    assert "steps in a row were skipped" in line


@pytest.mark.slow
def test_second_run_on_one_directory_is_refused(place, finished):
    first = subprocess.Popen(
        command(place, "twice", "--config.train.steps=100000"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    try:
        while not next(first.stdout).startswith("step"):
            time.sleep(0.01)
        result = run(place, "twice")
        assert result.returncode == 2 and "another run" in result.stderr
    finally:
        first.kill()
        first.stdout.close()
        first.wait()
