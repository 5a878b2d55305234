"""Where a command runs: without a terminal, without a home, in the C locale, with `~` in paths."""

import json
import subprocess
import sys

import pytest
from processes import ROOT, environment, train_command

pytestmark = pytest.mark.slow


def run(place, workdir, *flags, shell_end="", env=None, script="train.py"):
    """A command from a shell, which redirects it."""
    own = ["--config.train.steps=4"] if script == "train.py" else []
    command = train_command(place, workdir, *own, *flags, script=script)
    shell = ["sh", "-c", f'exec "$0" "$@" {shell_end}', *map(str, command)]
    environ = environment(1, place / "xla") | (env or {})
    environ = {name: value for name, value in environ.items() if value is not None}
    return subprocess.run(shell, cwd=ROOT, env=environ, capture_output=True, timeout=600)


def is_finished(place, workdir):
    lines = (place / workdir / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["step"] == 4


@pytest.mark.parametrize("shell_end", ["<&- >&-", "<&- >&- 2>&-", ">/dev/full", "</dev/null"])
def test_a_daemon_has_no_streams(place, shell_end):
    name = f"daemon-{len(shell_end)}"
    done = run(place, name, shell_end=shell_end)
    assert done.returncode == 0, done.stderr
    assert is_finished(place, name)
    assert b"Traceback" not in done.stderr


def test_a_run_outlives_the_reader_of_its_log(place):
    done = run(place, "head", shell_end="| head -1")
    assert done.stdout.count(b"\n") == 1
    assert done.stderr.count(b"\n") == 1 and b"the run goes on" in done.stderr
    assert is_finished(place, "head")


def test_the_c_locale_and_a_prompt_of_any_letters(place):
    prompt = "--config.train.sample_prompt=é中"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0"}
    done = run(place, "locale-é", prompt, env=plain)
    assert done.returncode == 0, done.stderr
    assert "prompt 'é中'" in done.stdout.decode() and is_finished(place, "locale-é")


NOBODY = """
import pwd, sys
def no_entry(user):
    raise KeyError(f"getpwuid(): uid not found: {user}")
pwd.getpwuid = no_entry
from gatedjax.train import run
sys.argv[0] = "train.py"
run()
"""


@pytest.mark.parametrize("has_cache", [True, False])
def test_a_user_without_entry_and_home_runs_or_is_told(place, tmp_path, has_cache):
    environ = environment(1, place / "xla")
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        environ.pop(name, None)
    flags = [
        "--config=tests/distributed/small_config.py",
        f"--config.data.sources.main.path={place / 'text'}",
        f"--workdir={tmp_path / 'run'}",
        "--config.train.steps=4",
        *([f"--config.data.cache_dir={tmp_path / 'tokens'}"] if has_cache else []),
    ]
    command = [sys.executable, "-c", NOBODY, *flags]
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600
    )
    warning, *others = done.stderr.splitlines()
    assert warning.startswith("warning: no compiled programs are kept: --compile_cache"), done
    if has_cache:
        assert done.returncode == 0 and "curves: " in done.stdout, done.stderr
    else:
        assert done.returncode == 2 and len(others) == 1, done.stderr
        assert others[0].startswith("error: config.data.cache_dir")


def test_a_tilde_that_the_shell_left(place, tmp_path):
    env = {"HOME": str(tmp_path)}
    flags = ["--workdir=~/run", "--compile_cache=~/xla", "--config.data.cache_dir=~/tokens"]
    done = run(place, "unused", *flags, env=env)
    assert done.returncode == 0, done.stderr
    assert {"run", "xla", "tokens"} <= {path.name for path in tmp_path.iterdir()}
    done = run(
        place,
        "unused",
        "--checkpoint=~/run",
        "--batches=1",
        "--prompt_tokens=4",
        "--decode_tokens=2",
        script="eval.py",
        env=env,
    )
    assert done.returncode == 0 and b"bits per byte" in done.stdout, done.stderr
    assert not (ROOT / "~").exists()


def test_ctrl_c_of_a_command_without_checkpoints_promises_none(place):
    code = (
        "import os, signal; from gatedjax import eval as e; "
        "e.restore_params = lambda _: os.kill(os.getpid(), signal.SIGINT); "
        "import sys; sys.argv = ['eval.py', '--checkpoint=x']; e.run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(1, place / "xla"),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")
