"""Full disks, removed folders, killed workers: nothing is half-written, one line says why, and a rerun completes."""

import contextlib
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from conftest import NETWORK, ROOT, failure, predict_arguments, program, read_maps
from conftest import train_arguments as arguments

import dataset
import test as script
import train
from unext import checkpoint, cutout, errors, files, log, run
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


def test_a_file_that_does_not_fit_leaves_only_the_old_one(tmp_path):
    path = tmp_path / "new\nline"
    with files.replacing(path) as file:
        file.write(b"old")
    problem = pytest.raises(OSError, match="new\nline: cannot be written: File too large")
    with full_disk(1000), problem, files.replacing(path) as file:
        file.write(bytes(2000))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("tensors", [1, 3000])  # the data is too much, or the directory at the file's end
def test_a_checkpoint_that_does_not_fit_leaves_the_old_one(tensors, tmp_path):
    last = tmp_path / run.LAST
    checkpoint.save(last, {"a": torch.tensor(2)})
    content = {f"a{i}": torch.zeros(100_000 // tensors) for i in range(tensors)}
    with full_disk(100_000), pytest.raises(OSError, match=r"last\.pth: cannot be written: .*File too large"):
        checkpoint.save(last, content)
    assert torch.load(last)["a"].item() == 2 and list(tmp_path.iterdir()) == [last]


def test_training_on_a_full_disk_ends_with_one_line_and_can_be_resumed(toy, from_files, tmp_path, capsys):
    args = arguments("--epoch 2 --batch_size 3 --save_every 1 --resume", toy, tmp_path, from_files)
    saved = []
    save = checkpoint.save

    def fill_up(*words):
        saved.append(1)
        with full_disk(200_000) if len(saved) == 2 else contextlib.nullcontext():
            save(*words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", fill_up)
        status, line = failure(train.main, args, capsys)
    assert status == 1 and "last.pth: cannot be written: " in line and "File too large" in line
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    train.main(args)
    assert "continuing after epoch 1, step 1" in capsys.readouterr().out
    assert checkpoint.read(tmp_path / "SAM2-UNeXT-2.pth")


def test_a_log_that_does_not_fit_is_named(tmp_path, capsys):
    told = log.Log(tmp_path, run.Progress(), {}, every=1, steps_per_epoch=3, epochs=1)
    told.open()
    with full_disk(1), pytest.raises(OSError, match=r"log\.jsonl: cannot be written: File too large"):
        told.write({"epoch": 1}, {"loss": 1.0}, "epoch", 1)
    with full_disk(1000), pytest.raises(OSError, match=r"tensorboard: cannot be written: File too large"):
        for step in range(100):
            told.epoch(run.Progress(1, step), {}, [("panel", torch.zeros(3, 8, 8))])
            with contextlib.suppress(OSError):  # its thread fails sooner or later; the log must name the error
                told.board.flush()
    assert "Traceback" not in capsys.readouterr().err


def test_maps_on_a_full_disk_are_complete_or_absent(micro_checkpoint, toy, tmp_path, capsys):
    args = predict_arguments(micro_checkpoint, toy / "test/Image", tmp_path / "maps", "--save", "map,cutout")
    cutout.load_estimator()  # what it compiles is written too
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
    for part in ("Image", "Mask"):
        shutil.copytree(toy / "train" / part, tmp_path / "train" / part)
    step = torch.optim.AdamW.step

    def step_and_remove(*words, **options):
        shutil.rmtree(tmp_path / gone, ignore_errors=True)
        return step(*words, **options)

    args = arguments("--epoch 2 --batch_size 2 --save_every 1", tmp_path, tmp_path / "save_path", from_files)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step_and_remove)
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


def can_mount() -> bool:
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=64K", "tmpfs", "/dev/shm"]
    return shutil.which("unshare") is not None and not subprocess.run(command, capture_output=True).returncode


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="may not mount a small /dev/shm")
def test_training_with_a_small_dev_shm_ends_with_one_line(toy, tmp_path):
    words = f"{NETWORK} --train_image_path {toy}/train/Image --train_mask_path {toy}/train/Mask --save_path {tmp_path}"
    command = f"mount -t tmpfs -o size=64K tmpfs /dev/shm && exec {' '.join(program('train.py'))} {words} --workers 1"
    result = subprocess.run(["unshare", "-m", "sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("train.py: /dev/shm is too small for the workers")
