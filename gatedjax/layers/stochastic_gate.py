"""Gates that are on or off at random, and gradients through them, as pure functions in float32.

A gate's logits a are those of p = sigmoid(a). A sample has no gradient by a; here are the ways to
one, of arXiv 1308.3432 (Bengio, Leonard and Courville) and 1611.01144 (Gumbel-softmax):

  bernoulli_gate            a bit; backward the gradient by the bit goes straight through: biased
  likelihood_ratio          the same bits, no gradient through what they gate: unbiased, and of the
                            least variance with `Baseline`
  stochastic_times_smooth   a bit times a smooth function: 0, or sqrt(p)
  noisy_rectifier           max(0, a + noise): an ordinary gradient where it is not 0
  gumbel_softmax            a category: softmax of noisy logits, or its largest, straight through

docs/layers/stochastic_gates.md shows their bias and variance.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from gatedjax.errors import require

Slope = Literal["one", "sigmoid"]
Noise = Literal["logistic", "normal"]


def straight_through(
    forward: Float[Array, "..."] | float,
    backward: Float[Array, "..."],
) -> Float[Array, "..."]:
    """The value of `forward` and the gradient of `backward`."""
    # The difference first: it is exactly 0.
    return forward + (backward - jax.lax.stop_gradient(backward))


def with_gumbel_noise(
    key: Array,
    logits: Float[Array, "... E"],
    temperature: Float[Array, ""] | float,
) -> Float[Array, "... E"]:
    """`(h + g) / temperature` of logits `h / temperature`, float32.

    The noise is divided too, so the largest is drawn by softmax(h) at any temperature.

    Args:
      key: of the noise.
      logits: already divided by the temperature.
      temperature: what they were divided by.
    """
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)
    return logits.astype(jnp.float32) + noise / temperature


def gumbel_softmax(
    key: Array,
    logits: Float[Array, "... E"],
    temperature: Float[Array, ""] | float = 1.0,
    *,
    hard: bool = False,
) -> Float[Array, "... E"]:
    """A sample of softmax(logits): `softmax((logits + g) / temperature)` (arXiv 1611.01144).

    Args:
      key: of the noise.
      logits: of the categories.
      temperature: low ones are near to a category, and their gradients vary more. It may change
        over training (`annealed_temperature`); which category is the largest does not depend on it.
      hard: the largest is 1 and the others 0 going forward; going backward as if not.

    Raises:
      InputError: a temperature that is not above 0, if it is a number.
    """
    if isinstance(temperature, int | float):
        require(temperature > 0, "temperature", temperature, "a number above 0")
    scaled = logits.astype(jnp.float32) / temperature
    soft = jax.nn.softmax(with_gumbel_noise(key, scaled, temperature), axis=-1)
    if not hard:
        return soft
    largest = jax.nn.one_hot(jnp.argmax(soft, axis=-1), soft.shape[-1], dtype=soft.dtype)
    return straight_through(largest, soft)


def hard_choice(
    key: Array | None,
    logits: Float[Array, "... E"],
    temperature: Float[Array, ""] | float = 1.0,
) -> Float[Array, "... E"]:
    """One-hot: a hard Gumbel softmax with a key, the largest without one (evaluation).

    Args:
      key: of the noise, or None.
      logits: of the categories.
      temperature: of the softmax that the gradient goes through.
    """
    if key is not None:
        return gumbel_softmax(key, logits, temperature, hard=True)
    return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.float32)


def annealed_temperature(
    step: ArrayLike,
    start: float,
    end: float,
    steps: int,
) -> Float[Array, ""]:
    """From `start` to `end`, by the same factor every step, until `steps`.

    Args:
      step: of the training, from 0.
      start, end: temperatures above 0.
      steps: from then on it is `end`.
    """
    done = jnp.clip(jnp.asarray(step).astype(jnp.float32) / steps, 0.0, 1.0)
    ratio = end / start
    return start * ratio**done


def bernoulli_gate(
    key: Array,
    gate_logits: Float[Array, "..."],
    slope: Slope = "sigmoid",
) -> Float[Array, "..."]:
    """Bits that are 1 with probability sigmoid(gate_logits); going backward, straight through.

    Args:
      key: of the draw.
      gate_logits: a.
      slope: what stands for dh / da going backward: "one", or "sigmoid", the slope of the sigmoid.

    Raises:
      InputError: an unknown slope.
    """
    logits = gate_logits.astype(jnp.float32)
    surrogates = {"one": logits, "sigmoid": jax.nn.sigmoid(logits)}
    require(slope in surrogates, "slope", slope, f"one of {list(surrogates)}")
    return straight_through(_bits(key, logits), surrogates[slope])


class Baseline(NamedTuple):
    """Moving means of which the least-variance baseline of every unit is the quotient.

    Attributes:
      weighted: of (h - p)^2 L.
      weight: of (h - p)^2.
    """

    weighted: Float[Array, " n"]
    weight: Float[Array, " n"]

    @property
    def value(self) -> Float[Array, " n"]:
        """E[(h - p)^2 L] / E[(h - p)^2]; 0 before the first update."""
        return self.weighted / jnp.where(self.weight == 0, 1, self.weight)


def first_baseline(units: int) -> Baseline:
    """The one before the first step."""
    return Baseline(jnp.zeros(units, jnp.float32), jnp.zeros(units, jnp.float32))


def updated_baseline(
    baseline: Baseline,
    bits: Float[Array, "*rows n"],
    gate_logits: Float[Array, "*rows n"],
    losses: Float[Array, "*rows"],
    decay: float = 0.9,
) -> Baseline:
    """The baseline for the next step: one of this step's own draws would bias its gradient.

    Args:
      baseline: of the steps before.
      bits: h.
      gate_logits: a.
      losses: L, one for each row of bits.
      decay: of the moving means, in [0, 1).
    """
    logits = jax.lax.stop_gradient(gate_logits.astype(jnp.float32))
    weight = jnp.square(jax.lax.stop_gradient(bits) - jax.nn.sigmoid(logits))
    weighted = weight * jax.lax.stop_gradient(losses)[..., None]
    rows = tuple(range(weight.ndim - 1))
    return Baseline(
        decay * baseline.weighted + (1 - decay) * jnp.mean(weighted, rows),
        decay * baseline.weight + (1 - decay) * jnp.mean(weight, rows),
    )


def likelihood_ratio(
    bits: Float[Array, "*rows n"],
    gate_logits: Float[Array, "*rows n"],
    losses: Float[Array, "*rows"],
    baseline: Float[Array, " n"] | float = 0.0,
) -> Float[Array, "*rows"]:
    """Zeros whose gradient by the gate's logits is (h - p) (L - baseline): unbiased.

    To be added to the losses, which are then differentiated as they are:

        bits = jax.lax.stop_gradient(bernoulli_gate(key, gate_logits))
        losses = loss_of(bits)
        total = jnp.mean(losses + likelihood_ratio(bits, gate_logits, losses, baseline.value))

    Without bias for any baseline that does not depend on these bits; of the least variance with
    that of `Baseline` (arXiv 1308.3432, section 4).

    Args:
      bits: h, drawn by `gate_logits`; no gradient goes through them.
      gate_logits: a.
      losses: L, one for each row of bits.
      baseline: of every unit.
    """
    logits = gate_logits.astype(jnp.float32)
    fixed_bits = jax.lax.stop_gradient(bits)
    # The slope of log p(h), h a - log(1 + e^a), is h - p.
    log_probability = fixed_bits * logits - jax.nn.softplus(logits)
    advantage = jax.lax.stop_gradient(losses[..., None] - baseline)
    return jnp.sum(advantage * straight_through(0.0, log_probability), axis=-1)


def stochastic_times_smooth(
    key: Array,
    gate_logits: Float[Array, "..."],
) -> Float[Array, "..."]:
    """h = b sqrt(p), where b is 1 with probability sqrt(p), p = sigmoid(gate_logits).

    Its mean is p. The gradient is that of the smooth factor, where b is 1.
    """
    root = jnp.exp(0.5 * jax.nn.log_sigmoid(gate_logits.astype(jnp.float32)))
    is_on = jax.random.bernoulli(key, jax.lax.stop_gradient(root))
    return jnp.where(is_on, root, 0.0)


def noisy_rectifier(
    key: Array,
    gate_logits: Float[Array, "..."],
    noise: Noise = "logistic",
) -> Float[Array, "..."]:
    """max(0, gate_logits + noise).

    Args:
      key: of the noise.
      gate_logits: a.
      noise: "logistic": it is above 0 with probability sigmoid(a), and its mean is log(1 + e^a);
        "normal": of variance 1.

    Raises:
      InputError: an unknown noise.
    """
    draws = {"logistic": jax.random.logistic, "normal": jax.random.normal}
    require(noise in draws, "noise", noise, f"one of {list(draws)}")
    drawn = draws[noise](key, gate_logits.shape, jnp.float32)
    return jax.nn.relu(gate_logits.astype(jnp.float32) + drawn)


def _bits(key: Array, logits: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 with probability sigmoid(logits), else 0."""
    p = jax.lax.stop_gradient(jax.nn.sigmoid(logits))
    return jax.random.bernoulli(key, p).astype(jnp.float32)
