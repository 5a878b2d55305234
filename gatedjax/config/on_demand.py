"""The configuration of feed-forwards of which every token has as much as it needs."""

from dataclasses import dataclass
from typing import Literal

from gatedjax.config.checks import (
    Checked,
    CountOrZero,
    Fraction,
    NonNegative,
    Positive,
    Size,
    SizeOrZero,
)
from gatedjax.config.router import Temperature
from gatedjax.errors import require


@dataclass(frozen=True)
class AdaptiveMLPConfig(Checked):
    """An MLP in equal parts, learners; a gate says how many of them a token has (adaptive
    computation modules, arXiv 2312.10193).
    """

    kind: Literal["adaptive_mlp"] = "adaptive_mlp"
    # of all learners
    hidden: Size = 512
    learners: Size = 4
    # a token has at least so many
    least: SizeOrZero = 0
    # false: activation(x W_up) W_down, as published; true: a gated MLP
    gated: bool = False
    # identity: of a learner that stands for a projection
    activation: Literal["gelu", "silu", "relu_squared", "identity"] = "gelu"
    # of the gate's two hidden layers, between which there is no activation
    gate_hidden: Size = 16
    # of the Gumbel noise that chooses in training
    temperature: Temperature = 0.8
    # the fraction of the learners that a batch should use
    budget: Fraction = 0.5
    # weights of three losses: of abs(fraction used - budget), of what is missing to an even use of
    # all choices in a row, and of what is missing to differences between rows
    budget_loss: NonNegative = 0.1
    entropy_loss: NonNegative = 0.05
    diversity_loss: NonNegative = 0.05
    not_causal = None  # no token sees a later one
    only_causal = None

    def check(self) -> None:
        most = min(self.hidden, 1024)
        expected = f"a divisor of hidden = {self.hidden}, {most} at most"
        is_good = self.learners <= most and self.hidden % self.learners == 0
        require(is_good, "learners", self.learners, expected)
        expected = f"below learners = {self.learners}"
        require(self.least < self.learners, "least", self.least, expected)
        only_plain = self.activation in ("relu_squared", "identity")
        require(
            not (self.gated and only_plain),
            "activation",
            self.activation,
            "'silu' or 'gelu' with gated = True",
        )

    @property
    def choices(self) -> int:
        """How many numbers of learners there are."""
        return self.learners + 1 - self.least


@dataclass(frozen=True)
class VersatileMLPConfig(Checked):
    """One gated MLP, in slices as experts and in loops as depth (VersatileFFN, arXiv 2512.14531).

    It has the norm in front of it itself: every loop passes it.
    """

    kind: Literal["versatile_mlp"] = "versatile_mlp"
    hidden: Size = 512
    activation: Literal["silu", "gelu"] = "silu"
    # slices of the hidden channels
    experts: Size = 8
    experts_per_token: Size = 2
    # channels of a slice; 0: hidden / experts
    expert_hidden: SizeOrZero = 0
    # the most
    loops: Size = 4
    # of the Gumbel noise that chooses the loops in training: at the first step, and from
    # anneal_steps on, reached exponentially; 0 steps: the first one stays
    temperature: Temperature = 5.0
    final_temperature: Temperature = 0.1
    anneal_steps: CountOrZero = 24_448
    # weight of E sum_i f_i P_i of the slices
    balance_loss: NonNegative = 5e-5
    # of the norm
    norm_eps: Positive = 1e-6
    not_causal = None  # no token sees a later one
    only_causal = None

    def check(self) -> None:
        require(
            self.experts_per_token <= self.experts,
            "experts_per_token",
            self.experts_per_token,
            f"at most experts = {self.experts}",
        )
        largest = self.hidden // self.experts
        expected = f"slices that do not overlap: {largest} at most of hidden = {self.hidden}"
        fits = largest > 0 and self.expert_hidden <= largest
        require(fits, "expert_hidden", self.slice_hidden, expected)

    @property
    def slice_hidden(self) -> int:
        """Channels of a slice."""
        return self.expert_hidden or self.hidden // self.experts
