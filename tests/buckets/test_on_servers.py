"""Buckets on servers of this machine: moto's S3 and gcp-storage-emulator (gcs_server.py).

`make test-buckets` makes the environment: the extra `buckets`, and the servers in an environment of
their own (BUCKET_SERVERS, by default `servers` in that of the tests).
"""

import gzip
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from etils import epath

from gatedjax import buckets
from gatedjax.errors import InputError
from gatedjax.training import bucket_lock, step_folders
from gatedjax.training.bucket_lock import BucketLock
from gatedjax.training.checkpoint import read_config

ROOT = Path(__file__).parents[2]
SERVERS = Path(os.environ.get("BUCKET_SERVERS", f"{sys.prefix}/servers"), "bin", "python")
HAS_CLIENTS = all(
    subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode == 0
    for name in ("gcsfs", "s3fs")
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not SERVERS.exists() or not HAS_CLIENTS, reason="make test-buckets brings the servers"
    ),
]

BUCKET = "gatedjax-test"
STORES = ("gs", "s3")
SMALL = [
    "--config=tiny",
    "--config.model.num_layers=2",
    "--config.model.width=32",
    "--config.model.ffns.mlp.hidden=32",
    "--config.data.seq_len=32",
    "--config.data.sources.main.kind=text",
    "--config.optim.warmup_steps=2",
    "--config.train.steps=20",
    "--config.train.log_every=1",
    "--config.train.eval_every=10",
    "--config.train.eval_batches=2",
    "--config.train.checkpoint_every=5",
    "--config.train.sample_tokens=4",
]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module", autouse=True)
def servers(tmp_path_factory):
    """Both servers, each with a bucket; the environment tells every library of them."""
    log = open(tmp_path_factory.mktemp("servers") / "log.txt", "wb")  # noqa: SIM115 (for the servers)
    gcs, s3 = free_port(), free_port()
    commands = [
        [SERVERS, Path(__file__).with_name("gcs_server.py"), str(gcs), BUCKET],
        [SERVERS, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(s3)],
    ]
    started = [subprocess.Popen(command, stdout=log, stderr=log) for command in commands]
    environment = {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{gcs}",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patches:
        for name, value in environment.items():
            patches.setenv(name, value)
        for port in (gcs, s3):
            wait_for(port)
        buckets.file_system("s3://x").mkdir(BUCKET)
        yield
    for server in started:
        server.terminate()
        server.wait()
    log.close()


def wait_for(port: int) -> None:
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"no server at {port}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with text, and with caches that all runs share."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "text").mkdir()
    for page in sorted((ROOT / "docs").glob("*.md"))[:6]:
        shutil.copy(page, folder / "text")
    return folder


def start(place: Path, command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(place / "cache"), "TMPDIR": str(place)},
    )


def run(place: Path, command: list[str], code: int = 0) -> str:
    process = start(place, command)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == code, output
    return output


def training(place: Path, workdir: str, *flags: str) -> list[str]:
    text = f"--config.data.sources.main.path={place}/text"
    return ["train.py", *SMALL, text, f"--workdir={workdir}", *flags]


def evaluation(checkpoint: str) -> list[str]:
    speed = ["--prompt_tokens=4", "--decode_tokens=2"]
    return ["eval.py", f"--checkpoint={checkpoint}", "--batches=2", "--json", *speed]


def losses(text: str | bytes) -> dict:
    """(step, split) -> loss, to the last digit, of the newest record of each."""
    records = [json.loads(line) for line in text.splitlines()]
    return {(record["step"], record["split"]): record["loss"] for record in records}


@pytest.fixture(scope="module")
def local(place):
    """A run on this machine's disk, to compare with."""
    run(place, training(place, f"{place}/local"))
    return place / "local"


@pytest.fixture(scope="module", params=STORES)
def killed(request, place, local):
    """A run in a bucket that was killed during a save, then started again until its end."""
    url = f"{request.param}://{BUCKET}/runs/one"
    process = start(place, training(place, url))
    files = buckets.file_system(url)
    caught = None
    while caught is None:
        assert process.poll() is None, process.communicate()[0]
        for step in (5, 10, 15):
            there = buckets.sizes(epath.Path(url) / "checkpoints" / str(step))
            if there and step_folders.COMMITTED not in there:
                process.send_signal(signal.SIGKILL)
                caught = step
                break
        time.sleep(0.005)
    process.communicate()
    assert not files.exists(f"{url}/checkpoints/{caught}/{step_folders.COMMITTED}")
    before = step_folders.steps(epath.Path(url) / "checkpoints")
    assert before == list(range(5, caught, 5))
    output = run(place, training(place, url))
    assert ("resuming after step" in output) == bool(before)
    return url


def test_a_killed_run_goes_on_to_the_digit(killed, local):
    whole = losses((local / "metrics.jsonl").read_text())
    assert losses(buckets.read(epath.Path(killed) / "metrics.jsonl", 1 << 20)) == whole
    assert len(whole) == 22
    names = set(buckets.sizes(epath.Path(killed)))
    for name in ("config.json", "starts.jsonl", "log.txt"):
        assert name in names
    assert any(name.startswith("tensorboard/events") for name in names)
    starts = buckets.read(epath.Path(killed) / "starts.jsonl", 1 << 20).splitlines()
    assert len(starts) == 2
    assert step_folders.steps(epath.Path(killed) / "checkpoints") == [10, 15, 20]
    assert read_config(killed)["train"]["steps"] == 20


