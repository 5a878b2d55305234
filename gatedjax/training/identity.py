"""What a run was trained on: its text and its tokenizer, saved with it and compared later.

A checkpoint holds the tokenizer's fingerprint and, for each source, the hashes of its training and
its validation text; of a stream, of the training documents at its beginning. Paths are no part of
it: the same content elsewhere is the same data. The tokenizer itself travels with the run, as
`tokenizer.json` in its directory.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from gatedjax import buckets
from gatedjax.config import DataConfig
from gatedjax.data import (
    JsonTokenizer,
    corpora,
    has_chat,
    load_chat_template,
    load_tokenizer,
)
from gatedjax.data.chat_template import CONFIG_NAME
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import InputError
from gatedjax.paths import Place, expand_place, is_bucket
from gatedjax.training.run_directory import plain_errors, raise_together, replace_file

TOKENIZER_FILE = "tokenizer.json"

# {"tokenizer": fingerprint, "sources": {name: {"train": sha256, "validation": sha256}}}, and with
# conversations {"chat_template": fingerprint}.
Identity = Mapping[str, Any]


def identity_of(data: DataConfig, tokenizer: Tokenizer) -> Identity:
    """What this configuration trains on, as a checkpoint holds it."""
    sources = {}
    for name, corpus in corpora(data).items():
        sources[name] = corpus.text_hashes()
    identity = {"tokenizer": tokenizer.fingerprint, "sources": sources}
    if has_chat(data):
        template = load_chat_template(data.tokenizer, data.chat_template)
        identity["chat_template"] = template.fingerprint
    return identity


def require_same_tokenizer(saved: Identity, tokenizer: Tokenizer, run_dir: Place) -> None:
    """InputError if the run was trained with another tokenizer: its ids mean another text."""
    before = saved.get("tokenizer")
    if before is None or before == tokenizer.fingerprint:
        return
    right = "bytes" if before == load_tokenizer("bytes").fingerprint else run_dir / TOKENIZER_FILE
    raise InputError(
        f"config.data.tokenizer: {tokenizer.name} is not the tokenizer that {run_dir} was trained "
        f"with: the same ids would mean other text; that one is --config.data.tokenizer={right}, "
        "or give another --workdir"
    )


def text_difference(saved: Identity, now: Identity) -> str | None:
    """Names the first source whose text is not the one that the run was trained on.

    None if all are the same, or if the checkpoint (`saved`) says nothing of its data.
    """
    sources = saved.get("sources")
    if not isinstance(sources, Mapping):
        return None
    for name in dict.fromkeys([*sources, *now["sources"]]):
        before = sources.get(name)
        after = now["sources"].get(name)
        if before != after:
            return f"data.sources.{name}: {_difference(before, after)}"
    template = now.get("chat_template")
    if template is not None and saved.get("chat_template") != template:
        return "data.chat_template: is not the one that the checkpoint was trained with"
    return None


def _difference(before: Any, after: Mapping[str, str] | None) -> str:
    if after is None:
        return "the checkpoint was trained on it, and it is missing now"
    if not isinstance(before, Mapping):
        return "the checkpoint was not trained on this source"
    splits = [split for split in after if before.get(split) != after[split]]
    return f"the {' and '.join(splits)} text is not the checkpoint's, it has changed since"


def keep_tokenizer(run_dir: Place, tokenizer: Tokenizer) -> None:
    """The first process writes the tokenizer's file into the run directory, if it is not there.

    Raises:
      InputError: on all processes, if it cannot be written.
    """
    if isinstance(tokenizer, JsonTokenizer):
        _keep(run_dir / TOKENIZER_FILE, tokenizer.data)


def keep_chat_template(run_dir: Place, data: DataConfig) -> None:
    """Likewise the chat template, if the run learns from conversations.

    Raises:
      InputError: on all processes, if it cannot be written.
    """
    if has_chat(data):
        template = load_chat_template(data.tokenizer, data.chat_template)
        _keep(run_dir / CONFIG_NAME, template.to_json())


def _keep(path: Place, contents: bytes) -> None:
    problem = None
    if jax.process_index() == 0:
        try:
            with plain_errors(f"could not write {path}"):
                is_there = buckets.exists(path) if is_bucket(path) else path.is_file()
                if not is_there or path.read_bytes() != contents:
                    replace_file(path, contents)
        except InputError as error:
            problem = error
    raise_together(problem)


def tokenizer_of_run(run_dir: str | os.PathLike, spec: str) -> str | None:
    """What names the tokenizer of a run: "bytes", or the file that travels with it.

    None if the run has none: an older one, whose configuration names a path outside.
    """
    if spec == "bytes":
        return spec
    return _own_file(expand_place(run_dir, "run directory") / TOKENIZER_FILE)


def chat_template_of_run(run_dir: str | os.PathLike) -> str | None:
    """The chat template that travels with a run; None if there is none."""
    return _own_file(expand_place(run_dir, "run directory") / CONFIG_NAME)


def _own_file(path: Place) -> str | None:
    if is_bucket(path):
        with plain_errors(f"could not read {path}"):
            return str(path) if buckets.exists(path) else None
    # Not even a link: it could lead to any file.
    if Path(path).is_symlink() or not path.is_file():
        return None
    return str(path)
