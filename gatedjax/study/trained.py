"""A model at the end of its run: what the measures are taken of."""

import dataclasses
import math
from typing import Any

from gatedjax.study.grid import Cell
from gatedjax.training.run import Run


@dataclasses.dataclass
class Trained:
    """A model at the end of its run.

    steps: that were taken; fewer than planned where training ended early.
    metrics: of the last step whose metrics were read, as plain numbers.
    history: of all that were read, with their steps.
    step_ms: the mean time of a step between the first reading of metrics and the last.
    """

    cell: Cell
    run: Run
    params: Any
    steps: int
    metrics: dict[str, float]
    history: list[tuple[int, dict[str, float]]] = dataclasses.field(default_factory=list)
    step_ms: float = math.nan
