"""Decoding speed beside transformers on this CPU: the same Llama, float32, greedy, same threads.

    python benchmarks/decode_cpu.py [--peer_python=/path/to/python] [--rows=8] [--json=FILE]

Two sizes: "tiny" has the width and depth of configs/tiny.py, "100m" is a dense model of 127M
parameters (vocabulary 32,000, not tied). Each side lives in a process of its own; rounds take
turns. The figure is the median of the rounds; what the first token takes is left out.

--one_core binds both to one core and counts the CPU seconds of each process: that can be read off a
machine that is busy with other work. Without it, run on a quiet machine.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from absl import flags
from report import cores, cpu_model, table, write_json
from train_cpu import check_peer_python

from gatedjax.errors import InputError
from gatedjax.runtime import cli

HERE = Path(__file__).resolve().parent
# train_cpu.py has the flags --peer_python, --rounds and --json, which are taken here too.
_SIZE = flags.DEFINE_enum("size", None, ["tiny", "100m"], "One of the sizes; default: both.")
_ROWS = flags.DEFINE_integer("rows", 1, "Rows that are decoded together.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 64, "Tokens of a round, each row.", lower_bound=1)
_ONE_CORE = flags.DEFINE_bool("one_core", False, "One core, CPU seconds.")

SIZES = {
    "tiny": {
        "width": 128,
        "layers": 4,
        "heads": 4,
        "kv_heads": 2,
        "hidden": 384,
        "vocab_size": 257,
    },
    "100m": {
        "width": 768,
        "layers": 12,
        "heads": 12,
        "kv_heads": 6,
        "hidden": 2048,
        "vocab_size": 32_000,
    },
}
HEADER = ("size", "side", "tokens/s", "of rounds", "ours / it")


def main(_) -> None:
    """Workers of each size -> rounds by turns -> table."""
    peer_python = flags.FLAGS.peer_python
    check_peer_python(peer_python)
    if _ONE_CORE.value and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = []
    figures = {}
    versions = {}
    for name in [_SIZE.value] if _SIZE.value else SIZES:
        rates, found = measured(SIZES[name], peer_python)
        versions |= found
        figures[name] = rates
        ours = statistics.median(rates["gatedjax"])
        for side, of_rounds in rates.items():
            middle = statistics.median(of_rounds)
            spread = f"{min(of_rounds):,.1f} to {max(of_rounds):,.1f}"
            rows.append((name, side, f"{middle:,.1f}", spread, f"{ours / middle:.2f}"))
    print(
        f"{cpu_model()}, {cores()} cores, {_ROWS.value} rows of {_TOKENS.value} tokens; {versions}"
    )
    print(table(HEADER, rows))
    if flags.FLAGS.json:
        write_json(flags.FLAGS.json, {"rows": _ROWS.value, "tokens_per_second": figures}, versions)


def measured(
    size: dict[str, int],
    peer_python: str,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Tokens per second of every round by side, and the versions of both."""
    setting = {
        **size,
        "rows": _ROWS.value,
        "prompt": 16,
        "tokens": _TOKENS.value,
        "threads": cores(),
        "cpu_seconds": _ONE_CORE.value,
    }
    text = json.dumps(setting)
    workers = {
        "gatedjax": start([sys.executable, str(HERE / "gatedjax_decode.py"), text]),
        "transformers": start([peer_python, str(HERE / "peers" / "transformers_decode.py"), text]),
    }
    versions = {}
    for worker in workers.values():
        versions |= answer(worker)
    rates = {side: [] for side in workers}
    # The first round of each is not counted.
    for round_number in range(1 + flags.FLAGS.rounds):
        for side, worker in workers.items():
            print(_TOKENS.value, file=worker.stdin, flush=True)
            seconds = answer(worker)
            if round_number:
                rates[side].append(_ROWS.value * _TOKENS.value / seconds)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return rates, versions


def start(command: list[str]) -> subprocess.Popen:
    """A worker, which answers every line."""
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def answer(worker: subprocess.Popen):
    """The next line of a worker.

    Raises:
      InputError: it has ended.
    """
    line = worker.stdout.readline()
    if not line:
        raise InputError(f"{worker.args[1]} ended with code {worker.wait()}")
    return json.loads(line)


if __name__ == "__main__":
    cli.run(main)
