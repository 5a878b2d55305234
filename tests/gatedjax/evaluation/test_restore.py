"""A checkpoint from elsewhere is data, not trust: what evaluation reads and what it refuses."""

import dataclasses
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from helpers import slow

from gatedjax.config import FrozenDict, MeshConfig, SourceConfig, to_dict
from gatedjax.data import load_tokenizer
from gatedjax.errors import InputError
from gatedjax.evaluation import restore
from gatedjax.evaluation.restore import require_same_text, require_text, restore_params
from gatedjax.training import identity, orbax_store
from gatedjax.training.checkpoint import Checkpointer
from gatedjax.training.digests import named_leaves
from gatedjax.training.run import fresh_state, prepare
from gatedjax.training.state import params_for_evaluation


def small(place, **changes):
    """One layer, on a folder of text."""
    text = place / "text"
    if not text.exists():
        text.mkdir()
        for i in range(12):
            (text / f"{i}.txt").write_text(f"document {i} " * 4)
    source = SourceConfig(kind="text", path=str(text))
    defaults = dict(
        model__vocab_size=288,
        model__width=16,
        model__ffns__mlp__hidden=16,
        data__sources=FrozenDict(main=source),
        data__cache_dir=str(place / "cache"),
        data__seq_len=16,
    )
    return tiny_run.plain(**defaults | changes)


def save(place, config, name="run"):
    """A run directory with the state of step 1, as train.py leaves it; and that state."""
    run = prepare(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    with jax.set_mesh(run.mesh):
        state = fresh_state(run)
    # Numbers of their own in every leaf, so that a leaf in the place of another shows.
    numbers = iter(range(1, 10_000))
    state = jax.tree.map(
        lambda x: (
            jax.device_put(x + next(numbers) * 1e-3, x.sharding)
            if jnp.issubdtype(x.dtype, jnp.floating)
            else x
        ),
        state,
    )
    data = identity.identity_of(config.data, tokenizer)
    with Checkpointer(place / name, to_dict(config), data=data) as checkpointer:
        checkpointer.save(1, state, data_index=8, wait=True)
    identity.keep_tokenizer(place / name, tokenizer)
    return run, state


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("restore")
    save(place, small(place))
    return place


@pytest.fixture
def run_dir(place, tmp_path):
    return shutil.copytree(place / "run", tmp_path / "run")


def change_manifest(run_dir, change):
    """As a stranger would: the checksum is no secret."""
    path = run_dir / "checkpoints" / "1" / "manifest" / "metadata"
    body = json.loads(path.read_text())["body"]
    change(body)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"body": body, "sha256": digest}))


def change_config(run_dir, key, value):
    def change(body):
        group = body["config"]
        *groups, name = key.split(".")
        for part in groups:
            group = group[part]
        group[name] = value

    change_manifest(run_dir, change)


def refusal(call) -> str:
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what is read


@pytest.mark.parametrize("optimizer", [slow("adamw"), "ema", "schedule_free"])
def test_only_what_evaluation_uses_is_read(tmp_path, monkeypatch, optimizer):
    changes = {
        "adamw": {},
        "ema": {"optim__ema_decay": 0.9},
        "schedule_free": {"optim__name": "schedule_free", "optim__schedule": "constant"},
    }
    _, state = save(tmp_path, small(tmp_path, **changes[optimizer]))
    read = {}
    original = orbax_store.read_arrays

    def arrays(*args):
        read.update(original(*args))
        return read

    monkeypatch.setattr(orbax_store, "read_arrays", arrays)
    _, params, _ = restore_params(tmp_path / "run")
    expected = jax.jit(params_for_evaluation)(state)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for actual, right in zip(jax.tree.leaves(params), jax.tree.leaves(expected)):
        np.testing.assert_array_equal(actual, right)
    moments = [name for name in read if name.startswith("opt_state") and name.split(".")[-1] != ""]
    assert bool(moments) == (optimizer == "schedule_free")
    assert not any(".mu" in name or ".nu" in name for name in read)


def test_a_lack_of_moments_is_no_lack(run_dir, monkeypatch):
    """The bytes of the moments are gone: an evaluation does not notice, training does."""
    original = orbax_store.with_sharding

    def counted(name, leaf):
        assert not name.startswith("opt_state"), name
        return original(name, leaf)

    monkeypatch.setattr(orbax_store, "with_sharding", counted)
    restore_params(run_dir)


