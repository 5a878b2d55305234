"""The GPU kit on a CPU: a dry run of all its stages, and what it does when something fails."""

import itertools
import json
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from benchmarks.gpu import clocks, guard, kernel_times, ncu, numerics, programs, tune, variants
from benchmarks.gpu import numeric_cases as numeric_cases_module
from benchmarks.gpu.cases import OURS, AttentionShape, timed
from benchmarks.gpu.guard import WorkerOptions, run_each
from benchmarks.gpu.numeric_cases import AS_DISPATCHED, DELTA, GROUPED, numeric_cases
from benchmarks.gpu.numeric_inputs import draw
from benchmarks.gpu.processes import Job, run_together
from benchmarks.gpu.records import append_record, read_records
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.stages import LIMITS, parallel_jobs
from benchmarks.gpu.summary import summary
from benchmarks.gpu.unpack import unpack
from kernels_pallas.ops import NORMALIZERS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def settings(tmp_path) -> Settings:
    made = Settings(out=tmp_path / "out", scratch=tmp_path / "scratch", dry=True)
    made.out.mkdir()
    made.scratch.mkdir()
    return made


def dry_run(settings: Settings, stages: str, budget: int) -> str:
    """Runs the kit as a person does; what it prints."""
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(budget), "--dry"]
    command += [f"--scratch={settings.scratch}", f"--stages={stages}"]
    environment = os.environ | {"OUT": str(settings.out), "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    return done.stdout


def of_kind(settings: Settings, kind: str) -> list[dict]:
    return [record for record in read_records(settings.out) if record["kind"] == kind]


@pytest.mark.slow
def test_dry_run_of_all_stages(settings):
    text = dry_run(settings, ",".join(LIMITS), budget=3600)

    checked = [r for r in of_kind(settings, "numerics") if r["ptxas"] == "installed"]
    assert [r["ok"] for r in checked] == [True] * len(numeric_cases(dry=True))

    times = [r for r in of_kind(settings, "time") if r["stage"] == "time"]
    assert len(times) == len(programs.programs(dry=True))
    assert all(r["ms"] > 0 for r in times)

    tuned = of_kind(settings, "tuned")
    assert len(tuned) == len(variants.tuned(dry=True))
    assert all(r["ms"] > 0 for r in tuned)

    (trained,) = of_kind(settings, "train")
    assert trained["tokens_per_s"] > 0

    # Stages that want NVIDIA's programs are recorded, not fatal.
    assert {r["stage"] for r in of_kind(settings, "stage")} == set(LIMITS)
    failed = [r["process"] for r in of_kind(settings, "process")]
    assert all(process.startswith(("torch", "ncu")) for process in failed), failed

    assert (settings.out / "gpu_summary.txt").read_text() in text
    assert f"numerics, ptxas installed: {len(checked)} of {len(checked)} right" in text
    assert "ceiling bf16 matmul" in text
    assert text.rstrip().endswith("failures of gatedjax: 0")


def test_a_stage_that_fails_does_not_end_the_run(settings):
    text = dry_run(settings, "nonsense,ncu", budget=60)
    assert "stage nonsense: error ValueError: stage: got 'nonsense', expected one of" in text
    assert "stage ncu:" in text
    assert text.rstrip().endswith("failures of gatedjax: 0")


def test_stages_beyond_the_budget_are_skipped(settings):
    text = dry_run(settings, "time,tune", budget=12)
    assert [r["skipped"] for r in of_kind(settings, "stage")] == [True, True]
    assert "stage time: skipped True" in text


def test_the_main_process_imports_no_jax():
    program = "import sys, benchmarks.gpu.__main__; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("op", [GROUPED, pytest.param(DELTA, marks=pytest.mark.slow)])
def test_numerics(op):
    case = next(case for case in numeric_cases(dry=True) if case.op == op)
    found = numerics.check_case(case, dry=True)
    assert found["ok"], found


def test_every_normalizer_of_one_pass_is_a_case():
    expected = {
        name
        for name, normalizer in NORMALIZERS.items()
        if normalizer.passes == 1 and not normalizer.parameters
    }
    assert {"softmax", *numeric_cases_module.NORMALIZERS} == expected


def test_wrong_numerics_are_seen(monkeypatch):
    case = next(case for case in numeric_cases(dry=True) if case.op == GROUPED)
    drawn = draw(case)

    def off_by_a_percent(x, implementation, **options):
        out = drawn.call(x, implementation=implementation, **options)["out"]
        return {"out": out * 1.01 if implementation == "gpu" else out}

    wrong = drawn._replace(call=off_by_a_percent)
    monkeypatch.setattr(numerics, "draw", lambda case: wrong)
    assert not numerics.check_case(case, dry=True)["ok"]


@pytest.mark.slow
def test_cases_of_a_gpu_can_be_traced():
    """Sizes and options that no dry run reaches."""
    for case in numeric_cases(dry=False):
        if case.dtype == "bfloat16":
            drawn = draw(case)
            inputs = {k: jax.ShapeDtypeStruct(v.shape, case.dtype) for k, v in drawn.inputs.items()}
            for name in set(inputs) - set(drawn.operands):
                inputs[name] = inputs[name].update(dtype="float32")

            how = {} if case.op in AS_DISPATCHED else programs.kernel_options(dry=True)

            def call(x, drawn=drawn, how=how):
                return drawn.call(x, **how)

            assert jax.eval_shape(call, inputs)


@pytest.mark.slow
def test_programs_of_a_gpu_can_be_traced(monkeypatch):
    """Shapes that no dry run reaches. The decoding step through jax-triton has no interpreter."""
    interpreted = programs.kernel_options(dry=True)
    monkeypatch.setattr(programs, "kernel_options", lambda dry: interpreted)
    ours = [p for p in programs.programs(dry=False) if p.implementation == OURS]
    # One pass of each decoding step, and a line without ours.
    assert len(ours) == 2 * len(timed(dry=False)) - 5
    for program in ours:
        if program.case.startswith("linear_scan_step"):
            continue
        function, specs, cost = program.build()
        assert jax.eval_shape(function, *specs) is not None
        assert max(cost) > 0


def test_costs_count_what_is_visible():
    shape = AttentionShape(1, 8, 1, 1, 1)
    pairs = {"window": 1 + 2 + 6 * 3, "documents": 2 * 10}
    for name, visible in pairs.items():
        size = 3 if name == "window" else 4
        cost = shape._replace(options=((name, size),)).costs()["fwd"]
        assert cost.flops == 2 * 2 * visible
    assert shape.costs()["fwd"].flops == 2 * 2 * 36


def test_profiled_kernels_are_in_their_programs():
    built = {p.case: p.build() for p in programs.programs(dry=True) if p.implementation == OURS}
    for case, kernel in ncu.profiled(dry=True):
        function, specs, _ = built[case]
        assert f"name={kernel}" in str(jax.make_jaxpr(function)(*specs))
    of_gpu = {p.case for p in programs.programs(dry=False)}
    assert {case for case, _ in ncu.profiled(dry=False)} <= of_gpu


def tables() -> list[str]:
    """What the tables hold, as text."""
    modules = (
        variants.tuning_of_scan,
        variants.tuning_of_delta,
        variants.tuning_of_attention,
        variants.tuning_of_grouped,
    )
    return [str(module.TUNED) for module in modules]


def test_every_variant_changes_its_table():
    before = tables()
    for one in variants.tuned(dry=False):
        names = [tune.as_text(changes) for changes in one.variants]
        assert names[0] == "as it is" and len(names) == len(set(names))
        for changes in one.variants:
            one.apply(changes)
            assert (tables() != before) == bool(changes)
        one.apply({})
        assert tables() == before


def test_the_best_row_is_of_the_fastest_kernels():
    """Of the variants that agree in the chunk, without those that compute something else."""
    one = variants.Tuned(
        program=programs.programs(dry=True)[0],
        apply=variants.set_scan,
        kernels=variants.SCAN_KERNELS,
        variants=[
            {},
            {"intra_warps": 4, "back_warps": 4},
            {"intra_warps": 2, "back_warps": 2},
            {"chunk": 32, "intra_warps": 4},
            {"intra_warps": 1},
        ],
    )
    microseconds = [(9, 9, 9), (5, 7, 10), (6, 2, 9), (4, 4, 9), (0, 0, 0)]
    records = []
    for changes, (products, back, scan) in zip(one.variants, microseconds):
        kernels = {
            "linear_scan_vector_products": products,
            "linear_scan_vector_backward_products": back,
            "linear_scan_forward": scan,
            "fusion": 1,
        }
        records.append({"changes": tune.as_text(changes), "kernels": kernels, "sums": [[1.0] * 9]})
    records[4]["sums"] = [[1.0] * 8 + [1.5]]
    assert tune.best_changes(one, records) == {"intra_warps": 4, "back_warps": 2}
    records[3]["kernels"]["linear_scan_forward"] = 3
    assert tune.best_changes(one, records) == {"chunk": 32, "intra_warps": 4}
    with pytest.raises(ValueError, match="the row as it is"):
        tune.best_changes(one, records[1:])


def test_times_of_kernels():
    """Programs are told apart by the pause between them; a kernel's time is its fastest call's."""
    gap = 2 * kernel_times.GAP_NS
    first = [kernel_times.Event("a", start, 10) for start in (0, 20, 40, 60)]
    second = [kernel_times.Event("b", gap + start, start + 1000) for start in (0, 2000)]
    stray = [kernel_times.Event("c", gap + 9000, 5)]
    groups = kernel_times.separate([*second, *stray, *first])
    assert [kernel_times.times_of_call(group, 2) for group in groups] == [
        {"a": 0.02},
        {"b": 1.0},
    ]


def test_parallel_processes_divide_all_tasks(settings):
    """And those with the packed ptxas are told so."""
    (settings.cuda / "bin").mkdir(parents=True)
    (settings.cuda / "bin" / "ptxas").touch()
    on_gpu = Settings(settings.out, settings.scratch)
    labels = [job.label for job in parallel_jobs(on_gpu)]
    names = {label.split()[0] for label in labels}
    assert names == {"numerics", "compile", "compile_fla"}
    packed = [job for job in parallel_jobs(on_gpu) if "--ptxas=packed" in job.command]
    assert packed
    assert all(job.environment["CUDA_ROOT"] == str(settings.cuda) for job in packed)

    tasks = list(range(10))
    parts = [WorkerOptions(settings, part, parts=3).own(tasks) for part in range(3)]
    assert sorted(itertools.chain(*parts)) == tasks


def test_late_processes_are_killed_with_their_children(settings):
    quick = Job("quick", ["true"])
    failing = Job("failing", ["false"])
    endless = Job("endless", ["bash", "-c", "sleep 600 & echo $! > $FILE; wait"])
    endless.environment["FILE"] = str(settings.out / "child")
    watching = Job("watching", ["sleep", "600"], companion=True)
    began = time.monotonic()
    run_together(settings, "stage", [quick, watching], limit=100)
    assert time.monotonic() - began < 50
    run_together(settings, "stage", [quick, failing, endless, watching], limit=1)
    found = {r["process"]: (r["late"], r["exit_code"]) for r in of_kind(settings, "process")}
    assert found == {"failing": (False, 1), "endless": (True, -9)}
    child = int((settings.out / "child").read_text())
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True)
    assert state.stdout.strip() == "" or state.stdout.startswith("Z")


