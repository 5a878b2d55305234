"""The configuration of sparse feed-forwards: routers, experts, Soft MoE, mixtures of LoRA experts.

A router is composed, not named: how logits are made, how they become scores, which experts are selected, how their
outputs are weighed, and what keeps the loads even. The models of the literature, as values over the defaults:

  Switch                 experts_per_token=1, router: renormalize=False
  Mixtral, Qwen3-MoE     (the defaults, with their own numbers of experts)
  OLMoE, Qwen2-MoE       router: renormalize=False
  gpt-oss                router: weighting="selected"
  Llama 4                experts_per_token=1, router: scoring="sigmoid", renormalize=False, weight_input=True
  DeepSeek-V2            router: selection="grouped_topk", group_score="max", renormalize=False, scale=16.0
  DeepSeek-V3            router: scoring="sigmoid", selection="grouped_topk", scale=2.5, bias_rule="sign"
  MoE++                  zero_experts=1, copy_experts=1, constant_experts=2, router: residual=True, renormalize=False
  LongCat-Flash          copy_experts=256, router: renormalize=False, scale=6.0, bias_rule="pid", ffn_fraction=0.67
"""

from dataclasses import dataclass, field
from typing import Literal

from gatedjax.errors import require


@dataclass(frozen=True)
class RouterConfig:
    """`logits = (activation(M(x) W + W_g previous) + b) / temperature -> scores -> experts -> weights`."""

    # Logits.
    # M(x); unit: x / |x|
    modified_input: Literal["identity", "tanh", "sigmoid", "unit"] = "identity"
    residual: bool = False  # W_g times the logits of the sparse layer before (MoE++)
    activation: Literal["identity", "gelu", "sigmoid", "tanh"] = "identity"
    affine: bool = False  # a learned b
    temperature: float = 1.0  # at the first step; high is dense
    # from step anneal_steps on, reached exponentially; low is sparse
    final_temperature: float = 1.0
    anneal_steps: int = 0  # 0: the temperature stays as it is
    # Scores.
    scoring: Literal["softmax", "sigmoid", "sparsemax"] = "softmax"
    # Selection, by score + bias; among equals the lower expert id. expert_choice is not causal.
    selection: Literal["topk", "grouped_topk", "gumbel", "hash", "expert_choice"] = "topk"
    num_groups: int = 1  # grouped_topk: experts come in so many groups, of which
    kept_groups: int = 1  # these with the best score may be selected from
    group_score: Literal["sum_top2", "max"] = "sum_top2"  # DeepSeek-V3, V2
    # a selected expert is skipped where importance * score is below (MoDES); 0 for none
    threshold: float = 0.0
    # Weights of the outputs. selected: the score function of the selected logits alone; uniform: 1 / k.
    weighting: Literal["scores", "selected", "uniform"] = "scores"
    renormalize: bool = True  # weights sum to 1
    scale: float = 1.0  # times the weights, at last
    # weights multiply what goes into the experts, not what comes out (Llama 4)
    weight_input: bool = False
    # State: a bias on each expert's selection, changed after every step by the loads of the whole batch.
    bias_rule: Literal["none", "sign", "pid"] = "none"
    bias_rate: float = 0.001  # of the sign rule
    pid_gains: tuple[float, ...] = (0.05, 0.01, 0.0)  # proportional, integral, derivative
    ffn_fraction: float = 0.0  # of all assignments, wanted for experts that compute; 0: the same load for every expert

    def __post_init__(self):
        annealed = self.anneal_steps > 0 or self.final_temperature == self.temperature
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(self.final_temperature > 0, "final_temperature", self.final_temperature, "above 0")
        require(annealed, "anneal_steps", 0, "at least 1, as final_temperature is not temperature")
        is_grouped = self.selection == "grouped_topk"
        require(
            is_grouped or self.num_groups == 1,
            "num_groups",
            self.num_groups,
            "1, or selection 'grouped_topk'",
        )
        expected = f"between 1 and num_groups = {self.num_groups}"
        require(1 <= self.kept_groups <= self.num_groups, "kept_groups", self.kept_groups, expected)
        gumbel_ok = self.selection != "gumbel" or (
            self.scoring == "softmax" and self.weighting == "scores"
        )
        require(
            gumbel_ok,
            "selection",
            "gumbel",
            "another, or scoring 'softmax' with weighting 'scores'",
        )
        choice_ok = self.selection != "expert_choice" or (
            self.weighting == "scores"
            and not self.renormalize
            and self.bias_rule == "none"
            and not self.threshold
        )
        expected = (
            "another, or weighting 'scores', renormalize false, no bias_rule and no threshold"
        )
        require(choice_ok, "selection", "expert_choice", expected)
        hash_ok = self.selection != "hash" or self.bias_rule == "none"
        require(
            hash_ok, "bias_rule", self.bias_rule, "'none': a hash selects by token, not by score"
        )
        require(self.threshold >= 0, "threshold", self.threshold, "at least 0")
        require(self.scale > 0, "scale", self.scale, "above 0")
        require(len(self.pid_gains) == 3, "pid_gains", self.pid_gains, "three numbers")
        require(
            0.0 <= self.ffn_fraction < 1.0,
            "ffn_fraction",
            self.ffn_fraction,
            "a fraction from 0 to below 1",
        )
        needs_rule = self.ffn_fraction == 0 or self.bias_rule != "none"
        require(
            needs_rule, "ffn_fraction", self.ffn_fraction, "0, or a bias_rule that can reach it"
        )

    @property
    def causal(self) -> bool:
        """Whether where a token goes depends on nothing that comes after it."""
        return self.selection != "expert_choice"


