"""Standard streams that are closed, lose their reader, or cannot write a letter; and homeless
users.
"""

import errno
import io
import os
import subprocess
import sys

import pytest

from gatedjax.errors import InputError
from gatedjax.paths import expand
from gatedjax.runtime import streams

HEADER = f"""
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("streams", {streams.__file__!r})
streams = importlib.util.module_from_spec(spec)
spec.loader.exec_module(streams)
"""


def run(code, *args, shell_end="", **env):
    """Python with `streams` imported alone, which takes a moment; `shell_end` redirects it."""
    command = ["sh", "-c", f'exec "$0" "$@" {shell_end}', sys.executable, "-c", HEADER + code]
    environment = os.environ | env
    return subprocess.run([*command, *args], capture_output=True, env=environment, timeout=60)


@pytest.mark.parametrize("shell_end", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_lead_nowhere(tmp_path, shell_end):
    code = """
streams.open_absent()
streams.write_any_text()
with open(sys.argv[1], "w") as file:
    print("to the terminal")
    print("an error", file=sys.stderr)
    os.write(1, b"of a library"); os.write(2, b"of a library")
    assert sys.stdin.read() == ""
    assert file.fileno() > 2
    file.write("of the file")
"""
    path = tmp_path / "file"
    done = run(code, str(path), shell_end=shell_end)
    assert done.returncode == 0, done.stderr
    assert path.read_text() == "of the file"


def test_a_lasting_stream_outlives_its_reader():
    code = """
with streams.lasting_stdout("it goes on"):
    for i in range(3000):
        print("a line", i, flush=True)
sys.exit(5)
"""
    done = run(code, shell_end="| head -1; exit 0")
    assert done.stdout == b"a line 0\n"
    assert done.stderr == b"warning: standard output: Broken pipe; it goes on\n"


class FullDisk(io.StringIO):
    """The second write fails, and none after it."""

    writes = 0

    def write(self, text):
        self.writes += 1
        if self.writes == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_a_lasting_stream_goes_on_when_the_disk_has_room_again(capsys):
    disk = FullDisk()
    stream = streams.LastingStream(disk, "it goes on")
    for i in range(4):
        assert stream.write(f"{i}\n") == 2
    assert disk.getvalue() == "0\n2\n3\n"
    assert capsys.readouterr().err == (
        "warning: standard output: No space left on device; it goes on\n"
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_letter_can_be_printed(encoding):
    done = run(
        'streams.write_any_text(); print("\\u00e9\\u4e2d\\udc80")', PYTHONIOENCODING=encoding
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding).startswith(("\\xe9", "é"))


def test_the_c_locale_without_utf8_mode_starts_again_with_it():
    code = """
streams.start_again_in_utf8()
print(sys.argv[1:] == ["\\u00e9\\u4e2d", "x y"], sys.flags.utf8_mode, "\\u4e2d")
"""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run(code, "é中", "x y", **plain)
    assert (done.returncode, done.stdout.decode()) == (0, "True 1 中\n"), done.stderr


def test_it_starts_again_once(monkeypatch):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert streams.utf8_command({})[:3] == [sys.executable, "-X", "utf8=1"]
    assert streams.utf8_command({"PYTHONUTF8": "1"}) is None
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "utf-8")
    assert streams.utf8_command({}) is None


def test_a_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(expand("~/run", "--workdir")) == "/home/someone/run"
    assert str(expand("a/~/b", "--workdir")) == "a/~/b"


def test_nobody_has_no_home_directory(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError()))
    with pytest.raises(InputError, match=r"--workdir: got '~/run', expected a path without '~'"):
        expand("~/run", "--workdir")
    assert str(expand("/run", "--workdir")) == "/run"