def test_parameters_are_cut_by_the_mesh_that_is_given(run_dir, place):
    _, whole, _ = restore_params(run_dir)
    run, cut, _ = restore_params(run_dir, mesh=MeshConfig(fsdp=4, tensor=2))
    assert run.mesh.shape["fsdp"] == 4
    shardings = jax.tree.map(lambda x: x.sharding, run.abstract.params)
    on_a_device = 0
    for leaf, sharding, right in zip(
        jax.tree.leaves(cut), jax.tree.leaves(shardings), jax.tree.leaves(whole)
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        np.testing.assert_array_equal(leaf, right)
        on_a_device += leaf.addressable_data(0).size
    assert on_a_device < sum(x.size for x in jax.tree.leaves(whole)) / 3


def test_the_mesh_of_the_run_where_the_devices_can_form_it(place, tmp_path):
    save(tmp_path, small(tmp_path, mesh__fsdp=2, mesh__tensor=2))
    assert restore.fitting_mesh(tmp_path / "run") == MeshConfig(fsdp=2, tensor=2)
    change_config(tmp_path / "run", "mesh.fsdp", 3)
    assert restore.fitting_mesh(tmp_path / "run") == MeshConfig()
    change_config(tmp_path / "run", "mesh", ["hostile"])
    assert restore.fitting_mesh(tmp_path / "run") == MeshConfig()


def test_memory_is_counted_of_what_is_read_and_as_it_is_cut(place, monkeypatch):
    config = dataclasses.replace(small(place), mesh=MeshConfig(fsdp=4, tensor=2))
    run = prepare(config)
    unread = restore._unread(run.abstract)
    params = sum(x.size * 4 for x in jax.tree.leaves(run.abstract.params))
    monkeypatch.setattr(restore, "_device_memory", lambda: params / 2)
    restore.require_memory(run, unread)
    copies = prepare(dataclasses.replace(config, mesh=MeshConfig()))
    assert "--mesh=fsdp=8" in refusal(lambda: restore.require_memory(copies, unread))
    names = set(named_leaves(run.abstract))
    assert {n for n in names - unread if n.startswith("opt_state")} == set()


# --- whose paths are used


def test_an_own_run_is_evaluated_on_its_own_text(run_dir):
    run, *_ = restore_params(run_dir)
    require_text(run)
    require_same_text(run, run_dir)


HOSTILE_PATHS = {
    "private folder": ("data.sources.main.path", "/etc"),
    "cache of the author's choice": ("data.cache_dir", "attacker"),
    "another kind": ("data.sources.main.kind", "jsonl"),
}


@pytest.mark.parametrize("name", HOSTILE_PATHS)
def test_paths_of_a_stranger_are_not_used(run_dir, monkeypatch, name):
    change_config(run_dir, *HOSTILE_PATHS[name])
    run, *_ = restore_params(run_dir)
    assert run.config.data.cache_dir == "" and run.config.data.sources["main"].path == ""
    message = refusal(lambda: require_text(run))
    assert "--source=KIND:PATH" in message and "--trust_paths" in message
    run, *_ = restore_params(run_dir, trust_paths=True)
    key, value = HOSTILE_PATHS[name]
    trusted = to_dict(run.config)
    for part in key.split("."):
        trusted = trusted[part]
    assert trusted == value


def test_without_the_key_a_run_is_a_strangers_and_the_user_names_the_text(
    run_dir, place, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another cache"))
    run, *_ = restore_params(run_dir)
    refusal(lambda: require_text(run))
    run, *_ = restore_params(run_dir, source=f"text:{place / 'text'}")
    require_text(run)
    require_same_text(run, run_dir)
    assert (tmp_path / "another cache").is_dir() is True
    assert "one of" in refusal(lambda: restore_params(run_dir, source="csv:/x"))
    run, *_ = restore_params(run_dir, source="python_stdlib")
    require_text(run)


def test_step_text_and_changes_of_the_user(run_dir, place):
    newest = restore_params(run_dir)
    with Checkpointer(run_dir, read_only=True) as checkpointer:
        steps = checkpointer.steps()
    for step in steps:
        assert restore_params(run_dir, step=step).step == step
    assert newest.step == steps[-1]
    assert "no step 77; it holds" in refusal(lambda: restore_params(run_dir, step=77))
    changes = {"data": {"seq_len": 8}, "train": {"batch_size": 2}}
    run = restore_params(run_dir, text=str(place / "text"), changes=changes).run
    require_text(run)
    assert run.config.data.seq_len == 8 and run.config.train.batch_size == 2
    assert run.config.data.validation_fraction == 1
    both = dict(text="a", source="text:b")
    assert "--text: got --source too" in refusal(lambda: restore_params(run_dir, **both))
    wrong = {"data": {"seq_len": 0}}
    assert "config.data.seq_len: got 0" in refusal(lambda: restore_params(run_dir, changes=wrong))


def test_no_home_no_key_no_crash(tmp_path, monkeypatch):
    from gatedjax.training import ownership

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("not a folder")
    assert ownership.signature({"a": 1}) is None and not ownership.is_own({"a": 1}, "x")
    monkeypatch.setenv("HOME", str(tmp_path))
    signed = ownership.signature({"a": 1})
    assert ownership.is_own({"a": 1}, signed) and not ownership.is_own({"a": 2}, signed)
    key = tmp_path / ".local" / "state" / "gatedjax" / "key"
    assert key.stat().st_mode & 0o077 == 0
    assert not any(ownership.is_own({"a": 1}, bad) for bad in (None, 3, "", "ü", ["x"]))


# --- what the data were


def test_changed_text_is_one_line_and_the_same_text_elsewhere_is_none(run_dir, place, tmp_path):
    def on(text):
        source = SourceConfig(kind="text", path=str(text))
        run, *_ = restore_params(run_dir)
        sources = FrozenDict(main=source)
        data = dataclasses.replace(
            run.config.data, sources=sources, cache_dir=str(tmp_path / "cache")
        )
        return run._replace(config=dataclasses.replace(run.config, data=data))

    moved = shutil.copytree(place / "text", tmp_path / "moved")
    require_same_text(on(moved), run_dir)
    (moved / "extra.txt").write_text("one more document")
    message = refusal(lambda: require_same_text(on(moved), run_dir))
    assert "data.sources.main" in message and "--source" in message


def test_the_tokenizer_travels_with_the_run(tmp_path):
    from tokenizer_file import train_json_tokenizer

    path = tmp_path / "original.json"
    train_json_tokenizer(path)
    config = small(tmp_path, data__tokenizer=str(path), model__vocab_size=320)
    save(tmp_path, config)
    path.unlink()
    run, *_ = restore_params(tmp_path / "run")
    assert run.config.data.tokenizer == str(tmp_path / "run" / "tokenizer.json")
    require_same_text(run, tmp_path / "run")
    kept = tmp_path / "run" / "tokenizer.json"
    original = kept.read_bytes()
    train_json_tokenizer(kept, ("</s>",))
    assert "not the tokenizer that" in refusal(lambda: restore_params(tmp_path / "run"))
    kept.unlink()
    kept.symlink_to("/etc/passwd")
    assert "cannot be read" in refusal(lambda: restore_params(tmp_path / "run"))
    kept.unlink()
    kept.write_bytes(original)
    change_config(tmp_path / "run", "data.tokenizer", "/dev/zero")
    run, *_ = restore_params(tmp_path / "run")
    assert run.config.data.tokenizer == str(kept)
    kept.unlink()
    message = refusal(lambda: restore_params(tmp_path / "run"))
    assert "does not hold its tokenizer" in message


# --- sizes and shapes of a stranger's configuration

HOSTILE = {
    "a batch of 10^9 rows": ("train.batch_size", 10**9),
    "a batch of 10^6 rows": ("train.batch_size", 10**7),
    "windows of 10^9 tokens": ("data.seq_len", 10**9),
    "a vocabulary of 10^12": ("model.vocab_size", 10**12),
    "a number without end": ("model.width", 10**4000),
    "no heads": ("model.mixers.attention.num_heads", 0),
    "10^9 layers": ("model.num_layers", 10**9),
    "10^5 layers of their own": ("model.num_layers", 10**5),
    "10^12 wide": ("model.width", 10**12),
    "null": ("model", None),
    "null in a group": ("train.batch_size", None),
    "a list": ("data", []),
    "a kind that is a list": ("model.mixers.attention.kind", []),
    "a kind that is a group": ("model.mixers.attention.kind", {}),
    "a negative size": ("model.width", -8),
    "a string for a number": ("model.width", "wide"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values_are_refused_before_anything_is_allocated(run_dir, monkeypatch, name):
    monkeypatch.setattr(orbax_store, "read_arrays", lambda *_: pytest.fail("arrays were read"))
    change_config(run_dir, *HOSTILE[name])
    if name == "10^5 layers of their own":
        change_config(run_dir, "model.scan_layers", False)
    message = refusal(lambda: restore_params(run_dir))
    assert len(message) < 2000


def test_deep_nesting_is_refused(run_dir):
    nested = {}
    for _ in range(900):
        nested = {"a": nested}
    change_config(run_dir, "model", nested)
    with Checkpointer(run_dir, read_only=True, report=lambda _: None) as checkpointer:
        assert "no intact checkpoint" in refusal(checkpointer.config)