@dataclass(frozen=True)
class SparseMoEConfig:
    """Sparse mixture of gated MLPs, and of experts that cost nothing. Expert ids count in the order of the fields."""

    kind: Literal["sparse_moe"] = "sparse_moe"
    num_experts: int = 8  # that compute (gated MLPs)
    zero_experts: int = 0  # 0
    copy_experts: int = 0  # x (LongCat-Flash's identity experts)
    constant_experts: int = 0  # a1 x + a2 v, (a1, a2) = softmax(W_c x)
    experts_per_token: int = 2
    hidden: int = 128  # of one expert
    activation: Literal["silu", "gelu"] = "silu"
    router: RouterConfig = field(default_factory=RouterConfig)
    shared_hidden: int = 0  # a shared expert of this width sees every token; 0 for none
    shared_gate: bool = True  # sigmoid(x w) on the shared expert, as Qwen2-MoE
    # Weights of the losses; every one is 1 at perfect balance (router_losses.py converts other projects' weights).
    balance_loss: float = 0.01
    # MoE++'s tau: weight of experts that cost nothing within the balance loss
    zero_computation_weight: float = 1.0
    sequence_loss: float = 0.0  # the balance loss within every row of the batch (DeepSeek-V3)
    z_loss: float = 0.001  # of mean logsumexp(logits)^2
    # An expert takes at most ceil(k T / E * capacity_factor) assignments from a row of T tokens; 0: no limit. With
    # tau, experts that compute take tau times as many as the others (MoE++).
    capacity_factor: float = 0.0
    # Who comes first. position: earlier tokens. choice: all first choices (V-MoE), priority: larger weights (batch
    # prioritized routing): in both a later token can displace an earlier one, so they are not causal.
    capacity_order: Literal["position", "choice", "priority"] = "position"
    # Over the devices of the `expert` axis. gather_weights: experts come to the tokens. The others: tokens go to the
    # experts, sent one by one (not on CPU), in buffers, or all to all (for many experts per token).
    exchange: Literal["gather_weights", "ragged_all_to_all", "all_to_all", "ring"] = (
        "gather_weights"
    )
    # all_to_all: a device sends another at most this many times its even share of assignments; ragged_all_to_all: it
    # receives at most this many times its even share. More are dropped and counted. 0: room for all.
    exchange_factor: float = 0.0

    def __post_init__(self):
        counts = (
            "num_experts",
            "zero_experts",
            "copy_experts",
            "constant_experts",
            "shared_hidden",
        )
        for name in counts:
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(
            self.total_experts >= 1,
            "num_experts",
            self.num_experts,
            "at least 1 expert of any sort",
        )
        expected = f"between 1 and the number of experts, {self.total_experts}"
        require(
            1 <= self.experts_per_token <= self.total_experts,
            "experts_per_token",
            self.experts_per_token,
            expected,
        )
        r = self.router
        even = self.total_experts % r.num_groups == 0
        require(
            even,
            "router.num_groups",
            r.num_groups,
            f"a divisor of the number of experts, {self.total_experts}",
        )
        size = self.total_experts // r.num_groups
        expected = f"groups that hold experts_per_token = {self.experts_per_token}; {r.kept_groups} x {size} do not"
        require(
            r.kept_groups * size >= self.experts_per_token,
            "router.kept_groups",
            r.kept_groups,
            expected,
        )
        pairs = r.selection != "grouped_topk" or r.group_score == "max" or size >= 2
        require(pairs, "router.group_score", r.group_score, "'max': groups hold one expert")
        require(self.capacity_factor >= 0, "capacity_factor", self.capacity_factor, "at least 0")
        own = r.selection != "expert_choice" or not self.capacity_factor
        require(
            own,
            "capacity_factor",
            self.capacity_factor,
            "0: expert choice fills every expert evenly",
        )
        positive = self.zero_computation_weight > 0
        require(positive, "zero_computation_weight", self.zero_computation_weight, "above 0")
        require(self.exchange_factor >= 0, "exchange_factor", self.exchange_factor, "at least 0")
        sends = not self.exchange_factor or self.exchange.endswith("all_to_all")
        require(
            sends,
            "exchange_factor",
            self.exchange_factor,
            "0, or exchange 'all_to_all' or 'ragged_all_to_all'",
        )
        plain = not r.weight_input or self.num_experts == self.total_experts
        require(
            plain,
            "router.weight_input",
            True,
            "false: experts that cost nothing take their input as it is",
        )
        splits = not r.ffn_fraction or 0 < self.num_experts < self.total_experts
        require(
            splits, "router.ffn_fraction", r.ffn_fraction, "0: there are not both sorts of experts"
        )

    @property
    def total_experts(self) -> int:
        """Experts that the router chooses among."""
        return self.num_experts + self.zero_experts + self.copy_experts + self.constant_experts

    @property
    def not_causal(self) -> str | None:
        """Why a causal model cannot have this feed-forward, or None."""
        if not self.router.causal:
            return "router.selection 'expert_choice': every expert chooses among all tokens, later ones too"
        if self.capacity_factor and self.capacity_order != "position":
            return f"capacity_order {self.capacity_order!r}: later tokens displace earlier ones"
        return None


