"""A train step that trains everything, one part, or low-rank updates: memory and time, on this CPU.

    python benchmarks/frozen_base.py [--rounds=9] [--steps=3] [--json=FILE]

The model is dense: attention with an output gate, gated MLPs, layers under scan, float32, AdamW.
Memory is what is held all the time (parameters, optimizer) by the shapes, and what the compiler
says a step needs beside it. All steps live in one process and take turns; the time is the median of
the rounds as a ratio to full training's of the same round: what else runs here weighs on both.
"""

import dataclasses
import os
import statistics
import sys
import time

import jax
from gatedjax_train import random_batch
from report import cores, cpu_model, installed_versions, parser, table, write_json

from gatedjax import sharding
from gatedjax.aot import libtpu
from gatedjax.aot.step import abstract_batch
from gatedjax.config import Config, LoRAConfig, config_dict, from_config_dict, layer
from gatedjax.training import trainable
from gatedjax.training.run import Run, flops_per_token, fresh_state, prepare
from gatedjax.training.step import jit_train_step

HEADER = (
    "trains",
    "parameters that train",
    "held MiB",
    "beside it MiB",
    "MFLOP a token",
    "time of a step",
)


def base() -> Config:
    """Everything trains."""
    c = config_dict()
    c.model.vocab_size = 512
    c.model.width = 256
    c.model.num_layers = 6
    c.model.mixers = {"attention": layer("gated_attention", num_heads=4, head_dim=64)}
    c.model.ffns = {"mlp": layer("gated_mlp", hidden=768)}
    c.model.dtype = "float32"
    c.data.seq_len = 256
    c.train.batch_size = 4
    return from_config_dict(c)


def variants() -> dict[str, Config]:
    """What the rows of the table are."""
    everything = base()
    rank_8 = LoRAConfig(rank=8, targets=("*",))
    lora = dataclasses.replace(everything.model, lora=rank_8)
    mixers = dataclasses.replace(everything.optim, trainable=("*.mixer.*",))
    return {
        "everything": everything,
        "the mixers": dataclasses.replace(everything, optim=mixers),
        "low-rank updates of all projections, rank 8": dataclasses.replace(everything, model=lora),
    }


class Step:
    """A compiled step, with its state."""

    def __init__(self, config: Config):
        self.run = prepare(config)
        with jax.set_mesh(self.run.mesh):
            step = jit_train_step(config, self.run.tx, self.run.shardings)
            self.compiled = step.lower(self.run.abstract, abstract_batch(self.run)).compile()
            self._state = fresh_state(self.run)
            local = random_batch(config, seed=0)
            batch_size = config.train.batch_size
            self._batch = sharding.global_batch(self.run.mesh, local, batch_size)
        self.seconds(1)

    def seconds(self, steps: int) -> float:
        """Of that many steps."""
        start = time.perf_counter()
        for _ in range(steps):
            self._state, _ = self.compiled(self._state, self._batch)
        jax.block_until_ready(self._state)
        return time.perf_counter() - start


def figures(run: Run, compiled: jax.stages.Compiled) -> dict[str, float]:
    """Of one variant, without its time."""
    trained, _ = trainable.split(run.config, run.abstract.params)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.abstract))
    memory = compiled.memory_analysis()
    return {
        "trained_parameters": sum(x.size for x in jax.tree.leaves(trained)),
        "held_mib": held / 2**20,
        "temporary_mib": memory.temp_size_in_bytes / 2**20,
        "mflop_per_token": flops_per_token(run) / 1e6,
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=9, help="of every variant, by turns")
    arguments.add_argument("--steps", type=int, default=3, help="of a round")
    args = arguments.parse_args()
    libtpu.quieten()
    steps = {name: Step(config) for name, config in variants().items()}
    load_before = os.getloadavg()[0]
    rounds = [
        {name: step.seconds(args.steps) for name, step in steps.items()} for _ in range(args.rounds)
    ]
    load = max(load_before, os.getloadavg()[0])
    rows = []
    measured = {}
    for name, step in steps.items():
        ratio = statistics.median(r[name] / r["everything"] for r in rounds)
        measured[name] = figures(step.run, step.compiled) | {"time_ratio": ratio}
        of_name = measured[name]
        rows.append(
            (
                name,
                f"{of_name['trained_parameters']:,}",
                f"{of_name['held_mib']:.1f}",
                f"{of_name['temporary_mib']:.1f}",
                f"{of_name['mflop_per_token']:.1f}",
                f"{ratio:.2f}",
            )
        )
    milliseconds = 1000 * min(r["everything"] for r in rounds) / args.steps
    sys.stdout.write(table(HEADER, rows) + "\n")
    sys.stdout.write(
        f"{cpu_model()}, {cores()} cores, load {load:.1f}; a step that trains everything takes "
        f"{milliseconds:.0f} ms at best\n"
    )
    if args.json:
        write_json(args.json, {"load": load, "variants": measured}, installed_versions(["jax"]))


if __name__ == "__main__":
    main()
