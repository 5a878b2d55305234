"""Writes the first cell and the "Open in Colab" badge into every notebook.

    python notebooks/update.py

The cell is notebooks/first_cell.py, with the extras that a notebook needs; the address of the
repository is the one in pyproject.toml.
"""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Notebooks that need more than `plots`, by their number.
EXTRAS = {"05": "plots,aot"}
_BADGE = re.compile(r"^\[!\[Open in Colab\].*\n\n", re.M)


def repository() -> str:
    """The address of the repository: https://HOST/OWNER/NAME."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    return project["urls"]["Repository"]


def first_cell(name: str) -> str:
    """The source of a notebook's first cell."""
    source = (HERE / "first_cell.py").read_text().rstrip()
    source = re.sub(r'^REPOSITORY = ".*"$', f'REPOSITORY = "{repository()}"', source, flags=re.M)
    extras = EXTRAS.get(name[:2], "plots")
    return re.sub(r'^EXTRAS = ".*"$', f'EXTRAS = "{extras}"', source, flags=re.M)


def badge(name: str) -> str:
    """A picture that opens the notebook in Colab."""
    place = repository().removeprefix("https://github.com/")
    picture = "https://colab.research.google.com/assets/colab-badge.svg"
    link = f"https://colab.research.google.com/github/{place}/blob/main/notebooks/{name}.ipynb"
    return f"[![Open in Colab]({picture})]({link})"


def updated(name: str, notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with its badge and its first cell as they should be."""
    title, setup, *rest = notebook["cells"]
    text = _BADGE.sub("", "".join(title["source"]))
    heading, _, below = text.partition("\n\n")
    title = title | {"source": _lines(f"{heading}\n\n{badge(name)}\n\n{below}")}
    # Colab shows the title in place of the code.
    metadata = {"cellView": "form"}
    setup = setup | {"source": _lines(first_cell(name)), "metadata": metadata}
    return notebook | {"cells": [title, setup, *rest]}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    for path in sorted(HERE.glob("*.ipynb")):
        notebook = json.loads(path.read_text())
        text = json.dumps(updated(path.stem, notebook), indent=1, ensure_ascii=False)
        path.write_text(text + "\n")


if __name__ == "__main__":
    main()
