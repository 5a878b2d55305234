"""What a run directory keeps of the checkpoint that it was imported from: RUN/hf.

Files that the model needs elsewhere (how text is cut, how a chat is written, how it is sampled),
config.json, and in `gatedjax.json` the family and the dtype of every tensor.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gatedjax.errors import InputError
from gatedjax.interop.safetensors import DTYPES, LARGEST_INDEX, read_json

FOLDER = "hf"
FILE = "gatedjax.json"
# tokenizer.json itself lies in the run directory, where every run has it.
CARRIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


class Record(NamedTuple):
    """The family, the dtype of most tensors, and that of the others by name."""

    model_type: str
    dtype: str
    others: Mapping[str, str]


def write_record(place: Path, record: Record) -> None:
    """Into the folder that is carried along."""
    (place / FILE).write_text(json.dumps(record._asdict(), indent=2, sort_keys=True) + "\n")


def read_record(run_dir: Path) -> Record | None:
    """Of a run that was imported; None of any other.

    Raises:
      InputError: it is there, and is none.
    """
    path = run_dir / FOLDER / FILE
    if not path.exists():
        return None
    values = read_json(path, LARGEST_INDEX)
    others = values.get("others")
    if isinstance(others, dict) and values.keys() == set(Record._fields):
        dtypes = [values["dtype"], *others.values()]
        are_known = all(isinstance(dtype, str) and dtype in DTYPES for dtype in dtypes)
        if are_known and isinstance(values["model_type"], str):
            return Record(values["model_type"], values["dtype"], others)
    expected = f"{', '.join(Record._fields)} as import_hf writes them"
    raise InputError(f"{path}: expected {expected}")
