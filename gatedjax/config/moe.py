"""The configuration of sparse feed-forwards: experts, Soft MoE, mixtures of LoRA experts.

Their routers are in `router.py`. The models of the literature, as values over the defaults:

  Switch              experts_per_token=1, router: renormalize=False
  Mixtral, Qwen3-MoE  (the defaults, with their own numbers of experts)
  OLMoE, Qwen2-MoE    router: renormalize=False
  gpt-oss             activation="clamped_swiglu", bias=True,
                      router: weighting="selected", affine=True
  Llama 4             experts_per_token=1,
                      router: scoring="sigmoid", renormalize=False, weight_input=True
  DeepSeek-V2         router: selection="grouped_topk", group_score="max", renormalize=False,
                      scale=16.0
  DeepSeek-V3         router: scoring="sigmoid", selection="grouped_topk", scale=2.5,
                      bias_rule="sign"
  Kimi-Linear         shared_gate=False,
                      router: scoring="sigmoid", scale=2.446, bias_rule="sign"
  Nemotron-3          gated=False, activation="relu_squared", latent=..., shared_gate=False,
                      router: scoring="sigmoid", bias_rule="sign"
  V-MoE               balance_loss=0.0, z_loss=0.0, importance_loss=..., load_loss=...,
                      capacity_factor=..., capacity_order="choice" or "priority",
                      router: noise=1.0, renormalize=False
  MoE++               zero_experts=1, copy_experts=1, constant_experts=2,
                      router: residual=True, renormalize=False
  LongCat-Flash       copy_experts=256,
                      router: renormalize=False, scale=6.0, bias_rule="pid", ffn_fraction=0.67
"""

from dataclasses import dataclass, field
from typing import Literal

from gatedjax.config.checks import (
    Checked,
    NonNegative,
    Positive,
    Size,
    SizeOrZero,
)
from gatedjax.config.router import RouterConfig, Temperature
from gatedjax.errors import require


@dataclass(frozen=True)
class SparseMoEConfig(Checked):
    """Sparse mixture of MLPs, and of experts that cost nothing.

    Expert ids count in the order of the fields.
    """

    kind: Literal["sparse_moe"] = "sparse_moe"
    # that compute (MLPs)
    num_experts: SizeOrZero = 8
    # whose output is 0
    zero_experts: SizeOrZero = 0
    # whose output is x (LongCat-Flash's identity experts)
    copy_experts: SizeOrZero = 0
    # whose output is a1 x + a2 v, (a1, a2) = softmax(W_c x)
    constant_experts: SizeOrZero = 0
    experts_per_token: Size = 2
    # of one expert
    hidden: Size = 128
    # clamped_swiglu, of gated experts: as in `gated_mlp`; relu_squared: of experts without a gate
    activation: Literal["silu", "gelu", "clamped_swiglu", "relu_squared"] = "silu"
    swiglu_limit: Positive = 7.0
    # false: experts, the shared one too, are activation(x W_up) W_down (Nemotron-H)
    gated: bool = True
    # of all matrices of the experts, the shared one's too (gpt-oss; its router's: `router.affine`)
    bias: bool = False
    # Experts work on this many channels, between one projection down and one up for all of them;
    # router and shared expert see all channels (Nemotron-3). 0: experts do, too.
    latent: SizeOrZero = 0
    router: RouterConfig = field(default_factory=RouterConfig)
    # a shared expert of this width sees every token; 0 for none
    shared_hidden: SizeOrZero = 0
    # sigmoid(x w) on the shared expert, as Qwen2-MoE
    shared_gate: bool = True
    # Weights of the losses. Each loss is 1 at perfect balance; `layers/moe/losses.py` converts the
    # weights of other projects.
    balance_loss: NonNegative = 0.01
    # MoE++'s tau: weight of experts that cost nothing within the balance loss
    zero_computation_weight: Positive = 1.0
    # the balance loss within every row of the batch, documents of a row together (DeepSeek-V3)
    sequence_loss: NonNegative = 0.0
    # of V-MoE's two, within every row of the batch: squared coefficients of variation over experts,
    # of their mean probabilities, and of their chances to be chosen under `router.noise`
    importance_loss: NonNegative = 0.0
    load_loss: NonNegative = 0.0
    # of mean logsumexp(logits)^2
    z_loss: NonNegative = 0.001
    # In training an expert takes at most ceil(k T / E * capacity_factor) assignments from a
    # document of T tokens; 0: no limit. Evaluation and decoding drop nothing (DeepSeek-V2). With
    # tau, experts that compute take tau times as many as the others (MoE++).
    capacity_factor: NonNegative = 0.0
    # Which assignments are kept first. position: earlier tokens; of later ones only the number
    # matters. choice: all first choices (V-MoE). priority: tokens with a larger probability of
    # their best expert (batch prioritized routing). In the last two a later token can displace an
    # earlier one, so they are not causal.
    capacity_order: Literal["position", "choice", "priority"] = "position"
    # Over the devices of the `expert` axis. gather_weights: experts come to the tokens. The others:
    # tokens go to the experts, sent one by one (not on CPU), in buffers, or around a ring (for many
    # experts per token).
    exchange: Literal["gather_weights", "ragged_all_to_all", "all_to_all", "ring"] = (
        "gather_weights"
    )
    # all_to_all: a device sends another at most this many times its even fraction of assignments;
    # ragged_all_to_all: it receives at most this many times its even fraction. More are dropped,
    # counted and told of. 0: with all_to_all nothing is dropped; with ragged_all_to_all there is
    # room for twice the even fraction, and for everything with `bias`.
    exchange_factor: NonNegative = 0.0

    def check(self) -> None:
        total = self.total_experts
        require(total >= 1, "num_experts", self.num_experts, "at least 1 expert of any sort")
        require(
            1 <= self.experts_per_token <= total,
            "experts_per_token",
            self.experts_per_token,
            f"between 1 and the number of experts, {total}",
        )
        self._check_experts()
        self._check_groups()
        self._check_router()
        can_limit = self.exchange in ("all_to_all", "ragged_all_to_all")
        require(
            can_limit or self.exchange_factor == 0,
            "exchange_factor",
            self.exchange_factor,
            "0, or exchange 'all_to_all' or 'ragged_all_to_all'",
        )

    def _check_experts(self) -> None:
        gated_only = self.activation == "clamped_swiglu"
        plain_only = self.activation == "relu_squared"
        require(
            not (plain_only if self.gated else gated_only),
            "activation",
            self.activation,
            f"another with gated = {self.gated}",
        )
        # What is not computed has no bias; the layer adds the biases of all that was chosen.
        require(
            not self.bias or self.exchange_factor == 0,
            "exchange_factor",
            self.exchange_factor,
            "0 with bias",
        )

    def _check_groups(self) -> None:
        router = self.router
        total = self.total_experts
        require(
            total % router.num_groups == 0,
            "router.num_groups",
            router.num_groups,
            f"a divisor of the number of experts, {total}",
        )
        group_size = total // router.num_groups
        wanted = f"groups that hold experts_per_token = {self.experts_per_token}"
        require(
            router.kept_groups * group_size >= self.experts_per_token,
            "router.kept_groups",
            router.kept_groups,
            f"{wanted}; {router.kept_groups} x {group_size} do not",
        )
        if router.selection == "grouped_topk" and router.group_score == "sum_top2":
            require(
                group_size >= 2,
                "router.group_score",
                router.group_score,
                "'max': groups hold one expert",
            )

    def _check_router(self) -> None:
        router = self.router
        require(
            router.selection != "given" or self.experts_per_token == 1,
            "experts_per_token",
            self.experts_per_token,
            "1 with router.selection 'given'",
        )
        if router.selection == "expert_choice":
            require(
                self.capacity_factor == 0,
                "capacity_factor",
                self.capacity_factor,
                "0: expert choice fills every expert evenly",
            )
        require(
            router.noise > 0 or not self.load_loss,
            "load_loss",
            self.load_loss,
            "0 without router.noise",
        )
        if router.weight_input:
            require(
                self.num_experts == self.total_experts,
                "router.weight_input",
                True,
                "false: experts that cost nothing take their input as it is",
            )
        if router.ffn_fraction:
            require(
                0 < self.num_experts < self.total_experts,
                "router.ffn_fraction",
                router.ffn_fraction,
                "0: there are not both sorts of experts",
            )

    @property
    def total_experts(self) -> int:
        """Experts that the router chooses among."""
        return self.num_experts + self.zero_experts + self.copy_experts + self.constant_experts

    # why an encoder cannot have it
    only_causal = None

    @property
    def not_causal(self) -> str | None:
        """Why a causal model cannot have this feed-forward, or None."""
        if not self.router.causal:
            reason = "every expert chooses among all tokens, later ones too"
            return f"router.selection 'expert_choice': {reason}"
        if self.capacity_factor and self.capacity_order != "position":
            return f"capacity_order {self.capacity_order!r}: later tokens displace earlier ones"
        return None


