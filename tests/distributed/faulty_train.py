"""train.py with a fault: FAULT=nan:5 (or nan:5-99), spike:25, stall:6, stuck:6. Nothing of it is in
the product.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax.numpy as jnp

from gatedjax import train
from gatedjax.runtime import cli
from gatedjax.training import growing

kind, _, steps = os.environ["FAULT"].partition(":")
first, _, last = steps.partition("-")
FAULTY = range(int(first), int(last or first) + 1)
dogs = []


class ImpatientWatchdog(train.Watchdog):
    """As the real one; the fault shortens its patience for one step, whatever compilation took
    before.
    """

    def __init__(self, *args):
        super().__init__(*args)
        dogs.append(self)


def stand_still(is_for_ever: bool) -> None:
    (dog,) = dogs
    patience, dog._seconds = dog._seconds, 1.0
    while is_for_ever or not dog.stalls:
        time.sleep(0.05)
    dog._seconds = patience


def with_fault(step):
    def call(state, batch, teacher):
        if int(state.step) + 1 in FAULTY:
            if kind in ("stall", "stuck"):
                stand_still(kind == "stuck")
            # Almost no tokens are left to divide by: the loss and its gradient are hundreds of
            # times as large.
            mask = {
                "nan": jnp.nan,
                "spike": jnp.where(jnp.arange(len(batch.tokens)) % 2, 1.0, -0.99)[:, None],
            }
            batch = batch.replace(loss_mask=batch.loss_mask * mask.get(kind, 1.0))
        return step(state, batch, teacher)

    # It is compiled before it is called.
    call.lower = step.lower
    return call


make_step, train.Watchdog = growing.jit_train_step, ImpatientWatchdog
growing.jit_train_step = lambda *args: with_fault(make_step(*args))

if __name__ == "__main__":
    cli.run(train.main)
