"""Full disks, removed folders, killed workers: nothing is half-written, one line says why, and a rerun completes."""

import contextlib
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import failure, predict_arguments, read_maps
from conftest import train_arguments as arguments

import dataset
import test as script
import train
from unext import checkpoint, errors, log, run
from unext.masks import read_mask

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.posix


@contextlib.contextmanager
def full_disk(left: int):
    """No file can grow beyond `left` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("tensors", [1, 3000])  # the data is too much, or the directory at the file's end
def test_a_checkpoint_that_does_not_fit_leaves_the_old_one(tensors, tmp_path):
    last = tmp_path / run.LAST
    checkpoint.save(last, {"a": torch.tensor(2)})
    content = {f"a{i}": torch.zeros(100_000 // tensors) for i in range(tensors)}
    with full_disk(100_000), pytest.raises(OSError, match=r"last\.pth: cannot be written: .*File too large"):
        checkpoint.save(last, content)
    assert torch.load(last)["a"].item() == 2 and list(tmp_path.iterdir()) == [last]


def test_a_worker_that_dies_while_a_checkpoint_is_written_is_told(tmp_path, monkeypatch):
    def save(content, file):
        try:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
        except RuntimeError:
            raise RuntimeError("[enforce fail at inline_container.cc:672]. unexpected pos")  # noqa: B904 (as torch's)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        checkpoint.save(tmp_path / run.LAST, {})


def test_a_log_that_does_not_fit_is_named(micro_model, tmp_path, capsys):
    training = SimpleNamespace(folder=tmp_path, model=micro_model, progress=run.Progress(1, 1, 1))
    opened = log.Log(SimpleNamespace(batch_size=1, accumulate=1), training, pairs=3, steps_per_epoch=3)
    opened.open()
    with full_disk(1), pytest.raises(OSError, match=r"log\.jsonl: cannot be written: File too large"):
        opened.write({"epoch": 1}, {"loss": 1.0}, "epoch")
    with full_disk(1000), pytest.raises(OSError, match=r"tensorboard: cannot be written: File too large"):
        for _ in range(100):
            opened.epoch({}, [])
            with contextlib.suppress(OSError):  # its thread fails sooner or later; the log must name the error
                opened.board.flush()
    assert "Traceback" not in capsys.readouterr().err


def test_maps_on_a_full_disk_are_complete_or_absent(micro_checkpoint, toy, tmp_path, capsys):
    args = predict_arguments(micro_checkpoint, toy / "test/Image", tmp_path / "maps", "--save", "map,cutout")
    with full_disk(90_000):  # a map fits, a cut-out does not
        status, line = failure(script.main, args, capsys)
    assert status == 1 and "cutout/toy_" in line and "cannot be written: File too large" in line
    before = read_maps(tmp_path / "maps")
    assert before and [path.name for path in (tmp_path / "maps/cutout").iterdir()] == ["settings.json"]
    script.main(args)
    after = read_maps(tmp_path / "maps")
    assert len(after) == len(read_maps(tmp_path / "maps/cutout")) == 4
    assert all(np.array_equal(after[name], pixels) for name, pixels in before.items())


@pytest.mark.parametrize("gone", ["save_path", "train/Image"])
def test_a_folder_removed_during_training_is_named(gone, toy, from_files, tmp_path, monkeypatch, capsys):
    shutil.copytree(toy / "train", tmp_path / "train")
    args = arguments("--epoch 2 --batch_size 2 --save_every 1", tmp_path, tmp_path / "save_path", from_files)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: shutil.rmtree(tmp_path / gone, ignore_errors=True))
    status, line = failure(train.main, args, capsys)
    assert status == 1 and f"{tmp_path / gone}/" in line and "No such file or directory" in line


def test_a_killed_worker_ends_training_with_one_line_and_no_hang(toy, from_files, tmp_path, monkeypatch, capsys):
    parent = os.getpid()

    def read_or_die(path):
        if os.getpid() != parent and path.stem == "toy_0003":
            os.kill(os.getpid(), signal.SIGKILL)
        return read_mask(path)

    monkeypatch.setattr(dataset, "read_mask", read_or_die)
    status, line = failure(train.main, arguments("--workers 2", toy, tmp_path, from_files), capsys)
    assert status == 1 and line.endswith(f": {errors.WORKER_LOST}")
