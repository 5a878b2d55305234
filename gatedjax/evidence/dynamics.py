"""Every mixer as one dynamical system (arXiv 2405.15731), a head at a time, in float64.

    h_t = Lambda_t h_{t-1} + B_t v_t        y_t = C_t h_t + D_t v_t

with a state h [N, V], a matrix Lambda_t [N, N], vectors B_t and C_t [N] and a number D_t. What
tells mixers apart is what these are made from:

    linear attention     Lambda = 1                 B = k         C = q           D = 0
    RetNet, GLA          Lambda = decay             B = k         C = q
    RWKV-6               Lambda = decay             B = k         C = q, of h_{t-1}; D = q (u k)
    Mamba-2, S6          Lambda = exp(dt A)         B = dt B      C               D = D
    delta rule           Lambda = (1 - beta k k^T) decay          B = beta k      C = q
    any, row-normalized  C_t / (C_t n_t), where n_t is the state of v = 1
    softmax              Lambda = 1                 B = phi(k)    C = phi(q) / sum, D = 0

where phi(q) phi(k) = exp(q k) needs infinitely many channels: all powers of q. `softmax` has them
up to an order; `slots`, as the cache of keys does, has one channel for each token instead, and a
C_t that must be made from all of them.

S6 and a forget gate are one: dt = softplus(x) and A = -1 give Lambda = exp(-softplus(x)) =
sigmoid(-x), and B = softplus(x) k.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike


class System(NamedTuple):
    """A head's matrices, for every token."""

    transition: Float[np.ndarray, "T N N"]
    inputs: Float[np.ndarray, "T N"]
    outputs: Float[np.ndarray, "T N"]
    skip: Float[np.ndarray, " T"]


def run(system: System, v: Float[np.ndarray, "T V"]) -> Float[np.ndarray, "T V"]:
    """The outputs of the system, token by token."""
    state = np.zeros((system.inputs.shape[1], v.shape[1]))
    outputs = []
    for t in range(len(v)):
        state = system.transition[t] @ state + np.outer(system.inputs[t], v[t])
        outputs.append(system.outputs[t] @ state + system.skip[t] * v[t])
    return np.stack(outputs)


def mixing_matrix(system: System) -> Float[np.ndarray, "T T"]:
    """What token t takes of token s: C_t Lambda_t ... Lambda_{s+1} B_s, and D_t at t = s."""
    return run(system, np.eye(len(system.skip)))


def linear(
    q: ArrayLike,
    k: ArrayLike,
    log_decay: Float[np.ndarray, "T N"] | Float[np.ndarray, "T 1"] | None = None,
    bonus: Float[np.ndarray, " N"] | None = None,
) -> System:
    """Linear attention; RetNet and GLA by their decays, RWKV-6 by its bonus.

    Args:
      q: [T, N], with the scale, if there is one.
      k: [T, N], keys.
      log_decay: at most 0; None for none.
      bonus: u. The token is then read with it, and from the state before the token.
    """
    # Lists will do.
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    T, N = k.shape
    decay = np.ones((T, N)) if log_decay is None else np.broadcast_to(np.exp(log_decay), (T, N))
    transition = decay[:, :, None] * np.eye(N)
    skip = np.zeros(T)
    if bonus is not None:
        # C h_{t-1} = C (h_t with this token's k v left out), as none has decayed yet: the state
        # is shifted by a token.
        skip = np.sum(q * (bonus * k), axis=1)
        return _read_before(System(transition, k, q, skip))
    return System(transition, k, q, skip)


def _read_before(system: System) -> System:
    """The system whose C_t sees h_{t-1}: its state holds h_{t-1} beside h_t."""
    T, N = system.inputs.shape
    transition = np.zeros((T, 2 * N, 2 * N))
    transition[:, :N, :N] = system.transition
    # The second half is the first half as it was.
    transition[:, N:, :N] = np.eye(N)
    nothing = np.zeros((T, N))
    inputs = np.concatenate([system.inputs, nothing], axis=1)
    outputs = np.concatenate([nothing, system.outputs], axis=1)
    return System(transition, inputs, outputs, system.skip)


def state_space(
    dt: Float[np.ndarray, " T"],
    A: float | Float[np.ndarray, " N"],
    B: Float[np.ndarray, "T N"],
    C: Float[np.ndarray, "T N"],
    D: float = 0.0,
) -> System:
    """Mamba-2, whose A is a number; S6, whose A has one for each channel of the state.

    Args:
      dt: step sizes, above 0.
      A: below 0.
      B, C: of every token.
      D: of the skip.
    """
    rates = np.broadcast_to(A, B.shape[1:])
    system = linear(C, dt[:, None] * B, dt[:, None] * rates)
    return system._replace(skip=np.full(len(dt), D))


def delta(
    q: Float[np.ndarray, "T N"],
    k: Float[np.ndarray, "T N"],
    beta: Float[np.ndarray, " T"],
    log_decay: Float[np.ndarray, "T N"] | Float[np.ndarray, "T 1"] | None = None,
) -> System:
    """DeltaNet; Gated DeltaNet by a decay of one number, Kimi Delta Attention of one a channel.

    Args:
      q: with the scale.
      k: of length 1, if the rule is to erase.
      beta: how much of what a key finds is replaced.
      log_decay: at most 0, of the state before the token.
    """
    decayed = linear(q, k, log_decay)
    outer = k[:, :, None] * k[:, None, :]
    erase = np.eye(k.shape[1]) - beta[:, None, None] * outer
    return decayed._replace(
        transition=erase @ decayed.transition,
        inputs=beta[:, None] * k,
    )


def normalized(system: System) -> System:
    """The rows of the mixing matrix sum to 1; the skip is left as it is."""
    sums = run(system._replace(skip=np.zeros_like(system.skip)), np.ones((len(system.skip), 1)))
    return system._replace(outputs=system.outputs / sums)


def powers(x: Float[np.ndarray, "T K"], order: int) -> Float[np.ndarray, "T N"]:
    """phi: all products of up to `order` channels, so that phi(q) phi(k) = sum (q k)^n / n!."""
    features = [np.ones((len(x), 1))]
    for n in range(1, order + 1):
        outer = features[-1][:, :, None] * x[:, None, :]
        features.append(outer.reshape(len(x), -1) / np.sqrt(n))
    return np.concatenate(features, axis=1)


def softmax(q: Float[np.ndarray, "T K"], k: Float[np.ndarray, "T K"], order: int) -> System:
    """Softmax attention with exp cut off after a power of q k; `q` has the scale."""
    return normalized(linear(powers(q, order), powers(k, order)))


def slots(q: Float[np.ndarray, "T K"], k: Float[np.ndarray, "T K"]) -> System:
    """Softmax attention, exactly: a channel of the state for each token."""
    T = len(q)
    logits = np.where(np.tri(T, dtype=bool), q @ k.T, -np.inf)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    every = np.broadcast_to(np.eye(T), (T, T, T))
    return System(every, np.eye(T), weights, np.zeros(T))
