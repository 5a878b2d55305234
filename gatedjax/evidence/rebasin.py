"""Two trained models, one of which is permuted to match the other: Git Re-Basin (arXiv 2209.04836).

Experts, hidden units, heads and channels of the residual stream have no order: a model with them
permuted computes the same. `matched` finds the permutation of B that brings its parameters nearest
to A's, group by group (weight matching); with `softness`, units of B are mixed by an entropic
transport plan in place of a permutation (arXiv 1910.05653). Then (A + B) / 2 may be a good model.

What belongs together is read off the names of the parameters' axes: axes called "embed" are the
residual stream's, all over the model; "mlp", "heads" and "expert" those of one layer.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from scipy.special import logsumexp

from gatedjax.config import config_dict, from_config_dict, layer
from gatedjax.data import batches
from gatedjax.data.recall import RecallConfig, recall_dataset
from gatedjax.errors import require
from gatedjax.layers.tree import flatten_dict, unflatten_dict
from gatedjax.study import Cell
from gatedjax.study.cell import seeded, train
from gatedjax.study.sinks import predictions
from gatedjax.study.trained import Trained
from gatedjax.training.state import init_params, param_axes

Path = tuple[str, ...]
Arrays = dict[Path, np.ndarray]
# Names of axes without an order -> their group in a layer; None: one and the same in all layers.
UNORDERED = {
    "embed": None,
    "embed_act": None,
    "embed_vocab": None,
    "mlp": "units",
    "heads": "heads",
    "kv_heads": "heads",
    "expert": "experts",
    "router": "experts",
}
# Of passes over all groups; they stop when no permutation changes any more.
MOST_PASSES = 50
SINKHORN_STEPS = 500
INTERPOLATION = (0.0, 0.25, 0.5, 0.75, 1.0)


class Place(NamedTuple):
    """An axis of a parameter; `units` is that of an expert's hidden units, where it has one."""

    path: Path
    axis: int
    units: int | None = None


Groups = dict[str, list[Place]]


class Map(NamedTuple):
    """What of B's units stands where A has unit i: row i of `units`.

    hidden: of experts, for every pair of experts the same of their hidden units.
    """

    units: Float[np.ndarray, "n n"]
    hidden: Float[np.ndarray, "n n F F"] | None = None


def groups_of(axes: Mapping[Path, Sequence[str | None]]) -> Groups:
    """The axes that are permuted together.

    Args:
      axes: the names of the axes of every parameter, by path.
    """
    groups: Groups = {}
    for path, names in axes.items():
        for axis, name in enumerate(names):
            if name not in UNORDERED or (name == "mlp" and "expert" in names):
                continue
            units = None
            if name == "expert" and "mlp" in names:
                units = list(names).index("mlp")
            groups.setdefault(_group(path, name), []).append(Place(path, axis, units))
    return groups


def _group(path: Path, name: str) -> str:
    group = UNORDERED[name]
    if group is None:
        return "residual"
    # ("periods", "layer_0", "mixer", ...): a part of a layer.
    is_periodic = path[0] == "periods"
    return "/".join((*path[: 3 if is_periodic else 2], group))


def identity(groups: Groups, params: Arrays) -> dict[str, Map]:
    """Maps that change nothing.

    Raises:
      ValueError: heads that share keys, which this does not permute.
    """
    maps = {}
    for name, places in groups.items():
        sizes = {params[place.path].shape[place.axis] for place in places}
        require(len(sizes) == 1, name, sorted(sizes), "axes of one size: no grouped heads")
        size = sizes.pop()
        hidden = None
        widths = [params[p.path].shape[p.units] for p in places if p.units is not None]
        if widths:
            width = widths[0]
            hidden = np.broadcast_to(np.eye(width), (size, size, width, width))
        maps[name] = Map(np.eye(size), hidden)
    return maps


