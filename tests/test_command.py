# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import subprocess
import sys

import pytest

from pathmoe.command import UserError
from pathmoe.files import check_writable, write_aside, write_text


@pytest.mark.parametrize(
    ("main", "status", "said"),
    [
        ("lambda: 3", 3, ""),
        ("lambda: None", 0, ""),
        ("lambda: {'a': 1}", 0, ""),
        ("lambda: (_ for _ in ()).throw(UserError('two\\n lines'))", 2, "error: two lines\n"),
        (
            "lambda: (_ for _ in ()).throw(OSError(28, 'No space left on device', 'a'))",
            2,
            "error: a cannot be read or written: No space left on device. Check the disk, or choose another place.\n",
        ),
        ("lambda: (_ for _ in ()).throw(KeyboardInterrupt)", 130, "interrupted\n"),
        ("lambda: ArgumentParser().parse_args(['--no'])", 2, "error: unrecognized arguments: --no\n"),
        ("lambda: ArgumentParser().parse_args(['--a', ''])", 2, "error: --a must not be empty: give a value.\n"),
        (
            "lambda: ArgumentParser().parse_args(['--a', 'b', ''])",
            2,
            "error: the value after --a b must not be empty: give a value.\n",
        ),
        ("lambda: ArgumentParser().error('two\\n lines')", 2, "error: two lines\n"),
    ],
)
def test_a_command_ends_with_its_status_and_one_line(main, status, said):
    code = f"from pathmoe.command import ArgumentParser, UserError, run_command; run_command({main})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, "", said)


FORKED = """
import multiprocessing, signal
from pathmoe.command import run_command
from pathmoe.train.engine import StopOnSignal

def dispositions(_):
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

def in_a_pool():
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.map(dispositions, [0])[0]

def main():
    assert in_a_pool() == [signal.SIG_DFL, signal.default_int_handler]
    with StopOnSignal():
        assert in_a_pool() == [signal.SIG_DFL, signal.SIG_IGN]
        assert callable(signal.getsignal(signal.SIGTERM))
    assert in_a_pool() == [signal.SIG_DFL, signal.default_int_handler]

run_command(main)
"""


def test_forked_processes_have_no_handler_in_python_that_may_miss_their_only_sigterm():
    ended = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_stops_reading_ends_the_command_in_silence(lines):
    code = f"from pathmoe.command import run_command; run_command(lambda: print('line\\n' * {lines}))"
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    command.stdout.close()
    assert (command.stderr.read(), command.wait()) == (b"", 141)


@pytest.mark.parametrize("name", ["new/deep/out.json", "out.json", "é" * 120])
def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path, name):
    (tmp_path / "out.json").write_text("old")
    check_writable(tmp_path / name, "--output")
    assert [path.name for path in tmp_path.rglob("*")] == ["out.json"]
    assert (tmp_path / "out.json").read_text() == "old"
    write_text(tmp_path / name, "new")
    assert (tmp_path / name).read_text() == "new"


@pytest.mark.parametrize("name", ["", "file/out.json", "new/" + "a" * 300, "a" * 300, "/proc/out.json"])
def test_a_place_that_cannot_be_written_is_named_and_left_as_it_was(tmp_path, name):
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match=f"^--output {tmp_path / name}"):
        check_writable(tmp_path / name, "--output")
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def test_a_failed_write_names_the_file_and_leaves_no_folder(tmp_path):
    with pytest.raises(OSError, match="out.json") as failed, write_aside(tmp_path / "new" / "out.json") as partial:
        raise OSError(28, "No space left on device", str(partial))
    assert failed.value.filename == str(tmp_path / "new" / "out.json")
    assert not list(tmp_path.iterdir())
