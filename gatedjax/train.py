"""Trains a gated language model.

    python train.py --config=configs/tiny.py [--workdir=runs/tiny] [--config.optim.lr=3e-4 ...]

Started again on the same --workdir, it goes on where the newest intact checkpoint ends, to the bit,
on any number of processes and devices (docs/launch.md). SIGTERM to any process: all save the same
step and exit 0.
"""

import sys
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from gatedjax import sharding
from gatedjax.aot import step as aot
from gatedjax.config import Config, DataConfig, differing_keys, from_config_dict, to_dict
from gatedjax.data import batches, corpora, load_tokenizer, make_dataset, validation_text
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import InputError
from gatedjax.evaluation.compressors import bits_per_byte_of_compressors
from gatedjax.evaluation.sampling import generate_text
from gatedjax.evaluation.validation import Validation
from gatedjax.reporting.console import say
from gatedjax.reporting.curves import plot_run
from gatedjax.reporting.step_log import StepLog
from gatedjax.reporting.writers import make_writers
from gatedjax.runtime import cli, launch
from gatedjax.runtime.watchdog import Watchdog
from gatedjax.training.checkpoint import Checkpointer, Restored
from gatedjax.training.memory import require_memory
from gatedjax.training.run import Run, describe, fresh_state, prepare, with_vocab
from gatedjax.training.step import TrainState, jit_train_step, params_for_evaluation

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/; dotted flags change single values."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Checkpoints, logs and pictures; default runs/<name of the config>."
)
_PROFILE = flags.DEFINE_integer(
    "profile_step",
    0,
    "Trace 5 steps from this one on into the workdir; 0 for none.",
    lower_bound=0,
)
_PROBES = flags.DEFINE_bool(
    "probes", False, "At every evaluation, pictures of what the layers do, for TensorBoard."
)
_AOT = flags.DEFINE_string(
    "aot", None, "Compile the step for an absent TPU slice (v5p:8x8x4, 2*v5e:16x16), report, end."
)
_CACHE = flags.DEFINE_string(
    "compile_cache", "~/.cache/gatedjax/xla", "Folder of compiled programs; empty for none."
)


def main(_) -> None:
    """Flags -> configuration -> mesh -> data -> state -> loop -> picture and sample."""
    config = from_config_dict(cli.required_config(_CONFIG))
    workdir = Path(_WORKDIR.value or f"runs/{cli.config_name(_CONFIG)}")
    tokenizer = load_tokenizer(config.data.tokenizer)
    config = with_vocab(config, tokenizer)
    if _AOT.value:
        sys.exit(0 if aot.print_report(config, _AOT.value) else 3)
    # Not for --aot: without its device a stored program cannot be read, and jax warns.
    cli.use_compilation_cache(_CACHE.value)
    launch.start()
    run = prepare(config)
    say(describe(run))
    require_memory(run)
    require_same_on_all_processes(run.config)
    state = train(run, workdir)
    if state is None:
        return
    with jax.set_mesh(run.mesh):
        sample(run, state, tokenizer)
    if jax.process_index() == 0:
        draw_curves(workdir, config.data)


def require_same_on_all_processes(config: Config) -> None:
    """InputError if the processes came with different configurations or texts."""
    launch.require_same("configuration", to_dict(config))
    texts = corpora(config.data)
    for corpus in texts.values():
        say(corpus.describe())
    digests = {name: corpus.sha256 for name, corpus in texts.items()}
    launch.require_same("text of data.sources", digests)


def train(run: Run, workdir: Path) -> TrainState | None:
    """The state after the last step; None if the run was asked to stop before it."""
    config = to_dict(run.config)
    settings = run.config.train
    with (
        jax.set_mesh(run.mesh),
        Checkpointer(
            workdir,
            config,
            keep=settings.keep_checkpoints,
            report=say,
        ) as checkpointer,
    ):
        restored = checkpointer.restore_latest(run.abstract)
        if restored is None:
            state = fresh_state(run)
            start = 0
        else:
            say_resumed(run, restored)
            state = restored.state
            start = restored.data_index
        writers = make_writers(workdir, settings.steps, start)
        with writers, Watchdog(settings.stuck_seconds, workdir) as watchdog:
            log = StepLog(run, writers, watchdog)
            state, is_finished = loop(run, state, start, log, checkpointer, workdir / "profile")
    return state if is_finished else None


