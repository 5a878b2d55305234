"""Writes docs/papers.md from the rows of gatedjax/papers.

python docs/papers_page.py
"""

import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# Found through the line above.
from gatedjax.papers import PREAMBLE, STATUSES, Paper, families, selected  # noqa: E402

# What the site's box for code holds.
COLUMNS = 90

HEAD = """# Papers

What of the literature is here: what it is, where it lives, what to type, and what differs from the
paper. "In part" says what is missing; at the end of a family stands what is not there yet.
`gatedjax-papers list`, `gatedjax-papers search WORDS` and `gatedjax-papers show TITLE` print the
same.

A flag changes one value of a configuration, so it goes with any other. Python begins with

```python
{preamble}```

This page is made from `gatedjax/papers/rows` by `python docs/papers_page.py`. To add a paper, add a
`[[paper]]` there; a test runs what it says to type and looks for its test.
"""


def page() -> str:
    """The counts, then family by family."""
    parts = [HEAD.format(preamble=PREAMBLE), counts()]
    for family in families():
        rows = selected(family=family)
        parts.append(f"## {family[0].upper()}{family[1:]}\n")
        parts += [section(paper) for paper in rows if paper.is_there]
        missing = [paper for paper in rows if not paper.is_there]
        if missing:
            parts.append(not_yet(missing))
    return "\n".join(parts)


def counts() -> str:
    """How many papers of each family work."""
    lines = [f"| | {' | '.join(STATUSES)} |", "|---" * (len(STATUSES) + 1) + "|"]
    for family in families():
        lines.append(counted(f"[{family}](#{family.replace(' ', '-')})", family))
    lines.append(counted("all", None))
    return "\n".join([*lines, ""])


def counted(name: str, family: str | None) -> str:
    numbers = [str(len(selected(status, family))) for status in STATUSES]
    return f"| {name} | {' | '.join(numbers)} |"


def section(paper: Paper) -> str:
    """What is there of a paper."""
    lines = [f"### {paper.title}", "", source(paper) + paper.about, ""]
    if paper.missing:
        lines += [f"**In part.** Missing: {paper.missing}.", ""]
    lines += [typed_block(paper), "", f"Differs: {paper.differs}", ""]
    return "\n".join([*lines, f"In `{paper.where}`, tested by `{paper.test}`.", ""])


def source(paper: Paper) -> str:
    if not paper.arxiv:
        return ""
    return f"[{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}). "


def typed_block(paper: Paper) -> str:
    """What to type, as a block of its language."""
    if paper.code:
        return f"```python\n{paper.code}\n```"
    return f"```sh\n{wrapped(paper.command)}\n```"


def wrapped(command: str) -> str:
    """A command on lines that fit their box."""
    lines = textwrap.wrap(
        command,
        width=COLUMNS,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return " \\\n".join(lines)


def not_yet(papers: list[Paper]) -> str:
    """The rest of a family, a row each."""
    lines = ["| not yet | what it is | missing |", "|---|---|---|"]
    for paper in papers:
        link = paper.title
        if paper.arxiv:
            link = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv})"
        cells = [re.sub(r"\|", "&#124;", text) for text in (link, paper.about, paper.missing)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    (ROOT / "docs" / "papers.md").write_text(page())
