"""Trains a gated language model, or an encoder.

    python train.py --config=configs/tiny.py [--workdir=runs/tiny] [--config.optim.lr=3e-4 ...]

Started again on the same --workdir, it goes on where the newest intact checkpoint ends, to the bit,
on any number of processes and devices (docs/launch.md). SIGTERM, SIGHUP or Ctrl-C to any process:
all save the same step and end.
"""

import functools
import gc
import signal
import sys

import jax
from absl import flags
from ml_collections import config_flags

from gatedjax import sharding
from gatedjax.aot import larger_products, unrolling
from gatedjax.aot import step as aot
from gatedjax.buckets import require_reachable
from gatedjax.config import Config, DataConfig, flat, from_config_dict, to_dict
from gatedjax.config.converted import check_windows
from gatedjax.data import batches, corpora, load_tokenizer, make_dataset
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import ExplodedError, InputError, TrainingError, printable
from gatedjax.evaluation.encoder import EncoderValidation
from gatedjax.evaluation.validation import Validation
from gatedjax.files import require_utf8
from gatedjax.paths import Place, expand_place
from gatedjax.reporting.console import doing, live_bar, say
from gatedjax.reporting.ending import draw_curves, sample
from gatedjax.reporting.profile import StepTrace
from gatedjax.reporting.step_log import StepLog
from gatedjax.reporting.writers import METRICS_FILE, make_writers
from gatedjax.resume import (
    Position,
    require_something_to_train,
    say_resumed,
    went_wrong_after,
    where_to_go_on,
)
from gatedjax.runtime import cli, launch, run_log, streams
from gatedjax.runtime.mirror import Mirror
from gatedjax.runtime.stop import Stop, name_of
from gatedjax.runtime.watchdog import Watchdog
from gatedjax.training import given_teacher, given_weights, identity
from gatedjax.training.checkpoint import Checkpointer
from gatedjax.training.growing import Growth
from gatedjax.training.memory import require_memory
from gatedjax.training.run import Run, describe, fresh_state, prepare, with_vocab
from gatedjax.training.run_directory import set_aside
from gatedjax.training.run_record import keep_record
from gatedjax.training.state import TrainState, params_for_evaluation
from gatedjax.training.step_folders import has_steps
from gatedjax.training.teacher import Teacher

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "tiny or another name of configs/, a file or a module; dotted flags change single values.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Checkpoints, logs and pictures; default runs/NAME of the config."
)
_FRESH = flags.DEFINE_bool(
    "fresh", False, "Begin anew; a run that is in the workdir is kept, under another name."
)
_PRINT = flags.DEFINE_bool("print", False, "Print the resolved configuration, and end.")
_PROFILE = flags.DEFINE_integer(
    "profile_step",
    0,
    "Trace 5 steps from this one on into the workdir; 0 for none.",
    lower_bound=0,
)
_PROBES = flags.DEFINE_bool(
    "probes", False, "At every evaluation, pictures of what the layers do, for TensorBoard."
)
_TRACKERS = flags.DEFINE_list(
    "trackers", [], "Trackers to write to as well: wandb, trackio, mlflow."
)
_AOT = flags.DEFINE_string(
    "aot", None, "Compile the step for an absent TPU slice (v5p:8x8x4, 2*v5e:16x16), report, end."
)
_SCHEDULE = flags.DEFINE_bool(
    "schedule", False, "With --aot of one chip (v5p:1): the model time of the step, part by part."
)
_CHANGED_DATA = flags.DEFINE_bool(
    "changed_data", False, "Go on with another text than the checkpoint's, from its first row on."
)
_CACHE = flags.DEFINE_string(
    "compile_cache", "~/.cache/gatedjax/xla", "Folder of compiled programs; empty for none."
)


