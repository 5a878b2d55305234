"""A small policy-gradient loop on tasks whose reward a program checks, for SAPO and GRPO.

A policy of two layers of attention, from scratch, learns to reverse a string or to add two numbers.
The reward of an answer is the fraction of its tokens that are right. Each round samples a group of
answers to every prompt, then takes several steps on them: the later ones are off-policy, which is
what the clip and the gate are for.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int, PRNGKeyArray

from gatedjax.config import FrozenDict, GatedAttentionConfig, GatedMLPConfig, ModelConfig
from gatedjax.errors import require
from gatedjax.model import LanguageModel, head_weights
from gatedjax.model import logits as compute_logits
from gatedjax.sharding import RULES
from gatedjax.training.policy import group_advantages, grpo_objective, sapo_objective
from gatedjax.training.state import init_params

Task = Literal["reverse", "add"]
OBJECTIVES: dict[str, Callable[[Array, Array], Array]] = {
    "SAPO": sapo_objective,
    "GRPO": grpo_objective,
    # Without either: r A.
    "none": jnp.multiply,
}
# Tokens besides those of the task's alphabet: what separates prompt and answer.
SEPARATORS = 2


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of these sizes, to be called with a seed.

    objective: one of OBJECTIVES.
    letters: of the strings of `reverse`; `add` has ten digits.
    length: of a string, or digits of a number.
    prompts, answers: of a round: a group of answers to each prompt.
    steps: of the optimizer on the answers of a round, a part of them each.
    """

    task: Task = "reverse"
    objective: str = "SAPO"
    letters: int = 5
    length: int = 4
    rounds: int = 150
    prompts: int = 16
    answers: int = 16
    steps: int = 4
    lr: float = 2e-3
    width: int = 64

    def __post_init__(self) -> None:
        expected = f"one of {list(OBJECTIVES)}"
        require(self.objective in OBJECTIVES, "objective", self.objective, expected)

    def __call__(self, seed: int) -> dict[str, float]:
        return run_loop(self, seed)

    @property
    def symbols(self) -> int:
        return self.letters if self.task == "reverse" else 10

    @property
    def prompt_length(self) -> int:
        """Prompts end with a separator; the numbers of a sum have another between them."""
        return self.length + 1 if self.task == "reverse" else 2 * self.length + 2

    @property
    def answer_length(self) -> int:
        return self.length if self.task == "reverse" else self.length + 1


class Answers(NamedTuple):
    """Of a round: whole rows [N, T], the old policy's log-probabilities, advantages, rewards."""

    tokens: Int[Array, "N T"]
    log_probs: Float[Array, "N A"]
    advantages: Float[Array, " N"]
    rewards: Float[Array, " N"]


