"""What the gates, attention, states and experts of a checkpoint do, on one page of pictures.

    python -m gatedjax.probe --checkpoint=runs/tiny [--text=book.txt] [--out=FOLDER]

Any run directory will do, those of imported models too. The model reads rows of the text, each of
which begins as its documents do; without --text what the run held out. In the folder: probes.html,
which needs no other file, its pictures, and all numbers in probes.json. What each probe is:
docs/probes.md.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jaxtyping import PyTree

from gatedjax.config import SourceConfig
from gatedjax.data import Batch, load_tokenizer, validation_text
from gatedjax.data.sources import open_source
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import InputError
from gatedjax.evaluation.probes import Probes, measure
from gatedjax.evaluation.prompt_text import start_of_text
from gatedjax.evaluation.restore import (
    fitting_mesh,
    memory_errors,
    require_same_text,
    require_text,
    restore_params,
)
from gatedjax.paths import expand
from gatedjax.reporting.console import say
from gatedjax.reporting.probe_page import write_page
from gatedjax.reporting.probe_pictures import require_no_links
from gatedjax.runtime import cli, launch
from gatedjax.runtime.host_memory import large_blocks_given_back
from gatedjax.sharding import global_batch, my_rows
from gatedjax.training.run import Run

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory, as --workdir of train.py.")
_OUT = flags.DEFINE_string("out", None, "Folder of the page; default: CHECKPOINT/probes.")
_TEXT = flags.DEFINE_string(
    "text", None, "A file or folder of text to read; default: what the run held out."
)
_ROWS = flags.DEFINE_integer("rows", 8, "Rows that the model reads, at most.", lower_bound=1)
_LENGTH = flags.DEFINE_integer(
    "length", None, "Tokens of a row; default: those that the run was trained on.", lower_bound=2
)
_STEP = flags.DEFINE_integer(
    "step", None, "Which checkpoint; default: the newest intact one.", lower_bound=0
)
_TRUST = flags.DEFINE_bool(
    "trust_paths", False, "Use the paths in a checkpoint that somebody else wrote."
)


def main(_) -> None:
    """Restore -> rows of text -> probes -> page."""
    checkpoint = expand(cli.required(_CHECKPOINT), "--checkpoint")
    folder = checkpoint / "probes" if _OUT.value is None else expand(_OUT.value, "--out")
    require_no_links(folder)
    launch.start()
    with large_blocks_given_back():
        run, params, step = restore_params(
            checkpoint,
            step=_STEP.value,
            text=_TEXT.value,
            trust_paths=_TRUST.value,
            mesh=fitting_mesh(checkpoint),
        )
    if run.config.model.task != "lm":
        raise InputError(
            f"--checkpoint: got a run of model.task {run.config.model.task!r}, expected 'lm': "
            "eval.py --probes draws what an encoder does"
        )
    data = run.config.data
    tokenizer = load_tokenizer(data.tokenizer, data.end_of_document)
    batch = rows_of_texts(
        texts_of(run, checkpoint),
        tokenizer,
        start_of_text(checkpoint, tokenizer),
        rows=_ROWS.value,
        length=_LENGTH.value or data.seq_len,
    )
    probes = measured(run, params, batch)
    tokens = int((batch.segment_ids > 0).sum())
    rows, length = batch.tokens.shape
    notes = [
        f"{checkpoint}, step {step}: {run.config.model.num_layers} layers, {data.tokenizer}",
        f"{tokens:,} tokens in {rows} rows of {length} of {_TEXT.value or 'held-out text'}",
    ]
    for path in write_page(probes, folder, f"Probes of {checkpoint.name}", notes):
        say(str(path))


def texts_of(run: Run, checkpoint: Path) -> Iterator[str]:
    """The documents of --text, or the run's held-out text.

    Raises:
      InputError: there is none, or the run's text is not what it was.
    """
    if _TEXT.value is not None:
        source = open_source("text", SourceConfig(kind="text", path=_TEXT.value))
        for text in source.texts():
            if text:
                yield text
        return
    require_text(run)
    require_same_text(run, checkpoint)
    yield validation_text(run.config.data).decode(errors="replace")


def rows_of_texts(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    start: list[int],
    *,
    rows: int,
    length: int,
) -> Batch:
    """Rows of one document each: pieces of the texts, from the first one on.

    Args:
      texts: documents.
      tokenizer: of the model.
      start: the ids that a document of the model begins with.
      rows: at most.
      length: of a row; shorter pieces are padded.

    Raises:
      InputError: no text, or rows without room for it.
    """
    room = length - len(start)
    if room < 2:
        raise InputError(f"--length: got {length}, expected at least {len(start) + 2}")
    pieces: list[list[int]] = []
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        for first in range(0, len(ids), room):
            pieces.append([*start, *ids[first : first + room]])
        if len(pieces) >= rows:
            break
    pieces = [piece for piece in pieces if len(piece) > 1][:rows]
    if not pieces:
        raise InputError("--text: got no text, expected some to read")
    shape = (len(pieces), max(len(piece) for piece in pieces))
    tokens = np.zeros(shape, np.int32)
    is_real = np.zeros(shape, bool)
    for row, piece in enumerate(pieces):
        tokens[row, : len(piece)] = piece
        is_real[row, : len(piece)] = True
    places = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return Batch(
        tokens=tokens,
        targets=np.zeros_like(tokens),
        segment_ids=is_real.astype(np.int32),
        positions=np.where(is_real, places, 0),
        loss_mask=is_real.astype(np.float32),
    )


def measured(run: Run, params: PyTree, batch: Batch) -> Probes:
    """The probes of a batch, on the run's mesh, which may want more rows: of padding."""
    rows = -(-len(batch.tokens) // run.mesh.size) * run.mesh.size

    def mine(x: np.ndarray) -> np.ndarray:
        padded = np.pad(x, ((0, rows - len(x)), (0, 0)))
        return padded[list(my_rows(run.mesh, rows))]

    local = jax.tree.map(mine, batch)
    with jax.set_mesh(run.mesh), memory_errors("a batch of this size"):
        return measure(run.config.model, params, global_batch(run.mesh, local, rows))


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    cli.run(main)


if __name__ == "__main__":
    run()
