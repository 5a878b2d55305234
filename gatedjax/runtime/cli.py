"""How every command starts and fails: bad input is one line on stderr and exit code 2."""

import contextlib
import errno
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from gatedjax.aot import libtpu
from gatedjax.buckets import require_reachable
from gatedjax.config import files as config_files
from gatedjax.config import nearest_key
from gatedjax.errors import PASSING_ERRNOS, InputError, StorageError, TrainingError, printable
from gatedjax.paths import Place, expand_place, is_bucket
from gatedjax.runtime import compile_cache, run_log, streams
from gatedjax.runtime.host_memory import keep_freed_memory
from gatedjax.runtime.stderr_filter import intact
from gatedjax.runtime.stop import Stopped, ignore_stop_signals

STARTED = time.monotonic()

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
EXIT_NO_READER = 141  # 128 + SIGPIPE

# The coordinator dies with process 0: it leaves last, so that the others can still print their
# error.
_LEAVE_LAST_SECONDS = 2.0
_LONGEST_LINE = 4000
# What jax's runtime says when another process is gone. Its other errors, such as one of a kernel
# with a barrier, and all errors of ours are bugs.
_PEER_LOST = re.compile(
    r"gloo|nccl.*(remote|system error|closed)|connection (reset|closed|refused)"
    r"|coordination.?service|heartbeat|socket closed|barrier.*(timed out|failed|error)",
    re.IGNORECASE | re.DOTALL,
)
# What the operating system says about the user's disks and paths, rather than about our code.
_USER_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
}

_checkpoints: Path | None = None  # where this command saves steps, if it does


def run(main: Callable[[Sequence[str]], None], takes: int = 0) -> None:
    """`absl.app.run` with one-line errors. A bug still shows its traceback and exits 1.

    Args:
      main: gets the program's name and the arguments that are no flags.
      takes: how many such arguments there may be.
    """
    streams.open_absent()
    streams.start_again_in_utf8()
    streams.write_any_text()
    keep_freed_memory()
    libtpu.quieten()
    _help_is_of(main.__module__)

    def parse(argv: Sequence[str]) -> Sequence[str]:
        return _guarded(lambda: _parse(argv, takes))

    def guarded_main(argv: Sequence[str]) -> None:
        _guarded(lambda: main(argv))
        ignore_stop_signals()

    app.run(guarded_main, flags_parser=parse)


