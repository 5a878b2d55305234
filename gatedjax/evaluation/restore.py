"""From a run directory back to a configuration and parameters: for eval.py and generate.

A checkpoint from elsewhere is data, not trust. Of its configuration only the numbers count, and
those are checked against what this machine can hold before anything is allocated. The paths in it
are used if this user's own run wrote it (`training.ownership`), or if the user says so; otherwise
the user names the text. Its tokenizer is the file that travels with it.
"""

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gatedjax import sharding
from gatedjax.config import (
    WITHOUT_PATH,
    Config,
    DataConfig,
    MeshConfig,
    SourceConfig,
    from_config_dict,
)
from gatedjax.data import load_tokenizer
from gatedjax.errors import InputError
from gatedjax.paths import Place, expand_place
from gatedjax.training import identity, ownership
from gatedjax.training.checkpoint import Checkpointer
from gatedjax.training.digests import named_leaves
from gatedjax.training.memory import bytes_on_a_device, device_memory, host_memory
from gatedjax.training.run import Run, prepare
from gatedjax.training.state import TrainState, params_for_evaluation

# Section -> key -> value.
Changes = Mapping[str, Mapping[str, Any]]

# Beyond these it is no model that this code has trained. They bound what is traced layer by layer
# before its size is known.
_MOST_TRACED_LAYERS = 1024
_LARGEST_NUMBER = 2**40

# A batch on the host: tokens, targets, segments, positions and mask, four bytes each; several are
# read ahead.
_HOST_BYTES_PER_TOKEN = 20 * 8


class RestoredRun(NamedTuple):
    """A run, as its checkpoint describes it, its parameters, and the step they are of."""

    run: Run
    params: PyTree
    step: int


def restore_params(
    directory: str | os.PathLike,
    *,
    step: int | None = None,
    source: str | None = None,
    text: str | None = None,
    trust_paths: bool = False,
    mesh: MeshConfig | None = None,
    changes: Changes | None = None,
) -> RestoredRun:
    """A run and the parameters of one of its checkpoints.

    Only what evaluation needs is read: of the optimizer nothing, unless its state is where the
    averaged parameters are.

    Args:
      directory: the run directory.
      step: which checkpoint; None for the newest intact one.
      source: where the run's text is now, as KIND or KIND:PATH (`text:/data/wiki`). What the run
        would have held out of it is evaluated.
      text: a file or folder of text that the run never saw. All of it is evaluated.
      trust_paths: use the paths in the checkpoint's configuration, whoever wrote it.
      mesh: how the parameters are placed; None for copies on all devices.
      changes: of the configuration, by section, such as `{"data": {"seq_len": 512}}`.

    Raises:
      InputError: no checkpoint there, none intact, a configuration that makes no model, a model or
        batch that does not fit, or a tokenizer that is not the run's.
    """
    run_dir = expand_place(directory, "--checkpoint")
    with Checkpointer(run_dir, read_only=True) as checkpointer:
        manifest = checkpointer.manifest(step)
        config = _configuration(_changed(manifest["config"], changes or {}), mesh)
        data = _data_of(run_dir, config.data, manifest, source, text, trust_paths)
        config = dataclasses.replace(config, data=data)
        _require_vocabulary(config)
        with _no_model():
            run = prepare(config)
        unread = _unread(run.abstract)
        require_memory(run, unread)
        with jax.set_mesh(run.mesh):
            if step is None:
                restored = checkpointer.restore_latest(run.abstract, unread)
            else:
                restored = checkpointer.restore(step, run.abstract, unread)
            if restored is None:
                raise InputError(f"--checkpoint: {run_dir} holds no checkpoint")
            params = _params(run, restored.state, unread)
            return RestoredRun(run, params, restored.step)


def fitting_mesh(directory: str | os.PathLike) -> MeshConfig:
    """The mesh that the run was trained on, if these devices can form it with more or fewer copies.

    Else all devices hold copies.
    """
    with Checkpointer(expand_place(directory, "--checkpoint"), read_only=True) as checkpointer:
        saved = checkpointer.config().get("mesh")
    values: dict[str, Any] = {**saved, "data": 0} if isinstance(saved, dict) else {}
    try:
        mesh = MeshConfig(**values)
        sharding.make_mesh(mesh)
    except (InputError, TypeError):
        return MeshConfig()
    return mesh


def require_same_text(run: Run, directory: str | os.PathLike) -> None:
    """InputError if the run's sources are not what they were when it was trained.

    Its held-out text would be another one, part of it trained on.
    """
    run_dir = expand_place(directory, "--checkpoint")
    with Checkpointer(run_dir, read_only=True) as checkpointer:
        saved = checkpointer.manifest().get("data")
    if not isinstance(saved, dict):
        return
    tokenizer = load_tokenizer(run.config.data.tokenizer, run.config.data.end_of_document)
    try:
        now = identity.identity_of(run.config.data, tokenizer)
        difference = identity.text_difference(saved, now)
    except InputError as error:
        # The text of a run that was copied or moved may not be where it was.
        difference = str(error)
    if difference is not None:
        raise InputError(
            f"{difference}; put the old text back, or name the text to evaluate on with "
            "--source=KIND:PATH"
        )


