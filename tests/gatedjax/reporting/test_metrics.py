"""Writers, throughput, formats and the picture: right numbers in the right place, also after a kill
and a resume.
"""

import io
import json
import math
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from gatedjax.config import ModelConfig, SparseMoEConfig
from gatedjax.errors import InputError
from gatedjax.reporting import console as live
from gatedjax.reporting import writers as metrics
from gatedjax.reporting.console import Console, format_duration, format_si, format_step, say
from gatedjax.reporting.curves import draw, loss_curve, plot_run
from gatedjax.reporting.figure import moving_mean
from gatedjax.reporting.step_log import drops_unasked, no_room
from gatedjax.reporting.throughput import Throughput
from gatedjax.reporting.trackers import TRACKERS
from gatedjax.reporting.writers import Jsonl, TensorBoard, Writers, make_writers, read_records


class Terminal(io.StringIO):
    def isatty(self):
        return True


def steps_in(run_dir):
    return [r["step"] for r in read_records(run_dir / "metrics.jsonl")]


# --- formats


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0, "0.00"),
        (0.5, "0.50"),
        (9.999, "10.0"),
        (999.4, "999"),
        (999.9, "1.00k"),
        (41234, "41.2k"),
        (1e6, "1.00M"),
        (1.2e11, "120G"),
        (3.3e12, "3.30T"),
        (2e18, "2000P"),
        (-41234, "-41.2k"),
        (math.nan, "nan"),
    ],
)
def test_format_si(x, text):
    assert format_si(x) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (130, "2m10s"),
        (11111, "3h05m"),
        (190000, "2d04h"),
        (math.inf, "?"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def test_format_step_shows_what_is_known():
    scalars = {
        "loss": 2.134,
        "bits_per_byte": 3.08,
        "tokens_per_s": 41234,
        "mfu": 0.123,
        "flops_per_s": 1e12,
    }
    scalars |= {
        "eta_s": 130,
        "grad_norm": 0.71,
        "skipped_steps": 0,
        "lr": 1e-3,
        "load_entropy": 1.0,
    }
    shown = "step 120/600  loss 2.134  bpb 3.080  41.2k tok/s  mfu 12.3%  eta 2m10s  grad 0.71"
    assert format_step(120, 600, scalars) == shown
    without_peak = {"loss": 2.134, "mfu": None, "flops_per_s": 1.2e11, "skipped_steps": 2}
    assert format_step(7, 600, without_peak) == "step   7/600  loss 2.134  120 GFLOP/s  skipped 2"
    assert (
        format_step(7, 600, {"loss": math.nan}, "validation")
        == "step   7/600  validation  loss nan"
    )


# --- throughput


def test_throughput_leaves_out_compilation_and_pauses_and_keeps_pauses_in_the_time_left():
    now = [100.0]
    speed = Throughput(1000, 50.0, peak_flops=1e6, total_steps=30, clock=lambda: now[0])
    now[0] += 60  # compilation
    assert speed.read(1) == {}
    now[0] += 4
    assert speed.read(11) == {
        "tokens_per_s": 2500,
        "flops_per_s": 125_000,
        "mfu": 0.125,
        "eta_s": 0.4 * 19,
    }
    with speed.paused():
        now[0] += 6
    now[0] += 2
    read = speed.read(21)
    assert read["tokens_per_s"] == 5000 and read["eta_s"] == pytest.approx(12 / 20 * 9)
    now[0] += 2
    assert speed.read(31)["eta_s"] == 0


def test_throughput_without_a_known_peak_has_no_mfu():
    now = [0.0]
    speed = Throughput(10, 2.0, peak_flops=None, total_steps=5, clock=lambda: now[0])
    speed.read(3)  # a resumed run starts anywhere
    now[0] = 2.0
    assert speed.read(4) == {"tokens_per_s": 5, "flops_per_s": 10, "mfu": None, "eta_s": 2.0}


# --- console


def test_console_writes_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    console = Console(20, out)
    console.write(1, {"loss": 5.0})
    console.write(2, {"loss": 4.0}, "validation")
    console.close()
    assert out.getvalue() == "step  1/20  loss 5.000\nstep  2/20  validation  loss 4.000\n"


def test_a_terminal_has_a_live_bar_with_lines_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal()

    def drawn():
        """What the bar shows when it is drawn again."""
        before = len(out.getvalue())
        live._bar._progress.refresh()
        return out.getvalue()[before:]

    with live.live_bar(20, out):
        live.doing("tokenizing [main]")
        assert "tokenizing [main]" in drawn()
        console = Console(20, out)
        console.write(1, {"loss": 5.0})
        assert "step  1/20  loss 5.000" in drawn()
        say("checkpoint [3/4]", out)
        assert "checkpoint [3/4]\n" in out.getvalue()
        live.show_step(2, 20, {"loss": 4.0})
        assert "step  2/20  loss 4.000" in drawn()
        console.write(2, {"loss": 4.5}, "validation")
        assert "step  2/20  validation  loss 4.500\n" in out.getvalue()
        console.write(3, {"loss": 3.0})
        console.close()
        assert "step  3/20  loss 3.000\n" in out.getvalue()
    before = out.getvalue()
    assert before.endswith("\x1b[?25h") or "\x1b[?25h" in before[-40:]  # the cursor is back
    assert not live.is_live()
    say("after", out)
    assert out.getvalue() == before + "after\n"


@pytest.mark.parametrize("terminal, term", [(False, "xterm"), (True, "dumb")])
def test_elsewhere_nothing_is_redrawn(monkeypatch, terminal, term):
    monkeypatch.setenv("TERM", term)
    out = Terminal() if terminal else io.StringIO()
    with live.live_bar(20, out):
        live.doing("tokenizing")
        live.show_step(1, 20, {"loss": 5.0})
        Console(20, out).write(1, {"loss": 5.0})
    assert out.getvalue() == "step  1/20  loss 5.000\n"


# --- files


def test_records_round_trip_and_are_valid_json(tmp_path):
    with Writers([Jsonl(tmp_path)]) as writers:
        writers.write(
            1, {"loss": jnp.float32(2.5), "skipped_steps": jnp.int32(0), "mfu": None, "lr": 1e-3}
        )
        assert len(read_records(tmp_path / "metrics.jsonl")) == 1  # on disk before the next step
        writers.write(1, {"loss": np.float32("nan"), "grad_norm": math.inf}, "validation")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(constant):
        raise ValueError(constant)

    first, second = [json.loads(line, parse_constant=refuse) for line in lines]
    assert first == {"step": 1, "split": "train", "loss": 2.5, "skipped_steps": 0, "lr": 1e-3}
    assert second == {"step": 1, "split": "validation", "loss": None, "grad_norm": None}


@pytest.mark.parametrize(
    "torn", ["", '{"step": 5, "spl', '{"step": 5, "split": "train", "loss": 1.0}']
)
def test_resume_drops_what_comes_again_and_a_torn_line(tmp_path, torn):
    writer = Jsonl(tmp_path)
    for step in (1, 2, 3, 4):
        writer.write(step, {"loss": float(step)})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + torn)
    resumed = Jsonl(tmp_path, resume_step=2)
    resumed.write(3, {"loss": 30.0})
    resumed.close()
    assert [(r["step"], r["loss"]) for r in read_records(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]
    Jsonl(tmp_path, resume_step=0).close()
    assert steps_in(tmp_path) == []


def test_a_file_that_is_not_ours_is_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("my notes\nmore notes\n")
    with pytest.raises(
        InputError,
        match=r"metrics.jsonl, line 1: got 'my notes', expected a JSON object with a step",
    ):
        Jsonl(tmp_path)
    assert path.read_text() == "my notes\nmore notes\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to stand for a full disk")
