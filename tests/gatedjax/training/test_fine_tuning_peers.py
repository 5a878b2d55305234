"""One step of fine-tuning beside transformers: the same conversations by its own chat template and
its own mask, one by one, against a packed batch of an imported model.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizer_file import train_json_tokenizer

from gatedjax import data
from gatedjax.config import from_config_dict
from gatedjax.sharding import global_batch
from gatedjax.training import given_weights
from gatedjax.training.run import fresh_state, prepare, with_vocab
from gatedjax.training.step import jit_train_step

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gatedjax.interop")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
LENGTH = 160
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\\n' }}"
    "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)
SIZES = dict(
    vocab_size=320,
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
)
GATED_DELTA = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
)


def conversations() -> list[list[dict]]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(14):
        turns = []
        for _ in range(rng.integers(1, 4)):
            turns.append({"role": "user", "content": f"wörds {i} " * rng.integers(1, 5)})
            turns.append({"role": "assistant", "content": f"and ünïts {i}! " * rng.integers(1, 4)})
        made.append(turns)
    return made


def model_of(family: str):
    torch.manual_seed(0)
    configs = {
        "qwen3": lambda: transformers.Qwen3Config(**SIZES, tie_word_embeddings=True),
        "qwen3_5": lambda: transformers.Qwen3_5TextConfig(**SIZES, **GATED_DELTA),
    }
    model = transformers.AutoModelForCausalLM.from_config(configs[family]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def imported(folder: Path, workdir: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "gatedjax.interop.import_hf",
            f"--from={folder}",
            f"--workdir={workdir}",
            "--dtype=float32",
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def fine_tuning(run_dir: Path, chats: Path):
    """The resolved configuration of configs/sft.py."""
    spec = importlib.util.spec_from_file_location("sft", ROOT / "configs" / "sft.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config(f"full={run_dir}")
    c.data.sources.main.path = str(chats)
    c.data.seq_len = LENGTH
    c.data.validation_fraction = 0.1
    c.data.cache_dir = str(chats.parent / "cache")
    c.train.batch_size = 1
    return c


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_a_step_equals_transformers(tmp_path, monkeypatch, family):
    # transformers takes other packages' kernels where they are installed, also without a GPU.
    for package in ("fla", "mamba_ssm", "causal_conv1d"):
        monkeypatch.setitem(sys.modules, package, None)
    folder = tmp_path / "hub"
    model = model_of(family)
    model.save_pretrained(folder)
    train_json_tokenizer(folder / "tokenizer.json", SPECIAL)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    imported(folder, tmp_path / "run")

    chats = tmp_path / "chats.jsonl"
    made = conversations()
    chats.write_text("\n".join(json.dumps({"messages": messages}) for messages in made))
    c = fine_tuning(tmp_path / "run", chats)
    tokenizer = data.load_tokenizer(c.data.tokenizer)
    # All rows of a pass in one batch.
    tokens, ends = data.corpora(from_config_dict(c).data)["main"].stream("train")
    rows = len(data.chat.Conversations(tokens, ends, LENGTH))
    c.train.batch_size = rows
    config = with_vocab(from_config_dict(c), tokenizer)
    dataset = data.make_dataset(config.data, "train", batch_size=rows, rows=range(rows), seed=0)
    batch = next(data.batches(dataset))
    run = prepare(config, jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        weights = given_weights.find(run, tokenizer, print)
        state = fresh_state(run, given_weights.read(run, weights))
        step = jit_train_step(config, run.tx, run.shardings)
        _, metrics = step(state, global_batch(run.mesh, batch, rows))

    trained_on = set()
    for row in range(rows):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            here = batch.segment_ids[row] == segment
            trained_on.add(tuple(batch.tokens[row][here]))
    assert rows < len(trained_on) == len(ends)

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for messages in made:
        encoded = theirs.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = encoded["input_ids"]
        if tuple(ids[:-1]) not in trained_on:
            continue
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
        mask = torch.tensor(encoded["assistant_masks"][1:], dtype=torch.bool)
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        total = total + losses[mask].sum()
        count += int(mask.sum())
    loss = total / count
    loss.backward()
    squares = sum(float((p.grad.double() ** 2).sum()) for p in model.parameters())
    assert metrics["tokens"] == count
    assert float(metrics["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    assert float(metrics["grad_norm"]) == pytest.approx(squares**0.5, rel=1e-4)
