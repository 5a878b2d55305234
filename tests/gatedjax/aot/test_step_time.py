"""The parts of a replayed step: told apart by the names in its compiled text."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gatedjax.aot import hlo, parse_slice, step_time, target
from gatedjax.aot.schedule import Called, ProgramRun
from gatedjax.aot.step import compile_step, expert_loads, with_loads
from gatedjax.config import Config, DataConfig, ModelConfig, SparseMoEConfig, TrainConfig
from gatedjax.errors import InputError
from gatedjax.model import LanguageModel

FORWARD = "jit(train_step)/jvp(LanguageModel)/while/body"
BACKWARD = "jit(train_step)/transpose(jvp(LanguageModel))/while/body/checkpoint"


def instruction(name: str, call: str, path: str) -> str:
    metadata = f'metadata={{op_name="{path}"}}'
    return f"  %{name} = f32[8,8]{{1,0}} {call}, {metadata}"


MIXER = "periods/layer_0/mixer.with_cache"
MATMUL = "convolution(%x, %x)"
SUM = "add(%x, %x)"
KERNEL = 'custom-call(%x), custom_call_target="tpu_custom_call"'
TEXT = "\n".join(
    [
        "HloModule jit_train_step",
        "%fused (x: f32[8,8]) -> f32[8,8] {",
        "  %x = f32[8,8]{1,0} parameter(0)",
        instruction("dot", MATMUL, f"{FORWARD}/periods/layer_0/ffn.with_statistics/up/dot_general"),
        "}",
        "ENTRY %main (x: f32[8,8]) -> f32[8,8] {",
        "  %fusion.1 = f32[8,8]{1,0} fusion(%x), kind=kOutput, calls=%fused",
        instruction("kernel.2", KERNEL, f"{FORWARD}/{MIXER}/attention/pallas_call"),
        instruction("rotated.3", SUM, f"{BACKWARD}/rematted_computation/{MIXER}/add"),
        instruction("norm.4", SUM, f"{BACKWARD}/periods/layer_0/mixer_norm/mul"),
        instruction("logits.5", MATMUL, "jit(train_step)/jvp(token_loss)/while/body/dot_general"),
        instruction("new.6", SUM, "jit(train_step)/update/add"),
        instruction("stacked.7", SUM, f"{FORWARD}/dynamic_update_slice"),
        instruction("rows.8", SUM, "jit(train_step)/jvp(LanguageModel)/_embedded/gather"),
        instruction("added.9", SUM, f"{FORWARD}/periods/layer_0/add"),
        "}",
    ]
)
PARTS = {
    "fusion.1": ("feed-forward: matrices", "forward"),
    "kernel.2": ("mixer: kernels", "forward"),
    "rotated.3": ("mixer: the rest", "repeated"),
    "norm.4": ("norms", "backward"),
    "logits.5": ("loss: matrices", "forward"),
    "new.6": ("optimizer and gradient norm", "forward"),
    "stacked.7": ("loading and saving between layers", "forward"),
    "rows.8": ("embedding", "forward"),
    "added.9": ("other", "forward"),
}
CHIP = target("tpu:v5p")


def found_parts() -> dict[str, tuple[str, str]]:
    known = hlo.instructions(TEXT)
    return {
        name: (step_time.part(known[name]), step_time.which_pass(known[name])) for name in PARTS
    }


def table() -> list[str]:
    """Of a step whose HLOs take a second each, one of them unheard of, and a second between them.

    The model's FLOPs take half of it at the peak; each HLO moves a GiB on each of two cores.
    """
    second = round(CHIP.clock_hz)
    called = {name: Called(calls=1, cycles=second, hbm_bytes=2**30) for name in (*PARTS, "new.10")}
    seconds = len(called) + 1
    program = ProgramRun(
        cycles=seconds * second,
        hbm_bytes=len(called) * 2**30,
        called=called,
        missing=("gather.11",),
        unknown_branches=0,
    )
    parts = step_time.times_by_part(program, TEXT, CHIP)
    flops = seconds / 2 * CHIP.peak_flops
    return step_time.lines(step_time.StepTime(program, parts, model_flops=flops, chip=CHIP))


EXPECTED = {
    name: ["1000.00", "9.1%", "1000.00", "0.00", "0.00", "2.0", "GiB"]
    for name in (
        "feed-forward: matrices",
        "mixer: kernels",
        "loss: matrices",
        "optimizer and gradient norm",
        "loading and saving between layers",
        "embedding",
        "other",
        "what XLA added",
    )
}
EXPECTED["mixer: the rest"] = ["1000.00", "9.1%", "0.00", "0.00", "1000.00", "2.0", "GiB"]
EXPECTED["norms"] = ["1000.00", "9.1%", "0.00", "1000.00", "0.00", "2.0", "GiB"]
EXPECTED["less than 0.4 % each"] = ["0.00", "0.0%", "0.00", "0.00", "0.00", "0", "B"]
EXPECTED["between the parts"] = ["1000.00", "9.1%", "1000.00", "0.00", "0.00", "0", "B"]


def check_table(lines: list[str]) -> None:
    assert "11000.00 ms a step" in lines[0] and "utilization 50.0%; HBM 20.0 GiB" in lines[0]
    assert lines[-1].endswith("gather.11")
    rows = {}
    for line in lines[3:-1]:
        words = line.split()
        rows[" ".join(words[:-7])] = words[-7:]
    assert rows == EXPECTED


def test_parts_and_passes():
    assert found_parts() == PARTS


@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_product_of_a_model_is_a_layers(scan_layers):
    """As flax and jax name them today, which changes with how modules call each other."""
    model = LanguageModel(
        ModelConfig(vocab_size=32, width=32, num_layers=2, scan_layers=scan_layers)
    )
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    text = jax.jit(model.apply).lower(params, tokens).as_text(debug_info=True)
    paths = re.findall(r'loc\("([^"]*layer_[^"]*/dot_general)"', text)
    parts = {step_time.part(hlo.Instruction("dot", path, has_matmul=True)) for path in paths}
    assert parts == {"mixer: matrices", "feed-forward: matrices"}


def test_the_table_adds_up():
    check_table(table())


def no_repetition(instruction: hlo.Instruction) -> str:
    return "backward" if "transpose(" in instruction.op_name else "forward"


def one_core(name: str, called: Called, chip: object) -> step_time.PartTime:
    return step_time.PartTime(**{name: called.cycles / CHIP.clock_hz}, hbm_bytes=called.hbm_bytes)


def without_pattern(pattern: str):
    """`re.search` that does not find what has this in its pattern."""
    return SimpleNamespace(search=lambda p, text: None if pattern in p else re.search(p, text))


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("which_pass", no_repetition),
        ("which_pass", lambda instruction: "forward"),
        ("_time", one_core),
        ("_SMALL", 0.2),
        *[("re", without_pattern(p)) for p in ("token_loss", "update", "dynamic", "norm", "layer")],
        ("hlo", SimpleNamespace(instructions=lambda text: {})),
    ],
)
def test_a_planted_error_is_seen(name, wrong, monkeypatch):
    monkeypatch.setattr(step_time, name, wrong)
    with pytest.raises(AssertionError):
        check_table(table())


def test_loads_of_experts():
    """All rows, about a fifth from even; the kernels that no trace knows them of, and no other."""
    loads = expert_loads(32_768, 16)
    assert loads.sum() == 32_768 and 0.1 < loads.std() / loads.mean() < 0.3
    known = np.arange(16)
    traced = [("expert_mlp_down", [None]), ("grouped_matmul_dlhs", [known]), ("attention", [None])]
    layer = SparseMoEConfig(num_experts=16, experts_per_token=2, hidden=128)
    config = Config(
        model=ModelConfig(ffns={"moe": layer}, ffn_pattern=("moe",)),
        train=TrainConfig(batch_size=4),
        data=DataConfig(seq_len=4096),
    )
    names = [name for name, _ in traced]
    found = with_loads(traced, config)
    assert [name for name, _ in found] == names
    np.testing.assert_array_equal(found[0][1][0], loads)
    assert found[1][1][0] is known and found[2][1] == [None]
    assert with_loads(traced, Config()) == traced


def test_the_time_of_several_chips_is_refused():
    with pytest.raises(InputError, match="--schedule: got --aot=v5e:2x2, expected one chip"):
        compile_step(Config(), parse_slice("v5e:2x2"), schedule=True)