def test_full_disk_and_unusable_directory_are_one_line(tmp_path):
    writer = Jsonl(tmp_path)
    writer.close()
    writer._file = open("/dev/full", "w")  # noqa: SIM115 (every flush fails as on a full disk)
    with pytest.raises(
        InputError, match=r"could not write .*metrics.jsonl: No space left on device"
    ):
        writer.write(1, {"loss": 1.0})
    with pytest.raises(InputError, match="No space left"):
        writer.close()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        InputError, match=r"could not write .*metrics.jsonl: (File exists|Not a directory)"
    ):
        Jsonl(tmp_path / "file")


def events(run_dir):
    """Read with the format's own framing: length, its checksum, the event, its checksum."""
    found = []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        data, i = path.read_bytes(), 0
        while i < len(data):
            size = int.from_bytes(data[i : i + 8], "little")
            body = data[i + 12 : i + 12 + size]
            assert int.from_bytes(data[i + 12 + size : i + 16 + size], "little") == masked_crc32c(
                body
            )
            found.append(Event.FromString(body))
            i += 16 + size
    return found


def test_tensorboard_holds_every_scalar_and_the_resumed_step(tmp_path):
    writer = TensorBoard(tmp_path, resume_step=4)
    writer.write(5, {"loss": 2.5, "load_entropy": 0.5})
    writer.write(6, {"loss": 2.0}, "validation")
    writer.close()
    found = events(tmp_path)
    scalars = {(e.step, v.tag): v.simple_value for e in found for v in e.summary.value}
    assert scalars == {
        (5, "train/loss"): 2.5,
        (5, "train/load_entropy"): 0.5,
        (6, "validation/loss"): 2.0,
    }
    assert [e.step for e in found if e.HasField("session_log")] == [
        5
    ]  # TensorBoard hides older events from here on


