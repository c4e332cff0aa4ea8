"""train.py in several processes takes the steps of a single one with the same total batch."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import recipe
import torch
from conftest import ROOT, contents, failure, predict_arguments, pretend_torchrun, read_log, save_image
from conftest import train_arguments as arguments

import test
import train
from dataset import epoch_batches
from unext import device

pytestmark = pytest.mark.posix


def run_of(processes, folder, toy, network, more, **options):
    words = f"{network} --epoch 1 --lr 0.1 --precision fp32 --workers 0 --log_every 1 {more}".split()
    for name, split in (("train", "train"), ("val", "test")):
        words += [f"--{name}_image_path", f"{toy}/{split}/Image", f"--{name}_mask_path", f"{toy}/{split}/Mask"]
    return {"processes": processes, "words": [*words, "--save_path", str(folder)], **options}


def start(*runs):
    """Each run's list of exit statuses, and what all of them printed."""
    command = [sys.executable, str(ROOT / "tests/processes.py"), *map(json.dumps, runs)]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("[")], result.stdout, result.stderr


@pytest.mark.slow
def test_two_processes_take_the_step_of_one_with_twice_the_batch(toy, from_files, tmp_path):
    runs = {
        "one": run_of(1, tmp_path / "one", toy, from_files, "--batch_size 4"),
        "two": run_of(2, tmp_path / "two", toy, from_files, "--batch_size 2"),
        "accumulating": run_of(2, tmp_path / "accumulating", toy, from_files, "--batch_size 1 --accumulate 2"),
    }
    statuses, output, errors = start(*runs.values())
    assert statuses == [[0], [0, 0], [0, 0]], errors
    assert output.count("4 images per step") == 3  # only the first process prints
    states = {name: torch.load(tmp_path / name / "SAM2-UNeXT-1.pth")["state_dict"] for name in runs}
    model = train.build_model(arguments("--device cpu", toy, tmp_path, from_files))
    moved = max((value - model.state_dict()[key]).abs().max() for key, value in states["one"].items())
    assert moved > 1e-2
    for name in ("two", "accumulating"):
        for key, value in states["one"].items():
            assert (states[name][key] - value).abs().max() <= 1e-9, (name, key)
        assert len(read_log(tmp_path / name)) == 3  # two steps, the second of two images, and the epoch
        for ours, theirs in zip(read_log(tmp_path / name), read_log(tmp_path / "one"), strict=True):
            for figure in theirs.keys() & {"loss", "bce", "wiou", "grad_norm", "lr", "Smeasure", "wFmeasure", "MAE"}:
                assert ours[figure] == pytest.approx(theirs[figure], rel=1e-6), figure


@pytest.mark.slow
def test_all_processes_validate_with_the_statistics_that_are_saved(from_files, tmp_path):
    """One process sees bright images, the other one dark ones; a single one scores the file that they saved."""
    bright = {index for [(_, index)] in epoch_batches(6, 1, 0, [1], rank=0, processes=2)}
    for i in range(6):
        photo = recipe.photo(str(i), 64, 64)
        save_image(tmp_path / f"train/Image/{i}.png", photo // 3 + np.uint8(160 if i in bright else 0))
        save_image(tmp_path / f"test/Image/{i}.png", photo)
        for split in ("train", "test"):
            save_image(tmp_path / split / f"Mask/{i}.png", (photo[..., 0] > 128) * np.uint8(255))
    both = run_of(2, tmp_path / "both", tmp_path, from_files, "--batch_size 1", statistics=True)
    init = f"--init {tmp_path}/both/SAM2-UNeXT-1.pth --lr 0"
    statuses, _, errors = start(both, run_of(1, tmp_path / "one", tmp_path, from_files, init))
    assert statuses == [[0, 0], [0]], errors
    ours, theirs = (read_log(tmp_path / name)[-1] for name in ("both", "one"))
    for figure in ("Smeasure", "wFmeasure", "MAE"):
        assert ours[figure] == pytest.approx(theirs[figure], rel=1e-9)


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_after_the_same_step(toy, from_files, tmp_path):
    statuses, _, errors = start(run_of(2, tmp_path, toy, from_files, "--batch_size 1", signal=[1, 2, signal.SIGTERM]))
    assert statuses == [[143, 143]], errors
    assert errors.count("SIGTERM after epoch 1, step 2") == 1
    assert torch.load(tmp_path / "last.pth")["progress"]["step"] == 2


@pytest.mark.slow
def test_when_a_process_dies_the_others_end_with_one_line_and_can_resume(toy, from_files, tmp_path):
    run_words = run_of(2, tmp_path, toy, from_files, "--batch_size 1 --save_every 1 --resume")
    statuses, _, errors = start(run_words | {"signal": [1, 2, signal.SIGKILL]}, run_words)
    assert statuses == [[1, -signal.SIGKILL], [0, 0]], errors
    lines = [line for line in errors.splitlines() if "another process of the run is gone" in line]
    assert len(lines) == 1 and lines[0].endswith("the same command with --resume continues")
    assert "Traceback" not in errors
    assert (tmp_path / "SAM2-UNeXT-1.pth").exists()


def test_a_single_process_needs_no_address_to_meet_others(toy, from_files, tmp_path, monkeypatch):
    """Some schedulers set RANK and WORLD_SIZE for every job."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    train.main(arguments("--epoch 1 --batch_size 6", toy, tmp_path, from_files))
    assert (tmp_path / "SAM2-UNeXT-1.pth").exists()


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"RANK": ""}, "RANK='', not a number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two', not a number"),
        ({"RANK": "3"}, "RANK=3 with WORLD_SIZE=1"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 without MASTER_ADDR"),
    ],
)
def test_an_environment_left_by_another_program_is_named(
    environment, message, toy, micro_checkpoint, tmp_path, monkeypatch, capsys
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for main, args in (
        (train.main, arguments("--epoch 1", toy, tmp_path)),
        (test.main, predict_arguments(micro_checkpoint, toy / "test/Image", tmp_path)),
    ):
        status, line = failure(main, args, capsys)
        assert (
            status == 2
            and f"the environment has {message}: start several processes with torchrun, or unset RANK" in line
        )
    assert not contents(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_opens_all_files(rank, toy, from_files, tmp_path, monkeypatch):
    pretend_torchrun(monkeypatch, rank, 2)
    opened = []
    monkeypatch.setattr(train, "check_files", lambda pairs, workers: opened.append(len(pairs)))
    monkeypatch.setattr(device, "distribute", lambda *words: sys.exit(9))
    with pytest.raises(SystemExit, match="9"):
        train.main(arguments("--epoch 1", toy, tmp_path, from_files))
    assert opened == ([] if rank else [6, 0])


@pytest.mark.parametrize(
    "more, message",
    [("", "--sync_bn: torch supports it on GPUs only"), ("--compile", "do not work together: leave one out")],
)
def test_sync_bn_needs_gpus_and_no_compiler(more, message, toy, tmp_path, capsys):
    status, line = failure(train.main, arguments(f"--sync_bn --device cpu {more}", toy, tmp_path), capsys)
    assert status == 2 and message in line
