"""Refined schedules: a run with linear decay, then one along its gradient norms."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from gatedjax.config import Config
from gatedjax.study.cell import seeded, train
from gatedjax.study.grid import Cell
from gatedjax.study.measures import bits_per_byte
from gatedjax.training.optim_refined import L1_NORM, L2_NORM, METRICS_FILE


@dataclasses.dataclass(frozen=True)
class Refinement:
    """A run with linear decay to 0; then the same with the schedule refined from it.

    Called with a seed: bits per byte of both ("bits@linear", "bits@refined"), and what was gained.
    """

    config: Config

    def __call__(self, seed: int) -> dict[str, float]:
        return refine(seeded(Cell({}, self.config), seed))


def refine(cell: Cell) -> dict[str, float]:
    """The values of a `Refinement`, of a cell with its seed."""
    linear = _with_schedule(cell, schedule="linear", final_lr_fraction=0.0, record_l1_norm=True)
    before = train(linear, read_every=1)
    with tempfile.TemporaryDirectory() as folder:
        lines = [json.dumps(_norms(step, read)) for step, read in before.history]
        (Path(folder) / METRICS_FILE).write_text("\n".join(lines), encoding="utf-8")
        changes = {"schedule": "refined", "refined_from": folder, "warmup_steps": 0}
        after = train(_with_schedule(cell, **changes))
    linear_bits = bits_per_byte(before)
    refined_bits = bits_per_byte(after)
    return {
        "bits@linear": linear_bits,
        "bits@refined": refined_bits,
        "gained": linear_bits - refined_bits,
    }


def _with_schedule(cell: Cell, **changes: Any) -> Cell:
    optim = dataclasses.replace(cell.config.optim, **changes)
    return dataclasses.replace(cell, config=dataclasses.replace(cell.config, optim=optim))


def _norms(step: int, read: dict[str, float]) -> dict[str, float]:
    return {"step": step, L1_NORM: read[L1_NORM], L2_NORM: read[L2_NORM]}