def main(_) -> None:
    """Flags -> configuration -> mesh -> data -> state -> loop -> picture and sample."""
    config = from_config_dict(cli.required_config(_CONFIG))
    check_windows(config.model.mixers, config.data.seq_len, "config.")
    if _PRINT.value:
        print_config(config)
        return
    default_workdir = f"runs/{cli.run_name(_CONFIG)}"
    given = default_workdir if _WORKDIR.value is None else _WORKDIR.value
    workdir = expand_place(given, "--workdir")
    require_utf8("--workdir", workdir)
    require_reachable(workdir, "--workdir")
    tokenizer = tokenizer_of(config.data, workdir)
    config = with_vocab(config, tokenizer)
    if _AOT.value:
        sys.exit(0 if aot.print_report(config, _AOT.value, _SCHEDULE.value) else 3)
    if _SCHEDULE.value:
        raise InputError("--schedule: got no --aot, expected a chip such as --aot=v5p:1")
    # Not for --aot: without its device a stored program cannot be read, and jax warns.
    cli.use_compilation_cache(_CACHE.value)
    cli.saves_to(workdir / "checkpoints")
    goes_on = f"the run goes on, its log is in {workdir}"
    with (
        streams.lasting_stdout(goes_on),
        Mirror(workdir, say) as files,
        run_log.keep() as log_file,
        Stop() as stop,
    ):
        launch.start(workdir / "checkpoints")
        stop.outside_steps()
        run = given_teacher.with_teacher(prepare(config))
        say(describe(run))
        if unrolling.is_asked(run.config.model):
            say(str(unrolling.unrolling(run.config, run.mesh)))
        if larger_products.is_possible(run.mesh):
            say(larger_products.line(run.config, run.mesh))
        require_memory(run)
        with live_bar(run.config.train.steps):
            doing("tokenizing")
            require_same_on_all_processes(run.config, workdir)
            if _FRESH.value:
                set_aside(workdir, say)
            state = train(
                run,
                workdir,
                files,
                tokenizer,
                stop,
                log_file,
            )
        if state is not None:
            with jax.set_mesh(run.mesh):
                sample(run, state, tokenizer)
            if jax.process_index() == 0:
                draw_curves(files, config)
    if state is None and stop.obeyed == signal.SIGINT:
        sys.exit(cli.EXIT_INTERRUPTED)


def print_config(config: Config) -> None:
    """Every key and value, a line each: what a flag of that name would change."""
    for key, value in flat(to_dict(config)):
        print(printable(f"config.{key} = {value!r}"))


def tokenizer_of(data: DataConfig, workdir: Place) -> Tokenizer:
    """The tokenizer that the configuration names.

    Raises:
      InputError: it cannot be read; if the run keeps a copy of its own, that is the way out.
    """
    try:
        return load_tokenizer(data.tokenizer, data.end_of_document)
    except InputError as error:
        own = identity.tokenizer_of_run(workdir, data.tokenizer)
        if own is None:
            raise
        raise InputError(f"{error}; the run keeps its own: --config.data.tokenizer={own}") from None


def require_same_on_all_processes(config: Config, workdir: Place) -> None:
    """InputError if the processes came with different configurations, folders or texts."""
    launch.require_same("configuration", to_dict(config))
    launch.require_same_folder("--workdir", workdir)
    texts = corpora(config.data)
    for corpus in texts.values():
        say(corpus.describe())
    digests = {name: corpus.sha256 for name, corpus in texts.items()}
    launch.require_same("text of data.sources", digests)


def train(
    run: Run,
    workdir: Place,
    files: Mirror,
    tokenizer: Tokenizer,
    stop: Stop,
    log_file: run_log.RunLog,
) -> TrainState | None:
    """From the newest checkpoint, or from the start, to the last step.

    Args:
      run: what is trained.
      workdir: the run directory.
      files: where the log and the metrics go, which is the same directory or comes to it.
      tokenizer: of its text.
      stop: asked whether to stop.
      log_file: which is opened once the directory is this run's.

    Returns:
      The state after the last step; None if the run was asked to stop before it.

    Raises:
      InputError: what is in the directory does not fit this run.
      TrainingError: the model diverged.
    """
    config = to_dict(run.config)
    data = identity.identity_of(run.config.data, tokenizer)
    settings = run.config.train
    weights = None
    # A run that goes on has its own: the others may have gone by then.
    if not has_steps(workdir):
        weights = given_weights.find(run, tokenizer, say)
    teaching = given_teacher.load(run, tokenizer, say)
    with (
        jax.set_mesh(run.mesh),
        Checkpointer(
            workdir,
            config,
            data=data,
            keep=settings.keep_checkpoints,
            report=say,
        ) as checkpointer,
    ):
        doing("preparing the state")
        growth = Growth(
            run,
            unrolling.by_the_rule(run.config, run.mesh),
            larger_products.options(run.config, run.mesh),
        )
        restored = checkpointer.restore_latest(run.abstract)
        if restored is None:
            compile_step = None
            if can_compile_beside(run):
                batch = aot.abstract_batch(run)
                compile_step = functools.partial(growth.compile_first, batch, teaching)
            state = fresh_state(run, given_weights.read(run, weights), compile_step)
            start = 0
            position = Position()
        else:
            require_something_to_train(run, restored, workdir)
            say_resumed(run, restored)
            identity.require_same_tokenizer(restored.data, tokenizer, workdir)
            state = restored.state
            start = restored.step
            position = where_to_go_on(
                run,
                restored,
                data,
                may_be_another_text=_CHANGED_DATA.value,
            )
        identity.keep_tokenizer(workdir, tokenizer)
        identity.keep_chat_template(workdir, run.config.data)
        keep_record(workdir, config, step=start, devices=describe(run), data=data)
        is_first = jax.process_index() == 0
        files.begin((METRICS_FILE, run_log.LOG_FILE) if is_first else ())
        if is_first:
            log_file.open(files.folder)
        writers = make_writers(
            files.folder,
            settings.steps,
            start,
            config,
            trackers=_TRACKERS.value,
            place=workdir,
        )
        tracing = StepTrace(
            _PROFILE.value,
            start,
            settings.steps,
            files.folder / "profile",
            lambda line: say(files.shown(line)),
        )
        watching = Watchdog(settings.stuck_seconds, files.folder)
        with writers, watching as watchdog, tracing as trace:
            log = StepLog(run, writers, watchdog)
            stop.between_steps(run.mesh)
            try:
                state, is_finished = loop(
                    run,
                    state,
                    start,
                    position,
                    growth,
                    log,
                    files,
                    checkpointer,
                    trace,
                    stop,
                    teaching,
                )
            except ExplodedError as error:
                sound = checkpointer.set_aside_exploded()
                raise TrainingError(f"{error}; {went_wrong_after(sound)}") from None
    stop.outside_steps()
    return state if is_finished else None


