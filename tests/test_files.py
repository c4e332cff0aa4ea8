"""unext/files.py: a file gets its name once it is complete; a folder belongs to one run at a time."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, contents, failure, predict_arguments, train_arguments

import test
import train
from unext import files

LOCK_AND_FORK = """
import os, time
from unext import files
with files.locked("."):
    if os.fork():
        print("locked", flush=True)
    time.sleep(60)
"""


def test_a_file_is_replaced_only_when_complete(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as file:
        file.write(b"half")
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old"
    with files.replacing(path) as file:
        file.write(b"new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    assert files.output_folder(tmp_path / "new" / "folder").is_dir()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc"):
        with pytest.raises(OSError, match=f"{path}: nothing can be written there"):
            files.output_folder(path)


def test_a_second_run_is_refused_and_changes_nothing(toy, micro_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    (tmp_path / "notes.txt").write_text("of the first run")
    before = contents(tmp_path)
    for main, args in (
        (train.main, train_arguments("--epoch 1", toy, tmp_path)),
        (test.main, predict_arguments(micro_checkpoint, toy / "test/Image", tmp_path)),
    ):
        with files.locked(tmp_path):
            status, line = failure(main, args, capsys)
        assert status == 2 and f"{tmp_path}: another process writes there; wait, or name another folder" in line
        assert contents(tmp_path) == before


@pytest.mark.posix
def test_the_lock_ends_with_a_killed_process_and_its_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    command, environment = [sys.executable, "-c", LOCK_AND_FORK], {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match="another process writes there"), files.locked(tmp_path):
            pass
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    monkeypatch.undo()
    with files.locked(tmp_path):
        pass
