"""What pictures call the values and labels of a study: words, units, and which way is better."""

import math
from typing import NamedTuple

HIGHER = "higher is better"
LOWER = "lower is better"


class Words(NamedTuple):
    """Of a value.

    text: with its unit.
    better: which way; "" where neither is.
    low, high: no value is outside of these.
    """

    text: str
    better: str = ""
    low: float = -math.inf
    high: float = math.inf

    @property
    def label(self) -> str:
        """Of an axis."""
        return f"{self.text} ({self.better})" if self.better else self.text


def _fraction(text: str, better: str = "") -> Words:
    return Words(text, better, 0.0, 1.0)


_COSINE = (-1.0, 1.0)
# A name that ends in "@" is that of all columns that begin so.
WORDS = {
    "accuracy": _fraction("answers that are right, fraction", HIGHER),
    "active_on_first": _fraction("attention of triggers on the first token, fraction"),
    "batch": Words("rows of a batch"),
    "bits@": Words("loss on held-out text, bits per byte", LOWER),
    "bits_per_byte": Words("loss on held-out text, bits per byte", LOWER),
    "codes": Words("codes in place of 288 output rows"),
    "cosine": Words("cosine of the two groups' gradients", "", *_COSINE),
    "dormant_on_first": _fraction("attention of ordinary tokens on the first one, fraction", LOWER),
    "first_token_fraction": _fraction("attention on the first token, fraction", LOWER),
    "frobenius@": Words("cosine with the machine of the Frobenius norm", "", *_COSINE),
    "load_max_over_mean": Words("load of the busiest expert / mean load", LOWER, 1.0),
    "error@": Words("mean squared error", LOWER, 0.0),
    "loss of mean@": Words("loss of the mean of the two models, nats", LOWER, 0.0),
    "loss": Words("loss on what is held out, nats", LOWER),
    "loss@": Words("loss on held-out text, nats per byte", LOWER),
    "loss@40": Words("squared error on rows of 40 pairs, as in training", LOWER, 0.0),
    "loss@160": Words("squared error on rows of 160 pairs", LOWER, 0.0),
    "lr": Words("learning rate"),
    "mflop": Words("forward pass of a token, MFLOP", LOWER),
    "mean_reward": _fraction("reward of an answer, mean of all rounds, fraction", HIGHER),
    "nuclear@": Words("cosine with the machine of the nuclear norm", "", *_COSINE),
    "edge": Words("rate of descent / the highest stable one"),
    "rate": Words("learning rate"),
    "rates": Words("rates and width"),
    "state": Words("state of a layer, numbers"),
    "step": Words("step of descent"),
    "step_ms": Words("time of a training step, ms", LOWER),
    "steps": Words("steps until 0.95 of held-out sums are right", LOWER, 0.0),
    "tokens": Words("tokens of a row"),
    "tuned": Words("loss with codes, bits per byte", LOWER),
    "value_norm": Words("norm of the first token's value / mean norm of all others", "", 0.0),
    "temporary_mib": Words("temporary memory of a gradient, MiB", LOWER),
    "window": Words("length of the window, tokens"),
}


def words_of(name: str) -> Words:
    """What a label or a column is called; its own name where nothing is known of it."""
    return WORDS.get(name, Words(name.removesuffix("@")))
