"""One saved step read back: its state, some of its arrays, or what it says of itself, verified.

A step that is not what was saved raises DamagedError, one that does not fit the target InputError.
On several processes all of them make the same calls, and raise together.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import PyTree

from gatedjax.errors import InputError
from gatedjax.paths import Place
from gatedjax.training import manifest as manifests
from gatedjax.training import orbax_store
from gatedjax.training.digests import Leaves, named_leaves
from gatedjax.training.quiet_orbax import QuietOrbax
from gatedjax.training.run_directory import DamagedError, failures_as_damage, raise_together


@dataclass(frozen=True)
class Restored:
    """A verified checkpoint.

    data_index: how many rows of the data the run had been given when it was saved.
    places: where its streams went on then, by the name of the source.
    data: what the data were (`identity.Identity`); {} if the checkpoint does not say.
    """

    step: int
    state: PyTree
    data_index: int
    places: Mapping[str, Any]
    config: Mapping[str, Any]
    data: Mapping[str, Any]


def read_state(
    directory: Place,
    step: int,
    target: PyTree,
    unread: Collection[str],
    config: Mapping[str, Any],
    quiet: QuietOrbax,
) -> Restored:
    """A step, verified on all processes together; the leaves in `unread` are not read.

    Args:
      directory: the folder of the steps.
      step: which one.
      target: where and how the state comes back: of `jax.ShapeDtypeStruct` with shardings.
      unread: names of leaves that are compared by shape and dtype only.
      config: of the run that reads, for what is said of a difference.
      quiet: keeps orbax's own account of a failure off the log.

    Raises:
      DamagedError: the step is not what was saved.
      InputError: a leaf of the target or the optimizer is another one.
    """
    wanted = named_leaves(target)
    step_dir = directory / str(step)
    body = {}
    leaves = {}
    problem = None
    try:
        body = read_manifest(directory, step)
        manifests.require_same_leaves(
            step_dir,
            body,
            wanted,
            config,
        )
        manifests.require_same_optimizer(step_dir, body, config)
        manifests.require_stored_sizes(step_dir, body["leaves"])
        leaves = _read_arrays(
            directory,
            step,
            body["leaves"],
            wanted,
            unread,
            quiet,
        )
    except (DamagedError, InputError) as error:
        problem = error
    # The digests are a collective: all processes come to it, or none.
    raise_together(problem)
    manifests.require_same_digests(body, leaves)
    in_order = []
    for name, leaf in wanted.items():
        absent = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        in_order.append(leaves.get(name, absent))
    data = body.get("data")
    return Restored(
        step=step,
        state=jax.tree.unflatten(jax.tree.structure(target), in_order),
        data_index=manifests.rows_taken(body),
        places=manifests.places(body),
        config=body["config"],
        data=data if isinstance(data, dict) else {},
    )


def read_leaves(
    directory: Place,
    step: int,
    wanted: Leaves,
    quiet: QuietOrbax,
) -> Leaves:
    """Some arrays of a step by name, verified on all processes together, and no others.

    Args:
      directory: the folder of the steps.
      step: which one.
      wanted: as of `Checkpointer.read_leaves`.
      quiet: keeps orbax's own account of a failure off the log.

    Raises:
      InputError: the files are damaged; there is no older step to try.
      DamagedError: the arrays are not those that were saved.
    """
    body = {}
    leaves = {}
    problem = None
    try:
        body = read_manifest(directory, step)
        described = body["leaves"]
        manifests.require_stored_sizes(directory / str(step), described)
        leaves = _read_arrays(
            directory,
            step,
            described,
            {**described, **wanted},
            described.keys() - wanted.keys(),
            quiet,
        )
    except DamagedError as error:
        problem = InputError(damage(directory, step, error))
    except InputError as error:
        problem = error
    # The digests are a collective: all processes come to it, or none.
    raise_together(problem)
    manifests.require_same_digests(body, leaves)
    return leaves


def read_manifest(directory: Place, step: int) -> dict[str, Any]:
    """The verified body of a step's manifest."""
    with failures_as_damage(f"the manifest of step {step} in {directory}"):
        step_dir = directory / str(step)
        manifests.require_plain_files(step_dir)
        text = (step_dir / "manifest" / "metadata").read_bytes()
        return manifests.verified_body(json.loads(text), step)


def _read_arrays(
    directory: Place,
    step: int,
    described: Mapping[str, Any],
    wanted: Leaves,
    unread: Collection[str],
    quiet: QuietOrbax,
) -> Leaves:
    """The arrays of a step by name, without those in `unread`."""
    read = {}
    for name, leaf in wanted.items():
        if name not in unread:
            read[name] = orbax_store.with_sharding(name, leaf)
    with quiet, failures_as_damage(f"the arrays of step {step} in {directory}"):
        return orbax_store.read_arrays(
            directory / str(step),
            described,
            read,
            wanted.keys() - read.keys(),
        )


def require_readable_by_orbax(directory: Place, step: int) -> None:
    """DamagedError if orbax's manager, which reads a file of every step, could not."""
    with failures_as_damage(f"step {step} in {directory}"):
        manifests.require_plain_files(directory / str(step))
        manifests.require_orbax_metadata(directory / str(step))


def damage(directory: Place, step: int, error: DamagedError) -> str:
    """What is said of a damaged step, as one line."""
    return f"checkpoint of step {step} in {directory} is damaged: {error}"
