"""The configuration of a model's output: how hidden states become probabilities and a loss."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from gatedjax.config.checks import Checked, NonNegative, Positive, Range, Size
from gatedjax.errors import require

OutputKind = Literal[
    "softmax",
    "stablemax",
    "sparsemax",
    "spherical",
    "noisy_softmax",
    "sphereface2",
    "fourier",
    "vq",
]


@dataclass(frozen=True)
class OutputConfig(Checked):
    """What stands in the place of softmax and cross-entropy at the output.

    Values other than `kind` are of the kinds that their comments name.
    """

    # softmax: cross-entropy. stablemax: cross-entropy of s(x) / sum s (arXiv 2501.04697).
    # sparsemax: the loss of probabilities with exact zeros (1602.02068); evaluation adds 1e-5 to
    # each of them, as a token that got none costs infinitely many bits. spherical: the Z-loss of
    # standardized logits (1604.08859). noisy_softmax: the target's logit is lowered at random in
    # training (1708.03769). sphereface2: a binary decision for each token of the vocabulary, on
    # cosines (2108.01513). fourier: the density of a Fourier series, at the vocabulary's places in
    # a row (2410.22269). vq: logits of codes that tokens share (2505.10202)
    kind: OutputKind = "softmax"
    # spherical: softplus(sharpness (offset - z)) / sharpness
    sharpness: Positive = 1.0
    offset: NonNegative = 10.0
    # noisy_softmax: alpha
    noise: NonNegative = 0.1
    # sphereface2: r, m, t, and lambda, the weight of the target's own decision
    cosine_scale: Positive = 30.0
    margin: NonNegative = 0.4
    power: Positive = 3.0
    positive_weight: Annotated[
        float,
        Range(
            0, 1, includes_low=False, includes_high=False, words="a fraction above 0 and below 1"
        ),
    ] = 0.7
    # fourier: N
    frequencies: Size = 16
    # fourier: weight of 4 pi^2 sum k^2 |c_k|^2, which keeps densities smooth
    smoothness: NonNegative = 0.0
    # vq: how many
    codes: Size = 64

    @property
    def has_own_head(self) -> bool:
        """Whether the output matrix has other rows than the vocabulary."""
        return self.kind in ("fourier", "vq")

    def rows(self, vocab_size: int) -> int:
        """Of the output matrix."""
        if self.kind == "fourier":
            return 2 * (self.frequencies + 1)
        if self.kind == "vq":
            return self.codes
        return vocab_size

    def first_bias(self, vocab_size: int) -> float:
        """The b at which SphereFace2's loss is least where all cosines are 0: b starts there."""
        odds = self.positive_weight / (1.0 - self.positive_weight) / max(vocab_size - 1.0, 1.0)
        start = 2.0 * 0.5**self.power - 1.0
        of_target = self.cosine_scale * (start - self.margin)
        of_others = self.cosine_scale * (start + self.margin)
        root = math.sqrt((1.0 - odds) ** 2 + 4.0 * odds * math.exp(of_target - of_others))
        return math.log(2.0 * odds) - of_others - math.log(1.0 - odds + root)

    def check_model(self, vocab_size: int, tie_embeddings: bool, z_loss: float) -> None:
        """InputError unless it goes with these values of the model.

        Args:
          vocab_size: 0 where it is not known yet.
          tie_embeddings: whether the embedding table is the output matrix.
          z_loss: the weight of PaLM's z-loss.
        """
        name = f"output.kind {self.kind!r}"
        require(
            self.kind == "softmax" or z_loss == 0,
            "z_loss",
            z_loss,
            f"0 with {name}",
        )
        require(
            not (self.has_own_head and tie_embeddings),
            "tie_embeddings",
            tie_embeddings,
            f"false with {name}",
        )
        require(
            self.kind != "vq" or vocab_size == 0 or self.codes <= vocab_size,
            "output.codes",
            self.codes,
            f"at most vocab_size = {vocab_size}",
        )
