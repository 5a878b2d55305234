"""Generation that stops early: a token whose exit is taken goes through no further feed-forward.

The layers run one after the other, and the host looks at each exit's prediction. Layers past the
exit that is taken only note the token in their caches, from the residual stream as it left: later
tokens see it there (as in CALM, arXiv 2207.07061). One row, the likeliest token each time.
"""

import dataclasses
import functools
import operator
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, PyTree

from gatedjax.config import BlockConfig, ModelConfig
from gatedjax.errors import require
from gatedjax.evaluation.exits import (
    DepthGate,
    Exits,
    depth_logits,
    exit_logits,
    features,
    gate_values,
)
from gatedjax.layers.block import Block, init_block_cache
from gatedjax.layers.norm import RMSNorm
from gatedjax.layers.token_info import History, TokenInfo, arranged, empty_history
from gatedjax.layers.token_rows import token_rows
from gatedjax.model import head_weights, logits

# Generations of which the median time counts.
REPEATS = 3


class Generated(NamedTuple):
    """A continuation and what it took.

    tokens: the new ones.
    exits: which exit each of them left at; as many as there are exits for the end.
    flops: of a token, as XLA counts the programs that ran for it.
    seconds: of CPU time of this process for all of them, the prompt and compiling not among them;
      the median of several times.
    """

    tokens: list[int]
    exits: list[int]
    flops: float
    seconds: float


def require_simple(config: ModelConfig) -> None:
    """InputError for a model whose layers pass more to each other than the residual stream."""
    passed = {
        "routers with a gating residual": config.router_residual > 0,
        "layers that start by depth": config.starts_by_depth,
        "shared attention weights": config.shares_weights,
        "keys and values of another layer": config.shares_cache,
        "gated memory units": config.shares_memory,
        "a value bank": config.value_bank is not None,
        "a first pass": config.first_pass is not None,
        "a router before all layers": config.router_model is not None,
        "a norm of its embeddings": config.embedding_norm,
        "low-rank updates": config.lora.rank > 0,
        "LayerNorm": config.norm_kind != "rms",
    }
    for what, is_there in passed.items():
        require(not is_there, "--checkpoint", f"a model with {what}", "one without, for exits")


