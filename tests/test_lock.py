"""A folder belongs to one run at a time: a second one is refused and changes nothing."""

import signal
import subprocess
import sys

import pytest
from conftest import ROOT, failure, predict_arguments, train_arguments

import test
import train
from SAM2UNeXT import SAM2UNeXT
from unext import files

HOLD = """
import os, time
from unext import files
with files.locked("."):
    worker = os.fork()  # as a data loader does
    if worker:
        print("held", flush=True)
    time.sleep(60 if worker else 0.3)
"""


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def commands(toy, micro_checkpoint, folder):
    yield train.main, train_arguments("--epoch 1", toy, folder)
    yield train.main, train_arguments("--epoch 2 --resume", toy, folder)
    yield test.main, predict_arguments(micro_checkpoint, toy / "test/Image", folder)


def test_a_second_run_in_the_folder_is_refused_and_changes_nothing(toy, micro_checkpoint, tmp_path, capsys):
    train.main(train_arguments("--epoch 1", toy, tmp_path))
    before = contents(tmp_path)
    capsys.readouterr()
    for main, args in commands(toy, micro_checkpoint, tmp_path):
        with files.locked(tmp_path):
            status, line = failure(main, args, capsys)
        assert status == 2 and f"{tmp_path}: another process writes there; wait, or name another folder" in line
        assert contents(tmp_path) == before
    test.main(predict_arguments(micro_checkpoint, toy / "test/Image", tmp_path))


def test_predicting_into_a_locked_folder_is_refused_before_the_network_is_loaded(
    toy, micro_checkpoint, tmp_path, monkeypatch, capsys
):
    """Of several processes only the first asks for the lock; the others must not get ahead of its answer."""
    monkeypatch.setattr(SAM2UNeXT, "from_checkpoint", lambda *words, **options: pytest.fail("was loaded"))
    with files.locked(tmp_path):
        status, line = failure(test.main, predict_arguments(micro_checkpoint, toy / "test/Image", tmp_path), capsys)
    assert status == 2 and "another process writes there" in line


def test_the_lock_ends_with_a_killed_process_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", HOLD]
    with subprocess.Popen(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match="another process writes there"), files.locked(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with files.locked(tmp_path):
            assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with files.locked(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
