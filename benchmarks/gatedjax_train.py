"""The worker of `train_cpu.py` on our side: the train step of train.py, on random tokens.

Its one argument is the configuration as JSON. It says one JSON line when it has compiled; then for
each line on stdin, a number of steps, it runs them and says how long they took.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable

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
    batches = [random_batch(run.config, seed) for seed in range(BATCHES)]
    with jax.set_mesh(run.mesh):
        state = fresh_state(run)
        train_step = jit_train_step(run.config, run.tx, run.shardings)

        def steps(state, count: int):
            """That many steps over the batches by turns: the new state, the last metrics."""
            for i in range(count):
                local = batches[i % BATCHES]
                batch = sharding.global_batch(run.mesh, local, run.config.train.batch_size)
                state, metrics = train_step(state, batch)
            return jax.block_until_ready((state, metrics))

        state, _ = steps(state, WARMUP_STEPS)
        say(about(run))
        for line in sys.stdin:
            start = time.perf_counter()
            cpu_start = time.process_time()
            state, metrics = steps(state, int(line))
            seconds = time.perf_counter() - start
            cpu_seconds = time.process_time() - cpu_start
            usage = resource.getrusage(resource.RUSAGE_SELF)
            say(
                {
                    "seconds": seconds,
                    "cpu_seconds": cpu_seconds,
                    "loss": float(metrics["loss"]),
                    "peak_rss_bytes": usage.ru_maxrss * 1024,  # KiB on Linux
                }
            )


def about(run: Run) -> dict:
    """What was compiled."""
    total, active = parameter_counts(run)
    return {
        "total": total,
        "active": active,
        "implementations": {c.op: c.implementation for c in dispatch.choices()},
        "versions": {"jax": jax.__version__},
    }


def random_batch(config: Config, seed: int) -> Batch:
    """Rows of one document each: every token has a target."""
    B = config.train.batch_size
    T = config.data.seq_len
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.model.vocab_size, (B, T + 1), np.int32)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segment_ids=np.ones((B, T), np.int32),
        positions=np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
        loss_mask=np.ones((B, T), np.float32),
    )


def parameter_counts(run: Run) -> tuple[int, int]:
    """Parameters, and those that take part in one token: of the experts only the chosen ones."""
    model = run.config.model
    total = sum(p.size for p in jax.tree.leaves(run.abstract.params))
    idle = 0
    for i in range(model.num_layers):
        _, ffn = model.layer(i)
        if isinstance(ffn, SparseMoEConfig):
            idle_experts = ffn.num_experts - ffn.experts_per_token
            idle += idle_experts * 3 * model.width * ffn.hidden
    return total, total - idle


def _protocol() -> Callable[[dict], None]:
    """Prints JSON lines on stdout; whatever libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(message: dict) -> None:
        print(json.dumps(message), file=out, flush=True)

    return say


if __name__ == "__main__":
    main()
