"""The model time of a whole training step on one chip, by part of the model.

The names in the source are what tells the parts apart: `layer_0/mixer`, `token_loss`, `update`.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping

from gatedjax.aot import hlo
from gatedjax.aot.report import size, table
from gatedjax.aot.schedule import Called, ProgramRun
from gatedjax.aot.targets import Tpu

# Parts that take less than this fraction of the step are one row.
_SMALL = 0.004


@dataclasses.dataclass(frozen=True)
class PartTime:
    """What one part of the model takes in a step, in each pass over it: seconds, and bytes of HBM.

    repeated: the forward pass that the backward pass runs again (`model.remat`).
    """

    forward: float = 0.0
    backward: float = 0.0
    repeated: float = 0.0
    hbm_bytes: int = 0

    @property
    def seconds(self) -> float:
        return self.forward + self.backward + self.repeated

    def __add__(self, other: "PartTime") -> "PartTime":
        return PartTime(
            self.forward + other.forward,
            self.backward + other.backward,
            self.repeated + other.repeated,
            self.hbm_bytes + other.hbm_bytes,
        )


@dataclasses.dataclass(frozen=True)
class StepTime:
    """The model time of a step, whole and by part.

    program: the replayed step.
    parts: of `times_by_part`.
    model_flops: of the model in a step.
    chip: on which it ran.
    """

    program: ProgramRun
    parts: Mapping[str, PartTime]
    model_flops: float
    chip: Tpu

    @property
    def seconds(self) -> float:
        return self.program.cycles / self.chip.clock_hz

    @property
    def utilization(self) -> float:
        """Of the chip's peak, by the model's FLOPs."""
        return self.model_flops / self.chip.peak_flops / self.seconds


def times_by_part(program: ProgramRun, text: str, chip: Tpu) -> dict[str, PartTime]:
    """The step's time by part, the longest first.

    Args:
      program: the replayed step.
      text: its compiled HLO.
      chip: on which it ran.
    """
    known = hlo.instructions(text)
    parts: dict[str, PartTime] = collections.defaultdict(PartTime)
    for name, called in program.called.items():
        instruction = known.get(name)
        if instruction is None:
            parts["what XLA added"] += _time("forward", called, chip)
        else:
            parts[part(instruction)] += _time(which_pass(instruction), called, chip)
    return dict(sorted(parts.items(), key=lambda item: -item[1].seconds))


def _time(name: str, called: Called, chip: Tpu) -> PartTime:
    seconds = called.cycles / chip.clock_hz
    return PartTime(hbm_bytes=called.hbm_bytes * chip.cores, **{name: seconds})


def which_pass(instruction: hlo.Instruction) -> str:
    """The field of `PartTime` that it counts for."""
    if "rematted_computation" in instruction.op_name:
        return "repeated"
    if "transpose(" in instruction.op_name:
        return "backward"
    return "forward"


def part(instruction: hlo.Instruction) -> str:
    """The part of the model that an instruction belongs to, in words."""
    path = instruction.op_name
    kind = "the rest"
    if instruction.opcode == "custom-call" and "pallas_call" in path:
        kind = "kernels"
    elif instruction.has_matmul:
        kind = "matrices"
    # A scope that is differentiated is called jvp(token_loss).
    if re.search(r"[/(]token_loss[/)]", path):
        return f"loss: {kind}"
    if re.search(r"[/(]update[/)]", path):
        return "optimizer and gradient norm"
    if re.search(r"dynamic_(update_)?(index|slice)", path) and kind == "the rest":
        return "loading and saving between layers"
    if re.search(r"(mixer|ffn|final)_norm", path):
        return "norms"
    # Where a method of a layer calls its modules, it is between: layer_0/layer_0._applied/ffn.
    layer = re.search(r"layer_\d+/(?:layer_\d+\.\w+/)?(mixer|ffn)\b", path)
    if layer is not None:
        name = {"mixer": "mixer", "ffn": "feed-forward"}[layer[1]]
        return f"{name}: {kind}"
    if "_embedded" in path:
        return "embedding"
    return "other"


def lines(time: StepTime) -> list[str]:
    """The report: the step's time, its fraction of the peak, a table by part, and what has no
    time.
    """
    program = time.program
    seconds = time.seconds
    ideal = time.model_flops / time.chip.peak_flops
    moved = size(program.hbm_bytes * time.chip.cores)
    rows = []
    rest = PartTime()
    for name, of_part in time.parts.items():
        if of_part.seconds < _SMALL * seconds:
            rest += of_part
        else:
            rows.append(_row(name, of_part, seconds))
    rows.append(_row("less than 0.4 % each", rest, seconds))
    counted = sum(of_part.seconds for of_part in time.parts.values())
    rows.append(_row("between the parts", PartTime(forward=seconds - counted), seconds))
    header = ["part", "ms", "of the step", "forward", "backward", "repeated", "HBM"]
    found = [
        f"model time (no hardware): {1e3 * seconds:.2f} ms a step; the model's FLOPs at peak "
        f"{1e3 * ideal:.2f} ms: model FLOPs utilization {time.utilization:.1%}; HBM {moved}",
        "",
        *table(header, rows),
    ]
    if program.missing:
        found.append(f"without a time (run beside, or not listed): {', '.join(program.missing)}")
    if program.unknown_branches:
        found.append(f"{program.unknown_branches} branches follow data and count as not taken")
    return found


def _row(name: str, time: PartTime, step: float) -> list[str]:
    passes = (time.forward, time.backward, time.repeated)
    return [
        name,
        f"{1e3 * time.seconds:.2f}",
        f"{time.seconds / step:.1%}",
        *(f"{1e3 * seconds:.2f}" for seconds in passes),
        size(time.hbm_bytes),
    ]
