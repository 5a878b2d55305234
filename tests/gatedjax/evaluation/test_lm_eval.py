"""Tasks of lm-evaluation-harness: our adapter against the harness' own `hf` backend, with the same
tiny Llama in both, in float32, on tasks from local files.

Needs the extras lm-eval and oracles: `make test-oracles`.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from tokenizer_file import TEXTS, train_json_tokenizer

from gatedjax.config import to_dict
from gatedjax.data import load_tokenizer
from gatedjax.training import identity
from gatedjax.training.checkpoint import Checkpointer
from gatedjax.training.run import fresh_state, prepare

ROOT = Path(__file__).parents[3]
WIDTH, LAYERS, HEADS, KEY_HEADS, HIDDEN = 32, 2, 4, 2, 48
# The tokenizer has as many: a padding entry would be sampled there, and is not here.
VOCAB = 300
LONGEST = 48

TASKS = {
    "choice": """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["wörds", " and", "ünïts and", "\\n"]
doc_to_target: 1
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "generation": """
task: generation
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs: {until: ["an", "0"], max_gen_toks: 16, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def torch_llama():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        intermediate_size=HIDDEN,
        max_position_embeddings=LONGEST,
        rms_norm_eps=1e-6,
        initializer_range=0.3,
        rope_theta=10_000.0,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).float().eval()


def our_config(tokenizer):
    """The same model in our words."""
    return tiny_run.plain(
        model__vocab_size=VOCAB,
        model__width=WIDTH,
        model__num_layers=LAYERS,
        model__norm_eps=1e-6,
        model__tie_embeddings=False,
        model__dtype="float32",
        model__mixers__attention__num_heads=HEADS,
        model__mixers__attention__num_kv_heads=KEY_HEADS,
        model__mixers__attention__head_dim=WIDTH // HEADS,
        model__mixers__attention__gate_position="none",
        model__mixers__attention__qk_norm=False,
        model__mixers__attention__rope_base=10_000.0,
        model__ffns__mlp__hidden=HIDDEN,
        data__tokenizer=tokenizer,
    )


def our_params(state, template):
    """Llama's tensors [out, in] where ours are [in, out], by heads and stacked over layers."""

    def stacked(name, shape):
        of_layers = [state[f"model.layers.{i}.{name}.weight"] for i in range(LAYERS)]
        return np.stack([np.asarray(x).T.reshape(shape) for x in of_layers])

    head = WIDTH // HEADS
    ours = {
        "embedding": state["model.embed_tokens.weight"],
        "head": state["lm_head.weight"],
        "final_norm/scale": state["model.norm.weight"],
        "mixer_norm/scale": stacked("input_layernorm", (WIDTH,)),
        "ffn_norm/scale": stacked("post_attention_layernorm", (WIDTH,)),
        "query/kernel": stacked("self_attn.q_proj", (WIDTH, HEADS, head)),
        "key/kernel": stacked("self_attn.k_proj", (WIDTH, KEY_HEADS, head)),
        "value/kernel": stacked("self_attn.v_proj", (WIDTH, KEY_HEADS, head)),
        "out/kernel": stacked("self_attn.o_proj", (HEADS, head, WIDTH)),
        "gate/kernel": stacked("mlp.gate_proj", (WIDTH, HIDDEN)),
        "up/kernel": stacked("mlp.up_proj", (WIDTH, HIDDEN)),
        "down/kernel": stacked("mlp.down_proj", (HIDDEN, WIDTH)),
    }
    used = set()

    def of_path(path, leaf):
        names = "/".join(str(key.key) for key in path)
        (name,) = [name for name in ours if names == name or names.endswith("/" + name)]
        used.add(name)
        value = np.asarray(ours[name], np.float32)
        assert value.shape == leaf.shape, names
        return jax.device_put(value, leaf.sharding)

    params = jax.tree_util.tree_map_with_path(of_path, template)
    assert used == set(ours)
    return params


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the tasks, and a run directory as the importer leaves it."""
    pytest.importorskip("lm_eval")
    place = tmp_path_factory.mktemp("lm_eval")
    path = train_json_tokenizer(place / "tokenizer.json", ("<|endoftext|>", "<s>"))
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == VOCAB
    llama = torch_llama()
    run = prepare(our_config(path), jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        state = fresh_state(run)
    tensors = {name: x.detach().numpy() for name, x in llama.state_dict().items()}
    state = dataclasses.replace(state, params=our_params(tensors, state.params))
    same = {"tokenizer": tokenizer.fingerprint, "sources": {}}
    with Checkpointer(place / "run", to_dict(run.config), data=same) as checkpointer:
        checkpointer.save(0, state, data_index=0, wait=True)
    identity.keep_tokenizer(place / "run", tokenizer)
    (place / "run" / "hf").mkdir()
    config = json.dumps({"max_position_embeddings": LONGEST})
    (place / "run" / "hf" / "config.json").write_text(config)
    rows = []
    for i, text in enumerate(TEXTS[:12]):
        question = text[: 3 + 2 * i] + " " * (i % 2) if i else ""
        rows.append({"question": question or text[:1], "text": text * (1 + i % 3)})
    data = place / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, text in TASKS.items():
        (place / f"{name}.yaml").write_text(text.replace("FILE", str(data)))
    llama.save_pretrained(place / "llama")
    return place


def asked(model, place):
    """(metrics, what the model said to every request) by task."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(place), include_defaults=False)
    found = simple_evaluate(
        model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    said = {}
    for name, samples in found["samples"].items():
        ordered = sorted(samples, key=lambda sample: sample["doc_id"])
        said[name] = [sample["resps"] for sample in ordered]
    return found["results"], said


@pytest.mark.slow
def test_the_numbers_equal_those_of_hf(place, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(place / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import transformers
    from lm_eval.models.huggingface import HFLM

    from gatedjax.evaluation.lm_eval_adapter import GatedjaxLM

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(place / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    theirs = HFLM(
        pretrained=transformers.LlamaForCausalLM.from_pretrained(place / "llama").float(),
        tokenizer=tokenizer,
        backend="causal",
        batch_size=4,
        max_length=LONGEST,
    )
    ours = GatedjaxLM(str(place / "run"), batch_size=4)
    assert ours.max_length == LONGEST and ours.tok_encode("wörds") == tokenizer.encode("wörds")
    expected, they_said = asked(theirs, place)
    found, we_said = asked(ours, place)
    assert we_said["generation"] == they_said["generation"]
    assert len({str(said) for said in we_said["generation"]}) > 3, "not all the same"
    for task in ("choice", "rolling"):
        flat = [np.asarray(np.ravel(said), float) for said in (we_said[task], they_said[task])]
        np.testing.assert_allclose(*flat, rtol=2e-5, atol=2e-4)
    for task, metrics in expected.items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert found[task][name] == pytest.approx(value, rel=1e-5), (task, name)
    # A run of our own has the end of a document before every context.
    (place / "run" / "hf").rename(place / "run" / "other")
    own = GatedjaxLM(str(place / "run"), batch_size="auto", max_length=LONGEST)
    (place / "run" / "other").rename(place / "run" / "hf")
    assert own.tok_encode("wörds") == [0, *ours.tok_encode("wörds")]


@pytest.mark.slow
def test_the_command(place, tmp_path):
    """By the harness' own flags; bad ones are a line."""
    command = [sys.executable, "-m", "gatedjax.lm_eval", "--model", "gatedjax"]
    command += ["--include_path", str(place), "--tasks", "choice", "--model_args"]
    environment = {"HF_HOME": str(place / "cache"), "HF_DATASETS_OFFLINE": "1"}

    def run(arguments):
        import os

        return subprocess.run(
            [*command, arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | environment | {"JAX_PLATFORMS": "cpu"},
        )

    result = run(f"checkpoint={place / 'run'}")
    assert result.returncode == 0 and "|choice|" in result.stdout, result.stderr
    result = run(f"checkpoint={tmp_path}")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "holds no checkpoint" in last
    result = run(f"checkpoint={place / 'run'},max_length=-3")
    assert result.returncode == 2 and "max_length: got" in result.stderr
