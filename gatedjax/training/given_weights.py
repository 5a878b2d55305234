"""A new run's parameters out of the checkpoint of another one: `train.init_from`.

Found by name, through the rules of `init_rename`. Every parameter of the new model comes from
there, or is one that `init_fresh` names: what is missing ends the run before anything is written,
what is left over is said. Averages, where the other run kept them, are what is taken, as in its
evaluation; of its optimizer nothing else is read.

Only the arrays of the checkpoint and their names count, and those have to be this model's: of its
configuration nothing is used, of its paths none.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from gatedjax.buckets import require_reachable
from gatedjax.config import differing_keys, to_dict
from gatedjax.config.patterns import matches_any, renamed, sides, unmatched
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import InputError, StorageError, require, shown
from gatedjax.layers import tree
from gatedjax.layers.low_rank import UPDATE
from gatedjax.paths import Place, expand_place
from gatedjax.training.checkpoint import Checkpointer
from gatedjax.training.digests import describe
from gatedjax.training.manifest import show
from gatedjax.training.optim import schedule_free_average
from gatedjax.training.run import Run
from gatedjax.training.step_folders import named_step

KEY = "config.train.init_from"
# Names of a stranger's checkpoint that a line of the log may hold, and those of an error.
_MOST_SAID = 100
_MOST_IN_ERROR = 8

# Schedule-free's part of the average that its parameters hold, beside the other sequence "z".
_BETA = re.compile(r"(opt_state(?:\.\d+)*\.)b1", re.ASCII)
# What of a state the model runs on.
_OF_MODEL = ("params.", "routers.")
_EMA = "ema."


class Average(NamedTuple):
    """The arrays of a checkpoint that schedule-free's average is made with."""

    z: str
    beta: str


class Stored(NamedTuple):
    """Where a parameter stands in a checkpoint.

    name: in the model of the checkpoint.
    array: that holds it.
    average: with schedule-free, what else it is made of.
    """

    name: str
    array: str
    average: Average | None = None


class GivenWeights(NamedTuple):
    """A checkpoint to start from, and the place in it of every parameter that is taken."""

    run_dir: Place
    step: int
    places: Mapping[tree.Path, Stored]


def find(
    run: Run,
    tokenizer: Tokenizer | None,
    report: Callable[[str], None],
) -> GivenWeights | None:
    """What `train.init_from` gives; None where it is empty. No array is read.

    Args:
      run: that starts.
      tokenizer: of its text; None for a task without text.
      report: called with the lines that say what was found, what starts fresh, what is left over.

    Raises:
      InputError: no checkpoint there; a parameter that is missing there, or has another shape;
        another tokenizer; a pattern that holds for nothing.
    """
    settings = run.config.train
    if not settings.init_from:
        return None
    place = expand_place(settings.init_from, KEY)
    require_reachable(place, KEY)
    run_dir, step = named_step(place)
    with _of_this_key(), Checkpointer(run_dir, read_only=True, report=report) as checkpointer:
        manifest = checkpointer.manifest(step)
    step = manifest["step"]
    source = f"step {step} of {run_dir}"
    wanted = parameters(run)
    fresh = _fresh(settings.init_fresh, wanted)
    there = _stored(manifest["leaves"])
    by_path = _renamed(settings.init_rename, there)
    places = {path: by_path[path] for path in wanted if path in by_path and path not in fresh}
    left_over = sorted(there.keys() - {stored.name for stored in places.values()})
    missing = wanted.keys() - fresh - places.keys()
    _require_all(missing, left_over, source)
    for path, stored in places.items():
        _require_same_shape(
            path,
            wanted[path],
            stored,
            manifest["leaves"],
            source,
        )
    if ("embedding",) not in fresh:
        _require_tokenizer(manifest.get("data"), tokenizer, source)
    report(f"weights: {len(places)} parameters of {source}{_which(places.values())}")
    report(f"weights: {len(fresh)} start fresh: {_listed(_names(fresh), _MOST_SAID)}")
    report(f"weights: {len(left_over)} left over there: {_listed(left_over, _MOST_SAID)}")
    if any(UPDATE in name.split(".") for name in left_over):
        report("weights: low-rank updates are among those; gatedjax.merge_lora merges them")
    differences = _differences(manifest["config"], run)
    if differences:
        report(f"weights: the model differs: {_listed(differences, _MOST_SAID)}")
    return GivenWeights(run_dir, step, places)


def read(run: Run, weights: GivenWeights | None) -> dict[tree.Path, Array]:
    """The parameters that are given, placed as the run has them; {} for none.

    Raises:
      InputError: the checkpoint is damaged, or has gone.
    """
    if weights is None:
        return {}
    targets = parameters(run)
    replicated = NamedSharding(run.mesh, PartitionSpec())
    wanted = {}
    for path, stored in weights.places.items():
        wanted[stored.array] = targets[path]
        if stored.average is not None:
            wanted[stored.average.z] = targets[path]
            wanted[stored.average.beta] = jax.ShapeDtypeStruct(
                (),
                jnp.float32,
                sharding=replicated,
            )
    with _of_this_key(), Checkpointer(weights.run_dir, read_only=True) as checkpointer:
        leaves = checkpointer.read_leaves(weights.step, wanted)
    given = {}
    for path, stored in weights.places.items():
        given[path] = leaves[stored.array]
        if stored.average is not None:
            given[path] = schedule_free_average(
                leaves[stored.array],
                leaves[stored.average.z],
                leaves[stored.average.beta],
            )
    return given


