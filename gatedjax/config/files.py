"""Which file --config=NAME means, and `gatedjax-study NAME`.

tiny                    one of gatedjax's own: configs/tiny.py of a clone, installed or not
configs/tiny.py         a file; where there is none of that name, gatedjax's own
my_project.experiment   a module: installed, or in the working folder
tiny_moe:bias           any of them with an argument for its get_config
"""

import difflib
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import gatedjax
from gatedjax.errors import InputError
from gatedjax.paths import expand

_PACKAGE = "gatedjax.configs"
# What a path can hold besides letters and digits, without being quoted anywhere.
_PLAIN_ARGUMENT = re.compile(r"[\w.,=+-]+", re.ASCII)


def own_folder() -> Path:
    """gatedjax's own configurations: in the package if it is installed, beside it in a clone."""
    package = Path(gatedjax.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def own_names(subfolder: str = "") -> list[str]:
    """The names of gatedjax's own configurations, or studies."""
    paths = (own_folder() / subfolder).glob("[!_]*.py")
    return sorted(path.stem for path in paths)


def find(name: str, flag: str, subfolder: str = "") -> Path:
    """The file that a name, a path or a module's name stands for.

    Args:
      name: as the user gave it, without an argument.
      flag: what it was given to, for the message.
      subfolder: of gatedjax's own configurations, where a bare name is looked for.

    Raises:
      InputError: there is none.
    """
    import_from_working_folder()
    path = expand(name, flag)
    is_path = path.suffix == ".py" or len(path.parts) > 1
    if is_path and path.is_file():
        return path
    own = _own_file(name, path, subfolder)
    if own is not None:
        return own
    if not is_path:
        module = _module_file(name, flag)
        if module is not None:
            return module
    known = own_names(subfolder)
    close = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InputError(
        f"{flag}: got {name!r}, expected a Python file, a module or one of {', '.join(known)}{hint}"
    )


def _own_file(name: str, path: Path, subfolder: str) -> Path | None:
    """gatedjax's own: `tiny`, `gatedjax.configs.tiny`, or a path such as `configs/tiny.py`."""
    if path.parts[:1] == ("configs",):
        # As the documentation writes it, in a folder that is no clone.
        inside = Path(*path.parts[1:])
    elif name.startswith(f"{_PACKAGE}."):
        inside = Path(name.removeprefix(f"{_PACKAGE}.").replace(".", "/") + ".py")
    elif len(path.parts) == 1:
        inside = Path(subfolder, f"{name.removesuffix('.py')}.py")
    else:
        return None
    # Only what is there by that very name: no way out of the folder, on no file system.
    folder = own_folder()
    return folder / inside if folder / inside in folder.rglob("[!_]*.py") else None


def _module_file(name: str, flag: str) -> Path | None:
    """The file of a module; None if there is none of that name."""
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    except Exception as error:
        # The packages above it are imported.
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{flag}: {name} cannot be imported ({reason})") from error
    if spec is None or spec.origin is None or not spec.has_location:
        return None
    return Path(spec.origin)


def import_from_working_folder() -> None:
    """Files in the working folder may import each other, as with `python -m`; it comes last."""
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)


def located(arguments: Sequence[str]) -> list[str]:
    """A command's arguments, with the file in place of what --config names.

    Raises:
      InputError: see `find`.
    """
    found = []
    is_value = False
    for i, argument in enumerate(arguments):
        if argument == "--":
            return [*found, *arguments[i:]]
        flag, equals, value = argument.partition("=")
        if is_value:
            argument = _located_value(argument)
        elif flag in ("--config", "-config") and equals:
            argument = f"--config={_located_value(value)}"
        is_value = argument in ("--config", "-config")
        found.append(argument)
    return found


def _located_value(value: str) -> str:
    name, colon, argument = value.partition(":")
    return f"{find(name, '--config')}{colon}{argument}"


def run_name(path: Path, argument: str | None) -> str:
    """A folder's name for a run of this file and argument: tiny, tiny_moe-bias.

    Different arguments have different names.
    """
    if not argument:
        return path.stem
    if _PLAIN_ARGUMENT.fullmatch(argument) and len(argument) <= 60:
        return f"{path.stem}-{argument}"
    plain = re.sub(r"[^\w.,=+-]+", "-", argument, flags=re.ASCII)[:40]
    digest = hashlib.sha256(argument.encode(errors="surrogateescape")).hexdigest()[:8]
    return f"{path.stem}-{plain}-{digest}"
