"""How many experts of a trained model tokens can do without (MoDES, arXiv 2511.15690).

Importances of layers and thresholds are found on one batch of held-out text, and what they cost is
measured on others. A threshold is for all tokens, or for one of two kinds. Nothing is trained.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, PyTree

from gatedjax.config import ModelConfig, SparseMoEConfig
from gatedjax.data import Batch
from gatedjax.errors import require
from gatedjax.evaluation.exit_learning import token_losses
from gatedjax.evaluation.skipping_model import Thresholds, with_importance, with_thresholds
from gatedjax.layers.gate_values import COLLECTION
from gatedjax.layers.moe import state as router_state
from gatedjax.layers.moe.routing import is_second_kind
from gatedjax.layers.moe.skipping import (
    NEVER,
    calibrated,
    chosen_scores,
    divergence,
    frontier,
    skip_threshold,
)
from gatedjax.layers.tree import flatten_dict, unflatten_dict
from gatedjax.model import LanguageModel, head_weights, logits
from gatedjax.training.flops import forward_flops_per_token


class Found(NamedTuple):
    """What a search gave.

    thresholds: the best ones. divergence: of the model with them, on the calibration batch.
    tried: how many pairs of thresholds were measured.
    """

    thresholds: Thresholds
    divergence: float
    tried: int


class Outcome(NamedTuple):
    """What skipping gave on some text; means over its tokens.

    loss: nats. accuracy: of the likeliest token. divergence: from the whole model, nats.
    experts: that run for a token, in a sparse layer. skipped: fractions of the chosen experts, of
      the tokens of either kind. flops: of a token, forward.
    """

    loss: float
    accuracy: float
    divergence: float
    experts: float
    skipped: tuple[float, float]
    flops: float


class Skipping:
    """Searches thresholds for a model, and measures them."""

    def __init__(
        self,
        model: ModelConfig,
        params: PyTree,
        second_kind: tuple[int, ...],
        seq_len: int,
    ):
        """Args:
        model: of a trained run.
        params: and state of routers.
        second_kind: token ids of the second kind; none for one kind.
        seq_len: of the rows, for FLOPs.
        """
        self._seq_len = seq_len
        # An importance divided by a threshold, in front of a threshold of 1, is that threshold: so
        # the state says what is skipped, and one program measures all of them.
        self._model = with_thresholds(model, second_kind, Thresholds(1.0, 1.0))
        self._second_kind = second_kind
        params = with_importance(self._model, params)
        self._params, self._state = router_state.split(params)
        self._run = jax.jit(functools.partial(_run, self._model))
        # Until they are calibrated, layers are alike.
        sparse = sum(len(block.layers) for block in self._sparse_blocks())
        self.importances: Float[np.ndarray, " L"] = np.ones(sparse)

    @property
    def kinds(self) -> int:
        """Of tokens."""
        return 2 if self._second_kind else 1

    def calibrate(self, batch: Batch) -> None:
        """Finds the importances of the layers.

        Args:
          batch: held-out text.
        """

        def logits_of(state: Mapping[str, Any]) -> Array:
            return self._run(self._params, state, batch)[0]

        is_token = np.asarray(batch.segment_ids) != 0
        state = calibrated(logits_of, self._state, is_token, self.kinds)
        self.importances = self._by_layer(state)

    def _by_layer(self, state: Mapping[str, Any]) -> Float[np.ndarray, " L"]:
        """Importances, of the sparse layers in the order of the model's layers."""
        flat = flatten_dict(state)
        found = {}
        for block in self._sparse_blocks():
            values = np.asarray(flat[(*block.path, "ffn", router_state.NAME, "importance")])
            if self.kinds == 2:
                values = values[..., 0]
            found |= dict(zip(block.layers, np.atleast_1d(values)))
        return np.asarray([found[layer] for layer in sorted(found)])

    def _sparse_blocks(self) -> list[Any]:
        blocks = self._model.blocks
        return [block for block in blocks if isinstance(block.feed_forward, SparseMoEConfig)]

    def state(
        self,
        thresholds: Thresholds,
        importances: Float[np.ndarray, " L"] | None = None,
    ) -> dict[str, Any]:
        """The state of the routers with which these thresholds skip.

        Args:
          thresholds: of the two kinds.
          importances: of the layers; None for the calibrated ones.
        """
        importances = self.importances if importances is None else importances
        sparse = sorted(layer for block in self._sparse_blocks() for layer in block.layers)
        of_layer = dict(zip(sparse, importances))
        flat = dict(flatten_dict(self._state))
        for block in self._sparse_blocks():
            path = (*block.path, "ffn", router_state.NAME, "importance")
            own = np.asarray([of_layer[layer] for layer in block.layers])
            scaled = np.stack([_over(own, threshold) for threshold in thresholds], axis=-1)
            if self.kinds == 1:
                scaled = scaled[..., 0]
            flat[path] = jnp.asarray(scaled if block.is_repeated else scaled[0], jnp.float32)
        return unflatten_dict(flat)

    def one_threshold(
        self,
        batch: Batch,
        rate: float,
        importances: Float[np.ndarray, " L"] | None = None,
    ) -> Thresholds:
        """The least threshold, for all tokens, that skips at least a fraction of the experts.

        Args:
          batch: held-out text.
          rate: the fraction.
          importances: of the layers; None for the calibrated ones.
        """
        importances = self.importances if importances is None else importances
        is_token = np.asarray(batch.segment_ids) != 0
        threshold = skip_threshold(importances, self._scores(batch), rate, is_token)
        return Thresholds(threshold, threshold)

    def search(self, batch: Batch, rate: float, levels: int) -> Found:
        """The thresholds of the least divergence that skip at least a fraction of the experts.

        Args:
          batch: held-out text.
          rate: the fraction.
          levels: thresholds of each kind that are tried, with even steps of what they skip of it.

        Raises:
          InputError: the text has tokens of one kind only.
        """
        importances = self.importances
        is_token = np.asarray(batch.segment_ids) != 0
        scores = self._scores(batch)
        whole = self._log_probs(batch, Thresholds(0.0, 0.0))

        def moved(thresholds: Thresholds) -> float:
            found = self._run(self._params, self.state(thresholds), batch)[0]
            return float(divergence(whole, found, is_token))

        is_second = np.asarray(is_second_kind(self._second_kind, jnp.asarray(batch.tokens)))
        grids = []
        skipped = []
        for mask in (is_token & ~is_second, is_token & is_second):
            expected = "a pattern of which the calibration batch has tokens, and others"
            require(bool(mask.any()), "--second_kind", "tokens of one kind only", expected)
            grid = np.asarray(
                [
                    skip_threshold(importances, scores, level / (levels - 1), mask)
                    for level in range(levels)
                ]
            )
            products = importances[:, None, None] * scores[:, mask]
            grids.append(grid)
            skipped.append([int(np.sum(products < threshold)) for threshold in grid])
        wanted = int(np.ceil(rate * is_token.sum() * scores.shape[0] * scores.shape[-1]))
        pairs = frontier(skipped[0], skipped[1], wanted)
        tried = [Thresholds(float(grids[0][i]), float(grids[1][j])) for i, j in pairs]
        measured = [moved(thresholds) for thresholds in tried]
        best = int(np.argmin(measured))
        return Found(tried[best], measured[best], len(tried))

    def _log_probs(self, batch: Batch, thresholds: Thresholds) -> Float[Array, "B T X"]:
        found = self._run(self._params, self.state(thresholds), batch)[0]
        return jax.nn.log_softmax(found)

    def _scores(self, batch: Batch) -> Float[np.ndarray, "L B T k"]:
        """Of the chosen experts of every sparse layer, with nothing skipped."""
        state = self.state(Thresholds(0.0, 0.0))
        _, _, recorded = self._run(self._params, state, batch)
        flat = flatten_dict(state)
        found = {}
        for block in self._sparse_blocks():
            of_block = recorded
            for name in (*block.path, "ffn"):
                of_block = of_block[name]
            values = of_block["router_logits"][0]
            ffn = block.feed_forward
            place = (*block.path, "ffn", router_state.NAME)
            for period, layer in enumerate(block.layers):

                def own(x: Array, period: int = period, block: Any = block) -> Array:
                    return x[period] if block.is_repeated else x

                temperature = ffn.router.temperature
                if (*place, "temperature") in flat:
                    temperature = own(flat[(*place, "temperature")])
                inputs: dict[str, Any] = {"tokens": jnp.asarray(batch.tokens)}
                if (*place, "bias") in flat:
                    inputs["bias"] = own(flat[(*place, "bias")])
                found[layer] = chosen_scores(
                    ffn.router,
                    own(values) / temperature,
                    ffn.experts_per_token,
                    **inputs,
                )
        return np.stack([np.asarray(found[layer]) for layer in sorted(found)])

    def measure(
        self,
        batches: list[Batch],
        thresholds: Thresholds,
        importances: Float[np.ndarray, " L"] | None = None,
    ) -> Outcome:
        """What these thresholds give on some text.

        Args:
          batches: held-out text, other than that of the calibration.
          thresholds: of the two kinds.
          importances: of the layers; None for the calibrated ones.
        """
        state = self.state(thresholds, importances)
        sums = np.zeros(4)
        run = np.zeros(2)
        chosen = np.zeros(2)
        for batch in batches:
            predicted, experts, _ = self._run(self._params, state, batch)
            mask = np.asarray(batch.loss_mask) > 0
            is_right = np.asarray(jnp.argmax(predicted, -1)) == np.asarray(batch.targets)
            whole = self._log_probs(batch, Thresholds(0.0, 0.0))
            of_token = jnp.sum(jnp.exp(whole) * (whole - jax.nn.log_softmax(predicted)), axis=-1)
            numbers = (np.asarray(token_losses(predicted, batch)), is_right, np.asarray(of_token))
            sums += np.asarray([*(number[mask].sum() for number in numbers), mask.sum()])
            of_kind, most = self._by_kind(batch, experts)
            run += of_kind
            chosen += most
        loss, accuracy, moved = (float(x) for x in sums[:3] / sums[3])
        # Of a kind without tokens nothing is skipped.
        fractions = (chosen - run) / np.maximum(chosen, 1.0)
        return Outcome(
            loss=loss,
            accuracy=accuracy,
            divergence=moved,
            experts=float(run.sum() / chosen.sum()) * self._places() / len(self.importances),
            skipped=(float(fractions[0]), float(fractions[1])),
            flops=self._flops(float(run.sum() / chosen.sum())),
        )

    def _places(self) -> int:
        """Places of a token in all sparse layers."""
        blocks = self._sparse_blocks()
        return sum(len(b.layers) * b.feed_forward.experts_per_token for b in blocks)

    def _by_kind(
        self,
        batch: Batch,
        experts: list[tuple[Array, int]],
    ) -> tuple[Float[np.ndarray, " 2"], Float[np.ndarray, " 2"]]:
        """Experts that ran, and those that were chosen, of the tokens of either kind.

        Args:
          batch: the text.
          experts: of each layer the ids, and the id of an empty place.
        """
        is_token = np.asarray(batch.segment_ids) != 0
        is_second = np.zeros_like(is_token)
        if self._second_kind:
            is_second = np.asarray(is_second_kind(self._second_kind, jnp.asarray(batch.tokens)))
        run = np.zeros(2)
        chosen = np.zeros(2)
        for ids, empty in experts:
            for kind, mask in enumerate((is_token & ~is_second, is_token & is_second)):
                own = np.asarray(ids)[..., mask, :]
                run[kind] += np.sum(own < empty)
                chosen[kind] += own.size
        return run, chosen

    def _flops(self, fraction: float) -> float:
        """Of a token, with this fraction of its experts run."""
        total = forward_flops_per_token(self._model, self._seq_len)
        for block in self._sparse_blocks():
            ffn = block.feed_forward
            matrices = 3 if ffn.gated else 2
            computing = ffn.router.ffn_fraction or ffn.num_experts / ffn.total_experts
            of_expert = 2 * matrices * (ffn.latent or self._model.width) * ffn.hidden
            of_layer = ffn.experts_per_token * computing * of_expert
            total -= len(block.layers) * (1.0 - fraction) * of_layer
        return total


