"""Runs of a study made by several processes or a Ray cluster: the same table, to the digit."""

import os
import pickle
import signal
import sys

import pytest
from tiny_run import plain

from gatedjax.data.recall import RecallConfig
from gatedjax.errors import InputError, TrainingError
from gatedjax.study import Cell, Study, report, workers
from gatedjax.study import __main__ as command
from gatedjax.study.study_file import load_study
from gatedjax.study.workers import Here, Part, PlannedRun, Processes, RayCluster, parts_of_machine

TASK = RecallConfig(
    task="copy", seq_len=8, vocab_size=4, num_pairs=3, train_examples=32, validation_examples=16
)


def study():
    cells = []
    for lr in (0.01, 0.02):
        config = plain(data__seq_len=8, train__steps=4, train__eval_every=20, optim__lr=lr)
        cells.append(Cell({"lr": lr}, config, recall=TASK))
    return Study("t", tuple(cells), (0, 1), ("recall",), ("accuracy", "steps"))


def table(made_by, folder):
    asked = study()
    records = command.run_missing(asked, folder, made_by)
    return report.markdown(asked, report.rows(asked, records), [])


def test_a_machine_is_cut_into_equal_parts():
    assert parts_of_machine(2, range(5), []) == [Part((0, 1), None), Part((2, 3), None)]
    assert parts_of_machine(2, [3], ["0", "GPU-7"]) == [Part((3,), "0"), Part((3,), "GPU-7")]
    for wrong, cores, gpus in ((0, range(2), []), (3, range(2), []), (2, range(8), ["0"])):
        with pytest.raises(InputError, match=f"--workers: got {wrong}, expected 1 to "):
            parts_of_machine(wrong, cores, gpus)


def test_gpus_are_found_without_starting_jax(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-8")
    assert workers._gpus() == []
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert workers._gpus() == ["2", "GPU-8"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(workers.glob, "glob", lambda _: ["/dev/nvidia10", "/dev/nvidia2"])
    assert workers._gpus() == ["2", "10"]


def test_one_kind_of_workers_at_a_time():
    with pytest.raises(InputError, match="--workers: got 2 and --ray"):
        workers.workers(2, "auto", 1, 0)


def dies_once(run, study):
    """As `make`; the process that makes the first run of seed 1 is killed."""
    mark = os.environ["DIED"]
    if run.seed == 1 and not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return workers.make(run, study)


def dies(run, study):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(len(workers._cores()) < 2, reason="needs two CPU cores")
def test_two_processes_one_of_which_is_killed(tmp_path, monkeypatch):
    expected = table(Here(), tmp_path / "here")
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    monkeypatch.setattr(workers, "make", dies_once)
    pool = Processes(2)
    assert pool.device_name() == Here().device_name()
    assert table(pool, tmp_path / "there") == expected
    assert (tmp_path / "died").exists()
    pool.close()


OWN_EXPERIMENT = """
import dataclasses
from gatedjax.study import Cell, Study

@dataclasses.dataclass(frozen=True)
class Doubled:
    number: int

    def __call__(self, seed):
        return {"doubled": 2.0 * self.number + seed}

def get_study(small):
    cells = tuple(Cell({"number": n}, experiment=Doubled(n)) for n in (3, 5))
    return Study("t", cells, (0, 1), (), ("doubled",))
"""


def study_of_a_file(folder):
    path = folder / "doubled.py"
    path.write_text(OWN_EXPERIMENT)
    return load_study(path, small=False)


def test_a_run_is_found_again_by_the_name_of_its_file(tmp_path):
    """What a file defines cannot be pickled; names can."""
    asked = study_of_a_file(tmp_path)
    run = workers.planned_runs(asked)[3]
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(run)
    names = pickle.loads(pickle.dumps((asked.file, run.key, run.seed)))
    assert workers.make_from_file(*names).values["doubled"] == 11.0
    with pytest.raises(InputError, match=r"doubled\.py was changed while its runs were made"):
        workers.make_from_file(asked.file, "another", 1)


@pytest.mark.slow
@pytest.mark.skipif(len(workers._cores()) < 2, reason="needs two CPU cores")
def test_two_processes_with_an_experiment_of_the_file(tmp_path):
    asked = study_of_a_file(tmp_path)
    pool = Processes(2)
    made = list(pool.finished(workers.planned_runs(asked), asked))
    pool.close()
    assert sorted(found.values["doubled"] for _, found in made) == [6.0, 7.0, 10.0, 11.0]


@pytest.mark.slow
@pytest.mark.skipif(len(workers._cores()) < 2, reason="needs two CPU cores")
def test_workers_that_always_die_end_the_study(monkeypatch):
    monkeypatch.setattr(workers, "make", dies)
    pool = Processes(2)
    (cell, _) = study().cells
    with pytest.raises(TrainingError, match="a worker died 3 times"):
        list(pool.finished([PlannedRun("a", cell, 0)], study()))
    pool.close()


@pytest.mark.slow
@pytest.mark.skipif(len(workers._cores()) < 2, reason="needs two CPU cores")
def test_ray_with_two_workers_one_of_which_is_killed(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    # Its workers do not find this file.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    expected = table(Here(), tmp_path / "here")
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    monkeypatch.setattr(workers, "make", dies_once)
    cluster = RayCluster("local", num_cpus=1, num_gpus=0)
    assert table(cluster, tmp_path / "there") == expected
    assert (tmp_path / "died").exists()
    cluster.close()


def test_ray_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(workers.sys.modules, "ray", None)
    with pytest.raises(InputError, match="--ray: ray cannot be imported"):
        workers.workers(1, "auto", 1, 0)
