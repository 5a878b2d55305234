"""The real step on slices that are not here, through the command line: it fits, it does not, the
slice is unknown.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import slow

from configs import gated_attention_1p7b
from gatedjax.aot import libtpu, parse_slice
from gatedjax.aot.step import compile_step
from gatedjax.config import from_config_dict
from kernels_pallas.attention.tpu import backward, forward

ROOT = Path(__file__).parents[3]
needs_libtpu = pytest.mark.skipif(
    not libtpu.installed(), reason="libtpu is not installed (pip install '.[aot]')"
)
SMALL = [
    "--config.model.vocab_size=512",
    "--config.model.num_layers=1",
    "--config.model.pattern=('attention',)",
    "--config.model.ffn_pattern=('moe',)",
    "--config.data.seq_len=128",
]


def train(*flags: str, config: str = "tiny") -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu"
    }
    command = [sys.executable, "train.py", f"--config=configs/{config}.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@needs_libtpu
def test_a_step_that_fits(tmp_path):
    done = train("--aot=2*v5e:2x2", "--config.mesh.fsdp=4", f"--workdir={tmp_path / 'run'}", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "8 TPU v5 lite device(s), mesh data 2 x fsdp 4" in done.stdout
    # What the parameters' initialization traces, on this machine's own platform, is not what the
    # step runs.
    assert "ops: attention: tpu, expert_mlp: tpu\n" in done.stdout
    assert "fits" in done.stdout and "largest arrays of the state" in done.stdout
    assert "all-gather" in done.stdout and "reduce-scatter" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@needs_libtpu
def test_ragged_exchange_compiles_for_tpu():
    """No CPU runs it, so this is where jax's checks of what varies over devices, and the TPU's
    compiler, see it.
    """
    exchange = "--config.model.ffns.moe.exchange=ragged_all_to_all"
    done = train("--aot=v5e:2x4", "--config.mesh.expert=4", exchange, *SMALL, config="tiny_moe")
    assert done.returncode == 0, done.stderr
    assert "mesh data 2 x expert 4" in done.stdout and "ragged-all-to-all" in done.stdout


@needs_libtpu
@pytest.mark.slow
def test_a_step_that_does_not_fit():
    done = train("--aot=v5e:2x2", "--config.mesh.fsdp=4", config="gated_attention_1p7b")
    assert done.returncode == 3, done.stderr
    assert "DOES NOT FIT" in done.stdout and "too much" in done.stdout


@needs_libtpu
@pytest.mark.slow
def test_the_model_time_of_a_step():
    done = train("--aot=v5e:1", "--schedule", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "1 TPU v5 lite device(s)" in done.stdout
    assert "model FLOPs utilization" in done.stdout
    for part in ("mixer: kernels", "feed-forward: kernels", "loss: matrices", "optimizer"):
        assert f"\n{part}" in done.stdout, part


@needs_libtpu
@pytest.mark.slow
def test_eight_micro_batches_of_packed_rows(monkeypatch):
    """libtpu refused the tables of segment ids there. What the kernels compute does not matter,
    and takes longer to compile than all else: they are left empty.
    """
    call = forward.call

    def of_nothing(plan, _, *rest, **options):
        return call(plan, lambda *refs: None, *rest, **options)

    for module in (forward, backward):
        monkeypatch.setattr(module, "call", of_nothing)
    c = gated_attention_1p7b.get_config()
    c.model.num_layers = 2
    c.model.vocab_size = 4096
    c.mesh.fsdp = 16
    c.train.accumulation_steps = 8
    step = compile_step(from_config_dict(c), parse_slice("v5p:2x2x4"))
    assert not isinstance(step.report, str), step.report


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--schedule"], "--schedule: got no --aot, expected a chip such as --aot=v5p:1"),
        slow(["--aot=v9:2x2"], "--aot: slice: got 'v9:2x2', expected"),
        pytest.param(
            ["--aot=v5e:3x5x7"],
            "--aot: slice: got 'v5e:3x5x7', which libtpu refuses",
            marks=needs_libtpu,
        ),
        pytest.param(
            ["--aot=v5e:2x2", "--config.mesh.fsdp=3"],
            "does not divide the 4 device(s)",
            marks=needs_libtpu,
        ),
    ],
)
def test_bad_slices_are_one_line(flags, message):
    done = train(*flags, "--config.model.vocab_size=512")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr, done.stderr
