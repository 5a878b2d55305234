"""The configuration of small experts beside a feed-forward."""

from dataclasses import dataclass

from gatedjax.config.checks import Checked, Size, SizeOrZero


@dataclass(frozen=True)
class SoftAdaptersConfig(Checked):
    """A soft mixture of bottlenecks that is added to a feed-forward (Soft-MoA, arXiv 2402.00828).

    Their last matrices start from 0. Off where their number is 0.
    """

    number: SizeOrZero = 0
    # slots of each: weighted means of all tokens of a document
    slots: Size = 1
    # channels of the bottleneck
    hidden: Size = 16
    # cosines of tokens and slots times a learned scale, as in soft_moe; false: their products
    normalize: bool = False

    @property
    def not_causal(self) -> str | None:
        """Why a causal model cannot have them, or None."""
        if not self.number:
            return None
        return "adapters: every slot is a mean over all tokens, later ones too"
