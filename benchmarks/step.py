"""Whole training steps compiled for one TPU that is not here: model time, model FLOPs utilization,
parts, temporaries.

    python benchmarks/step.py [--case=dense,gated_unrolled ...] [--target=v5p,v6e]
        [--peer_python=/path/to/python] [--json=benchmarks/results/step_tpu.json]

Four layers of width 2048, rows of 4,096 tokens, 32,000 words, tied, AdamW, bfloat16: the widths of
configs/gated_attention_1p7b.py, with other mixers and feed-forwards in their place. v5p and v7x
(one of its TensorCores) take four rows a step, v5e and v6e two, cases with 32k eight. Cases that
end in _long are compiled as for a run of days (`gatedjax/aot/larger_products.py`). Times are the
schedule's replay, not measurements; `gatedjax/aot` says how far to trust them. Rows are one
document each; collectives do not appear on one chip. Experts get loads about a fifth from even, and
the moves of their rows, on SparseCores, have no time.

The cases maxtext, maxtext_tuned and maxtext_unrolled are MaxText's step of the same function as
`dense`, maxtext_experts and maxtext_experts_unrolled that of `experts_no_gate`, compiled and
replayed by the same programs (_long: with the same options as ours); --peer_python is an
interpreter that has MaxText.

Each row compiles in a process of its own, for minutes; rows that the JSON file has from the same
versions are not made again, and each is written when it is there. `make bench-model` makes them
anew and compares.
"""

import argparse
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Collection, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is loaded to compile, not to run

from report import each_row, parser, print_rows, run_row, run_worker

from gatedjax.aot import parse_slice
from gatedjax.aot.larger_products import LARGER_PRODUCTS
from gatedjax.aot.step import compile_step
from gatedjax.aot.step_time import StepTime
from gatedjax.config import Config, config_dict, from_config_dict, layer
from gatedjax.training.flops import train_flops_per_token

