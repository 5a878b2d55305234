"""The configuration of a router of experts.

It is composed, not named: how logits are made, how they become router probabilities, which experts
are selected, how their outputs are weighted, and what keeps the loads even. `moe.py` says which
values make the routers of the literature.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from gatedjax.config.checks import (
    BelowOne,
    Checked,
    CountOrZero,
    NonNegative,
    Positive,
    Range,
    Size,
)
from gatedjax.errors import require

# Logits are divided by it: below this float32 would overflow.
Temperature = Annotated[float, Range(1e-6)]


@dataclass(frozen=True)
class RouterConfig(Checked):
    """Logits `(activation(M(x) W + W_g previous) + b) / temperature`, and what is made of them."""

    # M(x), what the router sees of a token; unit: x / |x|
    modified_input: Literal["identity", "tanh", "sigmoid", "unit"] = "identity"
    # W_g times the logits of the sparse layer before (MoE++)
    residual: bool = False
    activation: Literal["identity", "gelu", "sigmoid", "tanh"] = "identity"
    # a learned b
    affine: bool = False
    # in training normal noise is added to the logits, of this standard deviation over the number of
    # experts (V-MoE: 1)
    noise: NonNegative = 0.0
    # at the first step; high is dense
    temperature: Temperature = 1.0
    # from step anneal_steps on, reached exponentially; low is sparse
    final_temperature: Temperature = 1.0
    # 0: the temperature stays as it is
    anneal_steps: CountOrZero = 0
    # how logits become router probabilities
    scoring: Literal["softmax", "sigmoid", "sparsemax"] = "softmax"
    # by probability + bias, not rounded; among equals the larger logit, then the lower expert id.
    # gumbel: by logits + noise, so that the temperature does not change how often an expert is
    # drawn. expert_choice is not causal. given: one expert a token, by `model.shared_router`, or
    # from outside the model (`layers/moe/given_experts.py`); none is trained.
    selection: Literal["topk", "grouped_topk", "gumbel", "hash", "expert_choice", "given"] = "topk"
    # grouped_topk: experts come in this many groups, of which
    num_groups: Size = 1
    # these with the best score may be selected from
    kept_groups: Size = 1
    # DeepSeek-V3, DeepSeek-V2
    group_score: Literal["sum_top2", "max"] = "sum_top2"
    # a selected expert is skipped where importance * probability is below (MoDES); 0 for none
    threshold: NonNegative = 0.0
    # Tokens of these ids (those of images, for example) have this threshold in place of the other.
    second_kind: tuple[CountOrZero, ...] = ()
    second_threshold: NonNegative = 0.0
    # of the outputs. scores: the router probabilities; selected: `scoring` over the selected
    # logits alone; uniform: 1 / k.
    weighting: Literal["scores", "selected", "uniform"] = "scores"
    # weights sum to 1
    renormalize: bool = True
    # times the weights, after everything else
    scale: Positive = 1.0
    # weights multiply what goes into the experts, not what comes out (Llama 4)
    weight_input: bool = False
    # a bias on each expert's selection, changed after every step by the loads of the whole batch
    bias_rule: Literal["none", "sign", "pid"] = "none"
    # of the sign rule
    bias_rate: NonNegative = 0.001
    # proportional, integral, derivative
    pid_gains: tuple[NonNegative, ...] = (0.05, 0.01, 0.0)
    # of all assignments, wanted for experts that compute; 0: the same load for every expert
    ffn_fraction: BelowOne = 0.0

    def check(self) -> None:
        require(len(self.pid_gains) == 3, "pid_gains", self.pid_gains, "three numbers")
        is_annealed = self.anneal_steps > 0 or self.final_temperature == self.temperature
        require(
            is_annealed,
            "anneal_steps",
            self.anneal_steps,
            "at least 1, as final_temperature is not temperature",
        )
        has_target = self.ffn_fraction == 0 or self.bias_rule != "none"
        require(
            has_target,
            "ffn_fraction",
            self.ffn_fraction,
            "0, or a bias_rule that can reach it",
        )
        require(
            len(self.second_kind) > 0 or self.second_threshold == 0,
            "second_threshold",
            self.second_threshold,
            "0 without token ids in second_kind",
        )
        self._check_groups()
        self._check_selection()

    def _check_groups(self) -> None:
        is_grouped = self.selection == "grouped_topk"
        require(
            is_grouped or self.num_groups == 1,
            "num_groups",
            self.num_groups,
            "1, or selection 'grouped_topk'",
        )
        require(
            1 <= self.kept_groups <= self.num_groups,
            "kept_groups",
            self.kept_groups,
            f"between 1 and num_groups = {self.num_groups}",
        )

    def _check_selection(self) -> None:
        if self.selection in ("gumbel", "hash", "given"):
            require(self.noise == 0, "noise", self.noise, f"0 with selection {self.selection!r}")
        if self.selection == "gumbel":
            require(
                self.scoring == "softmax" and self.weighting == "scores",
                "selection",
                "gumbel",
                "another, or scoring 'softmax' with weighting 'scores'",
            )
        if self.selection == "expert_choice":
            is_plain = self.weighting == "scores" and not self.renormalize
            is_static = self.bias_rule == "none" and not self.skips
            expected = "weighting 'scores', renormalize false, no bias_rule and no threshold"
            require(
                is_plain and is_static,
                "selection",
                "expert_choice",
                f"another, or {expected}",
            )
        if self.selection == "given":
            is_plain = self.weighting == "uniform" and self.bias_rule == "none"
            expected = "another, or weighting 'uniform' and no bias_rule"
            require(is_plain, "selection", "given", expected)
        if self.selection == "hash":
            require(
                self.bias_rule == "none",
                "bias_rule",
                self.bias_rule,
                "'none': a hash selects by token, not by probability",
            )

    @property
    def causal(self) -> bool:
        """Whether where a token goes depends on nothing that comes after it."""
        return self.selection != "expert_choice"

    @property
    def skips(self) -> bool:
        """Whether selected experts may be skipped."""
        return self.threshold > 0 or self.second_threshold > 0
