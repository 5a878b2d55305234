"""The index of papers: what of the literature is here, where it lives, what to type.

    gatedjax-papers list
    gatedjax-papers search normalizer entropy
    gatedjax-papers show scalable-softmax

A row is a `[[paper]]` of a file in `rows/`, one file a family; `Paper` says what it holds. To add
one, write it there and run `python docs/papers_page.py`, which makes docs/papers.md. A test runs
what the rows say to type and looks for the tests that they name.
"""

import dataclasses
import difflib
import functools
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatedjax.errors import InputError, require

STATUSES = ("works", "in part", "not yet")
# What the code of every row may use.
PREAMBLE = """\
import jax
import jax.numpy as jnp

import gatedjax
from gatedjax import ops

q = k = v = jax.random.normal(jax.random.key(0), (1, 64, 4, 32))  # [B, T, H, D]
x = jax.random.normal(jax.random.key(0), (1, 64, 128))  # [B, T, M]
"""
MOST_LINES = 3
# How many titles a message names.
_MOST_NEAR = 5

_ROWS = Path(__file__).parent / "rows"
_ARXIV = re.compile(r"\d{4}\.\d{4,5}")
# The order of the page and of the list; files that are not named here come last.
_FIRST_FAMILIES = (
    "attention_gate",
    "normalizer",
    "position",
    "attention",
    "linear_attention",
    "delta_rule",
    "hybrid",
    "router",
    "mlp_gate",
)


@dataclass(frozen=True)
class Paper:
    """A row of the index.

    Attributes:
      family: what sort of mechanism it is, from its file.
      title: the paper's.
      status: "works", "in part" or "not yet".
      about: what it is, in one line.
      arxiv: its number; "" where it has none that we know for sure.
      where: the file or folder that it lives in.
      command: what to type: a command that trains, evaluates or studies.
      code: or up to three lines of Python after `PREAMBLE`.
      test: FILE::FUNCTION, a test of its formula.
      differs: what is not as in the paper.
      missing: what is not there, unless it works.
    """

    family: str
    title: str
    status: str
    about: str
    arxiv: str = ""
    where: str = ""
    command: str = ""
    code: str = ""
    test: str = ""
    differs: str = ""
    missing: str = ""

    @property
    def year(self) -> int | None:
        """Of the first version on arXiv."""
        return 2000 + int(self.arxiv[:2]) if self.arxiv else None

    @property
    def is_there(self) -> bool:
        """Whether there is something to type."""
        return self.status != "not yet"

    @property
    def short_title(self) -> str:
        """What stands before the colon of a title."""
        return self.title.partition(":")[0]


@functools.cache
def papers() -> tuple[Paper, ...]:
    """All rows, family by family; what works first.

    Raises:
      InputError: a row that is not as `Paper` says.
    """
    files = sorted(_ROWS.glob("*.toml"), key=_place)
    return tuple(paper for path in files for paper in _read(path))


def families() -> tuple[str, ...]:
    """The families, in order."""
    return tuple(dict.fromkeys(paper.family for paper in papers()))


def selected(status: str | None = None, family: str | None = None) -> list[Paper]:
    """The rows of a status and of a family; None for all.

    Raises:
      InputError: there is no such status or family.
    """
    require(status is None or status in STATUSES, "status", status, f"one of {list(STATUSES)}")
    names = families()
    require(family is None or family in names, "family", family, f"one of {list(names)}")
    return [
        paper
        for paper in papers()
        if status in (None, paper.status) and family in (None, paper.family)
    ]


def search(words: list[str]) -> list[Paper]:
    """The rows that hold every word, in any case, in any of their fields."""
    return [paper for paper in papers() if all(word.lower() in _text(paper) for word in words)]


def find(title: str) -> Paper:
    """The row of a title, of its first words or of an arXiv number.

    Raises:
      InputError: there is none, or several; with those that are near.
    """
    wanted = _plain(title)
    for exact in (True, False):
        found = [paper for paper in papers() if _is_called(paper, wanted, exact)]
        if len(found) == 1:
            return found[0]
        if found:
            break
    near = [paper.short_title for paper in found] or _near(wanted)
    expected = "a title of `gatedjax-papers list`"
    if near:
        expected = f"one of {near[:_MOST_NEAR]}"
    if len(near) > _MOST_NEAR:
        expected += f" or of {len(near) - _MOST_NEAR} more"
    raise InputError(f"title: got {title!r}, expected {expected}")


def _is_called(paper: Paper, wanted: str, exact: bool) -> bool:
    names = {_plain(paper.title), _plain(paper.short_title), _plain(paper.arxiv)}
    return wanted in names if exact else bool(wanted) and wanted in _plain(paper.title)


def _near(wanted: str) -> list[str]:
    """The short titles that are most like what was asked for, or that share a word with it."""
    # What is typed is often the beginning of a title.
    by_name = {_plain(paper.title)[: len(wanted) + 2]: paper for paper in papers()}
    names = difflib.get_close_matches(wanted, by_name, n=_MOST_NEAR, cutoff=0.65)
    if not names:
        by_name = {_plain(paper.title): paper for paper in papers()}
        words = {word for word in wanted.split() if len(word) > 3}
        names = [name for name in by_name if words & set(name.split())]
    return list(dict.fromkeys(by_name[name].short_title for name in names))


def _plain(text: str) -> str:
    """Small letters and digits, words apart by one space."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def _text(paper: Paper) -> str:
    return " ".join(str(value) for value in dataclasses.astuple(paper)).lower()


def _place(path: Path) -> tuple[int, str]:
    if path.stem in _FIRST_FAMILIES:
        return _FIRST_FAMILIES.index(path.stem), ""
    return len(_FIRST_FAMILIES), path.stem


def _read(path: Path) -> list[Paper]:
    """The rows of a file."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    rows = [_paper(table["family"], row, path.name) for row in table["paper"]]
    return sorted(rows, key=lambda paper: STATUSES.index(paper.status))


def _paper(family: str, row: dict[str, Any], file: str) -> Paper:
    name = f"{file}: {row.get('title')}"
    known = {field.name for field in dataclasses.fields(Paper)} - {"family"}
    require(set(row) <= known, name, sorted(set(row) - known), f"keys of {sorted(known)}")
    for key in ("title", "status", "about"):
        require(bool(row.get(key)), f"{name}: {key}", row.get(key), "a text")
    # Commands stand on several lines of the file, and are one.
    command = " ".join(row.get("command", "").split())
    code = row.get("code", "").strip()
    paper = Paper(**{**row, "family": family, "command": command, "code": code})
    _check(paper, name)
    return paper


def _check(paper: Paper, name: str) -> None:
    require(paper.status in STATUSES, f"{name}: status", paper.status, f"one of {STATUSES}")
    is_number = _ARXIV.fullmatch(paper.arxiv) is not None
    require(not paper.arxiv or is_number, f"{name}: arxiv", paper.arxiv, "a number like 2505.06708")
    is_missing = bool(paper.missing)
    expected = "a text, unless the status is 'works'"
    require(is_missing != (paper.status == "works"), f"{name}: missing", paper.missing, expected)
    if not paper.is_there:
        return
    for key in ("where", "test", "differs"):
        require(bool(getattr(paper, key)), f"{name}: {key}", "", "a text")
    require(
        bool(paper.command) != bool(paper.code),
        f"{name}: command, code",
        (paper.command, paper.code),
        "one of the two",
    )
    lines = [line for line in paper.code.splitlines() if line.strip()]
    require(len(lines) <= MOST_LINES, f"{name}: code", len(lines), f"at most {MOST_LINES} lines")
