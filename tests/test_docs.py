"""The documentation is true: its Python runs, its commands exist, its links lead somewhere, and
generated pages are fresh.
"""

import ast
import functools
import importlib.util
import re
import shlex
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from gatedjax.config import files

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
SHELL = re.compile(r"^```sh\n(.*?)^```", re.M | re.S)
SCRIPT_NAMES = r"gatedjax-(?:train|eval|generate|probe|study|papers|aot|\w+-hf)\b"
INLINE = re.compile(rf"`((?:python|make|pip|{SCRIPT_NAMES}) [^`]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# A command ends where its line does, or at a quote around it, a pipe, a redirection, a comment.
COMMAND = re.compile(
    r"\b(?:python (?P<module>-m )?(?P<target>[\w./]+)"
    rf"|(?P<script>{SCRIPT_NAMES}))"
    r"(?P<arguments>[^\n\"|&>#]*)"
)
# Files of commands beside the pages.
SCRIPTS = sorted((ROOT / "docs" / "launch").glob("*.sh"))
# What fits the site's box for code.
COLUMNS = 94
# Where the commands' common flags are defined.
SHARED_FLAGS = sorted((ROOT / "gatedjax" / "runtime").glob("*.py"))


def text_of(page: Path) -> str:
    return page.read_text()


def python_blocks(page: Path) -> list[str]:
    return PYTHON.findall(text_of(page))


def shell_blocks(page: Path) -> list[str]:
    return SHELL.findall(text_of(page))


def shell_text(page: Path) -> str:
    """The commands of a page, in blocks and in sentences, or of a script; each on one line."""
    if page.suffix == ".sh":
        commands = [text_of(page)]
    else:
        commands = [*shell_blocks(page), *INLINE.findall(text_of(page))]
    return "\n".join(commands).replace("\\\n", " ")


def source_of(target: str, is_module: bool) -> Path:
    """The file that a command runs."""
    if target.startswith("gatedjax-"):
        target = project()["scripts"][target].partition(":")[0]
        is_module = True
    if not is_module:
        path = ROOT / target
        # The scripts of the root hand over to the package.
        package_path = ROOT / "gatedjax" / target
        return package_path if path.exists() and package_path.exists() else path
    path = ROOT / target.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def project() -> Mapping:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def flags_in(source: Path) -> set[str]:
    """Names of the flags that a file defines, with absl or argparse."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        function = node.func.attr
        if function == "add_argument" or function.startswith("DEFINE_"):
            names = [a.value for a in node.args if isinstance(a, ast.Constant)]
            found.update(str(name).removeprefix("--") for name in names[:1])
    return found


@functools.cache
def get_config(path: str) -> Mapping:
    """What `--config=PATH` gives; PATH:STRING hands the string on."""
    name, _, argument = path.partition(":")
    spec = importlib.util.spec_from_file_location("a_config", files.find(name, "--config"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()


def is_placeholder(text: str) -> bool:
    """NAME, DIR, MY_FOLDER, $VARIABLE, '...': what readers replace."""
    return "..." in text or "$" in text or re.search(r"\b[A-Z][A-Z_]+\b", text) is not None


def check_command(source: Path, arguments: list[str]) -> None:
    shared = [source, *SHARED_FLAGS]
    # Scripts that lie beside each other share flags.
    for module in re.findall(r"^from (\w+) import", source.read_text(), re.MULTILINE):
        beside = source.with_name(f"{module}.py")
        if beside.exists():
            shared.append(beside)
    known = set().union(*(flags_in(file) for file in shared))
    config = None
    for argument in arguments:
        if not argument.startswith("--") or argument == "--":
            continue
        flag, _, value = argument.removeprefix("--").partition("=")
        if flag == "config" and not is_placeholder(value):
            config = get_config(value)
        if flag.startswith("config."):
            group = config
            for key in flag.split(".")[1:]:
                assert group is None or key in group, argument
                group = group and group[key]
        else:
            assert flag in known, f"{source} has no flag --{flag}"


# What their code calls has tests of its own that `make test` runs.
SLOW_PAGES = (
    "attention",
    "bidirectional_linear_attention",
    "delta_attention",
    "delta_scan",
    "frameworks",
    "gated_linear_attention",
    "kalmanet",
    "linear_scan",
    "lora_mixture",
    "mamba2",
    "mla",
    "other_keys",
    "papers",
    "rwkv6",
    "rwkv7",
    "soft_moe",
    "sparse_moe",
    "stochastic_gates",
    "tokens",
)


def runs_now(page: Path):
    """The page, marked where only `make test-all` runs its code."""
    marks = pytest.mark.slow if page.stem in SLOW_PAGES else ()
    return pytest.param(page, id=page.stem, marks=marks)


@pytest.mark.parametrize("page", [runs_now(p) for p in PAGES if python_blocks(p)])
def test_code_runs(page):
    """The blocks of a page, one after the other, as a reader would paste them."""
    namespace = {"__name__": "page"}
    for block in python_blocks(page):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize(
    "page", [*(p for p in PAGES if shell_blocks(p)), *SCRIPTS], ids=lambda p: p.stem
)
def test_shell_parses(page):
    for block in [text_of(page)] if page.suffix == ".sh" else shell_blocks(page):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=lambda p: p.name)
def test_commands_exist(page):
    """Scripts and modules are there, and know the flags and the keys of configurations."""
    text = shell_text(page)
    for command in COMMAND.finditer(text):
        target = command["target"] or command["script"]
        if is_placeholder(target) or target.startswith("python"):
            continue
        source = source_of(target, command["module"] is not None)
        assert source.exists(), command[0]
        arguments = shlex.split(command["arguments"])
        if "--" in arguments:
            # Behind it is another command, found by itself.
            arguments = arguments[: arguments.index("--")]
        check_command(source, arguments)

    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([\w-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"

    for extras in re.findall(r"(?:gatedjax|'\.)\[([\w,-]+)\]", text):
        assert set(extras.split(",")) <= set(project()["optional-dependencies"])


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_code_fits_its_box(page):
    for block in [*python_blocks(page), *shell_blocks(page)]:
        assert max(len(line) for line in block.splitlines()) <= COLUMNS


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    local = [
        link for link in LINK.findall(text_of(page)) if not re.match(r"https?://|#|mailto:", link)
    ]
    missing = [link for link in local if not (page.parent / link.split("#")[0]).exists()]
    assert not missing


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1000


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in menu


def test_pages_of_the_api_name_what_exists():
    """`::: a.b.c`: a module and a name of it."""
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for name in re.findall(r"^::: (\S+)", text_of(page), re.M):
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize(
    "study, picture",
    [
        ("mqar", "accuracy"),
        ("gate_positions", "bits_per_byte"),
        ("image_mixers", "accuracy"),
        ("image_mixer_costs", "step_ms"),
        ("lengths", "loss"),
        ("learning_rates", "bits_per_byte"),
        ("routing", "load_max_over_mean"),
        ("sinks", "dormant_on_first"),
        ("grokking", "steps"),
        ("widths", "bits_per_byte"),
        ("normalizers", "bits_per_byte"),
        ("superiority", "accuracy"),
        ("support_vectors", "frobenius"),
    ],
)
def test_pictures_of_studies_are_fresh(study, picture):
    """The site shows copies of pictures in results/."""
    result = ROOT / "results" / study / "cpu" / f"{picture}.png"
    shown = ROOT / "docs" / "pictures" / "studies" / f"{study}.png"
    assert result.read_bytes() == shown.read_bytes(), f"run: cp {result} {shown}"


def test_the_configuration_reference_is_fresh():
    spec = importlib.util.spec_from_file_location(
        "config_reference", ROOT / "docs" / "config_reference.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "config.md").read_text() == module.page(), (
        "run: python docs/config_reference.py"
    )