def test_evaluation_and_sampling_are_those_of_the_local_run(killed, local, place):
    there, here = (
        json.loads(run(place, evaluation(checkpoint)).splitlines()[-1])
        for checkpoint in (killed, str(local))
    )
    assert there["evaluations"] == here["evaluations"] and there["step"] == 20
    samples = [
        run(place, ["-m", "gatedjax.generate", f"--checkpoint={checkpoint}", "--tokens=6"])
        for checkpoint in (killed, str(local))
    ]
    # tensorstore says which credentials it takes, in a line of its own.
    there, here = (text.splitlines()[-1] for text in samples)
    assert there == here


def test_a_finished_run_and_fresh(killed, place):
    refused = run(place, training(place, killed, "--config.optim.lr=0.1"), code=2)
    assert "this run is finished, after step 20, with another configuration" in refused
    few = ["--config.train.steps=3", "--fresh"]
    output = run(place, training(place, killed, *few))
    assert f"the run in {killed} is kept as {killed}.1" in output
    assert step_folders.steps(epath.Path(f"{killed}.1") / "checkpoints") == [10, 15, 20]
    assert step_folders.steps(epath.Path(killed) / "checkpoints") == [3]
    # And from its weights.
    weights = f"--config.train.init_from={killed}.1/checkpoints/20"
    output = run(place, training(place, f"{place}/tuned-{killed[:2]}", *few, weights))
    assert "parameters of step 20 of" in output


@pytest.mark.parametrize("scheme", STORES)
def test_data_and_caches_in_a_bucket(scheme, place, local):
    top = epath.Path(f"{scheme}://{BUCKET}/data")
    lines = []
    for page in sorted((place / "text").iterdir()):
        buckets.upload(page, top / "text" / page.name)
        lines.append(json.dumps({"text": page.read_text()}))
    buckets.write(top / "lines" / "a.jsonl.gz", gzip.compress("\n".join(lines[:3]).encode()))
    buckets.write(top / "lines" / "b.jsonl", "\n".join(lines[3:]).encode())
    caches = [f"--config.data.cache_dir={top}/tokens", f"--compile_cache={top}/xla"]
    path = f"--config.data.sources.main.path={top}/text"
    run(place, training(place, f"{place}/{scheme}-text", path, *caches))
    whole = losses((local / "metrics.jsonl").read_text())
    assert losses((place / f"{scheme}-text" / "metrics.jsonl").read_text()) == whole
    assert any(name.endswith("/meta.json") for name in buckets.sizes(top / "tokens"))
    assert buckets.sizes(top / "xla")
    # Another machine: no cache of its own, and the text is not read again.
    shutil.rmtree(place / "cache")
    buckets.write(top / "lines" / "note.txt", b"of another kind")
    pattern = f"--config.data.sources.main.path={top}/lines/*.jsonl*"
    kind = "--config.data.sources.main.kind=jsonl"
    few = "--config.train.steps=3"
    output = run(place, training(place, f"{place}/{scheme}-lines", pattern, kind, few, *caches))
    assert "6 documents" in output
    missing = f"--config.data.sources.main.path={top}/nothing/*.jsonl"
    refused = run(place, training(place, f"{place}/none", missing, kind), code=2)
    assert refused.splitlines()[-1].endswith("matches no file")


@pytest.mark.parametrize("scheme", STORES)
def test_the_lock(scheme, monkeypatch):
    monkeypatch.setattr(bucket_lock, "BEAT_SECONDS", 0.3)
    monkeypatch.setattr(bucket_lock, "LEASE_SECONDS", 2.0)
    run_dir = epath.Path(f"{scheme}://{BUCKET}/runs/lock")
    first = BucketLock(run_dir, pytest.fail)
    with pytest.raises(InputError, match="another run is writing to this directory"):
        BucketLock(run_dir, lambda line: None)
    first._stop.set()
    monkeypatch.setattr(bucket_lock, "_is_dead_here", lambda content: False)
    second = BucketLock(run_dir, lambda line: None)
    with pytest.raises(InputError, match="another run has taken this directory"):
        first.require_held()
    second.close()
    BucketLock(run_dir, pytest.fail).close()


@pytest.mark.parametrize(
    "workdir, said",
    [
        ("gs://not-there-at-all/run", "is there a bucket gs://not-there-at-all?"),
        ("s3://not-there-at-all/run", "is there a bucket s3://not-there-at-all?"),
    ],
)
def test_a_bucket_that_is_not_there(place, workdir, said):
    output = run(place, training(place, workdir), code=2)
    assert output.splitlines()[-1] == f"error: --workdir: cannot use {workdir}: not found, {said}"


def test_without_credentials(place, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    output = run(place, training(place, f"s3://{BUCKET}/run"), code=2)
    assert "--workdir: cannot use" in output and "no valid credentials (AWS_PROFILE" in output


def test_without_permission(place, monkeypatch):
    """A user of AWS without any policy: moto judges requests from now on."""
    client = importlib.import_module("botocore.session").get_session().create_client
    iam = client("iam", region_name="us-east-1")
    iam.create_user(UserName="nobody")
    key = iam.create_access_key(UserName="nobody")["AccessKey"]
    judge_after(0)
    try:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        output = run(place, training(place, f"s3://{BUCKET}/run"), code=2)
        assert "--workdir: cannot use" in output and "permission denied" in output
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unknown")
        output = run(place, training(place, f"s3://{BUCKET}/run"), code=2)
        assert "no valid credentials" in output
    finally:
        judge_after(1 << 30)


def judge_after(requests: int) -> None:
    """moto lets so many requests pass whoever makes them."""
    request = urllib.request.Request(
        f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth",
        str(requests).encode(),
        headers={"Content-Type": "text/plain"},
    )
    urllib.request.urlopen(request).close()
