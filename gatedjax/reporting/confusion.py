"""Which classes an encoder takes for which: lines of text, and a picture."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from gatedjax.reporting.figure import new_figure, save

PICTURE = "confusion.png"
# More classes have no numbers in their squares, and no names beside them.
MOST_NUMBERED = 20
MOST_NAMED = 40


def most_confused(
    confusion: Int[np.ndarray, "X X"],
    classes: Sequence[str],
    count: int = 5,
) -> Iterator[str]:
    """The pairs of classes that are confused most, in words.

    Args:
      confusion: how often images of a class (row) were taken for one (column).
      classes: the names of the classes.
      count: of pairs, at most.
    """
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    for index in np.argsort(-wrong, axis=None, kind="stable")[:count]:
        row, column = np.unravel_index(index, wrong.shape)
        if wrong[row, column] == 0:
            return
        of_class = confusion[row].sum()
        yield f"{classes[row]!r} for {classes[column]!r}: {wrong[row, column]} of {of_class}"


def draw_confusion(
    confusion: Int[np.ndarray, "X X"],
    classes: Sequence[str],
    title: str,
    path: Path,
) -> None:
    """Writes the picture: a row for each class, the fractions of its images in colors.

    Args:
      confusion: as in `most_confused`.
      classes: the names of the classes.
      title: of the picture.
      path: where it is written.

    Raises:
      InputError: matplotlib is not installed, or no right to write.
    """
    figure, axes = new_figure((6.4, 5.6))
    of_class = np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    fractions = confusion / of_class
    shown = axes.imshow(
        fractions,
        cmap="Blues",
        vmin=0.0,
        vmax=1.0,
    )
    figure.colorbar(shown, ax=axes, label="fraction of the images of a class")
    if len(classes) <= MOST_NUMBERED:
        _write_numbers(axes, confusion, fractions)
    if len(classes) <= MOST_NAMED:
        places = range(len(classes))
        axes.set_xticks(places, classes, rotation=90)
        axes.set_yticks(places, classes)
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    axes.set_title(title)
    save(figure, path)


def _write_numbers(axes: Any, confusion: np.ndarray, fractions: np.ndarray) -> None:
    for (row, column), number in np.ndenumerate(confusion):
        if number:
            color = "white" if fractions[row, column] > 0.5 else "black"
            axes.text(
                column,
                row,
                str(number),
                ha="center",
                va="center",
                color=color,
                fontsize=7,
            )
