"""Buckets without a server: paths, refusals, and what rests on a store alone, on one in memory.

tests/buckets has the same on servers.
"""

import itertools
import sys
import threading

import fsspec
import pytest
from etils import epath

from gatedjax import buckets
from gatedjax.errors import InputError, StorageError
from gatedjax.paths import expand_place, is_bucket
from gatedjax.runtime.mirror import Mirror
from gatedjax.training import bucket_lock, step_folders
from gatedjax.training.bucket_lock import BucketLock
from gatedjax.training.orbax_store import s3_kvstore
from gatedjax.training.run_directory import append_line, failures_as_damage, set_aside

RUN = epath.Path("gs://bucket/runs/one")


@pytest.fixture
def store(monkeypatch):
    """A store in memory, in the place of every bucket."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    monkeypatch.setattr(buckets, "file_system", lambda place: memory)
    return memory


def put(store, *names, content=b"x"):
    for name in names:
        store.pipe_file(f"{RUN}/{name}", content)


@pytest.mark.parametrize(
    "given",
    [
        *(
            "az://b/run",
            "hdfs://b/run",
            "https://b/run",
            "GS://b/run",
            "gs://",
            "gs://b",
            "s3://b/",
        ),
        *("gs://b/../c", "gs://b//run", "gs:///run", "s3://b/./x", "s3://-/x", "gs://b/a\0"),
    ],
)
def test_a_bad_place_is_refused_by_the_flags_name(given):
    with pytest.raises(InputError, match=r"^--workdir: got .*expected a path, gs://BUCKET/PATH"):
        expand_place(given, "--workdir")


@pytest.mark.parametrize("given", ["gs://my-bucket/a/b", "s3://bucket.with.dots/a"])
def test_a_place_in_a_bucket_stays_one(given):
    place = expand_place(given, "--workdir")
    assert str(place) == given and is_bucket(place) and str(place / "c") == f"{given}/c"
    assert not is_bucket(expand_place("runs/tiny", "--workdir"))
    assert str(expand_place("gs://bucket", "x", whole_bucket=True)) == "gs://bucket"


@pytest.mark.parametrize("scheme, package", [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, scheme, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs {package} .*'gatedjax\[buckets\]'"):
        buckets.require_reachable(epath.Path(f"{scheme}://bucket/run"), "--workdir")


class NoCredentialsError(ValueError):
    """As botocore has it."""


class HttpError(OSError):
    """As gcsfs has it."""

    def __init__(self, code):
        self.code = code
        super().__init__(f"error, {code}")


@pytest.mark.parametrize(
    "error, kind, said",
    [
        (NoCredentialsError("Unable to locate credentials"), InputError, "no valid credentials"),
        (HttpError(401), InputError, "no valid credentials .*gcloud auth"),
        (HttpError(403), InputError, "permission denied"),
        (PermissionError("Access Denied"), InputError, "permission denied"),
        (ValueError("PERMISSION_DENIED: Error reading x"), InputError, "permission denied"),
        (HttpError(503), StorageError, "does not answer"),
        (ValueError("UNAVAILABLE: Connection refused"), StorageError, "does not answer"),
        (FileNotFoundError("b/bucket/o"), InputError, "is there a bucket gs://bucket[?]"),
    ],
)
def test_what_a_store_refuses_is_one_line(error, kind, said):
    with (
        pytest.raises(InputError, match=f"^--workdir: .*{said}") as caught,
        buckets.errors("--workdir: cannot use x", RUN),
    ):
        raise error
    assert type(caught.value) is kind and "\n" not in str(caught.value)


def test_a_bug_stays_one_and_no_answer_is_no_damage():
    for bug in (ValueError("shape (500,) of step 401"), TypeError("Forbidden"), KeyError("403")):
        with pytest.raises(type(bug)), buckets.errors("x", RUN):
            raise bug
    with pytest.raises(StorageError), failures_as_damage("a step"):
        raise HttpError(503)


# --- steps


def test_a_folder_without_its_commit_is_no_step(store):
    put(store, "checkpoints/5/commit_success.txt", "checkpoints/5/state/d/a")
    put(store, "checkpoints/10/state/d/a", "checkpoints/10/state/commit_success.txt")
    put(store, "checkpoints/damaged-3/commit_success.txt")
    assert step_folders.steps(RUN / "checkpoints") == [5]
    assert step_folders.has_steps(RUN) and not step_folders.has_steps(RUN / "other")


def test_a_step_that_is_set_aside_is_never_half_a_step(store, monkeypatch):
    """Whatever the moment of a kill: the number is free, or holds the whole step."""
    names = {"commit_success.txt", "manifest/metadata", "state/d/a"}
    for requests in itertools.count():
        store.store.clear()
        put(store, *(f"checkpoints/5/{name}" for name in names))
        left = iter(range(requests))

        def request(original, left=left):
            def made(*args, **kwargs):
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return original(*args, **kwargs)

            return made

        with monkeypatch.context() as patches:
            patches.setattr(store, "cp_file", request(store.cp_file))
            patches.setattr(store, "rm_file", request(store.rm_file))
            try:
                step_folders.set_aside(RUN / "checkpoints", 5, "damaged")
            except KeyboardInterrupt:
                pass
            else:
                break
        for folder in ("5", "damaged-5"):
            there = set(buckets.sizes(RUN / "checkpoints" / folder))
            assert there == names or "commit_success.txt" not in there
    assert requests == 2 * len(names)
    assert set(buckets.sizes(RUN / "checkpoints" / "damaged-5")) == names
    assert step_folders.steps(RUN / "checkpoints") == []


def test_fresh_keeps_the_run_under_another_name(store):
    put(store, "metrics.jsonl", "checkpoints/5/commit_success.txt", "log.txt")
    said = []
    set_aside(RUN, said.append)
    assert said == [f"--fresh: the run in {RUN} is kept as {RUN}.1"]
    kept = buckets.sizes(epath.Path(f"{RUN}.1"))
    assert set(kept) == {"metrics.jsonl", "checkpoints/5/commit_success.txt", "log.txt"}
    assert list(buckets.sizes(RUN)) == ["lock-1"]


# --- the lock


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bucket_lock, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(bucket_lock, "LEASE_SECONDS", 1.0)


def abandoned(lock):
    """As a holder that was killed on another machine, or suspended."""
    lock._stop.set()
    lock._thread.join()


def test_one_writer_at_a_time(store, quick, monkeypatch):
    first = BucketLock(RUN, pytest.fail)
    with pytest.raises(InputError, match=r"another run is writing to this directory .process"):
        BucketLock(RUN, lambda line: None)
    first.require_held()
    first.close()
    # Given free, and taken at once.
    second = BucketLock(RUN, pytest.fail)
    abandoned(second)
    monkeypatch.setattr(bucket_lock, "_is_dead_here", lambda content: False)
    said = []
    third = BucketLock(RUN, said.append)
    assert "locked by process" in said[0]
    third.require_held()
    with pytest.raises(InputError, match="another run has taken this directory"):
        second.require_held()
    # What the former holder still writes does not count.
    second._write(is_held=True)
    third.require_held()
    third.close()
    assert "lock-3" in buckets.sizes(RUN)


def test_of_several_that_come_at_once_one_gets_it(store, quick, monkeypatch):
    monkeypatch.setattr(bucket_lock, "_is_dead_here", lambda content: False)
    abandoned(BucketLock(RUN, pytest.fail))
    taken, refused = [], []

    def take():
        try:
            taken.append(BucketLock(RUN, lambda line: None))
        except InputError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1 and len(refused) == 3
    taken[0].close()


def test_the_lock_of_a_process_that_died_here_is_free_at_once(store):
    """With the real times: a test that waited would take a minute."""
    content = {"held": True, "pid": 2**31 - 5, "machine": bucket_lock._machine()}
    put(store, "lock-4", content=bucket_lock.json.dumps(content).encode())
    lock = BucketLock(RUN, pytest.fail)
    assert list(buckets.sizes(RUN)) == ["lock-5"]
    lock.close()


def test_a_store_without_conditions_is_said_to_have_no_locks(store, monkeypatch):
    monkeypatch.setattr(buckets, "create", lambda place, data: buckets.write(place, data) or True)
    said = []
    BucketLock(RUN, said.append).close()
    assert "it has no locks" in said[0]


def test_a_run_whose_directory_was_emptied_ends(store):
    lock = BucketLock(RUN, pytest.fail)
    store.store.clear()
    with pytest.raises(InputError, match="was removed while the run was writing to it"):
        lock.require_held()
    lock.close()


# --- files that grow


def test_files_that_grow_are_uploaded_whole(store):
    put(store, "metrics.jsonl", content=b"1\n")
    said = []
    with Mirror(RUN, said.append) as files:
        files.begin(["metrics.jsonl", "log.txt"])
        with open(files.folder / "metrics.jsonl", "a") as file:
            file.write("2\n")
        (files.folder / "tensorboard").mkdir()
        (files.folder / "tensorboard" / "events").write_bytes(b"e")
        files.upload()
        assert store.cat_file(f"{RUN}/metrics.jsonl") == b"1\n2\n"
        assert files.shown(f"curves: {files.folder}/curves.png") == f"curves: {RUN}/curves.png"
        (files.folder / "log.txt").write_text("the end")
        folder = files.folder
    assert set(buckets.sizes(RUN)) == {"metrics.jsonl", "tensorboard/events", "log.txt"}
    assert not folder.exists() and not said


def test_what_cannot_be_uploaded_is_kept(store, monkeypatch):
    def refuse(place, data):
        raise HttpError(503)

    with (
        pytest.raises(StorageError, match=r"does not answer.* are kept in "),
        Mirror(RUN, pytest.fail) as files,
    ):
        files.begin([])
        (files.folder / "log.txt").write_text("the end")
        monkeypatch.setattr(buckets, "write", refuse)
    assert (files.folder / "log.txt").read_text() == "the end"


def test_on_this_machine_a_mirror_is_the_directory_itself(tmp_path):
    with Mirror(tmp_path, pytest.fail) as files:
        files.begin(["metrics.jsonl"])
        files.upload()
        assert files.folder == tmp_path
    assert tmp_path.is_dir()


def test_a_line_is_added(store):
    append_line(RUN / "starts.jsonl", "a\n")
    append_line(RUN / "starts.jsonl", "b\n")
    assert store.cat_file(f"{RUN}/starts.jsonl") == b"a\nb\n"


def test_s3_is_found_by_the_variables_of_its_tools(monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    spec = s3_kvstore("s3://bucket/a/b")
    assert spec["bucket"] == "bucket" and spec["path"] == "a/b"
    assert spec["endpoint"] == "http://store:9000" and spec["aws_region"] == "eu-west-1"
