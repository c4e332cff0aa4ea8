"""train.py in several processes takes the steps of a single process with the same total batch."""

import json
import os
import signal
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import recipe
import torch
from conftest import ROOT, read_log, save_image, validation
from conftest import train_arguments as arguments
from conftest import train_options as options

import train
from dataset import epoch_batches
from unext import device
from unext.errors import InputError

pytestmark = pytest.mark.posix


def run_processes(*runs: dict) -> tuple[list[list[int]], str, str]:
    """Runs of processes.py: the exit statuses of the processes of each, standard output, standard error."""
    command = [sys.executable, str(ROOT / "tests/processes.py"), *map(json.dumps, runs)]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("[")], result.stdout, result.stderr


def run_of(processes, folder, toy, network, text, **more):
    text = f"--epoch 1 --lr 0.1 --log_every 1 {validation(toy)} {text}"
    return {"processes": processes, "arguments": options(text, toy, folder, network), "exact": True, **more}


@pytest.mark.slow
def test_two_processes_take_the_step_of_one_with_twice_the_batch(toy, from_files, tmp_path):
    compiled = "--batch_size 1 --accumulate 2 --compile --grad_checkpointing"
    runs = {
        "single": run_of(1, tmp_path / "single", toy, from_files, "--batch_size 4"),
        "two": run_of(2, tmp_path / "two", toy, from_files, "--batch_size 2"),
        "accumulating": run_of(2, tmp_path / "accumulating", toy, from_files, "--batch_size 1 --accumulate 2"),
        "compiled": run_of(2, tmp_path / "compiled", toy, from_files, compiled, compiled=1),
    }
    statuses, output, errors = run_processes(*runs.values())
    assert statuses == [[0], [0, 0], [0, 0], [0, 0]], errors
    assert output.count("4 images per step") == 4  # only the first process prints
    states = {name: torch.load(tmp_path / name / "SAM2-UNeXT-1.pth")["state_dict"] for name in runs}
    model = train.build_model(arguments("--device cpu", toy, tmp_path, from_files))
    moved = max((value - model.state_dict()[key]).abs().max() for key, value in states["single"].items())
    assert moved > 1e-2
    for name in ("two", "accumulating", "compiled"):
        for key, value in states["single"].items():
            assert (states[name][key] - value).abs().max() <= 1e-9, (name, key)
        assert len(read_log(tmp_path / name)) == 3  # two steps, the second of two images, and the epoch
        for ours, theirs in zip(read_log(tmp_path / name), read_log(tmp_path / "single"), strict=True):
            for figure in theirs.keys() & {"loss", "bce", "wiou", "grad_norm", "lr", "Smeasure", "wFmeasure", "MAE"}:
                assert ours[figure] == pytest.approx(theirs[figure], rel=1e-6), figure


@pytest.mark.slow
def test_all_processes_validate_with_the_statistics_that_are_saved(from_files, tmp_path):
    """One process sees bright images, the other dark ones; a single process scores the file that they saved."""
    bright = {index for [(_, index)] in epoch_batches(6, 1, 0, [1], rank=0, processes=2)}
    for i in range(6):
        photo = recipe.photo(str(i), 64, 64)
        save_image(tmp_path / f"train/Image/{i}.png", photo // 3 + np.uint8(160 if i in bright else 0))
        save_image(tmp_path / f"test/Image/{i}.png", photo)
        for split in ("train", "test"):
            save_image(tmp_path / split / f"Mask/{i}.png", (photo[..., 0] > 128) * np.uint8(255))
    two = run_of(2, tmp_path / "two", tmp_path, from_files, "--batch_size 1", statistics=True)
    init = f"--init {tmp_path}/two/SAM2-UNeXT-1.pth --lr 0"
    statuses, _, errors = run_processes(two, run_of(1, tmp_path / "single", tmp_path, from_files, init))
    assert statuses == [[0, 0], [0]], errors
    ours, theirs = (read_log(tmp_path / name)[-1] for name in ("two", "single"))
    for figure in ("Smeasure", "wFmeasure", "MAE"):
        assert ours[figure] == pytest.approx(theirs[figure], rel=1e-9)


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_after_the_same_step(toy, from_files, tmp_path):
    moment = {"moment": "optimizer 2", "rank": 1, "signal": signal.SIGTERM}
    statuses, _, errors = run_processes(run_of(2, tmp_path, toy, from_files, "--batch_size 1", **moment))
    assert statuses == [[143, 143]], errors
    assert errors.count("SIGTERM after epoch 1, step 2") == 1
    assert torch.load(tmp_path / "last.pth")["progress"]["step"] == 2


@pytest.mark.slow
def test_when_a_process_dies_the_others_end_with_one_line_and_can_resume(toy, from_files, tmp_path):
    run = run_of(2, tmp_path, toy, from_files, "--batch_size 1 --save_every 1 --resume")
    statuses, _, errors = run_processes(run | {"moment": "optimizer 2", "rank": 1}, run)
    assert statuses == [[1, -signal.SIGKILL], [0, 0]], errors
    lines = [line for line in errors.splitlines() if "another process of the run is gone" in line]
    assert len(lines) == 1 and lines[0].endswith("the same command with --resume continues")
    assert "Traceback" not in errors
    assert (tmp_path / "SAM2-UNeXT-1.pth").exists()


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, (0, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 0, 1)),  # some schedulers set them for every job
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, (5, 1, 8)),
        ({"RANK": ""}, "RANK= LOCAL_RANK=0 WORLD_SIZE=1"),
        ({"WORLD_SIZE": "two"}, "RANK=0 LOCAL_RANK=0 WORLD_SIZE=two"),
        ({"RANK": "3"}, "RANK=3 LOCAL_RANK=0 WORLD_SIZE=1"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK=1 LOCAL_RANK=0 WORLD_SIZE=2"),
    ],
)
def test_ranks_come_from_torchrun_and_an_environment_left_by_another_program_is_named(environment, expected):
    with mock.patch.dict(os.environ, environment):
        if isinstance(expected, tuple):
            assert device.ranks() == expected
            return
        remedy = "start several processes with torchrun, or unset RANK, LOCAL_RANK and WORLD_SIZE"
        with pytest.raises(InputError, match=rf"^the environment is not torchrun's \({expected}\): {remedy}$"):
            device.ranks()
