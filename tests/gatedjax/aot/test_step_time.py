"""The parts of a replayed step: told apart by the names in its compiled text."""

import pytest

from gatedjax.aot import hlo, parse_slice, step_time, target
from gatedjax.aot.schedule import Called, ProgramRun
from gatedjax.aot.step import compile_step
from gatedjax.config import Config
from gatedjax.errors import InputError

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
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_and_passes(name):
    found = hlo.instructions(TEXT)[name]
    assert (step_time.part(found), step_time.which_pass(found)) == PARTS[name]


def test_the_table_adds_up():
    chip = target("tpu:v5p")
    second = round(chip.clock_hz)
    called = {name: Called(calls=1, cycles=second, hbm_bytes=1) for name in PARTS}
    called["unheard.7"] = Called(calls=1, cycles=second)
    program = ProgramRun(
        cycles=8 * second, hbm_bytes=6, called=called, missing=("gather.8",), unknown_branches=0
    )
    parts = step_time.times_by_part(program, TEXT, chip)
    assert sum(time.seconds for time in parts.values()) == pytest.approx(7)
    assert parts["mixer: the rest"].repeated == pytest.approx(1)
    time = step_time.StepTime(program, parts, model_flops=4 * chip.peak_flops, chip=chip)
    lines = step_time.lines(time)
    assert "8000.00 ms a step" in lines[0] and "utilization 50.0%" in lines[0]
    assert lines[-1].endswith("gather.8")
    [between] = [line for line in lines if line.startswith("between the parts")]
    assert between.split()[3] == "1000.00"


def test_the_time_of_several_chips_is_refused():
    with pytest.raises(InputError, match="--schedule: got --aot=v5e:2x2, expected one chip"):
        compile_step(Config(), parse_slice("v5e:2x2"), schedule=True)