def test_make_writers_writes_everywhere_and_only_on_the_first_process(
    tmp_path, capsys, monkeypatch
):
    with make_writers(tmp_path / "a", 10) as writers:
        writers.write(3, {"loss": 2.0, "bits_per_byte": 2.9})
    assert capsys.readouterr().out == "step  3/10  loss 2.000  bpb 2.900\n"
    assert (
        steps_in(tmp_path / "a") == [3]
        and len(list((tmp_path / "a" / "tensorboard").iterdir())) == 1
    )
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    with make_writers(tmp_path / "b", 10) as writers:
        writers.write(3, {"loss": 2.0})
        say("quiet")
    assert capsys.readouterr().out == "" and not (tmp_path / "b").exists()


# --- trackers


class Recorder(types.ModuleType):
    """A tracker's package that remembers what it was called with."""

    def __init__(self):
        super().__init__("recorder")
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def called(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return [] if name == "search_runs" else self

        return called


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_a_tracker_gets_config_and_numbers(tmp_path, monkeypatch, capsys, name):
    client = Recorder()
    monkeypatch.setitem(sys.modules, name, client)
    config = {"model": {"width": 8}}
    with make_writers(tmp_path / "run", 10, 0, config, [name]) as writers:
        writers.write(3, {"loss": 2.0, "expert_load": np.ones(3)})
    given = str(client.calls)
    assert "width" in given and "'train/loss': 2.0" in given and "expert_load" not in given
    assert ("step", 3) in [item for _, _, kwargs in client.calls for item in kwargs.items()]
    assert client.calls[-1][0] in ("finish", "end_run")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_the_real_tracker_offline_goes_on_after_a_resume(tmp_path, monkeypatch, name):
    client = pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    config = {"model": {"width": 8}}
    for start in (0, 2):
        with make_writers(tmp_path / "run", 10, start, config, [name]) as writers:
            for step in (start + 1, start + 2):
                writers.write(step, {"loss": 2.0 / step})
    if name == "mlflow":
        (run,) = client.search_runs(experiment_names=["gatedjax"], output_format="list")
        assert run.data.params == {"model.width": "8"} and run.data.metrics == {"train/loss": 0.5}
    else:
        pattern = "run/wandb/offline-*/*.wandb" if name == "wandb" else "trackio/gatedjax.db"
        assert list(tmp_path.glob(pattern))


def test_trackers_that_are_not_there_are_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--trackers: got 'tensorflow', expected some of wandb"):
        make_writers(tmp_path, 10, trackers=["tensorflow"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="--trackers: wandb cannot be imported"):
        make_writers(tmp_path, 10, trackers=["wandb"])


# --- the picture


def write_run(run_dir, steps):
    writer = Jsonl(run_dir)
    for step in range(1, steps + 1):
        writer.write(step, {"bits_per_byte": 1 + 7 / step})
        if step % 10 == 0:
            writer.write(step, {"bits_per_byte": 1.1 + 7 / step}, "validation")
    writer.close()


def test_picture_is_written(tmp_path):
    write_run(tmp_path, 5)
    picture = plot_run(tmp_path, {"gzip -9": 1.81})
    assert picture == tmp_path / "curves.png" and picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("steps", [50, 150])
def test_picture_shows_the_records_and_the_references(tmp_path, steps):
    write_run(tmp_path, steps)
    records = read_records(tmp_path / "metrics.jsonl")
    curves = {split: loss_curve(records, split) for split in ("train", "validation")}
    (axes,) = draw(curves, {"gzip -9": 1.81}, "run").axes
    x, y = axes.lines[0].get_data()  # the raw curve; a long run has a smoothed one over it
    np.testing.assert_allclose((x, y), (np.arange(1, steps + 1), 1 + 7 / np.arange(1, steps + 1)))
    *_, validation, reference = (line.get_ydata() for line in axes.lines)
    assert validation[-1] == 1.1 + 7 / steps and set(reference) == {1.81}
    assert len(axes.lines) == (3 if steps < 100 else 4)
    assert [t.get_text() for t in axes.texts] == ["gzip -9: 1.81"]
    assert "bits per byte" in axes.get_ylabel() and axes.get_xlabel() == "optimizer step"
    low, high = axes.get_ylim()
    assert low < min(*y, 1.81) and max(y) < high


def test_curve_and_moving_mean():
    records = [
        {"step": 1, "split": "train", "bits_per_byte": 8.0},
        {"step": 3, "split": "train", "loss": 1.0},
    ]
    records += [
        {"step": s, "split": split, "bits_per_byte": None}
        for s, split in ((1, "validation"), (2, "train"))
    ]
    assert [list(x) for x in loss_curve(records, "train")] == [[1], [8.0]]
    np.testing.assert_allclose(moving_mean(np.array([1.0, 2.0, 6.0, 4.0]), 3), [3.0, 4.0])


def test_picture_without_records_or_matplotlib_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"could not read .*metrics.jsonl: No such file"):
        plot_run(tmp_path)
    Jsonl(tmp_path).close()
    with pytest.raises(InputError, match="holds no bits_per_byte to draw"):
        plot_run(tmp_path)
    write_run(tmp_path, 3)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install gatedjax\[plots\]"):
        plot_run(tmp_path)


@pytest.mark.parametrize(
    "changed, tells",
    [
        ({}, True),
        (dict(exchange_factor=2.0), False),
        (dict(capacity_factor=1.0), False),
        (dict(bias=True), False),
        (dict(exchange="all_to_all"), False),
    ],
)
def test_who_is_told_that_rows_were_dropped(changed, tells):
    """Where only the default room of a ragged exchange can have dropped them."""
    values = dict(num_experts=8, hidden=16, exchange="ragged_all_to_all") | changed
    model = ModelConfig(ffns={"moe": SparseMoEConfig(**values)}, ffn_pattern=("moe",))
    assert drops_unasked(model) == tells
    assert not drops_unasked(ModelConfig())
    assert no_room(7, 0.0123).startswith("step 7: 1.23% of the assignments to experts were dropped")