def test_tasks_after_a_failing_one_are_done(settings, monkeypatch):
    """After an error of CUDA they are done by a fresh process."""
    done, failed, commands = [], [], []
    monkeypatch.setattr(guard.os, "execv", lambda program, command: commands.append(command))

    def do(task):
        if task in ("refused", "CUDA_ERROR"):
            raise ValueError(task)
        done.append(task)

    def record(task, error):
        failed.append(str(error))

    tasks = ["first", "refused", "CUDA_ERROR", "last"]
    run_each(tasks, do, record, WorkerOptions(settings))
    assert (done, failed, commands) == (["first", "last"], ["refused", "CUDA_ERROR"], [])

    run_each(tasks, do, record, WorkerOptions(Settings(settings.out, settings.scratch)))
    (command,) = commands
    assert command[:3] == [sys.executable, "-m", "benchmarks.gpu.worker"]
    assert command[-1] == "--skip=3"

    done.clear()
    run_each(tasks, do, record, WorkerOptions(settings, skip=3))
    assert done == ["last"]


def test_unpacking(settings, tmp_path):
    """ptxas is unpacked; wheels that pip refuses are recorded."""
    packed = tmp_path / "packed"
    (packed / "wheels").mkdir(parents=True)
    (packed / "wheels" / "broken-1-py3-none-any.whl").write_text("no wheel")
    (packed / "ptxas.xz").write_bytes(lzma.compress(b"#!/bin/sh\necho packed\n"))
    unpack(settings, packed)
    ptxas = settings.cuda / "bin" / "ptxas"
    assert subprocess.run([ptxas], capture_output=True, text=True).stdout == "packed\n"
    (record,) = of_kind(settings, "stage")
    assert record["error"].startswith("wheels: CalledProcessError")
    assert not settings.packages.exists()
    unpack(settings, tmp_path / "nothing_packed")
    assert len(read_records(settings.out)) == 1


