"""Objectives of policy gradients over groups of answers: SAPO's gate beside GRPO's clip.

An answer's advantage is its reward, standardized within the answers to the same prompt. Both
objectives weigh tokens by the ratio r of the policy's probability to that of the policy which wrote
the answer. GRPO (arXiv 2402.03300) cuts r off at 1 +- epsilon. SAPO (2511.20347) has a sigmoid in
its place, f(r) = 4 / tau sigmoid(tau (r - 1)): its slope 4 s (1 - s) = sech^2(tau (r - 1) / 2) is 1
at r = 1 and falls smoothly on both sides, faster for answers that were worse than others.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

# tau of answers that were better than their group, and of those that were not.
TAU_POSITIVE = 1.0
TAU_NEGATIVE = 1.05
# GRPO's epsilon.
CLIP = 0.2
# Added to the deviation of a group's rewards.
LEAST_DEVIATION = 1e-6


def group_advantages(rewards: Float[Array, "prompts answers"]) -> Float[Array, "prompts answers"]:
    """Rewards less their group's mean, over its deviation; zeros where all are equal."""
    centered = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    return centered / (jnp.std(rewards, axis=1, keepdims=True) + LEAST_DEVIATION)


def sapo_gate(
    ratio: Float[Array, "..."],
    advantage: Float[Array, "..."],
    tau_positive: float = TAU_POSITIVE,
    tau_negative: float = TAU_NEGATIVE,
) -> Float[Array, "..."]:
    """f(r) of SAPO.

    Args:
      ratio: r of each token.
      advantage: of each token's answer; its sign chooses tau.
      tau_positive: for answers better than their group.
      tau_negative: for the others.
    """
    tau = jnp.where(advantage > 0, tau_positive, tau_negative)
    return 4.0 / tau * jax.nn.sigmoid(tau * (ratio - 1.0))


def sapo_objective(
    ratio: Float[Array, "..."],
    advantage: Float[Array, "..."],
    tau_positive: float = TAU_POSITIVE,
    tau_negative: float = TAU_NEGATIVE,
) -> Float[Array, "..."]:
    """f(r) A of each token: to be maximized.

    Args:
      ratio: r of each token.
      advantage: A of each token's answer.
      tau_positive: for answers better than their group.
      tau_negative: for the others.
    """
    return sapo_gate(ratio, advantage, tau_positive, tau_negative) * advantage


def grpo_objective(
    ratio: Float[Array, "..."],
    advantage: Float[Array, "..."],
    clip: float = CLIP,
) -> Float[Array, "..."]:
    """min(r A, clip(r) A) of each token: to be maximized."""
    clipped = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
    return jnp.minimum(ratio * advantage, clipped * advantage)