def moved(params: Arrays, groups: Groups, maps: Mapping[str, Map]) -> Arrays:
    """The parameters with the units of the given groups where the maps put them."""
    result = dict(params)
    for name, of_group in maps.items():
        for place in groups[name]:
            result[place.path] = _moved(result[place.path], place, of_group)
    return result


def _moved(x: np.ndarray, place: Place, by: Map) -> np.ndarray:
    if place.units is None or by.hidden is None:
        y = np.tensordot(by.units, x, axes=(1, place.axis))
        return np.moveaxis(y, 0, place.axis)
    of_pairs = by.units[:, :, None, None] * by.hidden
    y = np.tensordot(of_pairs, x, axes=((1, 3), (place.axis, place.units)))
    return np.moveaxis(y, (0, 1), (place.axis, place.units))


def matched(a: Arrays, b: Arrays, groups: Groups, softness: float = 0.0) -> dict[str, Map]:
    """The maps that bring b near a.

    One group after the other, the others held, until none changes: the sum of products with a's
    parameters never falls.

    Args:
      a, b: the parameters of two models of one shape.
      groups: of `groups_of`.
      softness: 0 for permutations; above, the temperature of a transport plan in units of the
        deviation of the products.

    Returns:
      A map for each group.
    """
    maps = identity(groups, a)
    for _ in range(MOST_PASSES):
        has_changed = False
        for name, places in groups.items():
            others = {other: by for other, by in maps.items() if other != name}
            found = _matched_group(a, moved(b, groups, others), places, softness)
            has_changed |= not np.allclose(found.units, maps[name].units, atol=1e-3)
            maps[name] = found
        if not has_changed:
            break
    return maps


def _matched_group(a: Arrays, b: Arrays, places: Sequence[Place], softness: float) -> Map:
    products = 0.0
    of_hidden: Any = 0.0
    for place in places:
        x, y = a[place.path], b[place.path]
        if place.units is None:
            rows_of_x = np.moveaxis(x, place.axis, 0).reshape(x.shape[place.axis], -1)
            rows_of_y = np.moveaxis(y, place.axis, 0).reshape(y.shape[place.axis], -1)
            products = products + rows_of_x @ rows_of_y.T
        else:
            axes = (place.axis, place.units)
            # [E, F, the rest]
            units_of_x = np.moveaxis(x, axes, (0, 1)).reshape(*(x.shape[i] for i in axes), -1)
            units_of_y = np.moveaxis(y, axes, (0, 1)).reshape(*(y.shape[i] for i in axes), -1)
            of_hidden = of_hidden + np.einsum("eur,fvr->efuv", units_of_x, units_of_y)
    if np.ndim(of_hidden) == 0:
        return Map(plan(np.asarray(products), softness))
    # What a pair of experts has in common, with their hidden units at their best.
    hidden = np.stack([[plan(pair, softness) for pair in row] for row in of_hidden])
    products = products + np.sum(hidden * of_hidden, axis=(2, 3))
    return Map(plan(products, softness), hidden)


def plan(products: Float[np.ndarray, "n n"], softness: float) -> Float[np.ndarray, "n n"]:
    """The doubly stochastic matrix P of the largest <P, products>, a permutation; or, with
    softness, plus softness x deviation of the products x the entropy of P (Sinkhorn).
    """
    if softness == 0:
        rows, columns = linear_sum_assignment(products, maximize=True)
        permutation = np.zeros_like(products)
        permutation[rows, columns] = 1.0
        return permutation
    return sinkhorn(products / (softness * max(products.std(), 1e-30)))


