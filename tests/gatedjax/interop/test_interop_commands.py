"""import_hf and export_hf as a person meets them, in real processes: a folder becomes a run, which
is evaluated, sampled from and trained further, and a folder again; bad input is one line.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizer_file import train_json_tokenizer

from gatedjax.interop import checkpoint, safetensors

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
WHOLE = Path(__file__).parent / "fixtures" / "qwen3_next"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with text, and with a checkpoint in two files, its tokenizer beside it."""
    place = tmp_path_factory.mktemp("interop")
    folder = place / "model"
    folder.mkdir()
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    train_json_tokenizer(folder / "tokenizer.json")
    config = json.loads((WHOLE / "config.json").read_text())
    config |= {"vocab_size": 320, "auto_map": {"AutoModel": "code.Model"}, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('executed')")
    write_random_tensors(folder)
    (place / "text").mkdir()
    for i in range(8):
        lines = [f"line {j} of file {i}: {j * i}\n" for j in range(80)]
        (place / "text" / f"{i}.txt").write_text("".join(lines))
    return place


def write_random_tensors(folder: Path) -> None:
    """All in bfloat16 but the decays, as released files have it."""
    described = checkpoint.described(folder)
    dtypes = {"A_log": "F32", "dt_bias": "F32"}
    plan = {}
    for link in described.family.links(described.model):
        dtype = safetensors.DTYPES[dtypes.get(link.tensor.rpartition(".")[2], "BF16")]
        plan[link.tensor] = safetensors.Planned(link.tensor, dtype, link.shape)
    shards = safetensors.in_shards(plan.values(), 12_000)
    files = dict(zip(safetensors.file_names(len(shards)), shards))
    assert len(files) > 1
    rng = np.random.default_rng(0)
    for file, planned_here in files.items():
        with safetensors.FileWriter(folder / file, planned_here) as writer:
            for planned in planned_here:
                values = 0.3 * rng.standard_normal(planned.shape, np.float32)
                writer.write(values.astype(planned.dtype))
    (folder / safetensors.INDEX).write_text(json.dumps(safetensors.index_of(files)))


def python(place: Path, *arguments: str, devices: int = 1) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(place / "xla"),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def import_(place: Path, folder: Path, run: str, *flags: str, devices: int = 1):
    command = ["-m", "gatedjax.interop.import_hf", f"--from={folder}"]
    return python(place, *command, f"--workdir={place / run}", *flags, devices=devices)


def export(place: Path, run: str, folder: str, *flags: str):
    command = ["-m", "gatedjax.interop.export_hf", f"--checkpoint={place / run}"]
    return python(place, *command, f"--to={place / folder}", *flags)


def test_a_folder_becomes_a_run_and_a_folder_again(place):
    imported = import_(place, place / "model", "run", "--mesh=fsdp=2", devices=2)
    assert imported.returncode == 0, imported.stderr
    assert "auto_map" in imported.stdout and "(qwen3_next)" in imported.stdout
    assert (place / "run" / "hf" / "chat_template.jinja").read_text() == CHAT_TEMPLATE

    evaluated = python(
        place,
        "eval.py",
        f"--checkpoint={place / 'run'}",
        f"--text={place / 'text'}",
        f"--config.data.cache_dir={place / 'tokens'}",
        "--batches=1",
        "--prompt_tokens=8",
        "--decode_tokens=2",
    )
    assert evaluated.returncode == 0, evaluated.stderr
    generate = ["-m", "gatedjax.generate", f"--checkpoint={place / 'run'}", "--tokens=4"]
    generated = python(place, *generate, "--prompt=line")
    assert generated.returncode == 0, generated.stderr

    trained = python(
        place,
        "train.py",
        f"--config=configs/from_run.py:{place / 'run'}",
        f"--workdir={place / 'more'}",
        "--config.data.sources.main.kind=text",
        f"--config.data.sources.main.path={place / 'text'}",
        f"--config.data.cache_dir={place / 'tokens'}",
        "--config.data.seq_len=32",
        "--config.train.steps=2",
        "--config.optim.warmup_steps=1",
        "--config.train.eval_batches=1",
        "--config.train.sample_tokens=2",
    )
    assert trained.returncode == 0, trained.stderr
    assert f"of step 0 of {place / 'run'}" in trained.stdout

    exported = export(place, "run", "again")
    assert exported.returncode == 0, exported.stderr
    same = export(place, "more", "trained", "--family=qwen3_next", "--dtype=float32")
    assert same.returncode == 0, same.stderr
    require_same_tensors(place / "model", place / "again")
    before = json.loads((place / "model" / "config.json").read_text())
    after = json.loads((place / "again" / "config.json").read_text())
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed == {"auto_map", "transformers_version"}
    tokenizer = (place / "model" / "tokenizer.json").read_bytes()
    assert (place / "again" / "tokenizer.json").read_bytes() == tokenizer
    assert (place / "again" / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    # Another run's model: the same family, all its tensors in float32.
    trained_tensors = safetensors.tensors_of_folder(place / "trained")
    assert {tensor.dtype for tensor in trained_tensors.values()} == {"F32"}
    assert trained_tensors.keys() == safetensors.tensors_of_folder(place / "model").keys()


def test_merged_updates_go_out(place):
    """Import, low-rank updates on conversations, merge, export: the base and its updates."""
    if not (place / "run").exists():
        assert import_(place, place / "model", "run").returncode == 0
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    (place / "template.jinja").write_text(template)
    records = []
    for i in range(64):
        messages = [
            {"role": "user", "content": f"line {i}?"},
            {"role": "assistant", "content": f"line {i} of file 1: {i}"},
        ]
        records.append(json.dumps({"messages": messages}))
    (place / "chats.jsonl").write_text("\n".join(records))
    tuned = python(
        place,
        "train.py",
        f"--config=configs/sft.py:lora={place / 'run'}",
        f"--workdir={place / 'tuned'}",
        f"--config.data.sources.main.path={place / 'chats.jsonl'}",
        f"--config.data.chat_template={place / 'template.jinja'}",
        f"--config.data.cache_dir={place / 'tokens'}",
        "--config.data.seq_len=64",
        "--config.data.validation_fraction=0.2",
        "--config.model.lora.targets=('*.mixer.query',)",
        "--config.optim.warmup_steps=1",
        "--config.train.steps=2",
        "--config.train.batch_size=2",
        "--config.train.eval_batches=1",
    )
    assert tuned.returncode == 0, tuned.stderr
    refused = export(place, "tuned", "never")
    assert refused.returncode == 2
    assert "python -m gatedjax.merge_lora first" in refused.stderr
    merge = ["-m", "gatedjax.merge_lora", f"--checkpoint={place / 'tuned'}"]
    merged = python(place, *merge, f"--workdir={place / 'merged'}")
    assert merged.returncode == 0, merged.stderr
    family = ("--family=qwen3_next", "--dtype=float32")
    exported = export(place, "merged", "answers", *family)
    assert exported.returncode == 0, exported.stderr

    files = safetensors.MappedFiles()
    before = safetensors.tensors_of_folder(place / "model")
    after = safetensors.tensors_of_folder(place / "answers")
    assert after.keys() == before.keys()
    changed = set()
    for name, tensor in before.items():
        values = files.view(tensor).astype(np.float32)
        if not np.array_equal(files.view(after[name]), values):
            changed.add(name)
            np.testing.assert_allclose(files.view(after[name]), values, atol=0.05)
    # Queries, which lie in one matrix with what else a layer projects.
    assert changed == {
        "model.layers.0.linear_attn.in_proj_qkvz.weight",
        "model.layers.1.self_attn.q_proj.weight",
    }
    settings = json.loads((place / "answers" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == template


def require_same_tensors(one: Path, other: Path) -> None:
    files = safetensors.MappedFiles()
    tensors = safetensors.tensors_of_folder(one)
    others = safetensors.tensors_of_folder(other)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert others[name].dtype == tensor.dtype, name
        assert files.view(others[name]).tobytes() == files.view(tensor).tobytes(), name


def test_bad_input_is_one_line(place, tmp_path):
    def fails(expected: str, result: subprocess.CompletedProcess) -> None:
        assert result.returncode == 2, result.stderr
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and expected in lines[0], result.stderr
        assert "Traceback" not in result.stderr

    half = tmp_path / "half"
    shutil.copytree(place / "model", half)
    file = sorted(half.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    fails("it is cut off", import_(place, half, "bad"))
    huge = tmp_path / "huge"
    shutil.copytree(place / "model", huge)
    file = sorted(huge.glob("*.safetensors"))[0]
    file.write_bytes((10 * 2**30).to_bytes(8, "little") + bytes(100))
    fails("got a header of 10,737,418,240 bytes", import_(place, huge, "bad"))
    fails("expected a folder", import_(place, tmp_path / "nothing", "bad"))
    without = tmp_path / "without"
    shutil.copytree(place / "model", without)
    (without / "tokenizer.json").unlink()
    fails("--tokenizer=FILE names another one", import_(place, without, "bad"))
    assert not (place / "bad" / "checkpoints").exists()