def can_compile_beside(run: Run) -> bool:
    """Whether the step may be compiled while the program that makes the first state is.

    Not where devices take part in compiling: accelerators try programs out, and processes compile
    what they compute together in one order.
    """
    return jax.process_count() == 1 and run.mesh.devices.flat[0].platform == "cpu"


def loop(
    run: Run,
    state: TrainState,
    start: int,
    position: Position,
    growth: Growth,
    log: StepLog,
    files: Mirror,
    checkpointer: Checkpointer,
    trace: StepTrace,
    stop: Stop,
    teaching: Teacher | None,
) -> tuple[TrainState, bool]:
    """A batch, a step; now and then a line of the log, an evaluation, a checkpoint.

    Args:
      run: what is trained.
      state: before the first of these steps.
      start: steps done before.
      position: in the data, that the first of these steps begins with.
      growth: of its batches, and its compiled steps.
      log: where metrics go.
      files: which hold them, and are in their place before a checkpoint is.
      checkpointer: where states go.
      trace: told of each step.
      stop: asked after each step.
      teaching: the model that the run learns from, if there is one.

    Returns:
      The state, and whether it is the last one; it is not if the run was asked to stop.
    """
    settings = run.config.train
    dataset = make_dataset(
        run.config.data,
        "train",
        batch_size=settings.batch_size,
        rows=sharding.my_rows(run.mesh, settings.batch_size),
        seed=run.config.data.seed,
        model=run.config.model,
    )
    validation = validation_of(run)
    growth.begin(state)
    log.grew(growth.rows * run.config.data.seq_len)
    stream = batches(dataset, position.row, position.places)
    for step in range(start + 1, settings.steps + 1):
        with log.reading(step):
            batch = growth.next_batch(stream)
        state, metrics = growth.train_step(state, batch, teaching)
        is_first = step == start + 1
        if is_first:
            # The step is traced now: see `run`.
            gc.enable()
        is_last = step == settings.steps
        signal_number = stop.requested()
        log.train(step, metrics, write=step % settings.log_every == 0 or is_first or is_last)
        if settings.grow_batches and step % settings.log_every == 0:
            rows = growth.rows
            state = growth.grown(state, metrics)
            if growth.rows > rows:
                log.grew(growth.rows * run.config.data.seq_len)
                say(f"step {step}: batches grow from {rows} to {growth.rows} rows")
        if step % settings.eval_every == 0 or is_last:
            evaluate(step, state, validation, log)
        if step % settings.checkpoint_every == 0 or is_last or signal_number:
            with log.saving(step):
                files.upload()
                checkpointer.save(
                    step,
                    state,
                    data_index=stream.next_index,
                    places=stream.places(),
                    wait=signal_number != 0,
                    loss=float(metrics["loss"]),
                    skipped_in_a_row=int(metrics["skipped_in_a_row"]),
                )
        trace.after(step)
        if signal_number and not is_last:
            saved = f"step {step} of {settings.steps} is saved"
            what = name_of(signal_number)
            say(f"stopped by {what}: {saved}; the same command goes on from there")
            return state, False
    return state, True


def validation_of(run: Run) -> Validation | EncoderValidation:
    """What measures the model on what was held out."""
    count = run.config.train.eval_batches
    if run.config.model.task == "lm":
        return Validation(run, count)
    return EncoderValidation(run, count)


def evaluate(
    step: int,
    state: TrainState,
    validation: Validation | EncoderValidation,
    log: StepLog,
) -> None:
    """The loss on what was held out and, with --probes, what the layers do.

    Args:
      step: the last one.
      state: after it.
      validation: measures the model.
      log: where the numbers go.
    """
    with log.evaluating(step):
        params = params_for_evaluation(state)
        log.validation(step, validation(params))
        if _PROBES.value:
            log.probes(step, validation.probes(params))


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    # Tracing leaves next to no cycles, and looking for them took a third of its time. `loop` has
    # Python look again.
    gc.disable()
    cli.run(main)


if __name__ == "__main__":
    run()
