"""From a run to a converted model: which weights are taken, what trains, what is refused."""

import importlib

import jax
import pytest
from tiny_run import plain, replace

from gatedjax.config import (
    FrozenDict,
    GatedAttentionConfig,
    GatedLinearAttentionConfig,
    config_dict,
    from_config_dict,
)
from gatedjax.errors import InputError
from gatedjax.layers.tree import flatten_dict
from gatedjax.training import conversion, trainable
from gatedjax.training.run import prepare


@pytest.fixture
def run_of(monkeypatch):
    """Makes `config_from_run` find a configuration, in place of a directory."""

    def use(config):
        def config_from_run(run):
            c = config_dict(config)
            c.train.init_from = run
            return c

        monkeypatch.setattr(conversion, "config_from_run", config_from_run)

    return use


def parameters(config):
    run = prepare(config, jax.devices()[:1])
    return run, {".".join(path): x.shape for path, x in flatten_dict(run.abstract.params).items()}


@pytest.mark.parametrize("kind", ["lizard", "rad_rwkv6", "rad_rwkv7"])
@pytest.mark.parametrize("gate", ["none", "sdpa"])
def test_what_a_student_takes_and_learns(run_of, kind, gate):
    """Beside layers of other kinds, whose decays have the same names."""
    attention = GatedAttentionConfig(num_heads=4, head_dim=8, gate_position=gate, window=16)
    mixers = {"attention": attention, "gla": GatedLinearAttentionConfig(num_heads=4, key_dim=8)}
    teacher = plain(
        model__mixers=FrozenDict(mixers),
        model__pattern=("gla", "attention"),
        model__num_layers=4,
    )
    run_of(teacher)
    values = {"window": 8} if kind == "lizard" else {}
    student = conversion.student_of("runs/teacher", kind, **values)
    c = student.config
    c.optim.trainable = student.new
    config = from_config_dict(c)
    assert student.mixers == ("periods.layer_1.mixer",)
    _, before = parameters(teacher)
    run, after = parameters(config)
    trained, _ = trainable.split(config, run.abstract.params)
    new = {".".join(path) for path in flatten_dict(trained)}
    # What trains is what is fresh, and all else has its place in the teacher.
    assert new == set(after) - set(before)
    assert all(before[name] == shape for name, shape in after.items() if name in before)
    assert tuple(c.train.init_fresh) == student.new


def test_what_cannot_be_converted(run_of):
    def refusal(config, kind="lizard", **values):
        run_of(config)
        with pytest.raises(InputError) as error:
            conversion.student_of("runs/teacher", kind, **values)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "window: got 128, expected at most data.seq_len = 32" in refusal(plain())
    sinks = plain(model__mixers__attention__sinks=True)
    assert "sinks: got True, expected False in a layer of kind 'lizard'" in refusal(sinks, window=8)
    linear = plain(model__pattern=("gla",))
    without = FrozenDict({"gla": linear.model.mixers["gla"]})
    assert "expected gated_attention" in refusal(replace(linear, model__mixers=without))


def test_the_stages(run_of):
    """What each stage of RADLADS learns from."""
    run_of(plain())
    expected = {
        ("convert_rad_rwkv6", "1=a"): ("a", 0.0, 1.0, 0.0),
        ("convert_rad_rwkv6", "2=b,a"): ("a", 1.0, 0.0, 0.0),
        ("convert_rad_rwkv7", "3=b"): ("", 0.0, 0.0, 1.0),
    }
    for (name, arg), (run, kl, mse, own) in expected.items():
        module = importlib.import_module(f"configs.{name}")
        settings = from_config_dict(module.get_config(arg)).train.teacher
        assert (settings.run, settings.kl) == (run, kl)
        assert (settings.mse, settings.cross_entropy) == (mse, own)
