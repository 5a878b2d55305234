"""The notebooks run from top to bottom, and what is committed of them is a run's: small, in order,
without errors.
"""

import ast
import base64
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)


def code_cells(page: Path) -> list[dict]:
    return [cell for cell in json.loads(page.read_text())["cells"] if cell["cell_type"] == "code"]


def plain(cell: dict) -> str:
    """The cell as Python: `%pip install x` is `magic("pip install x")`."""
    return re.sub(
        r"^(\s*)%(.*)$", lambda m: f"{m[1]}magic({m[2]!r})", "".join(cell["source"]), flags=re.M
    )


def test_there_are_five():
    assert [p.stem[:2] for p in PAGES] == ["01", "02", "03", "04", "05"]


@every_notebook
def test_the_first_cell_installs_what_is_missing(page, monkeypatch):
    first, asked = compile(plain(code_cells(page)[0]), page.name, "exec"), []
    exec(first, {"magic": asked.append})
    assert asked == [], "gatedjax is here"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(first, namespace := {"magic": asked.append})
    assert asked == ['pip install --quiet "{REQUIREMENT}"']
    extras = re.search(r"\[(.*?)\]", namespace["REQUIREMENT"])[1].split(",")
    assert extras == (["plots", "aot"] if page.stem.startswith("05") else ["plots"])


@every_notebook
def test_what_is_committed_is_a_run(page):
    assert page.stat().st_size <= 300_000
    cells = code_cells(page)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), (
        "run from top to bottom"
    )
    outputs = [output for cell in cells for output in cell["outputs"]]
    texts = ["".join(output.get("text", "")) for output in outputs]
    assert sum(map(bool, texts)) >= 3
    assert all(
        output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs
    )
    pictures = [
        base64.b64decode(o["data"]["image/png"])
        for o in outputs
        if "image/png" in o.get("data", {})
    ]
    assert pictures and max(map(len, pictures)) <= 60_000
    assert not any(re.search(r"/(home|root|tmp|work)/", text) for text in texts), (
        "a path of the machine that ran it"
    )


@every_notebook
def test_every_name_of_the_library_exists(page):
    """Imports resolve, attributes of modules exist, and calls of imported functions name only what
    they take.
    """
    known = {}
    for cell in code_cells(page):
        tree = ast.parse(plain(cell))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                known |= {
                    a.asname or a.name.split(".")[0]: importlib.import_module(a.name)
                    for a in node.names
                }
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                known |= {a.asname or a.name: getattr(module, a.name) for a in node.names}
    assert known, "a notebook imports something"
    for cell in code_cells(page):
        for node in ast.walk(ast.parse(plain(cell))):
            if isinstance(node, ast.Attribute):
                _resolve(node, known)
            elif isinstance(node, ast.Call) and isinstance(
                called := _resolve(node.func, known), type(_resolve)
            ):
                names = {k.arg: None for k in node.keywords if k.arg}
                inspect.signature(called).bind_partial(**names)


def _resolve(node: ast.expr, known: dict):
    """What `module.name.name` stands for; None if it does not begin with an imported module or
    function.
    """
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and inspect.ismodule(owner := _resolve(node.value, known)):
        return getattr(owner, node.attr)
    return None


def test_no_cell_uses_a_name_that_is_not_there():
    # The project's own choice leaves F821 out, for the shapes in annotations.
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--no-cache",
        "--select",
        "F",
        "notebooks",
    ]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_without_libtpu_the_fifth_says_so_in_one_line(monkeypatch):
    monkeypatch.setattr("gatedjax.aot.libtpu.installed", lambda: False)
    with pytest.raises(SystemExit, match=r"^libtpu is not here.*pip install 'gatedjax\[aot\]'"):
        exec(plain(code_cells(PAGES[4])[1]), {})


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=pytest.mark.slow, id=p.stem) for p in PAGES]
)
def test_runs(page, tmp_path, monkeypatch):
    """In a process and a folder of its own, as a reader's; raises CellExecutionError with the cell
    that failed.
    """
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    if page.stem.startswith("05") and importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notebook = nbformat.read(page, as_version=4)
    nbformat.validate(notebook)
    folder = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources=folder
    ).execute()
