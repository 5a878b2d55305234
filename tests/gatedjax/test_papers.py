"""The index of papers: what a row says to type runs, its test is there, its page is fresh."""

import ast
import dataclasses
import functools
import importlib.util
import shlex
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from ml_collections import config_flags

import gatedjax
from gatedjax import layers, papers
from gatedjax.config import Config, ModelConfig, files, from_config_dict
from gatedjax.errors import InputError
from gatedjax.papers import Paper
from gatedjax.papers.__main__ import main
from gatedjax.training.optim import make_optimizer

ROOT = Path(__file__).parents[2]
ROWS = [paper for paper in papers.papers() if paper.is_there]
CODE = [paper for paper in ROWS if paper.code]
TRAIN = "gatedjax-train"
COMMANDS = [paper for paper in ROWS if paper.command.startswith(TRAIN)]
# Slow tests compute with models of at most this many parameters; others keep their shapes.
MOST_PARAMETERS = 5_000_000


def name_of(paper: Paper) -> str:
    return paper.short_title.replace(" ", "_")


@functools.cache
def functions_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def module_of(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configured(name: str, overrides: list[str]) -> Config:
    """What `--config=NAME` and further flags give."""
    path, _, argument = name.partition(":")
    module = module_of(files.find(path, "--config"))
    raw = module.get_config(argument) if argument else module.get_config()
    values = flags.FlagValues()
    # ml_collections looks for the keys in sys.argv.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["papers", *overrides])
        config_flags.DEFINE_config_dict("config", raw, flag_values=values)
        values(sys.argv)
    return from_config_dict(values.config)


def config_of(paper: Paper) -> Config:
    _, first, *overrides = shlex.split(paper.command)
    return configured(first.removeprefix("--config="), overrides)


def changed_mixers(config: Config, command: str) -> set:
    """The configurations of mixers whose keys a command names; a value bank needs a model."""
    return {
        mixer
        for name, mixer in config.model.mixers.items()
        if f".{name}." in command and not getattr(mixer, "value_bank", 0)
    }


@functools.cache
def computes(config: ModelConfig) -> None:
    """A model's logits are finite; of a large one only shapes are looked at."""
    # A period of layers has one of each kind.
    depth = len(config.prefix) + config.period + len(config.suffix)
    model = gatedjax.LanguageModel(dataclasses.replace(config, vocab_size=257, num_layers=depth))
    tokens = jnp.ones((1, 16), jnp.int32)
    patches = None
    if config.task == "classify":
        tokens = jnp.ones((1, config.patches.num_tokens), jnp.int32)
        patches = jnp.ones((*tokens.shape, config.patches.size))
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, patches=patches)
    if sum(leaf.size for leaf in jax.tree.leaves(shapes)) < MOST_PARAMETERS:
        logits, _ = model.init_with_output(jax.random.key(0), tokens, patches=patches)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(logits))


def test_every_row_names_a_test_and_a_place_that_exist():
    for paper in ROWS:
        path, _, test = paper.test.partition("::")
        assert (ROOT / path).is_file() and test in functions_in(ROOT / path), paper.test
        assert (ROOT / paper.where).exists(), paper.where


def test_titles_and_numbers_are_of_one_row():
    titles = [paper.title for paper in papers.papers()]
    numbers = [paper.arxiv for paper in papers.papers() if paper.arxiv]
    assert len(set(titles)) == len(titles) and len(set(numbers)) == len(numbers)
    assert all(papers.find(title).title == title for title in titles)


def test_the_page_is_fresh():
    page = module_of(ROOT / "docs" / "papers_page.py").page()
    assert (ROOT / "docs" / "papers.md").read_text() == page, "run: python docs/papers_page.py"


@pytest.mark.parametrize("paper", CODE, ids=name_of)
def test_code_has_shapes(paper):
    def run(q, k, v, x):
        namespace["q"], namespace["k"], namespace["v"], namespace["x"] = q, k, v, x
        exec(compile(paper.code, paper.title, "exec"), namespace)
        return namespace.get("y", 0)

    imports = papers.PREAMBLE.partition("q = k = v")[0]
    namespace = {}
    exec(imports, namespace)
    heads = jax.ShapeDtypeStruct((1, 64, 4, 32), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, 64, 128), jnp.float32)
    jax.eval_shape(run, heads, heads, heads, tokens)


def test_flags_are_of_configurations_and_layers():
    """Each command makes a configuration, and what it changes of attention can be built."""
    mixers = set()
    for paper in COMMANDS:
        config = config_of(paper)
        mixers |= changed_mixers(config, paper.command)
        if ".optim." in paper.command:
            make_optimizer(
                config.optim,
                config.train.steps,
                {"lora": {"b": ("embed", "mlp")}},
                width=config.model.width,
                batch_size=config.train.batch_size,
            )
    x = jax.ShapeDtypeStruct((1, 8, 128), jnp.float32)
    for mixer in mixers:
        jax.eval_shape(layers.MIXERS[mixer.kind](mixer).init, jax.random.key(0), x)


@pytest.mark.parametrize("paper", ROWS, ids=name_of)
@pytest.mark.slow
def test_what_to_type_runs(paper):
    if paper.code:
        exec(compile(f"{papers.PREAMBLE}\n{paper.code}", paper.title, "exec"), {})
        return
    command, *arguments = shlex.split(paper.command)
    if command == "gatedjax-study":
        study = module_of(ROOT / "configs" / "studies" / f"{arguments[0]}.py")
        assert study.get_study(small=True)
        return
    if command != TRAIN:
        # Needs a run; its own page says more.
        assert any("RUN" in argument for argument in arguments), paper.command
        return
    computes(config_of(paper).model)


def test_the_command_lists_searches_and_shows(capsys):
    assert main(["list", "--status=works", "--family=estimator"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert all(line.startswith("works    estimator") for line in listed)
    assert main(["search", "SPARSEMAX", "multi-label"]) == 0
    assert capsys.readouterr().out.endswith("Attention and Multi-Label Classification\n")
    assert main(["show", "scalable-softmax"]) == 0
    shown = capsys.readouterr().out
    assert "(arXiv 2501.19399, 2025)" in shown and f"\n{TRAIN} --config=tiny" in shown
    assert main(["show", "2502.18845"]) == 0
    assert papers.PREAMBLE in capsys.readouterr().out
    assert main(["search", "no", "such", "mechanism"]) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["show", "scalabel softmax"], "'Scalable-Softmax Is Superior for Attention'"),
        (["show", "zzzz"], "`gatedjax-papers list`"),
        (["show", "softmax"], "title: got 'softmax', expected one of"),
        (["list", "--status=done"], "status: got 'done', expected one of"),
        (["list", "--family=score"], "family: got 'score', expected one of"),
        (["list", "--nothing"], "unrecognized arguments"),
        ([], "required"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"status": "done"}, "status: got 'done'"),
        ({"arxiv": "25"}, "arxiv: got '25'"),
        ({"command": ""}, "command, code: got"),
        ({"code": "1\n2\n3\n4"}, "command, code: got"),
        ({"code": "1\n2\n3\n4", "command": ""}, "code: got 4, expected at most 3 lines"),
        ({"test": ""}, "test: got ''"),
        ({"missing": "much"}, "missing: got 'much'"),
        ({"link": "x"}, r"got \['link'\]"),
    ],
)
def test_bad_rows_are_named(changes, message):
    row = dict(title="A", status="works", about="b", where="c", command="d", test="e", differs="f")
    with pytest.raises(InputError, match=f"^x.toml: A.*{message}"):
        papers._paper("router", row | changes, "x.toml")
