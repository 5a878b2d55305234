"""Reads a study from its file."""

import dataclasses
import importlib.util
from pathlib import Path

from gatedjax.errors import InputError
from gatedjax.study.grid import Study, StudyFile


def load_study(path: Path, small: bool) -> Study:
    """What the file's `get_study(small)` returns.

    Raises:
      InputError: no such file, or one without `get_study`.
    """
    if not path.is_file():
        raise InputError(f"study: got {path}, expected a Python file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"study: got {path}, expected a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_study"):
        raise InputError(f"study: {path} has no get_study(small)")
    file = StudyFile(path.resolve(), small)
    return dataclasses.replace(module.get_study(small), file=file)