@dataclass(frozen=True)
class SoftMoEConfig(Checked):
    """Soft mixture of experts (arXiv 2308.00951).

    Experts work on slots, weighted means of all tokens of a document.
    """

    kind: Literal["soft_moe"] = "soft_moe"
    num_experts: Size = 8
    slots_per_expert: Size = 1
    # of one expert
    hidden: Size = 128
    activation: Literal["silu", "gelu"] = "silu"
    not_causal = "kind 'soft_moe': every slot is a mean over all tokens, later ones too"
    only_causal = None


@dataclass(frozen=True)
class LoRAMixtureConfig(Checked):
    """A frozen gated MLP, with a mixture of low-rank experts on each of its three matrices."""

    kind: Literal["lora_mixture"] = "lora_mixture"
    # of the frozen MLP
    hidden: Size = 256
    activation: Literal["silu", "gelu"] = "silu"
    num_experts: Size = 4
    rank: Size = 16
    # an expert's product is scaled by alpha / rank
    alpha: Positive = 16.0
    # xlora: softmax(x W / temperature), one for each layer. phatgoose: softmax of normalized <x, v>
    # over the best experts_per_token, one for each matrix. sigmoid: sigmoid(<x, v>), which trains
    # the v of phatgoose.
    gate: Literal["xlora", "phatgoose", "sigmoid"] = "xlora"
    # xlora: x are the last hidden states of a first pass of the whole model without experts, as
    # published, and every layer has a W of its own; otherwise x is the input of the layer.
    first_pass: bool = False
    # 0: all
    experts_per_token: SizeOrZero = 0
    temperature: Temperature = 1.0
    not_causal = None  # no token sees a later one
    only_causal = None

    def check(self) -> None:
        require(
            0 <= self.experts_per_token <= self.num_experts,
            "experts_per_token",
            self.experts_per_token,
            f"between 0 (all) and num_experts = {self.num_experts}",
        )
        require(
            self.gate == "xlora" or not self.first_pass,
            "first_pass",
            self.first_pass,
            "False unless gate is 'xlora'",
        )
