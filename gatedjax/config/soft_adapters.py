"""The configuration of small experts beside a feed-forward."""

from dataclasses import dataclass

from gatedjax.config.checks import Checked, Size, SizeOrZero
from gatedjax.errors import require


@dataclass(frozen=True)
class SoftAdaptersConfig(Checked):
    """A soft mixture of bottlenecks that is added to a feed-forward (Soft-MoA, arXiv 2402.00828).

    Their last matrices start from 0. Off where their number is 0.
    """

    number: SizeOrZero = 0
    # slots of each: weighted means of all tokens of a document; 0: an ordinary adapter, every token
    # goes through all bottlenecks
    slots: SizeOrZero = 1
    # channels of the bottleneck
    hidden: Size = 16
    # cosines of tokens and slots times a learned scale, as in soft_moe; false: their products
    normalize: bool = False

    def check(self) -> None:
        is_good = self.slots > 0 or not self.normalize
        require(is_good, "normalize", self.normalize, "False with slots = 0, which have no logits")

    @property
    def not_causal(self) -> str | None:
        """Why a causal model cannot have them, or None."""
        if not self.number or not self.slots:
            return None
        return "adapters: every slot is a mean over all tokens, later ones too"