def _over(importances: Float[np.ndarray, " L"], threshold: float) -> Float[np.ndarray, " L"]:
    """Importances in front of a threshold of 1; without a threshold nothing is skipped."""
    if threshold == 0:
        return np.full(importances.shape, NEVER)
    # A little less: thresholds lie one float32 above the product that is the last to be skipped.
    return np.minimum((1.0 - 1e-6) * importances.astype(np.float64) / threshold, NEVER)


def _run(
    model: ModelConfig,
    params: PyTree,
    state: Mapping[str, Any],
    batch: Batch,
) -> tuple[Array, list[tuple[Array, int]], Mapping[str, Any]]:
    """Logits, the experts of every sparse block, and all that the layers record.

    Args:
      model: with thresholds.
      params: of it.
      state: of its routers.
      batch: rows of text.
    """
    merged: Any = router_state.merge(params, state)
    outputs: Any = LanguageModel(model).apply(
        {"params": merged},
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        mutable=[COLLECTION],
    )
    (hidden, _, _), variables = outputs
    recorded = variables[COLLECTION]
    experts = []
    for block in model.blocks:
        if isinstance(block.feed_forward, SparseMoEConfig):
            of_block = recorded
            for name in (*block.path, "ffn"):
                of_block = of_block[name]
            experts.append((of_block["experts"][0], block.feed_forward.total_experts))
    return logits(hidden, head_weights(merged)), experts, recorded