def loop(
    run: Run,
    state: TrainState,
    start: int,
    log: StepLog,
    checkpointer: Checkpointer,
    profile: Path,
) -> tuple[TrainState, bool]:
    """A batch, a step; now and then a line of the log, an evaluation, a checkpoint.

    Args:
      run: what is trained.
      state: before the first of these steps.
      start: steps done before.
      log: where metrics go.
      checkpointer: where states go.
      profile: the folder of a trace.

    Returns:
      The state, and whether it is the last one; it is not if the run was asked to stop (SIGTERM).
    """
    settings = run.config.train
    dataset = make_dataset(
        run.config.data,
        "train",
        batch_size=settings.batch_size,
        rows=sharding.my_rows(run.mesh, settings.batch_size),
        seed=run.config.data.seed,
    )
    validation = Validation(run, settings.eval_batches)
    train_step = jit_train_step(run.config, run.tx, run.shardings)
    stream = batches(dataset, start)
    for step in range(start + 1, settings.steps + 1):
        with log.reading(step):
            batch = sharding.global_batch(run.mesh, next(stream), settings.batch_size)
        state, metrics = train_step(state, batch)
        is_first = step == start + 1
        is_last = step == settings.steps
        stop = launch.preempted(step)
        log.train(step, metrics, write=step % settings.log_every == 0 or is_first or is_last)
        if step % settings.eval_every == 0 or is_last:
            evaluate(step, state, validation, log)
        if step % settings.checkpoint_every == 0 or is_last or stop:
            with log.saving(step):
                checkpointer.save(step, state, data_index=stream.next_index, wait=stop)
        trace(step, start, profile)
        if stop and not is_last:
            saved = f"step {step} of {settings.steps} is saved"
            say(f"stopped by SIGTERM: {saved}; the same command goes on from there")
            return state, False
    return state, True


def evaluate(step: int, state: TrainState, validation: Validation, log: StepLog) -> None:
    """The loss on validation text and, with --probes, what the layers do."""
    with log.evaluating(step):
        params = params_for_evaluation(state)
        log.validation(step, validation(params))
        if _PROBES.value:
            log.probes(step, validation.probes(params))


def trace(step: int, start: int, folder: Path) -> None:
    """Called after each step: with --profile_step, starts and ends a trace of 5 steps."""
    if not _PROFILE.value:
        return
    # The first step compiles: there is nothing to see in it.
    first = max(_PROFILE.value, start + 2)
    if step == first - 1:
        jax.profiler.start_trace(folder)
    if step == first + 4:
        jax.profiler.stop_trace()
        say(f"profile of 5 steps: {folder}")


def say_resumed(run: Run, restored: Restored) -> None:
    """Where the run starts, and which keys of the configuration changed since the checkpoint."""
    say(f"resuming after step {restored.step} of {run.config.train.steps}")
    for key, before, after in differing_keys(restored.config, to_dict(run.config)):
        say(f"changed since that checkpoint: {key}: {before!r} then, now {after!r}")


def sample(run: Run, state: TrainState, tokenizer: Tokenizer) -> None:
    """A piece of text from the trained model."""
    prompt = run.config.train.sample_prompt
    say(f"--- sample, temperature 0.8, prompt {prompt!r}")
    pieces = generate_text(
        run.config.model,
        params_for_evaluation(state),
        tokenizer,
        prompt,
        run.config.train.sample_tokens,
    )
    say(prompt + "".join(pieces) + "\n---")


def draw_curves(workdir: Path, data: DataConfig) -> None:
    """The picture of the run.

    A finished training does not fail for want of matplotlib, or of its sources.
    """
    try:
        compressors = bits_per_byte_of_compressors(validation_text(data))
        say(f"curves: {plot_run(workdir, compressors)}")
    except InputError as error:
        say(f"no picture: {error}")


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    cli.run(main)


if __name__ == "__main__":
    run()
