"""What a chip of a TPU slice sends in a training step, ours and MaxText's, compiled for slices that
are not here: collectives, bytes a parameter, temporaries.

    python benchmarks/step_slices.py [--case=ours,maxtext ...] [--mesh=v5p:2x2x4/fsdp=16 ...]
        [--peer_python=/path/to/python] [--json=benchmarks/results/step_slices.json]

Four layers of configs/gated_attention_1p7b.py without its gate, which is what MaxText can compute,
with the whole vocabulary of 151,936, tied, and four rows of 4,096 tokens a chip. The text that the
same libtpu compiled is read by the same program for both. Parameters gathered twice and gradients
scattered once, in bfloat16, are 6 bytes a parameter. No time is modeled.

ours          as train.py compiles it: collectives beside computing are asked for
ours_waiting  with mesh.async_collectives=False
maxtext       without options of the compiler, as it comes
maxtext_async with the options that `ours` has

--peer_python is an interpreter that has MaxText; docs/performance.md says how to make it. Each row
compiles in a process of its own, for minutes, and is written when it is there.
"""

import argparse
import itertools
import json
import os
from collections.abc import Mapping
from functools import partial
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is loaded to compile, not to run

import jax
from report import each_row, parser, print_rows, run_row, run_worker
from step import HERE, TUNED, require_known

from gatedjax.aot import Report, hlo, parse_slice
from gatedjax.aot.step import compile_step
from gatedjax.compiler_options import ASYNCHRONOUS_COLLECTIVES
from gatedjax.config import Config, config_dict, from_config_dict, layer

KEYS = ("case", "mesh")
HEADER = ("case", "mesh", "sent", "bytes/parameter", "waits for", "temporaries", "CPU s")
MESHES = ("v5p:2x2x4/fsdp=16", "v5p:4x4x4/fsdp=16,data=4", "v5p:4x4x4/fsdp=64")
ROWS_A_CHIP = 4
LENGTH = 4096
VOCABULARY = 151_936
IS_ASYNCHRONOUS = {"ours": True, "ours_waiting": False}
OPTIONS = {"maxtext": {}, "maxtext_async": ASYNCHRONOUS_COLLECTIVES}


def configuration(mesh: str, is_asynchronous: bool) -> Config:
    """Of a run on all chips of a slice."""
    topology, axes = parsed(mesh)
    c = config_dict()
    c.model.vocab_size = VOCABULARY
    c.model.width = 2048
    c.model.num_layers = 4
    attention = dict(num_heads=16, num_kv_heads=8, head_dim=128, gate_position="none")
    c.model.mixers = {"attention": layer("gated_attention", **attention)}
    c.model.pattern = ("attention",)
    c.model.ffns = {"mlp": layer("gated_mlp", hidden=5504)}
    c.model.ffn_pattern = ("mlp",)
    c.model.remat = "kernels"
    c.model.loss_chunk = 2048
    c.data.seq_len = LENGTH
    c.mesh.fsdp = axes["fsdp"]
    c.mesh.async_collectives = is_asynchronous
    c.train.batch_size = ROWS_A_CHIP * num_chips(topology)
    return from_config_dict(c)


def parsed(mesh: str) -> tuple[str, dict[str, int]]:
    """ "v5p:4x4x4/fsdp=16,data=4" -> "v5p:4x4x4" and the axes' sizes."""
    topology, _, text = mesh.partition("/")
    pairs = (pair.split("=") for pair in text.split(","))
    return topology, {name: int(size) for name, size in pairs}


def num_chips(topology: str) -> int:
    """Of "v5p:4x4x4": 64."""
    count = 1
    for side in topology.partition(":")[2].split("x"):
        count *= int(side)
    return count


def figures(name: str, mesh: str) -> dict:
    """One row of ours, in this process."""
    config = configuration(mesh, IS_ASYNCHRONOUS[name])
    step = compile_step(config, parse_slice(parsed(mesh)[0]))
    if isinstance(step.report, str):
        raise RuntimeError(step.report.splitlines()[0])
    parameters = sum(leaf.size for leaf in jax.tree.leaves(step.run.abstract.params))
    return of_report(step.report, parameters) | {"compile_seconds": step.compile_seconds}


def peer_figures(python: str | None, name: str, mesh: str) -> dict:
    """One row of MaxText, by a process of the other interpreter."""
    topology, axes = parsed(mesh)
    spec = {
        "slice": topology,
        "compiler_options": OPTIONS[name],
        "options": TUNED
        | dict(vocab_size=VOCABULARY, per_device_batch_size=ROWS_A_CHIP)
        | {f"ici_{axis}_parallelism": size for axis, size in axes.items()},
    }
    found = run_worker([str(python), str(HERE / "peers" / "maxtext_step.py"), json.dumps(spec)])
    if "error" in found:
        return found
    collectives = tuple(hlo.Collective(**kind) for kind in found.pop("collectives"))
    parameters = found.pop("parameters")
    return sent(collectives, parameters) | found


def of_report(report: Report, parameters: int) -> dict:
    """The figures of a compiled step."""
    return sent(report.collectives, parameters) | {"temporary_bytes": report.temp_bytes}


def sent(collectives: tuple[hlo.Collective, ...], parameters: int) -> dict:
    """What the collectives of a step send, in all and while the chip waits."""
    total = sum(c.sent_bytes for c in collectives)
    return {
        "parameters": parameters,
        "sent_bytes": total,
        "bytes_a_parameter": total / parameters,
        "blocking_bytes": sum(c.blocking_bytes for c in collectives),
        "collectives": {
            c.kind: {
                "count": c.count,
                "bytes": c.bytes,
                "asynchronous_count": c.asynchronous_count,
                "asynchronous_bytes": c.asynchronous_bytes,
            }
            for c in collectives
        },
    }


def line(row: tuple[str, str], found: Mapping) -> list[str]:
    """Of the table."""
    if "error" in found:
        return [*row, found["error"][:60], "", "", "", ""]
    return [
        *row,
        f"{found['sent_bytes'] / 1e9:.2f} GB",
        f"{found['bytes_a_parameter']:.1f}",
        f"{found['blocking_bytes'] / 1e9:.2f} GB",
        f"{found['temporary_bytes'] / 2**30:.1f} GiB",
        f"{found['compile_seconds']:.0f}",
    ]


def main() -> None:
    args = flags()
    if args.row:
        print(json.dumps(figures(*args.row)))
        return
    versions = {"libtpu": metadata.version("libtpu")}
    every_row = itertools.product(args.case.split(","), args.mesh)
    make = partial(figures_of, args.peer_python)
    rows = each_row(args.json, KEYS, versions, every_row, make)
    print_rows(HEADER, rows, line)


def figures_of(peer_python: str | None, name: str, mesh: str) -> dict:
    """Of the table, by a process of its own."""
    if name in OPTIONS:
        return peer_figures(peer_python, name, mesh)
    return run_row(__file__, name, mesh)


def flags() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--case", default=",".join(IS_ASYNCHRONOUS), help="comma-separated")
    made.add_argument("--mesh", nargs="+", default=MESHES, help=f"such as {MESHES[1]}")
    made.add_argument("--peer_python", help="an interpreter with MaxText")
    made.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    args = made.parse_args()
    require_known(made, "--case", args.case, [*IS_ASYNCHRONOUS, *OPTIONS])
    if args.peer_python is None and any(name in OPTIONS for name in args.case.split(",")):
        made.error("--peer_python: got none, expected an interpreter with MaxText")
    return args


if __name__ == "__main__":
    main()
