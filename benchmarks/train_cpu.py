"""Training speed of a small model beside models of transformers and torch of the same size, on this
CPU.

    python benchmarks/train_cpu.py [--model=gated_deltanet] [--one_core] \
      [--peer_python=/path/to/python] [--json=FILE]

Everybody has float32, AdamW with gradient clipping, the same batch, as many threads as there are
cores. --model=tiny is configs/tiny.py, with two peers:

  qwen3_next   the nearest relative: gated attention and Gated DeltaNet by turns, sparse experts;
               our sizes one by one
  llama        the strongest simple one: dense, no scan, no experts; as many parameters as take part
               in one token of ours

--model=gated_deltanet is two layers of Gated DeltaNet with dense feed-forwards, and has one:

  qwen3_next   the same layers, all sizes the same; its delta rule is transformers' torch function,
               which is what it has on a CPU

A step is forward, backward and optimizer. Each model lives in a process of its own; rounds take
turns: ours, peer, ours, peer ... The figure is the median of the rounds, and the ratio is ours /
theirs. Run it on a quiet machine; or with --one_core, which counts CPU seconds: one core for each
in turns, where other work costs nothing but its marks on caches and clock.
"""

import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from absl import flags
from report import cores, cpu_model, table, write_json

from gatedjax.config import Config, config_dict, from_config_dict, layer, to_dict
from gatedjax.data import load_tokenizer
from gatedjax.errors import InputError
from gatedjax.runtime import cli
from gatedjax.training.run import with_vocab

