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
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
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


def updater():
    spec = importlib.util.spec_from_file_location("update", ROOT / "notebooks" / "update.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@every_notebook
def test_badge_and_first_cell_are_those_of_the_source(page):
    notebook = json.loads(page.read_text())
    assert updater().updated(page.stem, notebook) == notebook, "run: python notebooks/update.py"
    assert updater().badge(page.stem) in "".join(notebook["cells"][0]["source"])


class Machine:
    """What the first cell asks of a machine, and what it tells pip."""

    def __init__(self, monkeypatch, smi="", capability="8.9"):
        self.smi, self.capability, self.installed = smi, capability, []
        monkeypatch.setattr(subprocess, "run", self.run)
        monkeypatch.setattr(shutil, "which", lambda name: name if smi else None)
        monkeypatch.delenv("COLAB_TPU_ADDR", raising=False)
        monkeypatch.setattr(Path, "glob", lambda *_: [])

    def run(self, command, **_):
        said = ""
        if command[0] == "nvidia-smi":
            said = self.smi if len(command) == 1 else f"{self.capability}\n"
        elif "install" in command:
            self.installed.append(command[-1])
        return subprocess.CompletedProcess(command, 0, said)


MACHINES = {
    "cpu": (dict(), ""),
    "no driver": (dict(smi="NVIDIA-SMI has failed"), ""),
    "T4, Colab": (dict(smi="| CUDA Version: 12.4 |", capability="7.5"), ",cuda12"),
    "H100": (dict(smi="| CUDA Version: 13.0 |", capability="9.0"), ",cuda13"),
    "new driver": (dict(smi="| CUDA UMD Version: 13.2 |"), ",cuda13"),
    "P100, Kaggle": (dict(smi="| CUDA Version: 13.0 |", capability="6.0"), ",cuda12"),
}


def first_cell(page: Path, missing: bool, monkeypatch) -> None:
    code = compile("".join(code_cells(page)[0]["source"]), page.name, "exec")
    if missing:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(code, {})


@pytest.mark.parametrize("name", MACHINES)
def test_the_first_cell_installs_for_the_accelerator(name, monkeypatch, tmp_path, capsys):
    described, extra = MACHINES[name]
    monkeypatch.chdir(tmp_path)
    machine = Machine(monkeypatch, **described)
    first_cell(PAGES[0], True, monkeypatch)
    assert machine.installed == [f"gatedjax[plots{extra}] @ git+{updater().repository()}"]
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"gatedjax \S+, jax \S+, runs on cpu: \d+ x cpu", lines[0])
    # The tests have a CPU, whatever this machine says it has.
    assert len(lines) == (2 if extra else 1)


def test_the_first_cell_on_a_tpu_in_a_clone_and_without_need(monkeypatch, tmp_path):
    machine = Machine(monkeypatch)
    first_cell(PAGES[0], False, monkeypatch)
    assert machine.installed == [], "gatedjax is here"
    monkeypatch.setenv("COLAB_TPU_ADDR", "here")
    (tmp_path / "gatedjax").mkdir()
    (tmp_path / "gatedjax" / "__init__.py").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    first_cell(PAGES[0], True, monkeypatch)
    assert machine.installed.pop() == f"gatedjax[plots,tpu] @ {tmp_path.as_uri()}"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    first_cell(PAGES[4], True, monkeypatch)
    assert machine.installed.pop() == f"gatedjax[plots,aot] @ {tmp_path.as_uri()}", "for no TPU"


def test_the_first_cell_says_what_a_person_must_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Machine(monkeypatch)
    monkeypatch.setattr(np, "__version__", "1.0")
    with pytest.raises(
        SystemExit, match="restart the runtime, then run this cell again: old numpy"
    ):
        first_cell(PAGES[0], True, monkeypatch)
    monkeypatch.setattr(sys, "version_info", (3, 11))
    with pytest.raises(SystemExit, match=r"gatedjax needs Python 3\.12 or newer, this is"):
        first_cell(PAGES[0], True, monkeypatch)


def a_repository(folder: Path) -> None:
    """This tree as the only commit of a git repository."""
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", ".cache", ".*_cache", "build", "dist", "runs", "results", "*.egg-info"
    )
    shutil.copytree(ROOT, folder, ignore=ignored)
    git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("python", ["python3.12", "python3.13"])
def test_the_first_cell_in_a_hosted_runtime(python, tmp_path):
    """An older jax is there, the working folder is empty; pip fetches from the real address, which
    git takes from this tree.
    """
    version = subprocess.run([python, "--version"], capture_output=True, text=True)
    if version.returncode != 0:
        pytest.skip(f"{python} is not here")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "jax==0.7.2", "flax==0.11.2", "absl-py==1.4.0"], check=True)
    a_repository(tmp_path / "repository")
    (tmp_path / "content").mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}

    def run(code, **more):
        return subprocess.run(
            [python, "-c", code],
            cwd=tmp_path / "content",
            env=environment | {"JAX_PLATFORMS": "cpu"} | more,
            capture_output=True,
            text=True,
            timeout=900,
        )

    older = run("import gatedjax.ops", PYTHONPATH=str(ROOT))
    said = "ImportError: kernels_pallas: got jax 0.7.2, expected 0.11.2 or newer: pip install -U"
    assert older.returncode == 1 and older.stderr.splitlines()[-1].startswith(said)
    cell = "".join(code_cells(PAGES[0])[0]["source"])
    use = (
        "\nimport importlib.metadata as m\n"
        "from gatedjax.ops import attention, linear_scan\n"
        "q = jax.random.normal(jax.random.key(0), (1, 20, 2, 16))\n"
        "print(attention(q, q, q, gate_logits=q).shape, linear_scan(q, q, q).shape)\n"
        "print('absl', m.version('absl-py'))\n"
    )
    installed = run(
        cell + use,
        GIT_CONFIG_COUNT="1",
        GIT_CONFIG_KEY_0=f"url.file://{tmp_path / 'repository'}.insteadOf",
        GIT_CONFIG_VALUE_0=updater().repository(),
    )
    assert installed.returncode == 0, installed.stderr
    first, shapes, absl = installed.stdout.splitlines()
    assert re.fullmatch(r"gatedjax \S+, jax 0\.1[12]\.\S+, runs on cpu: 1 x cpu", first)
    assert shapes == "(1, 20, 2, 16) (1, 20, 2, 16)" and absl == "absl 1.4.0"


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
                for a in node.names:
                    module = importlib.import_module(a.name)
                    top = a.name.split(".")[0]
                    # `import a.b` binds a.
                    known[a.asname or top] = module if a.asname else sys.modules[top]
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
