"""Low-rank updates of projections."""

from dataclasses import dataclass

from gatedjax.config.checks import (
    Checked,
    Fraction,
    Positive,
    SizeOrZero,
)
from gatedjax.config.router import Temperature
from gatedjax.errors import require


@dataclass(frozen=True)
class LoRAConfig(Checked):
    """Low-rank updates of projections (LoRA, arXiv 2106.09685): `x W + (alpha / rank) x A B`.

    A and B train, and beside them only what `optim.trainable` names. Off where the rank is 0.
    """

    rank: SizeOrZero = 0
    alpha: Positive = 16.0
    # patterns of projections: "*.mixer.query", "*.ffn.*", "*"
    targets: tuple[str, ...] = ()
    # W itself, as the targets use it, is -1, 0 or 1 times its mean magnitude; it trains as if it
    # were not rounded (BitNet b1.58, arXiv 2402.17764)
    ternary: bool = False
    # What those W are multiplied with has 8 bits: 255 steps between a token's largest magnitude and
    # its negative. Updates see it as it is.
    eight_bit_inputs: bool = False
    # Updates are multiplied by a learned number of each projection, which starts here (Hybrid Gated
    # Flow, arXiv 2602.05269); 0: by none.
    gate_start: Fraction = 0.0
    # E updates of each projection, weighted token by token and layer by layer by
    # softmax(h W / temperature), h of a first pass without updates (X-LoRA, arXiv 2402.07148);
    # 0: one. The W are `lora_classifier`, which only `optim.trainable` trains, as with it A and B.
    num_experts: SizeOrZero = 0
    # 0: all
    experts_per_token: SizeOrZero = 0
    temperature: Temperature = 1.0

    def check(self) -> None:
        require(
            self.rank > 0 or not self.targets,
            "rank",
            self.rank,
            f"at least 1 with targets = {self.targets}",
        )
        require(
            len(self.targets) > 0 or not self.rank,
            "targets",
            self.targets,
            f"at least one pattern with rank = {self.rank}",
        )
        require(
            self.ternary or not self.eight_bit_inputs,
            "eight_bit_inputs",
            self.eight_bit_inputs,
            "false without ternary",
        )
        require(
            self.rank > 0 or not self.num_experts,
            "rank",
            self.rank,
            f"at least 1 with num_experts = {self.num_experts}",
        )
        require(
            self.experts_per_token <= self.num_experts,
            "experts_per_token",
            self.experts_per_token,
            f"between 0 (all) and num_experts = {self.num_experts}",
        )
