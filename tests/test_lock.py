"""A folder belongs to one run at a time: a second one is refused and changes nothing."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, contents, failure, predict_arguments, train_arguments

import test
import train
from SAM2UNeXT import SAM2UNeXT
from unext import files

HOLD = """
import os, time
from unext import files
with files.locked("."):
    if os.fork():
        print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.1)


def test_a_second_run_is_refused_before_the_network_is_loaded_and_changes_nothing(
    toy, micro_checkpoint, tmp_path, monkeypatch, capsys
):
    train.main(train_arguments("--epoch 1", toy, tmp_path))
    before = contents(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(SAM2UNeXT, "__init__", lambda *words, **options: pytest.fail("was loaded"))
    for main, args in (
        (train.main, train_arguments("--epoch 1", toy, tmp_path)),
        (train.main, train_arguments("--epoch 2 --resume", toy, tmp_path)),
        (test.main, predict_arguments(micro_checkpoint, toy / "test/Image", tmp_path)),
    ):
        with files.locked(tmp_path):
            status, line = failure(main, args, capsys)
        assert status == 2 and f"{tmp_path}: another process writes there; wait, or name another folder" in line
        assert contents(tmp_path) == before


@pytest.mark.posix
def test_the_lock_ends_with_a_killed_process_and_its_workers(tmp_path, monkeypatch):
    command = [sys.executable, "-c", HOLD]
    with subprocess.Popen(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match="another process writes there"), files.locked(tmp_path):
            pass
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    monkeypatch.setattr(files, "PATIENCE", 6)
    with files.locked(tmp_path):
        pass


def test_a_folder_that_was_made_for_nothing_is_removed_again(tmp_path):
    with files.locked(tmp_path / "new/folder"):
        assert (tmp_path / "new/folder").is_dir()
    assert not list(tmp_path.iterdir())
    with files.locked(tmp_path / "new/folder"):
        (tmp_path / "new/folder/map.png").touch()
    assert (tmp_path / "new/folder/map.png").exists()
