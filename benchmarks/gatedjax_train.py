"""The worker of `train_cpu.py` on our side: the train step of train.py, on random tokens.

Its one argument is the configuration as JSON. It says one JSON line when it has compiled; then for
each line on stdin, a number of steps, it runs them and says how long they took.
"""

import json
import os
import resource
import sys
import time

import jax
import numpy as np

from gatedjax import sharding
from gatedjax.aot import libtpu
from gatedjax.config import Config, SparseMoEConfig, from_config_dict
from gatedjax.data import Batch
from gatedjax.runtime.host_memory import keep_freed_memory
from gatedjax.training.run import Run, fresh_state, prepare
from gatedjax.training.step import jit_train_step
from kernels_pallas import dispatch

BATCHES = 8
WARMUP_STEPS = 3


def main() -> None:
    """Compile -> say what was compiled -> steps on demand."""
    say = _protocol()
    keep_freed_memory()
    libtpu.quieten()
    run = prepare(from_config_dict(json.loads(sys.argv[1])))
    train = run.config.train
    batches = [random_batch(run.config, seed) for seed in range(BATCHES)]
    with jax.set_mesh(run.mesh):
        state, train_step = fresh_state(run), jit_train_step(run.config, run.tx, run.shardings)

        def steps(state, count: int):
            for i in range(count):
                batch = sharding.global_batch(run.mesh, batches[i % BATCHES], train.batch_size)
                state, metrics = train_step(state, batch)
            return jax.block_until_ready((state, metrics))

        state, _ = steps(state, WARMUP_STEPS)
        total, active = parameter_counts(run)
        implementations = {c.op: c.implementation for c in dispatch.choices()}
        versions = {"jax": jax.__version__}
        say(
            {
                "total": total,
                "active": active,
                "implementations": implementations,
                "versions": versions,
            }
        )
        for line in sys.stdin:
            start = time.perf_counter()
            state, metrics = steps(state, int(line))
            seconds = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
            say({"seconds": seconds, "loss": float(metrics["loss"]), "peak_rss_bytes": peak})


def random_batch(config: Config, seed: int) -> Batch:
    """Rows of one document each: every token has a target."""
    shape = (config.train.batch_size, config.data.seq_len)
    tokens = np.random.default_rng(seed).integers(
        0, config.model.vocab_size, (shape[0], shape[1] + 1), np.int32
    )
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return Batch(
        tokens[:, :-1],
        tokens[:, 1:],
        np.ones(shape, np.int32),
        positions,
        np.ones(shape, np.float32),
    )


def parameter_counts(run: Run) -> tuple[int, int]:
    """Parameters, and those that a token meets: of the experts only the chosen ones."""
    model, total, idle = run.config.model, 0, 0
    total = sum(p.size for p in jax.tree.leaves(run.abstract.params))
    for i in range(model.num_layers):
        ffn = model.layer(i)[1]
        if isinstance(ffn, SparseMoEConfig):
            idle += (ffn.num_experts - ffn.experts_per_token) * 3 * model.width * ffn.hidden
    return total, total - idle


def _protocol():
    """Prints JSON lines on stdout; whatever libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda message: print(json.dumps(message), file=out, flush=True)


if __name__ == "__main__":
    main()