def _help_is_of(module: str) -> None:
    """Makes `python train.py --help` show the docstring and the flags of `gatedjax.train`.

    absl shows those of the main module, which imports the command and calls it.
    """
    if module == "__main__":
        return
    sys.modules["__main__"].__doc__ = sys.modules[module].__doc__
    for flag in flags.FLAGS.get_flags_for_module(module):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def run_name(flag: flags.FlagHolder[Any]) -> str:
    """A folder's name for runs of the --config file: its name without folder, and its argument."""
    filename = config_flags.get_config_filename(flags.FLAGS[flag.name])
    name, _, argument = filename.partition(":")
    return config_files.run_name(Path(name), argument)


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder`; nothing if it is empty.

    The folder must be your own: the programs in it are executed.
    """
    if not folder:
        return
    try:
        path = expand_place(folder, "--compile_cache")
        require_reachable(path, "--compile_cache")
    except InputError as e:
        if "://" in folder:
            raise
        # The default, in a container without users: no reason not to run.
        streams.print_error(f"warning: no compiled programs are kept: {e}")
        return
    compile_cache.use(path)


def saves_to(checkpoints: Place) -> None:
    """This command saves steps in that folder: whether there is one belongs to an error's line.

    In a bucket nobody looks: it may be what the error is about.
    """
    global _checkpoints
    _checkpoints = None if is_bucket(checkpoints) else Path(checkpoints)


def required(flag: flags.FlagHolder[Any]) -> Any:
    """The flag's value.

    Raises:
      InputError: it was not given.
    """
    if flag.value is None:
        raise InputError(f"--{flag.name} is required")
    return flag.value


def given_place(flag: flags.FlagHolder[Any]) -> Place:
    """The path of a flag that has to be given. In a bucket, it is asked whether that is there.

    Raises:
      InputError: it was not given, is no path, or its bucket cannot be used.
      StorageError: the store does not answer.
    """
    name = f"--{flag.name}"
    place = expand_place(required(flag), name)
    require_reachable(place, name)
    return place


def required_config(flag: flags.FlagHolder[Any]) -> ConfigDict:
    """The ConfigDict of a --config flag.

    Raises:
      InputError: the flag was not given, or its file could not be loaded.
    """
    config = required(flag)
    if not isinstance(config, ConfigDict):
        # A stand-in of ml_collections, which raises as soon as an attribute is read.
        try:
            config.model  # noqa: B018
        except OSError as e:
            raise InputError(_unloadable(e)) from None
    return config


def _unloadable(error: OSError) -> str:
    """The last line of ml_collections' message; the lines before list all the places it tried."""
    return f"--config: {str(error).splitlines()[-1].strip()}"


def _guarded[T](call: Callable[[], T]) -> T:
    """The result of `call`; ends the process with one line on what is not a bug of ours."""
    try:
        return call()
    except Stopped as e:
        # Nothing had to be finished: that is what was asked for.
        interrupted = e.number == signal.SIGINT
        streams.print_error(f"stopped by {e}{intact(_checkpoints)}")
        _end(EXIT_INTERRUPTED if interrupted else 0)
    except KeyboardInterrupt:
        leave("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # `| head -1` has read enough, and wants no message.
        streams.connect_to_nothing(sys.stdout)
        _end(EXIT_NO_READER)
    except Exception as e:
        end = _plain(e)
        if end is None:
            _note_in_log(traceback.format_exc())
            raise
        leave(*end)


def _plain(error: Exception) -> tuple[str, int] | None:
    """The line and the exit code of an error that is no bug of ours; None of a bug."""
    if isinstance(error, StorageError | TrainingError):
        return str(error), EXIT_FAILED
    if isinstance(error, InputError):
        return str(error), EXIT_BAD_INPUT
    loss = _loss_of_a_process(error)
    if loss is not None:
        return f"another process of this run was lost ({loss})", EXIT_FAILED
    if not isinstance(error, OSError):
        return None
    message = f"{error.strerror}: {error.filename}" if error.filename else str(error)
    if error.errno in PASSING_ERRNOS:
        return message, EXIT_FAILED
    return (message, EXIT_BAD_INPUT) if error.errno in _USER_ERRNOS else None


def _loss_of_a_process(error: BaseException) -> BaseException | None:
    """What jax's runtime said when another process was lost, if that is behind the error.

    It surfaces as whatever the current call makes of it: orbax raises a TimeoutError from it.
    """
    if _processes() == 1:
        return None
    cause: BaseException | None = error
    while cause is not None:
        of_runtime = isinstance(cause, jax.errors.JaxRuntimeError)
        if of_runtime and _PEER_LOST.search(str(cause)):
            return cause
        cause = cause.__cause__
    return None


def _processes() -> int:
    # Asking for the count of a run that has not been started would start jax's devices.
    if not jax.distributed.is_initialized():
        return 1
    return jax.process_count()


def leave(message: str, code: int) -> NoReturn:
    """Ends this process with one line on stderr, whatever its threads are doing."""
    several = _processes() > 1
    where = f"process {jax.process_index()}: " if several else ""
    # A message may quote names and values of a stranger's file, of any length.
    one_line = printable(" ".join(message.split()))[:_LONGEST_LINE]
    kept = "" if code == EXIT_BAD_INPUT else intact(_checkpoints)
    line = f"error: {where}{one_line}{kept}"
    _note_in_log(line)
    streams.print_error(line)
    if several and jax.process_index() == 0:
        time.sleep(_LEAVE_LAST_SECONDS)
    _end(code)


def _note_in_log(text: str) -> None:
    """How the run ended. That the log cannot be written must not hide it."""
    with contextlib.suppress(InputError):
        run_log.note(text)


def _end(code: int) -> NoReturn:
    """Not sys.exit: checkpoint and data threads of a failed start must not keep us alive."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def _parse(argv: Sequence[str], takes: int) -> Sequence[str]:
    """Parses the flags; returns the program's name and the other arguments.

    Raises:
      InputError: one line that names the key, in place of absl's and ml_collections' own messages.
    """
    if "config" in flags.FLAGS:
        argv = [argv[0], *config_files.located(argv[1:])]
        # ml_collections looks there for the overrides.
        sys.argv = argv
    try:
        args = flags.FLAGS(argv)
    except (AttributeError, KeyError) as e:
        raise InputError(_unknown_key(argv, e)) from None
    except OSError as e:
        raise InputError(_unloadable(e)) from None
    except (flags.Error, TypeError, ValueError) as e:
        raise InputError(_wrong_flag(argv, e)) from None
    if flags.FLAGS["verbosity"].using_default_value:
        # absl's default is INFO, at which jax tells of every absent backend.
        flags.FLAGS.verbosity = logging.WARNING
    if len(args) > 1 + takes:
        raise InputError(f"flags: {args[1 + takes]!r} is not a flag; expected --name=value")
    return args


def _wrong_flag(argv: Sequence[str], error: Exception) -> str:
    """The message for a value that a flag, or the --config file itself, does not take."""
    text = str(error)
    if "Error whilst parsing config file" not in text:
        return f"flags: {text}"
    # ml_collections hands on the whole traceback of the file; its last line says what is wrong.
    reason = text.strip().splitlines()[-1].strip()
    reason = reason.removeprefix("gatedjax.errors.InputError: ")
    with_argument = [arg for arg in argv if re.match(r"--?config=[^:]*:", arg)]
    if with_argument and re.search(r"get_config\(\) takes 0 positional", reason):
        got = with_argument[-1].partition("=")[2]
        return f"--config: got {got!r}, expected no argument after ':': get_config() takes none"
    return f"--config: {reason}"


def _unknown_key(argv: Sequence[str], error: Exception) -> str:
    """The message for a key that no configuration has.

    ml_collections says little more than "'widht'": this finds the flag that holds it.
    """
    name = re.search(r"[A-Za-z_]\w*", str(error))
    for arg in argv:
        flag = re.match(r"--config\.([\w.]+)", arg)
        if name is None or flag is None:
            continue
        key = flag[1]
        if name[0] in key.split("."):
            return f"config.{key}: unknown key{nearest_key(key)}"
    return f"flags: {error}"