def parameters(run: Run) -> dict[tree.Path, jax.ShapeDtypeStruct]:
    """The shapes and places of all that the model runs on, the state of routers included."""
    return tree.flatten_dict(tree.united(run.abstract.params, run.abstract.routers))


def _fresh(patterns: Iterable[str], wanted: Iterable[tree.Path]) -> set[tree.Path]:
    """The parameters that `init_fresh` names."""
    paths = list(wanted)
    _require_match("config.train.init_fresh", patterns, _names(paths))
    return {path for path in paths if matches_any(patterns, ".".join(path))}


def _stored(leaves: Mapping[str, Any]) -> dict[str, Stored]:
    """The parameters of a checkpoint, by their names in its model."""
    found = {}
    for array in leaves:
        for prefix in _OF_MODEL:
            name = array.removeprefix(prefix)
            if name != array:
                found[name] = Stored(name, array)
    for beta in filter(None, map(_BETA.fullmatch, leaves)):
        for name, stored in found.items():
            z = f"{beta[1]}z.{name}"
            if z in leaves:
                found[name] = stored._replace(average=Average(z, beta[0]))
    for array in leaves:
        name = array.removeprefix(_EMA)
        if name != array:
            found[name] = Stored(name, array)
    return found


def _renamed(rules: Iterable[str], there: Mapping[str, Stored]) -> dict[tree.Path, Stored]:
    """The parameters of a checkpoint, by their paths in the new model."""
    _require_match("config.train.init_rename", [sides(rule)[0] for rule in rules], there)
    result = {}
    for old, stored in there.items():
        path = tuple(renamed(rules, old).split("."))
        if path in result:
            both = f"{result[path].name} and {old}"
            raise InputError(f"config.train.init_rename: both {both} become {'.'.join(path)}")
        result[path] = stored
    return result


def _require_match(key: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    names = list(names)
    pattern = unmatched(patterns, names)
    known = _listed(names, _MOST_IN_ERROR)
    require(pattern is None, key, pattern, f"a pattern that holds for one of {known}")


def _require_all(missing: Iterable[tree.Path], left_over: Iterable[str], source: str) -> None:
    names = _names(missing)
    if not names:
        return
    raise InputError(
        f"{KEY}: {source} lacks {len(names)} parameters of this model: "
        f"{_listed(names, _MOST_IN_ERROR)}; left over there: "
        f"{_listed(left_over, _MOST_IN_ERROR)}; config.train.init_rename maps names, "
        "config.train.init_fresh names what starts fresh"
    )


def _require_same_shape(
    path: tree.Path,
    wanted: jax.ShapeDtypeStruct,
    stored: Stored,
    leaves: Mapping[str, Any],
    source: str,
) -> None:
    """InputError unless the arrays that a parameter comes from have its shape and dtype.

    Args:
      path: of the parameter.
      wanted: the parameter.
      stored: its place.
      leaves: of the manifest.
      source: the checkpoint, for the message.
    """
    expected = {stored.array: show(describe(wanted))}
    if stored.average is not None:
        expected[stored.average.z] = show(describe(wanted))
        expected[stored.average.beta] = "float32[]"
    for array, right in expected.items():
        got = show(leaves[array])
        if got != right:
            name = ".".join(path)
            raise InputError(f"{KEY}: {name}: got {got} ({array} in {source}), expected {right}")


def _require_tokenizer(saved: Any, tokenizer: Tokenizer | None, source: str) -> None:
    """InputError if the other run read its text with another tokenizer."""
    before = saved.get("tokenizer") if isinstance(saved, Mapping) else None
    if before is None or tokenizer is None or before == tokenizer.fingerprint:
        return
    raise InputError(
        f"config.data.tokenizer: {tokenizer.name} is not the tokenizer of {source}: the same ids "
        "would mean other text; give that one, or start the embedding fresh "
        "(config.train.init_fresh)"
    )


def _which(used: Iterable[Stored]) -> str:
    """Which of the numbers of a run they are, for the log."""
    places = list(used)
    if any(place.array.startswith(_EMA) for place in places):
        return ", averaged (ema)"
    if any(place.average is not None for place in places):
        return ", averaged (schedule-free)"
    return ""


def _differences(before: Mapping[str, Any], run: Run) -> list[str]:
    """The keys of the model that differ: the same arrays may mean another function."""
    saved = before.get("model")
    now = to_dict(run.config.model)
    if not isinstance(saved, Mapping):
        return []
    found = differing_keys(saved, now, "config.model")
    return [f"{key}: {shown(then)} there, {shown(value)} here" for key, then, value in found]


def _names(paths: Iterable[tree.Path]) -> list[str]:
    return sorted(".".join(path) for path in paths)


def _listed(names: Iterable[str], most: int) -> str:
    """The names in one line, cut to a readable number of them."""
    names = list(names)
    if not names:
        return "none"
    text = ", ".join(names[:most])
    left = len(names) - most
    return f"{text} and {left} more" if left > 0 else text


@contextlib.contextmanager
def _of_this_key() -> Iterator[None]:
    """What is wrong with the checkpoint is wrong with the key that names it."""
    try:
        yield
    except StorageError as error:
        raise StorageError(f"{KEY}: {error}") from None
    except InputError as error:
        raise InputError(f"{KEY}: {error}") from None
