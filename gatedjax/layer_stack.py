"""Blocks one after another: the period of the layer pattern, scanned.

And what of it the backward pass finds in memory (`ModelConfig.remat`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_policies

from gatedjax.config import ModelConfig
from gatedjax.layers import TokenInfo
from gatedjax.layers.added_losses import ADDED_LOSSES
from gatedjax.layers.block import (
    STREAM_NAME,
    Block,
    Stream,
)
from gatedjax.layers.depth import Depth
from gatedjax.layers.gate_values import COLLECTION
from gatedjax.layers.moe.exchange_ragged import DISPATCHED_NAME
from gatedjax.layers.projection import OUT_NAME as PROJECTION_NAME
from gatedjax.ops import RESIDUAL_NAMES
from kernels_pallas.attention.xla import QUERIES_AND_KEYS_NAME
from kernels_pallas.common.norm import ROOT_NAME
from kernels_pallas.rotary.tpu.op import ANGLES_NAME

# What goes from layer to layer: (x, router logits, depth).
Carry = tuple[Stream, Array | None, Depth | None]


def periods_of(c: ModelConfig, training: bool = False, draws: bool = True) -> nn.Module:
    """All layers but prefix and suffix, as a module "periods".

    (carry, info, LoRA weights, caches) -> (the carry, (caches, statistics)), with the carry (x,
    router logits, depth). The weights of low-rank experts are those of a first pass
    (`first_pass.weights_by_block`), or None.

    Args:
      c: the model's configuration.
      training: as of `LanguageModel`.
      draws: whether layers draw random numbers, to begin with or for routers with noise.
    """
    period = Period
    if c.num_periods > 1:
        period = rematerialized(c, Period, is_in_loop=c.scan_layers)
    # Parameters and what is recorded get an axis of periods in front; caches and the weights of
    # low-rank experts are cut along theirs.
    scanned = nn.scan(
        period,
        variable_axes={"params": 0, COLLECTION: 0, ADDED_LOSSES: 0},
        split_rngs={"params": True, "router": True},
        in_axes=(nn.broadcast, 0, 0),
        length=c.num_periods,
        unroll=1 if c.scan_layers else c.num_periods,
        metadata_params={nn.PARTITION_NAME: "layers"},
        # The check traces all layers once more. It stays where numbers are drawn: those of the
        # second time are others, and seeds must go on giving what they gave.
        check_constancy_invariants=draws,
    )
    return scanned(c, training, name="periods")


class Period(nn.Module):
    """The layers after which the pattern repeats.

    One is compiled; `nn.scan` runs it num_periods times.
    """

    config: ModelConfig
    training: bool = False

    @nn.compact
    def __call__(
        self,
        carry: Carry,
        info: TokenInfo,
        lora_weights: dict[str, Array] | None,
        caches: dict[str, Any] | None,
    ) -> tuple[Carry, tuple[dict[str, Any] | None, dict[str, dict[str, Array]]]]:
        """(carry, info, LoRA weights, caches) -> (the carry, (caches, statistics))."""
        c = self.config
        # A pattern that does not repeat is computed again layer by layer, others by period.
        module = Block
        if c.num_periods == 1:
            module = rematerialized(c, Block)
        new_caches = {}
        statistics = {}
        for block in c.repeated_blocks:
            name = block.name
            carry, new_caches[name], statistics[name], info = through_block(
                module(c, block, self.training, name=name),
                carry,
                info,
                None if lora_weights is None else lora_weights.get(name),
                None if caches is None else caches[name],
            )
        if caches is None:
            return carry, (None, statistics)
        return carry, (new_caches, statistics)


def through_block(
    module: nn.Module,
    carry: Carry,
    info: TokenInfo,
    lora_weights: Array | None,
    cache: Any,
) -> tuple[Carry, Any, dict[str, Array], TokenInfo]:
    """(carry, cache, statistics, what the next block is told) of one block."""
    x, router_logits, depth = carry
    info_of_block = info
    if lora_weights is not None:
        info_of_block = dataclasses.replace(info, lora_weights=lora_weights)
    x, router_logits, depth, cache, statistics, handed_on = module(
        x,
        info_of_block,
        cache,
        router_logits,
        depth,
    )
    if handed_on:
        info = dataclasses.replace(info, **handed_on)
    return (x, router_logits, depth), cache, statistics, info


def of_period(c: ModelConfig, by_block: dict[str, Any] | None) -> dict[str, Any] | None:
    """What there is for the blocks of the period."""
    if by_block is None:
        return None
    names = {block.name for block in c.repeated_blocks}
    return {name: value for name, value in by_block.items() if name in names}


def rematerialized(
    c: ModelConfig,
    module: type[nn.Module],
    is_in_loop: bool = False,
) -> type[nn.Module]:
    """The module, of which the backward pass finds in memory what `c.remat` says."""
    if c.remat == "none":
        return module
    # Outside a loop XLA would merge what is computed again with what was computed first, and keep
    # it after all.
    return nn.remat(module, prevent_cse=not is_in_loop, policy=remat_policy(c.remat))


def remat_policy(name: str) -> Callable[..., Any]:
    """The `jax.checkpoint` policy of `ModelConfig.remat`."""
    of_kernels = (*RESIDUAL_NAMES, DISPATCHED_NAME)
    policies = {
        "full": checkpoint_policies.nothing_saveable,
        "kernels": checkpoint_policies.save_only_these_names(*of_kernels),
        "projections": checkpoint_policies.save_only_these_names(
            *of_kernels,
            PROJECTION_NAME,
            ANGLES_NAME,
            QUERIES_AND_KEYS_NAME,
            STREAM_NAME,
            ROOT_NAME,
        ),
    }
    return policies[name]