def _changed(saved: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """A saved configuration with other values of some keys."""
    changed = dict(saved)
    for section, values in changes.items():
        before = saved.get(section)
        if isinstance(before, Mapping):
            changed[section] = {**before, **values}
    return changed


def _configuration(saved: Mapping[str, Any], mesh: MeshConfig | None) -> Config:
    """The configuration of a checkpoint, on this machine's mesh.

    Raises:
      InputError: it is none, or asks for sizes that no model has.
    """
    _require_sensible_numbers(saved, "config")
    with _no_model():
        config = from_config_dict({**saved, "mesh": {}})
    model = config.model
    # Under scan the layers of one period stand for those of all.
    traced = len(model.blocks) if model.scan_layers else model.num_layers
    if traced > _MOST_TRACED_LAYERS:
        raise InputError(
            f"--checkpoint: config.model.num_layers: got {traced:,} layers of their own, "
            f"expected at most {_MOST_TRACED_LAYERS:,}"
        )
    _require_batch_fits(config)
    return dataclasses.replace(config, mesh=mesh or MeshConfig())


def require_language_model(run: Run) -> None:
    """InputError if the run is of an encoder, which predicts no next token."""
    task = run.config.model.task
    if task != "lm":
        raise InputError(
            f"--checkpoint: got a run of model.task {task!r}, expected 'lm': it predicts no next "
            "token; eval.py measures it"
        )


def _require_vocabulary(config: Config) -> None:
    if config.model.task == "classify":
        return
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.end_of_document)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"config.model.vocab_size: the checkpoint has {config.model.vocab_size} entries, "
            f"the tokenizer {config.data.tokenizer!r} has {tokenizer.vocab_size}"
        )


def _require_sensible_numbers(value: Any, path: str) -> None:
    if isinstance(value, Mapping):
        for name, entry in value.items():
            _require_sensible_numbers(entry, f"{path}.{name}")
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            _require_sensible_numbers(entry, f"{path}[{i}]")
    elif isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
        expected = f"at most {_LARGEST_NUMBER:,}"
        # Not the number itself: it may have thousands of digits.
        raise InputError(f"--checkpoint: {path}: got a larger number, expected {expected}")


def _require_batch_fits(config: Config) -> None:
    """InputError if a batch of the run's shape cannot be held, or its logits."""
    tokens = config.train.batch_size * config.data.seq_len
    shape = f"{config.train.batch_size:,} rows of {config.data.seq_len:,} tokens"
    host = host_memory()
    of_token = _HOST_BYTES_PER_TOKEN
    if config.model.task == "classify":
        of_token += 8 * 4 * config.model.patches.size
    if tokens * of_token > host:
        raise InputError(f"--checkpoint: its batches have {shape}: more than this machine can hold")
    devices = jax.device_count()
    # The least that a forward pass holds at once: the hidden states with one layer's work on them;
    # and, where the loss is not in chunks, the logits and their exponentials.
    channels = 4 * config.model.width
    if not config.model.loss_chunk:
        channels += 2 * config.model.vocab_size
    needed = 4 * tokens * channels / devices
    available = _device_memory()
    if available is not None and needed > available:
        raise InputError(
            f"--checkpoint: its batches have {shape}: their activations take "
            f"{needed / 2**30:,.1f} GiB a device, there are {available / 2**30:,.1f} GiB"
        )


