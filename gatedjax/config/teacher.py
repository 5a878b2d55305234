"""The configuration of a teacher: a frozen second model that a run learns from."""

from dataclasses import dataclass
from typing import Literal

from gatedjax.config.checks import Checked, NonNegative, Positive
from gatedjax.errors import require


@dataclass(frozen=True)
class TeacherConfig(Checked):
    """A trained model of the same vocabulary; none where `run` is empty.

    The loss of a run with a teacher is `cross_entropy` x its own, `kl` x the divergence of its
    predictions from the teacher's, and `mse` x the distance of its layers from the teacher's.
    """

    # a run directory, or one step of it (RUN/checkpoints/400)
    run: str = ""
    # of the run's own loss; at 0 it is still measured
    cross_entropy: NonNegative = 1.0
    # of KL(teacher | model), both at `temperature`, times its square (arXiv 1503.02531)
    kl: NonNegative = 0.0
    temperature: Positive = 1.0
    # of the mean square of the difference of `activation`, a mean over layers. Each layer gets what
    # the teacher's gets, so that all of them learn side by side.
    mse: NonNegative = 0.0
    # mixer_output: what a mixer adds to the residual stream; heads_output: the same before the
    # output matrix, of mixers that are made of gated attention
    activation: Literal["mixer_output", "heads_output"] = "mixer_output"

    def check(self) -> None:
        for name in ("kl", "mse"):
            value = getattr(self, name)
            require(bool(self.run) or value == 0, name, value, "0 without a teacher (run)")
        weights = self.cross_entropy + self.kl + self.mse
        require(weights > 0, "cross_entropy", self.cross_entropy, "above 0 where kl and mse are 0")
        require(
            bool(self.run) or self.cross_entropy == 1,
            "cross_entropy",
            self.cross_entropy,
            "1 without a teacher (run)",
        )