HERE = Path(__file__).resolve().parent
MLP = dict(hidden=5504)
EXPERTS = dict(num_experts=16, experts_per_token=2, hidden=1408)
KEYS = ("case", "target")
HEADER = ("case", "target", "ms", "MFU", "forward", "backward", "repeated", "temporaries", "CPU s")
ROWS = {"v5e": 2, "v5p": 4, "v6e": 2, "v7x": 4}
WIDTH = 2048
# Steps of a run of minutes, and of one of a day at least.
STEPS = 400
STEPS_OF_LONG_RUNS = 10_000_000


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and how its step is compiled.

    mixer: its kind.
    options: of the mixer.
    ffn, ffn_options: the same of the feed-forward.
    remat, loss_chunk, scan_layers: as of `ModelConfig`.
    rows: of 4,096 tokens, a step; None for what the chip usually takes (`ROWS`).
    steps: of the run, by whose length the compiler is told how long to look for large blocks.
    """

    mixer: str
    options: Mapping[str, object]
    ffn: str = "gated_mlp"
    ffn_options: Mapping[str, object] = dataclasses.field(default_factory=lambda: MLP)
    remat: str = "projections"
    loss_chunk: int = 8192
    scan_layers: bool = True
    rows: int | None = None
    steps: int = STEPS


GATED = dict(num_heads=16, num_kv_heads=8, head_dim=128)
DENSE = GATED | dict(gate_position="none")
WIDE_HEADS = DENSE | dict(num_heads=8, num_kv_heads=4, head_dim=256)
LINEAR = dict(num_heads=8, num_kv_heads=8, key_dim=128, value_dim=256)
DELTA = dict(num_heads=12, key_dim=128, value_dim=256)
CASES = {
    "dense": Case("gated_attention", DENSE),
    "dense_unrolled": Case("gated_attention", DENSE, scan_layers=False),
    "dense_kernels": Case("gated_attention", DENSE, remat="kernels", loss_chunk=2048),
    "gated": Case("gated_attention", GATED),
    "gated_unrolled": Case("gated_attention", GATED, scan_layers=False),
    "wide_heads": Case("gated_attention", WIDE_HEADS),
    "experts": Case("gated_attention", GATED, "sparse_moe", EXPERTS),
    "experts_unrolled": Case("gated_attention", GATED, "sparse_moe", EXPERTS, scan_layers=False),
    "experts_no_gate": Case("gated_attention", DENSE, "sparse_moe", EXPERTS),
    "experts_no_gate_unrolled": Case(
        "gated_attention", DENSE, "sparse_moe", EXPERTS, scan_layers=False
    ),
    "wide_heads_unrolled": Case("gated_attention", WIDE_HEADS, scan_layers=False),
    "wide_heads_unrolled_32k": Case("gated_attention", WIDE_HEADS, scan_layers=False, rows=8),
    "gla_unrolled": Case("gated_linear_attention", LINEAR, scan_layers=False),
    "delta_unrolled": Case("delta_attention", DELTA, scan_layers=False),
}
CASES |= {
    f"{name}_long": dataclasses.replace(case, steps=STEPS_OF_LONG_RUNS)
    for name, case in CASES.items()
}

# MaxText's options for the function of `dense`: queries and keys normalized, SwiGLU, tied, AdamW.
MAXTEXT = dict(
    decoder_block="qwen3",
    base_emb_dim=WIDTH,
    base_num_decoder_layers=4,
    base_num_query_heads=DENSE["num_heads"],
    base_num_kv_heads=DENSE["num_kv_heads"],
    head_dim=DENSE["head_dim"],
    base_mlp_dim=MLP["hidden"],
    use_qk_norm=True,
    vocab_size=32_000,
    logits_via_embedding=True,
    normalize_embedding_logits=False,
    max_target_length=4096,
    enable_dropout=False,
    attention="flash",
    remat_policy="minimal",
)
# Blocks of its attention as wide as is fastest in this model, and one kernel for its backward pass.
BLOCKS = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")
TUNED = MAXTEXT | {f"sa_block_{name}": 1024 for name in BLOCKS}
TUNED |= dict(sa_use_fused_bwd_kernel=True, remat_policy="minimal_with_context")
# And for the function of `experts_no_gate`, but for the loss of the router's logits, which MaxText
# does not have: weights of a token's experts sum to 1, the kernels are megablox's.
SPARSE = TUNED | dict(
    decoder_block="qwen3_moe",
    num_experts=EXPERTS["num_experts"],
    num_experts_per_tok=EXPERTS["experts_per_token"],
    base_mlp_dim=EXPERTS["hidden"],
    base_moe_mlp_dim=EXPERTS["hidden"],
    norm_topk_prob=True,
    load_balance_loss_weight=0.01,
)
# By name: the case of ours with the same function, and MaxText's options.
PEERS = {
    "maxtext": ("dense", MAXTEXT),
    "maxtext_tuned": ("dense", TUNED),
    "maxtext_unrolled": ("dense", TUNED | dict(scan_layers=False)),
    "maxtext_experts": ("experts_no_gate", SPARSE),
    "maxtext_experts_unrolled": ("experts_no_gate", SPARSE | dict(scan_layers=False)),
}
PEERS |= {f"{name}_long": (f"{case}_long", options) for name, (case, options) in PEERS.items()}


def configuration(case: Case, target: str) -> Config:
    """Of a run of this case on one chip."""
    c = config_dict()
    c.model.vocab_size = 32_000
    c.model.width = WIDTH
    c.model.num_layers = 4
    c.model.mixers = {"mixer": layer(case.mixer, **case.options)}
    c.model.pattern = ("mixer",)
    c.model.ffns = {"ffn": layer(case.ffn, **case.ffn_options)}
    c.model.ffn_pattern = ("ffn",)
    c.model.remat = case.remat
    c.model.loss_chunk = case.loss_chunk
    c.model.scan_layers = case.scan_layers
    c.data.seq_len = 4096
    c.train.batch_size = case.rows or ROWS[target]
    c.train.steps = case.steps
    return from_config_dict(c)


def figures(name: str, target: str) -> dict:
    """One row, in this process."""
    started = time.process_time()
    step = compile_step(configuration(CASES[name], target), parse_slice(f"{target}:1"), True)
    if isinstance(step.report, str) or step.time is None:
        raise RuntimeError(f"no model time: {step.report}")
    return of_time(step.time) | {
        "temporary_bytes": step.report.temp_bytes,
        "program_bytes": step.report.code_bytes,
        "compile_seconds": step.compile_seconds,
        "cpu_seconds": time.process_time() - started,
    }


def peer_figures(python: str, name: str, target: str) -> dict:
    """One row of MaxText, by a process of the other interpreter."""
    case, options = PEERS[name]
    config = configuration(CASES[case], target)
    # As ours, which is not told so on a v5e.
    is_told = CASES[case].steps == STEPS_OF_LONG_RUNS and target != "v5e"
    tokens = config.train.batch_size * config.data.seq_len
    spec = {
        "slice": f"{target}:1",
        "flops": tokens * train_flops_per_token(config.model, config.data.seq_len),
        "options": options | dict(per_device_batch_size=config.train.batch_size),
        "compiler_options": LARGER_PRODUCTS if is_told else {},
    }
    return run_worker([python, str(HERE / "peers" / "maxtext_step.py"), json.dumps(spec)])


def of_time(found: StepTime) -> dict:
    """The figures of a replayed step."""
    passes = ("forward", "backward", "repeated")
    parts = found.parts.values()
    return {
        "milliseconds": 1e3 * found.seconds,
        "utilization": found.utilization,
        **{
            f"{name}_milliseconds": 1e3 * sum(getattr(part, name) for part in parts)
            for name in passes
        },
        "parts": {name: 1e3 * part.seconds for name, part in found.parts.items()},
        "missing": len(found.program.missing),
        "unknown_branches": found.program.unknown_branches,
    }


def line(row: tuple[str, str], found: Mapping) -> list[str]:
    """Of the table."""
    if "error" in found:
        return [*row, "", "", found["error"][:60], "", "", "", ""]
    times = [found.get(f"{name}_milliseconds") for name in ("forward", "backward", "repeated")]
    passes = ["" if time is None else f"{time:.1f}" for time in times]
    return [
        *row,
        f"{found['milliseconds']:.2f}",
        f"{found['utilization']:.1%}",
        *passes,
        f"{found['temporary_bytes'] / 2**30:.1f} GiB",
        f"{found['compile_seconds']:.0f}",
    ]


def main() -> None:
    args = flags()
    if args.row:
        print(json.dumps(figures(*args.row)))
        return
    versions = {"libtpu": metadata.version("libtpu")}
    every_row = itertools.product(args.case.split(","), args.target.split(","))
    make = partial(figures_of, args.peer_python)
    rows = each_row(args.json, KEYS, versions, every_row, make)
    print_rows(HEADER, rows, line)


def figures_of(peer_python: str | None, name: str, target: str) -> dict:
    """Of the table, by a process of its own."""
    if name in PEERS:
        return peer_figures(peer_python, name, target)
    return run_row(__file__, name, target)


def flags() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--case", default=",".join(CASES), help="comma-separated")
    made.add_argument("--target", default="v5p", help="of v5e, v5p, v6e and v7x, comma-separated")
    made.add_argument("--peer_python", help="an interpreter with MaxText")
    made.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    args = made.parse_args()
    require_known(made, "--case", args.case, [*CASES, *PEERS])
    if args.peer_python is None and any(name in PEERS for name in args.case.split(",")):
        made.error("--peer_python: got none, expected an interpreter with MaxText")
    require_known(made, "--target", args.target, ROWS)
    return args


def require_known(made: argparse.ArgumentParser, flag: str, text: str, known: Collection) -> None:
    """Ends the command with one line if a name of the list is not known."""
    for name in text.split(","):
        if name not in known:
            made.error(f"{flag}: got {name!r}, expected some of {', '.join(known)}")


if __name__ == "__main__":
    main()