def test_summary(settings):
    """Lines of what went wrong; a line that a killed process left unfinished is passed over."""
    wrong = dict(stage="parallel", kind="numerics", ptxas="installed", case="scan", ok=False)
    append_record(settings.out, **wrong, same=True, errors={"out": 0.5})
    append_record(settings.out, **wrong | {"ptxas": "packed", "ok": True})
    refused = dict(stage="time", kind="time", case="scan fwd", implementation="fla")
    append_record(settings.out, **refused, error="ImportError: fla")
    variant = dict(stage="tune", kind="variant", case="c")
    append_record(settings.out, **variant, changes="as it is", kernels={})
    append_record(settings.out, **variant, changes="chunk=32", error="spills")
    row = dict(stage="tune", kind="tuned", case="c", changes="as it is")
    append_record(settings.out, **row, before_ms=2.0, ms=1.0)
    append_record(settings.out, **refused | {"implementation": OURS}, error="ValueError: spills")
    with open(settings.out / "gpu_results.jsonl", "a") as file:
        file.write(json.dumps(refused)[:20])
    text = summary(settings.out, seconds=1)
    assert "numerics, ptxas installed: 0 of 1 right" in text
    assert "WRONG scan: {'out': 0.5} deterministic=True" in text
    assert "numerics, ptxas packed: 1 of 1 right" in text
    assert "tune c: 2.000 -> 1.000 ms by as it is; 1 of 2 variants measured" in text
    assert "left out: ImportError: fla" in text
    assert "FAILED ValueError: spills" in text
    assert "  time scan fwd: ValueError: spills\nfailures of gatedjax: 2" in text


def test_clocks():
    text = "1980, 2619, 650.1, 60\n[N/A], 1, 2, 3\n1200, 2619, 120, 41\n1980, 26"
    assert clocks.read_samples(text) == {
        "sm_mhz": [1200, 1590, 1980],
        "memory_mhz": [2619, 2619, 2619],
        "watts": [120, 385.05, 650.1],
        "celsius": [41, 50.5, 60],
    }


def test_counters_of_ncu():
    text = (
        '==PROF== Connected\n"Metric Name","Metric Unit","Metric Value"\n"Duration","us","12.5"\n'
    )
    assert ncu.read_metrics(text + '"Grid Size","","132"\n') == {"Duration [us]": "12.5"}
