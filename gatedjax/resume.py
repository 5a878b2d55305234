"""Where a run goes on: what of its directory and its data must fit, and which row comes next."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from gatedjax.config import differing_keys, from_config_dict, to_dict
from gatedjax.errors import InputError
from gatedjax.paths import Place
from gatedjax.reporting.console import say
from gatedjax.training import identity
from gatedjax.training.checkpoint import Restored
from gatedjax.training.run import Run


class Position(NamedTuple):
    """Where a run is in its data.

    row: of the data's order, that comes next.
    places: of the streams among its sources.
    """

    row: int = 0
    places: Mapping[str, Any] = {}


def require_something_to_train(run: Run, restored: Restored, workdir: Place) -> None:
    """InputError if the run is finished and this configuration is another one.

    Nothing would be trained with it. The same configuration is no error: a scheduler may start the
    command once more. The mesh is no part of what is trained.
    """
    if restored.step < run.config.train.steps:
        return
    try:
        # As this version writes it: it may have keys that were not there then.
        before = to_dict(from_config_dict(restored.config))
    except InputError:
        before = restored.config
    changes = []
    for key, then, now in differing_keys(before, to_dict(run.config)):
        if not key.startswith("config.mesh."):
            changes.append(f"{key}: {then!r} then, now {now!r}")
    if changes:
        raise InputError(
            f"{workdir}: this run is finished, after step {restored.step}, with another "
            f"configuration ({'; '.join(changes)}): give another --workdir, or --fresh to begin "
            "anew and keep it under another name, or a larger --config.train.steps to go on with it"
        )


def where_to_go_on(
    run: Run,
    restored: Restored,
    data: identity.Identity,
    *,
    may_be_another_text: bool,
) -> Position:
    """The place in the data that comes next.

    Args:
      run: what is trained.
      restored: its checkpoint.
      data: what its data are now.
      may_be_another_text: --changed_data: another text begins with its first row.

    Raises:
      InputError: the text is not the one that the checkpoint was trained on, and may not be
        another.
    """
    if not restored.data:
        say("that checkpoint does not say what its text was: it is not compared")
    difference = identity.text_difference(restored.data, data)
    if difference is not None and not may_be_another_text:
        raise InputError(
            f"{difference}; put the old text back, give another --workdir, or --changed_data to go "
            "on with this text from its first row on"
        )
    if difference is not None:
        say(f"{difference}; going on with the first row of this text")
        return Position()
    # Rows of another length are other rows: the place is as many tokens into the data. Streams go
    # on with the token that comes next.
    before = restored.config.get("data", {}).get("seq_len", run.config.data.seq_len)
    row = restored.data_index * before // run.config.data.seq_len
    return Position(row, restored.places)


def say_resumed(run: Run, restored: Restored) -> None:
    """Where the run starts, and which keys of the configuration changed since the checkpoint."""
    say(f"resuming after step {restored.step} of {run.config.train.steps}")
    for key, before, after in differing_keys(restored.config, to_dict(run.config)):
        say(f"changed since that checkpoint: {key}: {before!r} then, now {after!r}")


def went_wrong_after(sound: int | None) -> str:
    """What is left after an explosion, for the last line of the run."""
    if sound is None:
        return "no checkpoint from before it is left"
    return (
        f"the checkpoint of step {sound} is from before it and intact, the same command goes on "
        "from there; give it other values, or it will go the same way"
    )
