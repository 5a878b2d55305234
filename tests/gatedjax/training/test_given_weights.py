"""A run that starts from the weights of another: what is taken, what is said, what is refused."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import slow
from tiny_run import plain, replace, tiny

from gatedjax.config import FrozenDict, LoRAConfig, LoRAMixtureConfig, to_dict
from gatedjax.data import load_tokenizer
from gatedjax.errors import InputError
from gatedjax.layers.tree import flatten_dict
from gatedjax.training import given_weights, orbax_store, step_folders
from gatedjax.training.checkpoint import Checkpointer
from gatedjax.training.run import fresh_state, prepare
from gatedjax.training.state import params_for_evaluation

BASE = plain(model__vocab_size=288, model__width=16, model__ffns__mlp__hidden=16)
FINGERPRINT = load_tokenizer("bytes").fingerprint


def shaped(config):
    """A state of numbers of their own in every leaf, made without a compiler."""
    run = prepare(config, jax.devices()[:1])
    numbers = iter(range(1, 10_000))

    def fill(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.ones(x.shape, x.dtype)
        return jax.device_put(np.full(x.shape, 1.0 + next(numbers) * 1e-3, x.dtype), x.sharding)

    return jax.tree.map(fill, run.abstract)


def save(place, config, steps=(1,), tokenizer=FINGERPRINT):
    """A run directory, as train.py leaves it; and the state that is in each of its steps."""
    state = shaped(config)
    data = {"tokenizer": tokenizer, "sources": {}}
    with Checkpointer(place, to_dict(config), data=data) as checkpointer:
        for step in steps:
            checkpointer.save(step, state, data_index=8, wait=True)
    return state


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    place = tmp_path_factory.mktemp("given") / "base"
    return place, save(place, BASE, steps=(1, 2))


def started(config, said=None, devices=1):
    """What a run that starts takes from elsewhere, by name."""
    run = prepare(config, jax.devices()[:devices])
    lines = [] if said is None else said
    with jax.set_mesh(run.mesh):
        weights = given_weights.find(run, load_tokenizer("bytes"), lines.append)
        return run, given_weights.read(run, weights)


def refusal(config) -> str:
    with pytest.raises(InputError) as error:
        started(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def given(config, place, **changes):
    return replace(config, train__init_from=str(place), **changes)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(found[path], x, err_msg=".".join(path))


# --- what is taken


def test_all_parameters_are_taken_and_nothing_else_is_read(base, monkeypatch):
    place, state = base
    read = []
    original = orbax_store.read_arrays

    def arrays(step_dir, described, wanted, unread):
        read.extend(wanted)
        return original(step_dir, described, wanted, unread)

    monkeypatch.setattr(orbax_store, "read_arrays", arrays)
    said = []
    run, found = started(given(BASE, place), said)
    assert_same(found, flatten_dict(state.params))
    assert sorted(read) == sorted(f"params.{'.'.join(path)}" for path in found)
    assert said == [
        f"weights: {len(found)} parameters of step 2 of {place}",
        "weights: 0 start fresh: none",
        "weights: 0 left over there: none",
    ]
    with jax.set_mesh(run.mesh):
        start = fresh_state(run, found)
    assert_same(flatten_dict(start.params), flatten_dict(state.params))
    # Of the other run's optimizer, guard and steps nothing.
    assert int(start.step) == 0
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(start.opt_state))


def test_a_step_can_be_named(base):
    place, _ = base
    said = []
    started(given(BASE, place / "checkpoints" / "1"), said)
    assert f"parameters of step 1 of {place}" in said[0]
    message = refusal(given(BASE, place / "checkpoints" / "3"))
    assert message.startswith("config.train.init_from: ") and "no step 3; it holds 1, 2" in message


@pytest.mark.parametrize(
    "changes, which",
    [
        slow(dict(optim__ema_decay=0.9), "averaged (ema)"),
        slow(
            dict(optim__name="schedule_free", optim__schedule="constant"),
            "averaged (schedule-free)",
        ),
        # Averages of what trains alone; what is frozen is as it is.
        (dict(optim__ema_decay=0.9, optim__trainable=("*.ffn.*",)), "averaged (ema)"),
    ],
)
def test_averages_are_taken_as_evaluation_takes_them(tmp_path, changes, which):
    state = save(tmp_path / "run", replace(BASE, **changes))
    said = []
    _, found = started(given(BASE, tmp_path / "run"), said)
    assert_same(found, flatten_dict(params_for_evaluation(state)))
    assert said[0].endswith(which)


def test_names_are_mapped_and_what_is_new_starts_fresh(base):
    """A gated MLP becomes the frozen weights of a mixture, its experts are new."""
    place, state = base
    mixture = LoRAMixtureConfig(hidden=16, num_experts=2, rank=2)
    config = given(
        replace(BASE, model__ffns=FrozenDict(mlp=mixture)),
        place,
        train__init_rename=("*.ffn.*.kernel -> *.ffn.*.frozen",),
        train__init_fresh=("*.lora_*", "*.classifier", "final_norm.scale"),
    )
    said = []
    run, found = started(config, said)
    before = flatten_dict(state.params)
    for name in ("gate", "up", "down"):
        path = ("periods", "layer_0", "ffn", name)
        np.testing.assert_array_equal(found[*path, "frozen"], before[*path, "kernel"])
    fresh = given_weights.parameters(run).keys() - found.keys()
    assert len(fresh) == 6 + 1 + 1
    assert said[1] == f"weights: 8 start fresh: {', '.join(sorted('.'.join(p) for p in fresh))}"
    assert said[2] == "weights: 1 left over there: final_norm.scale"
    # Another function may have the same arrays: what differs is said.
    kind = "config.model.ffns.mlp.kind: 'gated_mlp' there, 'lora_mixture' here"
    assert said[3].startswith(f"weights: the model differs: {kind}, ")


def test_updates_are_new_and_left_over_ones_are_told_of(base, tmp_path):
    place, state = base
    updates = LoRAConfig(rank=2, targets=("*.mixer.*",))
    with_updates = replace(BASE, model__lora=updates)
    run, found = started(given(with_updates, place, train__init_fresh=("*.lora.*",)))
    assert_same(found, flatten_dict(state.params))
    assert len(given_weights.parameters(run)) == len(found) + 2 * 5

    save(tmp_path / "tuned", with_updates)
    said = []
    started(given(BASE, tmp_path / "tuned"), said)
    assert "weights: 10 left over there: periods.layer_0.mixer.gate.projection.lora.a" in said[2]
    assert "merge_lora" in said[3]


@pytest.mark.slow
def test_weights_go_to_another_mesh_and_routers_keep_their_biases(tmp_path):
    config = tiny(
        model__vocab_size=288,
        model__ffns__moe__router__bias_rule="sign",
        model__ffns__moe__router__bias_rate=0.01,
    )
    state = save(tmp_path / "run", config)
    run, found = started(
        given(config, tmp_path / "run", mesh__fsdp=2, mesh__tensor=2, mesh__expert=2),
        devices=8,
    )
    assert_same(found, flatten_dict(params_for_evaluation(state)))
    assert any("router_state" in path for path in found)
    for path, target in given_weights.parameters(run).items():
        assert found[path].sharding.is_equivalent_to(target.sharding, target.ndim)


# --- what is refused


def test_another_model_is_refused_by_the_names_that_are_missing(base):
    place, _ = base
    message = refusal(given(replace(BASE, model__tie_embeddings=False), place))
    assert message == (
        f"config.train.init_from: step 2 of {place} lacks 1 parameters of this model: head; left "
        "over there: none; config.train.init_rename maps names, config.train.init_fresh names what "
        "starts fresh"
    )


def test_another_shape_is_refused(base):
    place, _ = base
    message = refusal(given(replace(BASE, model__ffns__mlp__hidden=32), place))
    assert message == (
        "config.train.init_from: periods.layer_0.ffn.down.kernel: got float32[1, 16, 16] "
        f"(params.periods.layer_0.ffn.down.kernel in step 2 of {place}), "
        "expected float32[1, 32, 16]"
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(train__init_rename=("*.nothing -> *.kernel",)),
            "config.train.init_rename: got '*.nothing', expected a pattern that holds for one of ",
        ),
        (
            dict(train__init_rename=("*.ffn.up.kernel -> *.ffn.gate.kernel",)),
            "config.train.init_rename: both periods.layer_0.ffn.gate.kernel and "
            "periods.layer_0.ffn.up.kernel become periods.layer_0.ffn.gate.kernel",
        ),
        (
            dict(train__init_fresh=("*.lora.*",)),
            "config.train.init_fresh: got '*.lora.*', expected a pattern that holds for one of ",
        ),
        (
            dict(train__init_rename=("a*b -> c",)),
            "init_rename: got 'a*b -> c', expected 'OLD -> NEW', with as many * on both sides",
        ),
    ],
)
def test_wrong_rules_are_refused(base, changes, message):
    place, _ = base
    with pytest.raises(InputError) as error:
        started(given(BASE, place, **changes))
    assert str(error.value).startswith(message)


def test_rules_without_weights_are_refused():
    with pytest.raises(InputError, match=r"init_fresh: got .*, expected none without init_from"):
        dataclasses.replace(BASE.train, init_fresh=("*",))


def test_another_tokenizer_is_refused_unless_the_embedding_is_new(tmp_path):
    save(tmp_path / "run", BASE, tokenizer="another")
    message = refusal(given(BASE, tmp_path / "run"))
    assert message.startswith("config.data.tokenizer: bytes is not the tokenizer of step 1 of ")
    started(given(BASE, tmp_path / "run", train__init_fresh=("embedding",)))


def test_no_checkpoint_and_a_damaged_one_are_refused(base, tmp_path):
    place, _ = base
    key = "config.train.init_from: "
    assert refusal(given(BASE, tmp_path / "none")) == f"{key}{tmp_path}/none: holds no checkpoints"
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert refusal(given(BASE, tmp_path / "empty")).startswith(f"{key}{tmp_path}/empty")
    copy = shutil.copytree(place, tmp_path / "copy")
    for file in (copy / "checkpoints" / "2" / "state").rglob("d/*"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))
    message = refusal(given(BASE, copy))
    assert message.startswith(f"{key}checkpoint of step 2 in {copy}/checkpoints is damaged: ")
    assert refusal(given(BASE, "az://bucket/run")).startswith(f"{key[:-2]}: got az://bucket/run")


def test_whether_a_run_goes_on(base, tmp_path):
    assert step_folders.has_steps(base[0])
    assert not step_folders.has_steps(tmp_path)