def sinkhorn(logits: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """exp(logits) with rows and columns scaled so that both sum to 1, in the log domain."""
    log_p = np.asarray(logits, np.float64)
    for _ in range(SINKHORN_STEPS):
        log_p = log_p - logsumexp(log_p, axis=1, keepdims=True)
        log_p = log_p - logsumexp(log_p, axis=0, keepdims=True)
    return np.exp(log_p)


def barrier(
    a: Arrays, b: Arrays, loss: Callable[[Arrays], float]
) -> tuple[float, Float[np.ndarray, " points"]]:
    """How far losses between the two rise above the line between theirs; and all losses."""
    losses = []
    for t in INTERPOLATION:
        between = {path: (1 - t) * a[path] + t * b[path] for path in a}
        losses.append(loss(between))
    found = np.asarray(losses)
    line = np.interp(INTERPOLATION, (0.0, 1.0), (found[0], found[-1]))
    return float(np.max(found - line)), found


@dataclasses.dataclass(frozen=True)
class RebasinPair:
    """Trains two models that differ in their seeds, on Bigram-Backcopy, and joins them.

    Attributes:
      ffn: "mlp" or "moe".
      hidden: units of an MLP, or of each of four experts.
      steps: of training, for each.
      width: of the residual stream.
      softness: of the transport plan.
    """

    ffn: str
    hidden: int = 64
    steps: int = 600
    width: int = 32
    softness: float = 0.1

    def __call__(self, seed: int) -> dict[str, float]:
        task = RecallConfig(
            task="bigram_backcopy",
            seq_len=32,
            vocab_size=32,
            num_pairs=3,
            validation_examples=256,
        )
        first, second = (self._trained(task, 2 * seed + i) for i in range(2))
        a, b = _arrays(first), _arrays(second)
        groups = groups_of(_axes(first))
        of_batch = _loss_of(first, task)
        permuted = moved(b, groups, matched(a, b, groups))
        mixed = moved(b, groups, matched(a, b, groups, self.softness))
        values = {}
        for name, other in {"as it is": b, "permuted": permuted, "transported": mixed}.items():
            height, losses = barrier(a, other, of_batch)
            values[f"barrier@{name}"] = height
            values[f"loss of mean@{name}"] = float(losses[len(losses) // 2])
        values["loss"] = of_batch(a)
        values["loss, other"] = of_batch(b)
        values["loss, permuted"] = of_batch(permuted)
        return values

    def _trained(self, task: RecallConfig, seed: int) -> Trained:
        c = config_dict()
        c.model.width = self.width
        c.model.num_layers = 1
        attention = layer("gated_attention", num_heads=4, num_kv_heads=4, head_dim=16)
        c.model.mixers = {"attention": attention}
        c.model.pattern = ("attention",)
        if self.ffn == "moe":
            experts = layer("sparse_moe", num_experts=4, experts_per_token=2, hidden=self.hidden)
            c.model.ffns = {"moe": experts}
            c.model.ffn_pattern = ("moe",)
        else:
            c.model.ffns.mlp.hidden = self.hidden
        c.model.init_std = 0.05
        c.model.dtype = "float32"
        c.model.scan_layers = False
        c.data.seq_len = task.seq_len
        c.optim.lr = 5e-3
        c.optim.warmup_steps = 50
        c.train.batch_size = 64
        c.train.steps = self.steps
        cell = seeded(Cell({}, from_config_dict(c), recall=task), seed)
        # The language is the same for both.
        return train(dataclasses.replace(cell, recall=dataclasses.replace(task, seed=0)))


def _axes(trained: Trained) -> dict[Path, Sequence[str | None]]:
    """The names of the axes of every parameter."""
    of_model = functools.partial(init_params, trained.run.config.model)
    return flatten_dict(param_axes(jax.eval_shape(of_model, jax.random.key(0))))


def _arrays(trained: Trained) -> Arrays:
    host = jax.device_get(trained.params)
    return {path: np.asarray(x, np.float64) for path, x in flatten_dict(host).items()}


def _loss_of(trained: Trained, task: RecallConfig) -> Callable[[Arrays], float]:
    dataset = recall_dataset(task, "validation", batch_size=256, rows=range(256))
    batch = next(iter(batches(dataset)))
    model = trained.run.config.model

    def loss(arrays: Arrays) -> float:
        params = unflatten_dict({path: np.float32(x) for path, x in arrays.items()})
        with jax.set_mesh(trained.run.mesh):
            return float(predictions(model, params, batch)[1])

    return loss