def run_loop(loop: Loop, seed: int) -> dict[str, float]:
    """Trains a policy: the mean reward of the last rounds, and how often it is right, greedily."""
    model = policy_model(loop)
    boxed = init_params(model, jax.random.key(seed))
    params: Any = nn.meta.unbox(boxed)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(loop.lr))
    opt_state = tx.init(params)
    rng = np.random.default_rng(seed)
    rewards = []
    fraction_cut = []
    for count in range(loop.rounds):
        prompts, right = problems(loop, rng, loop.prompts)
        key = jax.random.fold_in(jax.random.key(seed + 1), count)
        answers = answered(loop, model, params, prompts, right, key)
        rewards.append(float(jnp.mean(answers.rewards)))
        params, opt_state, cut = improved(
            loop,
            model,
            tx,
            (params, opt_state),
            answers,
        )
        fraction_cut.append(float(cut))
    prompts, right = problems(loop, rng, 256)
    greedy = sampled(loop, model, params, jnp.asarray(prompts), jax.random.key(0), 0.0)
    is_right = np.all(np.asarray(greedy)[:, loop.prompt_length :] == right, axis=1)
    last = max(1, loop.rounds // 10)
    return {
        "reward": float(np.mean(rewards[-last:])),
        "mean_reward": float(np.mean(rewards)),
        "solved": float(np.mean(is_right)),
        "off_policy": float(np.mean(fraction_cut)),
    }


def policy_model(loop: Loop) -> ModelConfig:
    """Two layers of attention."""
    attention = GatedAttentionConfig(num_heads=4, num_kv_heads=4, head_dim=loop.width // 4)
    return ModelConfig(
        vocab_size=loop.symbols + SEPARATORS,
        width=loop.width,
        num_layers=2,
        mixers=FrozenDict(attention=attention),
        ffns=FrozenDict(mlp=GatedMLPConfig(hidden=2 * loop.width)),
        init_std=0.05,
        dtype="float32",
        scan_layers=False,
    )


def problems(
    loop: Loop,
    rng: np.random.Generator,
    count: int,
) -> tuple[Int[np.ndarray, "N P"], Int[np.ndarray, "N A"]]:
    """Prompts and their right answers."""
    end = loop.symbols
    ends = np.full((count, 1), end)
    if loop.task == "reverse":
        strings = rng.integers(0, loop.symbols, (count, loop.length))
        return np.concatenate([strings, ends], axis=1), strings[:, ::-1]
    a, b = rng.integers(0, 10**loop.length, (2, count))
    parts = [_digits(a, loop.length), ends + 1, _digits(b, loop.length), ends]
    return np.concatenate(parts, axis=1), _digits(a + b, loop.length + 1)


def _digits(numbers: Int[np.ndarray, " N"], count: int) -> Int[np.ndarray, "N count"]:
    """Units first, as one adds."""
    return numbers[:, None] // 10 ** np.arange(count) % 10


def answered(
    loop: Loop,
    model: ModelConfig,
    params: Any,
    prompts: Int[np.ndarray, "N P"],
    right: Int[np.ndarray, "N A"],
    key: PRNGKeyArray,
) -> Answers:
    """A group of answers to each prompt, and what the program that checks them says.

    Args:
      loop: its sizes.
      model: the policy's configuration.
      params: the policy.
      prompts: of the round.
      right: their answers.
      key: of the samples.
    """
    rows = jnp.asarray(np.repeat(prompts, loop.answers, axis=0))
    tokens = sampled(loop, model, params, rows, key, 1.0)
    log_probs = answer_log_probs(loop, model, params, tokens)
    expected = np.repeat(right, loop.answers, axis=0)
    rewards = jnp.mean(tokens[:, loop.prompt_length :] == expected, axis=1)
    groups = rewards.reshape(-1, loop.answers)
    advantages = group_advantages(groups).ravel()
    return Answers(tokens, log_probs, advantages, rewards)


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def sampled(
    loop: Loop,
    model: ModelConfig,
    params: Any,
    prompts: Int[Array, "N P"],
    key: PRNGKeyArray,
    temperature: float,
) -> Int[Array, "N T"]:
    """Prompts with an answer each, token by token; the most likely one at temperature 0."""
    rows = prompts.shape[0]
    tokens = jnp.concatenate([prompts, jnp.zeros((rows, loop.answer_length), int)], axis=1)
    for i in range(loop.answer_length):
        at = loop.prompt_length + i
        logits = _logits(model, params, tokens)[:, at - 1, : loop.symbols]
        if temperature:
            drawn = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
        else:
            drawn = jnp.argmax(logits, axis=-1)
        tokens = tokens.at[:, at].set(drawn)
    return tokens


@functools.partial(jax.jit, static_argnums=(0, 1))
def answer_log_probs(
    loop: Loop,
    model: ModelConfig,
    params: Any,
    tokens: Int[Array, "N T"],
) -> Float[Array, "N A"]:
    """The policy's log-probabilities of the answers' tokens, among the task's symbols."""
    first = loop.prompt_length
    logits = _logits(model, params, tokens)[:, first - 1 : -1, : loop.symbols]
    answers = tokens[:, first:, None]
    return jnp.take_along_axis(jax.nn.log_softmax(logits), answers, axis=-1)[..., 0]


def _logits(model: ModelConfig, params: Any, tokens: Int[Array, "N T"]) -> Float[Array, "N T X"]:
    with nn.logical_axis_rules(RULES):
        outputs: Any = LanguageModel(model).apply({"params": params}, tokens)
    return compute_logits(outputs[0], head_weights(params))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def improved(
    loop: Loop,
    model: ModelConfig,
    tx: optax.GradientTransformation,
    state: tuple[Any, Any],
    answers: Answers,
) -> tuple[Any, Any, Float[Array, ""]]:
    """The policy after a round's steps, and the part of its tokens whose ratio left 1 +- 0.2.

    Args:
      loop: its sizes.
      model: the policy's configuration.
      tx: the optimizer.
      state: parameters, and the optimizer's state.
      answers: of the round.
    """

    def loss(params: Any, part: Answers) -> tuple[Array, Array]:
        log_probs = answer_log_probs(loop, model, params, part.tokens)
        ratio = jnp.exp(log_probs - part.log_probs)
        gained = OBJECTIVES[loop.objective](ratio, part.advantages[:, None])
        return -jnp.mean(gained), jnp.mean(jnp.abs(ratio - 1.0) > 0.2)

    def step(state: tuple[Any, Any], part: Answers) -> tuple[tuple[Any, Any], Array]:
        params, opt_state = state
        (_, away), grads = jax.value_and_grad(loss, has_aux=True)(params, part)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), away

    def cut(x: Array) -> Array:
        # Every part has answers of all groups.
        parts = x.reshape(-1, loop.steps, *x.shape[1:])
        return jnp.moveaxis(parts, 1, 0)

    (params, opt_state), away = jax.lax.scan(step, state, jax.tree.map(cut, answers))
    return params, opt_state, jnp.mean(away)