@dataclass(frozen=True)
class SoftMoEConfig:
    """Soft mixture of experts (arXiv 2308.00951): experts work on slots, weighted means of all tokens of a row."""

    kind: Literal["soft_moe"] = "soft_moe"
    num_experts: int = 8
    slots_per_expert: int = 1
    hidden: int = 128  # of one expert
    activation: Literal["silu", "gelu"] = "silu"
    not_causal = "kind 'soft_moe': every slot is a mean over all tokens, later ones too"

    def __post_init__(self):
        require(self.num_experts >= 1, "num_experts", self.num_experts, "at least 1")
        require(self.slots_per_expert >= 1, "slots_per_expert", self.slots_per_expert, "at least 1")


@dataclass(frozen=True)
class LoRAMixtureConfig:
    """A frozen gated MLP, with a mixture of low-rank experts on each of its three matrices."""

    kind: Literal["lora_mixture"] = "lora_mixture"
    hidden: int = 256  # of the frozen MLP
    activation: Literal["silu", "gelu"] = "silu"
    num_experts: int = 4
    rank: int = 16
    alpha: float = 16.0  # an expert's product is scaled by alpha / rank
    # xlora: softmax(x W / temperature), one for the layer. phatgoose: softmax of normalized <x, v> over the best
    # experts_per_token, one for each matrix; sigmoid: what trains its v, sigmoid(<x, v>).
    gate: Literal["xlora", "phatgoose", "sigmoid"] = "xlora"
    # xlora: x are the last hidden states of a first pass of the whole model without experts, as published, and the
    # weights are the same in all layers; otherwise x is the input of the layer.
    first_pass: bool = False
    experts_per_token: int = 0  # 0: all
    temperature: float = 1.0
    not_causal = None  # no token sees a later one

    def __post_init__(self):
        require(self.num_experts >= 1, "num_experts", self.num_experts, "at least 1")
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        expected = f"between 0 (all) and num_experts = {self.num_experts}"
        require(
            0 <= self.experts_per_token <= self.num_experts,
            "experts_per_token",
            self.experts_per_token,
            expected,
        )
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        expected = "False unless gate is 'xlora'"
        require(
            self.gate == "xlora" or not self.first_pass, "first_pass", self.first_pass, expected
        )
