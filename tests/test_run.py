"""unext/run.py: a run that was killed, stopped or damaged and resumed ends with the weights of an undisturbed one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import NETWORK, ROOT, contents, failure, pretend_torchrun, program, read_log
from conftest import train_arguments as arguments

import train
from unext import checkpoint, run

MAPS = Path("/proc/self/maps")

RECIPE = "--epoch 2 --batch_size 2 --lr 1e-3 --save_every 1 --log_every 1 --precision fp32 --resume"


def tensors(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def equal(one, other) -> bool:
    one, other = tensors(one), tensors(other)
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def places(folder) -> list[tuple]:
    return [(line["epoch"], line.get("step")) for line in read_log(folder)]


@pytest.fixture(scope="module")
def undisturbed(toy, from_files, tmp_path_factory):
    """The folders of runs that nothing happened to, by what is added to the recipe."""
    folders = {}

    def run_once(more=""):
        if more not in folders:
            folders[more] = tmp_path_factory.mktemp("undisturbed")
            train.main(arguments(f"{RECIPE} {more}", toy, folders[more], from_files))
        return folders[more]

    return run_once


def killed(moments, toy, folder, network, more=""):
    """Runs the recipe, killed at each of the moments and resumed after each; how each run ended."""
    words = f"{network} {RECIPE} {more} --train_image_path {toy}/train/Image --train_mask_path {toy}/train/Mask"
    words = [*words.split(), "--save_path", str(folder), *([] if "--workers" in more else ["--workers", "0"])]
    command = [sys.executable, str(ROOT / "tests/killed.py"), json.dumps(words), *moments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert not result.stderr.count("Error"), result.stderr
    return [int(line) for line in result.stdout.splitlines() if line.lstrip("-").isdigit()]


@pytest.mark.posix
@pytest.mark.slow
@pytest.mark.parametrize(
    "moments, more, steps",
    [
        (["backward 1", "write 1", "fsync 3", "rename 5", "rename 4"], "", 3),
        (["backward 3", "fsync 4", "write 3", "optimizer 1", "rename 8"], "", 3),  # the last: at the end of the run
        # The third file is written at the end of the first epoch; what is resumed has all of its steps behind it.
        (["write 3", "optimizer 2"], "--accumulate 2 --workers 1", 2),
    ],
)
def test_a_run_killed_at_any_moment_resumes_to_equal_weights(
    moments, more, steps, undisturbed, toy, from_files, tmp_path
):
    assert killed(moments, toy, tmp_path, from_files, more) == [-signal.SIGKILL] * len(moments) + [0]
    for name in ("SAM2-UNeXT-2.pth", "last.pth"):
        assert equal(tmp_path / name, undisturbed(more) / name)
    assert places(tmp_path) == [(epoch, step) for epoch in (1, 2) for step in (*range(1, steps + 1), None)]


@pytest.mark.posix
@pytest.mark.slow
def test_random_encoders_are_restored_too(toy, tmp_path):
    train.main(arguments(RECIPE, toy, tmp_path / "plain"))
    assert killed(["optimizer 4", "write 2"], toy, tmp_path / "killed", NETWORK)[-1] == 0
    assert equal(tmp_path / "killed/SAM2-UNeXT-2.pth", tmp_path / "plain/SAM2-UNeXT-2.pth")


@pytest.mark.posix
@pytest.mark.slow
def test_torchrun_restarts_a_killed_run_to_equal_weights(toy, from_files, tmp_path):
    for folder, environment in (("whole", {}), ("killed", {"KILLED_IN_STEP": "2"})):
        words = f"{from_files} {RECIPE} --batch_size 1 --workers 0 --save_path {tmp_path}/{folder}".split()
        words += ["--train_image_path", f"{toy}/train/Image", "--train_mask_path", f"{toy}/train/Mask"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += ["--max_restarts", "3", *program("train.py", *words)[1:]]
        environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as train.sh does
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
        assert result.returncode == 0, result.stderr
    assert "continuing after epoch 1, step" in result.stdout
    assert equal(tmp_path / "whole/SAM2-UNeXT-2.pth", tmp_path / "killed/SAM2-UNeXT-2.pth")


@pytest.mark.posix
@pytest.mark.parametrize("number, at", [(signal.SIGTERM, 2), (signal.SIGINT, 3)])
def test_a_signal_completes_the_step_and_saves(number, at, undisturbed, toy, from_files, tmp_path, monkeypatch, capsys):
    steps = []
    step = torch.optim.AdamW.step

    def step_and_signal(self, *args, **options):
        steps.append(1)
        if len(steps) == at:
            signal.raise_signal(number)
        return step(self, *args, **options)

    args = arguments(f"{RECIPE} --save_every 0", toy, tmp_path, from_files)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step_and_signal)
        status, line = failure(train.main, args, capsys)
    assert status == 128 + number and len(steps) == at
    assert f"{number.name} after epoch 1, step {at}; --resume continues in {tmp_path}" in line
    assert torch.load(tmp_path / "last.pth")["progress"]["step"] == at
    train.main(args)
    assert f"last.pth: continuing after epoch 1, step {at}" in capsys.readouterr().out
    assert equal(tmp_path / "SAM2-UNeXT-2.pth", undisturbed() / "SAM2-UNeXT-2.pth")


@pytest.fixture
def half_way(undisturbed, toy, from_files, tmp_path, monkeypatch):
    """The folder of a run that stopped after step 2."""
    save, saved = run.Run.save, []

    def save_two(self):
        save(self)
        saved.append(1)
        if len(saved) == 2:
            raise SystemExit(9)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(run.Run, "save", save_two)
        train.main(arguments(RECIPE, toy, tmp_path, from_files))
    return tmp_path


def test_a_damaged_last_pth_does_not_silently_start_over(half_way, toy, from_files, capsys):
    (half_way / "last.pth").write_bytes((half_way / "last.pth").read_bytes()[:-5000])
    before = contents(half_way)
    status, line = failure(train.main, arguments(RECIPE, toy, half_way, from_files), capsys)
    assert status == 2 and "last.pth: is truncated, damaged" in line and contents(half_way) == before


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not say which files are mapped")
def test_a_resumed_run_holds_no_mapping_of_last_pth(half_way, toy, from_files, monkeypatch):
    """Windows does not replace a file that is mapped."""
    mapped = []
    load_trained, train_one_epoch = checkpoint.load_trained, train.train_one_epoch

    def noted(function):
        return lambda *words: mapped.append("last.pth" in MAPS.read_text()) or function(*words)

    monkeypatch.setattr(checkpoint, "load_trained", noted(load_trained))
    monkeypatch.setattr(train, "train_one_epoch", noted(train_one_epoch))
    train.main(arguments(RECIPE, toy, half_way, from_files))
    assert mapped == [True, False, False]


@pytest.mark.parametrize("name", ["args.json", "log.jsonl", "tensorboard", "SAM2-UNeXT-5.pth", "best.pth", "last.pth"])
def test_what_a_run_has_written_is_never_replaced_without_resume(name, toy, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    status, line = failure(train.main, arguments("--epoch 1", toy, tmp_path), capsys)
    assert status == 2 and line.endswith(
        f"{tmp_path}: holds a run ({name}): continue it with --resume, or name another --save_path"
    )
    if name in ("SAM2-UNeXT-5.pth", "best.pth"):
        status, line = failure(train.main, arguments("--resume", toy, tmp_path), capsys)
        assert status == 2 and f"holds a run ({name}): without last.pth it cannot be resumed; name another" in line
    assert contents(tmp_path) == {tmp_path / name: b"mine"}


def test_a_first_step_that_fails_leaves_the_folder_as_it_was(toy, from_files, tmp_path, monkeypatch, capsys):
    args = arguments("--epoch 1 --batch_size 6", toy, tmp_path, from_files)
    with monkeypatch.context() as patch:
        patch.setattr(train, "loss_terms", mock.Mock(side_effect=torch.OutOfMemoryError))
        status, _ = failure(train.main, args, capsys)
    assert status == 1 and not contents(tmp_path)
    train.main(args)
    assert (tmp_path / "SAM2-UNeXT-1.pth").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ("--batch_size 3", "--batch_size was 2, now it is 3"),
        ("--seed 5 --epoch 3", "--epoch was 2, now it is 3; --seed was 0, now it is 5"),
        ("--precision bf16", "the precision was torch.float32, now it is torch.bfloat16"),
    ],
)
def test_a_resumed_run_needs_the_same_recipe(change, message, half_way, toy, from_files, capsys):
    status, line = failure(train.main, arguments(f"{RECIPE} {change}", toy, half_way, from_files), capsys)
    assert status == 2 and message in line and f"--init {half_way}/last.pth and a new --save_path" in line


def test_a_resumed_run_needs_the_same_files_which_may_have_moved(
    half_way, undisturbed, toy, from_files, tmp_path, capsys
):
    """Another fold may have as many images, even of the same names."""
    moved = shutil.copytree(toy, tmp_path / "moved")
    for change in (
        lambda: (moved / "train/Mask/toy_0003.png").open("ab").write(b"x"),
        lambda: [path.rename(path.with_stem("toy_0099")) for path in moved.glob("train/*/toy_0004.*")],
    ):
        change()
        status, line = failure(train.main, arguments(RECIPE, moved, half_way, from_files), capsys)
        assert status == 2 and "the data was 6 pairs (names and sizes: " in line and "now it is 6 pairs (" in line
        shutil.rmtree(moved)
        shutil.copytree(toy, moved)
    train.main(arguments(RECIPE, moved, half_way, from_files))
    assert equal(half_way / "SAM2-UNeXT-2.pth", undisturbed() / "SAM2-UNeXT-2.pth")


def test_another_number_of_processes_is_an_error_that_says_what_to_do(half_way, toy, from_files, capsys, monkeypatch):
    pretend_torchrun(monkeypatch, 0, 2)
    status, line = failure(train.main, arguments(RECIPE, toy, half_way, from_files), capsys)
    assert status == 2 and "the number of processes was 1, now it is 2: give what it began with" in line


def test_resume_starts_a_new_run_and_leaves_a_finished_one(toy, from_files, tmp_path, capsys):
    args = arguments("--epoch 1 --batch_size 6 --resume", toy, tmp_path, from_files)
    train.main(args)
    assert f"{tmp_path}: nothing to resume, starting a new run" in capsys.readouterr().out
    before = contents(tmp_path)
    train.main(args)
    assert "last.pth: the run is finished" in capsys.readouterr().out and contents(tmp_path) == before
    args.resume = False
    status, line = failure(train.main, args, capsys)
    assert status == 2 and "holds a run (last.pth, SAM2-UNeXT-1.pth, " in line and contents(tmp_path) == before