@contextlib.contextmanager
def _no_model() -> Iterator[None]:
    """What fails while a model is built from a stranger's configuration, in one line.

    The model is abstract at that time: nothing has been allocated.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"--checkpoint: {error}") from error
    except Exception as error:
        lines = str(error).splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0][:200]}"
        raise InputError(f"--checkpoint: its configuration makes no model ({reason})") from error


@contextlib.contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """A lack of memory becomes an InputError: `what` does not fit."""
    try:
        yield
    except MemoryError:
        raise InputError(f"--checkpoint: {what} does not fit this machine's memory") from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"--checkpoint: {what} does not fit a device's memory") from error


def _data_of(
    run_dir: Place,
    data: DataConfig,
    manifest: Mapping[str, Any],
    source: str | None,
    text: str | None,
    trust_paths: bool,
) -> DataConfig:
    """The data to evaluate on: the run's own, or those that the user names.

    Args:
      run_dir: of the checkpoint.
      data: as the checkpoint says.
      manifest: of the checkpoint.
      source: what the user names, KIND or KIND:PATH; held out as the run would have.
      text: what the user names, a path; all of it is held out.
      trust_paths: whether the user trusts the checkpoint's paths.

    Returns:
      A configuration without any path of a stranger.
    """
    is_trusted = trust_paths or ownership.is_own(
        manifest["config"].get("data", {}), manifest.get("data_signature")
    )
    tokenizer = identity.tokenizer_of_run(run_dir, data.tokenizer)
    if tokenizer is None:
        if not is_trusted:
            raise InputError(
                f"--checkpoint: {run_dir} does not hold its tokenizer ({identity.TOKENIZER_FILE}), "
                "and was not written by you: copy the tokenizer there, or give --trust_paths to "
                "use the path in its configuration"
            )
        tokenizer = data.tokenizer
    template = identity.chat_template_of_run(run_dir)
    if template is None and is_trusted:
        template = data.chat_template
    data = dataclasses.replace(data, tokenizer=tokenizer, chat_template=template or "")
    saved = manifest.get("data")
    if isinstance(saved, dict):
        identity.require_same_tokenizer(
            saved, load_tokenizer(tokenizer, data.end_of_document), run_dir
        )
    if source is not None and text is not None:
        raise InputError("--text: got --source too, expected one of them")
    if text is not None:
        unseen = {"main": SourceConfig(kind="text", path=text)}
        return dataclasses.replace(data, sources=unseen, validation_fraction=1.0, cache_dir="")
    if source is not None:
        return dataclasses.replace(data, sources={"main": _source(source)}, cache_dir="")
    if is_trusted:
        return data
    # Without their paths the sources cannot be read: who tries is told to name a text.
    nowhere = {}
    for name, described in data.sources.items():
        nowhere[name] = dataclasses.replace(described, path="")
    return dataclasses.replace(data, sources=nowhere, cache_dir="")


def require_text(run: Run) -> None:
    """InputError if the run has no text to evaluate on: its paths are a stranger's."""
    for name, source in run.config.data.sources.items():
        if source.kind not in WITHOUT_PATH and not source.path:
            raise InputError(
                f"--checkpoint: it was not written by you, so the path of its data.sources.{name} "
                "is not read: name a text with --source=KIND:PATH (such as text:/data/wiki), or "
                "give --trust_paths"
            )


def _source(text: str) -> SourceConfig:
    """The source that the flag --source names."""
    kind, _, path = text.partition(":")
    try:
        return SourceConfig(kind=kind, path=path)  # pyrefly: ignore  (checked by the dataclass)
    except InputError as error:
        raise InputError(f"--source: {error}") from None


def _unread(abstract: TrainState) -> set[str]:
    """The names of the leaves that `params_for_evaluation` does not use."""
    leaves = named_leaves(abstract)
    jaxpr = jax.make_jaxpr(params_for_evaluation)(abstract).jaxpr
    used = {id(x) for x in jaxpr.outvars}
    for equation in jaxpr.eqns:
        used.update(id(x) for x in equation.invars)
    return {name for name, x in zip(leaves, jaxpr.invars) if id(x) not in used}


def _params(run: Run, state: TrainState, unread: set[str]) -> PyTree:
    """`params_for_evaluation` of a state of which `unread` was not read."""
    leaves = named_leaves(state)
    structure = jax.tree.structure(state)
    read = {name: leaf for name, leaf in leaves.items() if name not in unread}

    def from_read(read: Mapping[str, jax.Array]) -> PyTree:
        whole = []
        for name, leaf in leaves.items():
            # Zeros stand for what was not read; nothing uses them, and XLA never makes them.
            whole.append(read[name] if name in read else jnp.zeros(leaf.shape, leaf.dtype))
        return params_for_evaluation(jax.tree.unflatten(structure, whole))

    shardings = _shardings_for_evaluation(run.abstract)
    with warnings.catch_warnings():
        # Donated, so that the parameters exist once; what the result has no room for is freed.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        return jax.jit(from_read, out_shardings=shardings, donate_argnums=0)(read)


def _shardings_for_evaluation(abstract: TrainState) -> PyTree:
    """The sharding of each parameter, and of the state of the routers in its place among them."""
    by_path = {}
    for tree in (abstract.params, abstract.routers):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            by_path[jax.tree_util.keystr(path)] = leaf.sharding

    def place(path: tuple, _: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        return by_path[jax.tree_util.keystr(path)]

    shapes = jax.eval_shape(params_for_evaluation, abstract)
    return jax.tree_util.tree_map_with_path(place, shapes)


def require_memory(run: Run, unread: set[str] | None = None) -> None:
    """InputError if a device could not hold the state: a checkpoint may claim any size.

    Compressed on disk, a terabyte of zeros is small. Nothing has been read when this is asked.
    """
    leaves = named_leaves(run.abstract)
    needed = sum(bytes_on_a_device(x) for name, x in leaves.items() if name not in (unread or ()))
    available = _device_memory()
    if available is None or needed <= available:
        return
    parameters = f"its parameters take {needed / 2**30:,.1f} GiB a device"
    raise InputError(
        f"--checkpoint: {parameters}, there are {available / 2**30:,.1f} GiB; "
        "a mesh cuts them (eval.py --mesh=fsdp=8)"
    )


def fits_one_device(run: Run) -> bool:
    """Whether one device could hold all parameters and, for a moment, its part of them."""
    parameters = jax.tree.leaves(run.abstract.params)
    needed = sum(x.size * x.dtype.itemsize + bytes_on_a_device(x) for x in parameters)
    available = _device_memory()
    return available is None or needed <= available


def _device_memory() -> int | None:
    """Bytes of a device, None if nobody says."""
    return device_memory(jax.local_devices()[0])
