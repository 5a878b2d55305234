"""How every entry point starts and fails: bad input is one line on stderr and exit code 2."""

import errno
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from gatedjax.aot import libtpu
from gatedjax.config import nearest_key
from gatedjax.errors import InputError, TrainingError
from gatedjax.runtime.host_memory import keep_freed_memory

STARTED = time.monotonic()
# The coordinator dies with process 0: it leaves last, so that the others can still say what went
# wrong.
_LEAVE_LAST_SECONDS = 2.0
_PEER_LOST = re.compile(
    r"gloo|nccl|connection (reset|closed)|coordination.?service|heartbeat|socket closed|barrier",
    re.IGNORECASE,
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


def run(main: Callable[[Sequence[str]], None], takes: int = 0) -> None:
    """`absl.app.run` with one-line errors. A bug still shows its traceback and exits 1.

    takes: how many arguments there may be besides flags; `main` gets them, after the program's
    name.
    """
    keep_freed_memory()
    libtpu.quieten()
    _help_is_of(main.__module__)
    app.run(
        lambda argv: _guarded(lambda: main(argv)),
        flags_parser=lambda argv: _guarded(lambda: _parse(argv, takes)),
    )


def _help_is_of(module: str) -> None:
    """`python train.py --help` shows the docstring and the flags of `gatedjax.train`, which is not
    the main module.
    """
    if module == "__main__":
        return
    sys.modules["__main__"].__doc__ = sys.modules[module].__doc__
    for flag in flags.FLAGS.get_flags_for_module(module):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def config_name(flag: flags.FlagHolder) -> str:
    """The name of the --config file, without folder, ending and argument."""
    return Path(flags.FLAGS[flag.name].config_filename.split(":")[0]).stem


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder` (your own: what is in there is executed); nothing if it
    is empty.
    """
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))


def required(flag: flags.FlagHolder[str | None]) -> str:
    """The flag's value; InputError if it was not given."""
    if flag.value is None:
        raise InputError(f"--{flag.name} is required")
    return flag.value


def required_config(flag: flags.FlagHolder) -> ConfigDict:
    """The ConfigDict of a --config flag; InputError if the flag was not given or its file could not
    be loaded.
    """
    config = required(flag)
    if not isinstance(
        config, ConfigDict
    ):  # ml_collections' stand-in, which raises once it is looked into
        try:
            config.model  # noqa: B018
        except OSError as e:
            raise InputError(_unloadable(e)) from None
    return config


def _unloadable(error: OSError) -> str:
    """The last line of what ml_collections says; before it stand all the places where it looked."""
    return f"--config: {str(error).splitlines()[-1].strip()}"


def _guarded(call: Callable):
    try:
        return call()
    except InputError as e:
        leave(str(e), 2)
    except TrainingError as e:
        leave(str(e), 1)
    except OSError as e:
        if e.errno not in _USER_ERRNOS:
            raise
        leave(f"{e.strerror}: {e.filename}" if e.filename else str(e), 2)
    except (
        Exception
    ) as e:  # the loss of a process comes as whatever the call of that moment makes of it
        if not (_processes() > 1 and _PEER_LOST.search(str(e))):
            raise
        leave(f"another process of this run was lost ({e}); the last checkpoint is intact", 1)
    except KeyboardInterrupt:
        leave("interrupted; the last checkpoint is intact", 130)


def _processes() -> int:
    return jax.process_count() if jax.distributed.is_initialized() else 1


def leave(message: str, code: int) -> None:
    """Ends this process with one line on stderr, whatever its threads are doing."""
    where = f"process {jax.process_index()}: " if _processes() > 1 else ""
    print(f"error: {where}{' '.join(message.split())}", file=sys.stderr, flush=True)
    if where and jax.process_index() == 0:
        time.sleep(_LEAVE_LAST_SECONDS)
    # Not sys.exit: checkpoint and data threads of a failed start must not keep the process alive.
    sys.stdout.flush()
    os._exit(code)


def _parse(argv: Sequence[str], takes: int) -> Sequence[str]:
    """Flags, with absl's and ml_collections' complaints turned into one line that names the key."""
    try:
        args = flags.FLAGS(argv)
    except (AttributeError, KeyError) as e:
        raise InputError(_unknown_key(argv, e)) from None
    except OSError as e:
        raise InputError(_unloadable(e)) from None
    except (flags.Error, TypeError, ValueError) as e:
        raise InputError(f"flags: {e}") from None
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = (
            logging.WARNING
        )  # absl would take INFO, at which jax tells of every absent backend
    if len(args) > 1 + takes:
        raise InputError(f"flags: {args[1 + takes]!r} is not a flag; expected --name=value")
    return args


def _unknown_key(argv: Sequence[str], error: Exception) -> str:
    """ml_collections says little more than "'widht'": find the flag that it came from."""
    name = re.search(r"[A-Za-z_]\w*", str(error))
    for arg in argv:
        match = re.match(r"--config\.([\w.]+)", arg)
        if match and name and name[0] in match[1].split("."):
            return f"config.{match[1]}: unknown key{nearest_key(match[1])}"
    return f"flags: {error}"