HERE = Path(__file__).resolve().parent
_PEER_PYTHON = flags.DEFINE_string(
    "peer_python",
    sys.executable,
    "An interpreter that has torch and transformers.",
)
_MODEL = flags.DEFINE_enum("model", "tiny", ["tiny", "gated_deltanet"], "What is trained.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Rounds of every model.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 20, "Steps of a round.", lower_bound=1)
_EXPERTS = flags.DEFINE_enum(
    "peer_experts",
    "grouped_mm",
    ["eager", "batched_mm", "grouped_mm"],
    "How qwen3_next computes its experts.",
)
_COMPILE = flags.DEFINE_bool("peer_compile", False, "Also measure the peers under torch.compile.")
_ONE_CORE = flags.DEFINE_bool("one_core", False, "One core, CPU seconds.")
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

HEADER = ("model", "parameters", "active", "tokens/s", "of rounds", "peak RSS MiB", "ours / it")


class Model(NamedTuple):
    """One contestant: the command of its worker."""

    name: str
    command: list[str]


def main(_) -> None:
    """Workers -> rounds by turns -> table and ratios."""
    check_peer_python(_PEER_PYTHON.value)
    if _ONE_CORE.value and hasattr(os, "sched_setaffinity"):
        # The workers inherit it.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    config = tiny_config() if _MODEL.value == "tiny" else deltanet_config()
    command = [sys.executable, str(HERE / "gatedjax_train.py"), json.dumps(to_dict(config))]
    ours = Worker(Model("gatedjax", command))
    workers = [ours]
    for peer in peers(config, ours.about["active"]):
        workers.append(Worker(peer))
    for _ in range(_ROUNDS.value):
        for worker in workers:
            worker.round(_STEPS.value)
    for worker in workers:
        worker.close()
    tokens = config.train.batch_size * config.data.seq_len * _STEPS.value
    results = {worker.name: worker.result(tokens) for worker in workers}
    rounds = f"{_ROUNDS.value} rounds of {_STEPS.value} steps"
    if _ONE_CORE.value:
        rounds += ", CPU seconds"
    print(f"{cpu_model()}, {cores()} cores; {rounds}; {versions(workers)}")
    print(show(results))
    if _JSON.value:
        figures = {
            "rounds": _ROUNDS.value,
            "steps": _STEPS.value,
            "cpu_seconds": _ONE_CORE.value,
            "models": results,
        }
        write_json(_JSON.value, figures, versions(workers))


def tiny_config() -> Config:
    """configs/tiny.py, with its vocabulary."""
    file = runpy.run_path(str(HERE.parent / "configs" / "tiny.py"))
    config = from_config_dict(file["get_config"]())
    return with_vocab(config, load_tokenizer(config.data.tokenizer))


def deltanet_config() -> Config:
    """Two layers of Gated DeltaNet with dense feed-forwards, at the other sizes of configs/tiny.py.

    As in Qwen3-Next a key head serves two value heads.
    """
    tiny = tiny_config()
    c = config_dict()
    c.model.vocab_size = tiny.model.vocab_size
    c.model.width = 256
    c.model.num_layers = 2
    c.model.mixers = {
        "delta": layer(
            "delta_attention",
            num_heads=4,
            num_key_heads=2,
            key_dim=64,
            value_dim=64,
        ),
    }
    c.model.pattern = ("delta",)
    c.model.ffns.mlp.hidden = 768
    c.model.init_std = tiny.model.init_std
    c.model.dtype = tiny.model.dtype
    c.model.scan_layers = False
    c.data.seq_len = tiny.data.seq_len
    c.train.batch_size = tiny.train.batch_size
    return from_config_dict(c)


class Worker:
    """A model in a process of its own, which idles until it is asked for a round."""

    def __init__(self, model: Model):
        self.name = model.name
        self.rounds: list[dict] = []
        # Lives as long as the process that writes it.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            model.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.about = self._answer()

    def round(self, steps: int) -> None:
        time.sleep(0.3)  # until the threads of the one before have gone to sleep
        print(steps, file=self._process.stdin, flush=True)
        self.rounds.append(self._answer())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def result(self, tokens: int) -> dict:
        """Tokens per second of every round, their median, memory and sizes."""
        clock = "cpu_seconds" if _ONE_CORE.value else "seconds"
        rates = [tokens / r[clock] for r in self.rounds]
        return {
            "parameters": self.about["total"],
            "active_parameters": self.about["active"],
            "tokens_per_second": statistics.median(rates),
            "tokens_per_second_of_rounds": rates,
            "peak_rss_bytes": self.rounds[-1]["peak_rss_bytes"],
            "final_loss": self.rounds[-1]["loss"],
        }

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read()
            raise InputError(f"{self.name} ended with code {code}: {said[-2000:]}")
        return json.loads(line)


def check_peer_python(python: str) -> None:
    """InputError in one line unless this interpreter imports torch and transformers."""
    command = [python, "-c", "import torch, transformers"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        failure = error.strerror
    else:
        failure = done.stderr.strip().splitlines()[-1] if done.returncode else None
    if failure:
        raise InputError(
            f"peer_python: {python} cannot import torch and transformers ({failure}), expected an "
            "interpreter with both (pip install torch transformers)"
        )


def peers(config: Config, active: int) -> list[Model]:
    """Qwen3-Next with our sizes one by one; beside `tiny` also a Llama with as many parameters as
    take part in one token of ours.
    """
    if _MODEL.value == "gated_deltanet":
        sizes = deltanet_sizes(config)
        return [
            _peer(
                config,
                name="qwen3_next compiled" if compiled else "qwen3_next",
                architecture="Qwen3NextForCausalLM",
                sizes=sizes,
                experts=None,
                compiled=compiled,
            )
            for compiled in _compiled()
        ]
    hybrid = shared_sizes(config) | hybrid_sizes(config)
    dense = shared_sizes(config) | {"intermediate_size": dense_hidden(config, active)}
    found = []
    for compiled in _compiled():
        suffix = " compiled" if compiled else ""
        found += [
            _peer(
                config,
                name=f"qwen3_next{suffix}",
                architecture="Qwen3NextForCausalLM",
                sizes=hybrid,
                experts=_EXPERTS.value,
                compiled=compiled,
            ),
            _peer(
                config,
                name=f"llama{suffix}",
                architecture="LlamaForCausalLM",
                sizes=dense,
                experts=None,
                compiled=compiled,
            ),
        ]
    return found


def _compiled() -> tuple[bool, ...]:
    """Whether a peer is compiled, for each of its runs."""
    return (False, True) if _COMPILE.value else (False,)


def model_sizes(config: Config) -> dict:
    """In transformers' names, of the model around the layers."""
    model = config.model
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.num_layers,
        "max_position_embeddings": config.data.seq_len,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }


def shared_sizes(config: Config) -> dict:
    """In transformers' names, of both peers of `tiny`."""
    attention = config.model.mixers["attention"]
    return model_sizes(config) | {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
    }


def deltanet_sizes(config: Config) -> dict:
    """In transformers' names, of a Qwen3-Next without attention and without experts."""
    model = config.model
    delta = model.mixers["delta"]
    return model_sizes(config) | {
        "layer_types": ["linear_attention"] * model.num_layers,
        "linear_num_key_heads": delta.key_heads,
        "linear_num_value_heads": delta.num_heads,
        "linear_key_head_dim": delta.key_dim,
        "linear_value_head_dim": delta.value_dim,
        "linear_conv_kernel_dim": delta.conv_width,
        "mlp_only_layers": list(range(model.num_layers)),
        "intermediate_size": model.ffns["mlp"].hidden,
    }


def hybrid_sizes(config: Config) -> dict:
    """In transformers' names, of Qwen3-Next's own parts."""
    model = config.model
    attention = model.mixers["attention"]
    gla = model.mixers["gla"]
    mlp = model.ffns["mlp"]
    moe = model.ffns["moe"]
    layer_types = []
    mlp_only_layers = []
    for i in range(model.num_layers):
        mixer, ffn = model.layer(i)
        layer_types.append("full_attention" if mixer == attention else "linear_attention")
        if ffn == mlp:
            mlp_only_layers.append(i)
    return {
        "layer_types": layer_types,
        "partial_rotary_factor": attention.rope_fraction,
        "linear_num_key_heads": gla.kv_heads,
        "linear_num_value_heads": gla.num_heads,
        "linear_key_head_dim": gla.key_dim,
        "linear_value_head_dim": gla.value_dim,
        "linear_conv_kernel_dim": gla.conv_width,
        "mlp_only_layers": mlp_only_layers,
        "intermediate_size": mlp.hidden,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.hidden,
        "shared_expert_intermediate_size": moe.shared_hidden,
        "output_router_logits": True,  # the balance loss, which ours computes too
        "router_aux_loss_coef": moe.balance_loss,
    }


def dense_hidden(config: Config, active: int) -> int:
    """The feed-forward width, a multiple of 8, with which a dense model has `active` parameters."""
    model = config.model
    attention = model.mixers["attention"]
    q = attention.num_heads * attention.head_dim
    kv = attention.kv_heads * attention.head_dim
    mixer_and_norms = 2 * model.width * (q + kv) + 2 * model.width
    embedding_and_norm = model.vocab_size * model.width + model.width
    for_mlps = active - embedding_and_norm - model.num_layers * mixer_and_norms
    hidden = for_mlps / (model.num_layers * 3 * model.width)
    return round(hidden / 8) * 8


def _peer(
    config: Config,
    name: str,
    architecture: str,
    sizes: dict,
    experts: str | None,
    compiled: bool,
) -> Model:
    """The command of a worker in transformers; `experts`: how it computes them."""
    optim = config.optim
    spec = {
        "architecture": architecture,
        "config": sizes,
        "experts": experts,
        "compile": compiled,
        "batch_size": config.train.batch_size,
        "seq_len": config.data.seq_len,
        "threads": cores(),
        "optim": {
            "lr": optim.lr,
            "betas": [optim.beta1, optim.beta2],
            "eps": optim.eps,
            "weight_decay": optim.weight_decay,
        },
        "clip_norm": optim.clip_norm,
    }
    script = str(HERE / "peers" / "transformers_train.py")
    return Model(name, [_PEER_PYTHON.value, script, json.dumps(spec)])


def show(results: dict[str, dict]) -> str:
    """The table: sizes, speed with its range over the rounds, memory, and our speed over each
    peer's.
    """
    ours = results["gatedjax"]["tokens_per_second"]
    rows = []
    for name, r in results.items():
        rates = r["tokens_per_second_of_rounds"]
        rows.append(
            [
                name,
                f"{r['parameters']:,}",
                f"{r['active_parameters']:,}",
                f"{r['tokens_per_second']:,.0f}",
                f"{min(rates):,.0f} .. {max(rates):,.0f}",
                f"{r['peak_rss_bytes'] / 2**20:,.0f}",
                f"{ours / r['tokens_per_second']:.2f}",
            ]
        )
    return table(HEADER, rows)


def versions(workers: list[Worker]) -> dict[str, str]:
    """Of the libraries of all workers."""
    found = {}
    for worker in workers:
        found |= worker.about["versions"]
    return found


if __name__ == "__main__":
    cli.run(main)
