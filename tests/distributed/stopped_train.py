"""Many trainings in one process, each stopped by SIGTERM at a random moment between its steps.

ROUNDS says how many. With several processes another one gets the signal in each round. A training
that is not stopped ends after its last step, with "lost".
"""

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
from absl import flags

from gatedjax import train
from gatedjax.config import from_config_dict
from gatedjax.data import load_tokenizer
from gatedjax.runtime import cli, launch
from gatedjax.runtime.stop import Stop
from gatedjax.training import growing
from gatedjax.training.run import prepare, with_vocab

LONGEST_WAIT = 0.4  # seconds: up to a hundred steps, with a checkpoint at every fourth
chance = random.Random(0)  # the same on all processes


def send_later(delay, times):
    time.sleep(delay)
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGTERM)


def with_signal(step, delay, times):
    """Sends the signal some time after the second step: the first compiles."""
    calls = 0

    def call(*args):
        nonlocal calls
        calls += 1
        if calls == 2 and times:
            threading.Thread(target=send_later, args=(delay, times)).start()
        return step(*args)

    return call


def main(_):
    config = from_config_dict(flags.FLAGS.config)
    config = with_vocab(config, load_tokenizer(config.data.tokenizer))
    launch.start()
    run = prepare(config)
    step = growing.jit_train_step(run.config, run.tx, run.shardings)
    for number in range(int(os.environ["ROUNDS"])):
        delay = chance.random() * LONGEST_WAIT
        is_mine = number % jax.process_count() == jax.process_index()
        times = chance.choice([1, 1, 3]) * is_mine
        growing.jit_train_step = lambda *_, d=delay, t=times: with_signal(step, d, t)
        workdir = Path(flags.FLAGS.workdir) / str(number)
        before = signal.getsignal(signal.SIGTERM)
        with Stop() as stop:
            state = train.train(run, workdir, stop)
        signal.signal(signal.SIGTERM, before)
        steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
        print(f"round {number}: {'stopped' if state is None else 'lost'}, {max(steps)}", flush=True)


if __name__ == "__main__":
    cli.run(main)