class EarlyExit:
    """Decodes one row, token by token and layer by layer."""

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Any],
        exits: Exits,
        layers: tuple[int, ...],
        by_gate: bool = False,
        depth: DepthGate | None = None,
    ):
        """Args:
        config: of the model.
        params: of it.
        exits: their parameters.
        layers: after how many layers each exit is; none for the model as it is.
        by_gate: whether gates decide, not the probability of the likeliest token.
        depth: a gate that chooses the depth, and decides alone.
        """
        require_simple(config)
        self._config = config
        self._params = params
        self._exits = exits
        self._layers = layers
        self._by_gate = by_gate
        self._depth = depth
        self._blocks: list[tuple[BlockConfig, PyTree]] = []
        for layer in range(config.num_layers):
            self._blocks.append(_of_layer(config, params, layer))
        self._flops: dict[Any, float] = {}

    def generate(
        self,
        prompt: list[int],
        count: int,
        thresholds: Float[np.ndarray, " E"],
    ) -> Generated:
        """The prompt, whole, and then `count` tokens.

        Args:
          prompt: ids of its tokens.
          count: how many are wanted.
          thresholds: of the exits; infinite ones let no token leave before the end.
        """
        length = len(prompt) + count
        # Once for the programs, with caches of the same size: what compiles here is not timed.
        for limit in (np.inf, -np.inf):
            self._continue(prompt, 3, np.full(len(self._layers), limit), length)
        times = [self._continue(prompt, count, thresholds, length) for _ in range(REPEATS)]
        return sorted(times, key=operator.attrgetter("seconds"))[REPEATS // 2]

    def _continue(
        self,
        prompt: list[int],
        count: int,
        thresholds: Float[np.ndarray, " E"],
        length: int,
    ) -> Generated:
        caches = []
        for block, _ in self._blocks:
            caches.append(init_block_cache(self._config, block, 1, length))
        history = empty_history(1)
        info, history = self._info(jnp.asarray([prompt], jnp.int32), history)
        x = self._embedded(jnp.asarray([prompt], jnp.int32))
        for layer in range(len(self._blocks)):
            x, caches[layer] = self._run(layer, x, info, caches[layer])
        token = int(self._last(x[:, -1:]))
        tokens = [token]
        places = [len(self._layers)]
        spent = 0.0
        start = time.process_time()
        while len(tokens) < count:
            ids = jnp.asarray([[token]], jnp.int32)
            info, history = self._info(ids, history)
            x = self._embedded(ids)
            place = len(self._layers)
            # Where a gate of the depth says that the token leaves.
            wanted = None
            for layer in range(len(self._blocks)):
                if place < len(self._layers):
                    caches[layer] = self._note(layer, x, info, caches[layer])
                    spent += self._flops["note", layer]
                    continue
                x, caches[layer] = self._run(layer, x, info, caches[layer])
                spent += self._flops["run", layer]
                if layer + 1 not in self._layers:
                    continue
                index = self._layers.index(layer + 1)
                if self._depth is not None:
                    if wanted is None:
                        wanted = int(self._wanted(self._depth, x))
                        spent += self._flops["depth"]
                    if index != wanted:
                        continue
                value, likeliest = self._exit(index, x)
                spent += self._flops["exit", index]
                if self._depth is not None or float(value) >= thresholds[index]:
                    place = index
                    token = int(likeliest)
            if place == len(self._layers):
                token = int(self._last(x))
                spent += self._flops["last"]
            tokens.append(token)
            places.append(place)
        seconds = time.process_time() - start
        steps = max(len(tokens) - 1, 1)
        return Generated(tokens, places[1:], spent / steps, seconds)

    def _info(self, tokens: Int[Array, "1 T"], history: History) -> tuple[TokenInfo, History]:
        arrangement = arranged(tokens, before=history)
        assert arrangement.after is not None
        return arrangement.info, arrangement.after

    def _embedded(self, tokens: Int[Array, "1 T"]) -> Float[Array, "1 T M"]:
        return token_rows(self._params["embedding"], tokens, None, self._config.dtype)

    def _run(self, layer: int, x: Array, info: TokenInfo, cache: Any) -> tuple[Array, Any]:
        block, params = self._blocks[layer]
        arguments = (self._config, block, params, x, info, cache)
        self._count(("run", layer), _through_block, arguments, x.shape[1])
        return _through_block(*arguments)

    def _note(self, layer: int, x: Array, info: TokenInfo, cache: Any) -> Any:
        block, params = self._blocks[layer]
        arguments = (self._config, block, params, x, info, cache)
        self._count(("note", layer), _noted, arguments, x.shape[1])
        return _noted(*arguments)

    def _wanted(self, gate: DepthGate, x: Array) -> Array:
        arguments = (self._config.norm_eps, gate, x)
        self._count("depth", _chosen_depth, arguments, 1)
        return _chosen_depth(*arguments)

    def _exit(self, index: int, x: Array) -> tuple[Array, Array]:
        arguments = (
            self._config.norm_eps,
            index,
            self._by_gate,
            self._exits,
            head_weights(self._params),
            x,
        )
        self._count(("exit", index), _at_exit, arguments, 1)
        return _at_exit(*arguments)

    def _last(self, x: Array) -> Array:
        arguments = (self._config, self._params["final_norm"], head_weights(self._params), x)
        self._count("last", _at_end, arguments, 1)
        return _at_end(*arguments)

    def _count(self, key: Any, program: Any, arguments: tuple, tokens: int) -> None:
        """Notes what XLA counts for a program that takes one token."""
        if key in self._flops or tokens != 1:
            return
        analysis = program.lower(*arguments).compile().cost_analysis()
        self._flops[key] = float(analysis.get("flops", 0.0))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _through_block(
    config: ModelConfig,
    block: BlockConfig,
    params: PyTree,
    x: Array,
    info: TokenInfo,
    cache: Any,
) -> tuple[Array, Any]:
    module = Block(config, block)
    outputs: Any = module.apply({"params": params}, x, info, cache, None, None)
    return outputs[0], outputs[3]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _noted(
    config: ModelConfig,
    block: BlockConfig,
    params: PyTree,
    x: Array,
    info: TokenInfo,
    cache: Any,
) -> Any:
    """The cache alone: XLA leaves out all that it does not need."""
    _, cache = _through_block(config, block, params, x, info, cache)
    return cache


@functools.partial(jax.jit, static_argnums=0)
def _chosen_depth(eps: float, gate: DepthGate, x: Float[Array, "1 1 M"]) -> Array:
    return jnp.argmax(depth_logits(gate, x[0, 0], eps))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _at_exit(
    eps: float,
    index: int,
    by_gate: bool,
    exits: Exits,
    weights: Float[Array, "X M"],
    x: Float[Array, "1 1 M"],
) -> tuple[Array, Array]:
    """What decides, and the likeliest token."""
    predicted = exit_logits(x[0, 0], exits.scale[index], weights, eps)
    numbers = features(predicted)
    value = gate_values(exits, index, numbers) if by_gate else numbers[0]
    return value, jnp.argmax(predicted)


@functools.partial(jax.jit, static_argnums=0)
def _at_end(
    config: ModelConfig,
    params: PyTree,
    weights: Float[Array, "X M"],
    x: Float[Array, "1 1 M"],
) -> Array:
    """The likeliest token after all layers."""
    norm = RMSNorm(config.norm_eps, config.zero_centered_norm)
    normed: Any = norm.apply({"params": params}, x)
    return jnp.argmax(logits(normed[0, 0], weights))


def _of_layer(
    config: ModelConfig,
    params: Mapping[str, Any],
    layer: int,
) -> tuple[BlockConfig, PyTree]:
    """The block of a layer and its parameters. Layers that are alike have equal blocks."""
    for block in config.blocks:
        if layer not in block.layers:
            continue
        # One program for all layers of its kind.
        alone = dataclasses.replace(block, name="block", layers=range(1), is_repeated=False)
        if not block.is_repeated:
            return alone, params[block.name]
        period = list(block.layers).index(layer)
        stacked = params["periods"][block.name]
        return alone, jax.tree.map(operator.itemgetter(period), stacked)
    raise ValueError(f"layer: got {layer}, expected below {config.num_layers}")
