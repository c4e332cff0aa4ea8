"""train.py in several processes: the step is that of one process with as many pictures."""

import json
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, failure
from conftest import train_arguments as arguments

import run
import train


def start(number, folder, toy, network, more, *signal_at):
    """Runs the script in so many processes; each one's status, and what they wrote on standard error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"{network} --epoch 1 --lr 0.1 --precision fp32 --workers 0 --log_every 1 {more}".split()
    folders = f"--train_image_path {toy}/train/Image --train_mask_path {toy}/train/Mask "
    folders += f"--val_image_path {toy}/test/Image --val_mask_path {toy}/test/Mask --save_path"
    words = json.dumps([*words, *folders.split(), str(folder)])
    command = [sys.executable, ROOT / "tests/processes.py", number, port, words, *signal_at]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1]), result.stdout, result.stderr


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_take_the_step_of_one_with_twice_the_batch(toy, from_files, tmp_path):
    states = {}
    for name, number, more in (
        ("one", 1, "--batch_size 4"),
        ("two", 2, "--batch_size 2"),
        ("two accumulating", 2, "--batch_size 1 --accumulate 2"),
    ):
        status, output, errors = start(number, tmp_path / name, toy, from_files, more)
        assert status == [0] * number, errors
        assert output.count("4 pictures a step") == 1  # only the first process speaks
        states[name] = torch.load(tmp_path / name / "SAM2-UNeXT-1.pth")["state_dict"]
    torch.manual_seed(0)
    begin = train.build_model(arguments("", toy, tmp_path, from_files)).state_dict()
    moved = max((value - begin[key]).abs().max() for key, value in states["one"].items())
    assert moved > 1e-2
    for name in ("two", "two accumulating"):
        for key, value in states["one"].items():
            assert (states[name][key] - value).abs().max() <= 1e-5, (name, key)
        assert len(log(tmp_path / name)) == 3  # two steps, the second of two pictures, and the epoch
        for ours, theirs in zip(log(tmp_path / name), log(tmp_path / "one"), strict=True):
            for figure in theirs.keys() & {"loss", "bce", "wiou", "grad_norm", "lr", "Smeasure", "wFmeasure", "MAE"}:
                assert ours[figure] == pytest.approx(theirs[figure], rel=1e-4), figure


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_after_the_same_step(toy, from_files, tmp_path):
    status, _, errors = start(2, tmp_path, toy, from_files, "--batch_size 1", 1, 2)
    assert status == [143, 143]
    assert errors.count("ended by SIGTERM after epoch 1, step 2") == 1
    assert run.read_last(tmp_path)[1]["progress"]["step"] == 2


@pytest.mark.parametrize(
    "more, message",
    [("", "--sync_bn: torch does it on GPUs alone"), ("--compile", "do not go together: leave out one")],
)
def test_sync_bn_needs_gpus_and_no_compiler(more, message, toy, tmp_path, capsys):
    status, line = failure(train.main, arguments(f"--sync_bn --device cpu {more}", toy, tmp_path), capsys)
    assert status == 2 and message in line
