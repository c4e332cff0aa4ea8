"""unext/run.py: a run that was killed, stopped or damaged and resumed ends with the weights of an undisturbed run."""

import os
import shutil
import signal
import subprocess
import sys
from unittest import mock

import pytest
import torch
from conftest import NETWORK, contents, failure, pretend_torchrun, program, read_log, same_checkpoint
from conftest import train_arguments as arguments
from conftest import train_options as options
from test_processes import run_processes

import train
from unext import run

RECIPE = "--epoch 2 --batch_size 2 --lr 1e-3 --save_every 1 --log_every 1 --resume"


@pytest.fixture(scope="module")
def undisturbed(toy, from_files, tmp_path_factory):
    """The folder of an undisturbed run of the recipe."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train.main(arguments(RECIPE, toy, folder, from_files))
    return folder


def killed(moments, toy, folder, network, more=""):
    """Runs the recipe, killed at each of the moments and resumed after each; how each run ended."""
    runs = [{"arguments": options(f"{RECIPE} {more}", toy, folder, network)}] * (len(moments) + 1)
    moments = [{"moment": moment} for moment in moments] + [{}]
    statuses, _, errors = run_processes(*(run | moment for run, moment in zip(runs, moments, strict=True)))
    assert "Error" not in errors, errors
    return [status for [status] in statuses]


@pytest.mark.posix
@pytest.mark.slow
@pytest.mark.parametrize(
    "moments, more, steps",
    [
        (["backward 1", "write 1", "fsync 3", "rename 4"], "", 3),
        (["backward 3", "optimizer 1", "rename 11"], NETWORK, 3),  # random encoders; the last: at the end of the run
        # The third file is written at the end of the first epoch; what is resumed has all of its steps behind it.
        (["write 3", "optimizer 2"], "--accumulate 2 --workers 1", 2),
    ],
)
def test_a_run_killed_at_any_moment_resumes_to_equal_weights(moments, more, steps, toy, from_files, tmp_path):
    train.main(arguments(f"{RECIPE} {more}", toy, tmp_path / "undisturbed", from_files))
    assert killed(moments, toy, tmp_path / "killed", from_files, more) == [-signal.SIGKILL] * len(moments) + [0]
    for name in ("SAM2-UNeXT-2.pth", "last.pth"):
        assert same_checkpoint(tmp_path / "killed" / name, tmp_path / "undisturbed" / name)
    lines = [(line["epoch"], line.get("step")) for line in read_log(tmp_path / "killed")]
    assert lines == [(epoch, step) for epoch in (1, 2) for step in (*range(1, steps + 1), None)]


@pytest.mark.posix
@pytest.mark.slow
def test_torchrun_restarts_a_killed_run_to_equal_weights(toy, from_files, tmp_path):
    recipe = f"{RECIPE} --batch_size 1"
    run_processes({"processes": 2, "arguments": options(recipe, toy, tmp_path / "undisturbed", from_files)})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    train_command = program("train.py", *options(recipe, toy, tmp_path / "killed", from_files))
    command += ["--max_restarts", "3", *train_command[1:]]
    environment = {"KILLED_IN_STEP": "2", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # the latter as train.sh does
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert result.returncode == 0, result.stderr
    assert "continuing after epoch 1, step" in result.stdout
    assert same_checkpoint(tmp_path / "killed/SAM2-UNeXT-2.pth", tmp_path / "undisturbed/SAM2-UNeXT-2.pth")


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
    assert same_checkpoint(tmp_path / "SAM2-UNeXT-2.pth", undisturbed / "SAM2-UNeXT-2.pth")


@pytest.fixture(scope="module")
def _half_way(toy, from_files, tmp_path_factory):
    folder, save = tmp_path_factory.mktemp("half_way"), run.Run.save

    def save_and_stop(self):
        save(self)
        if self.progress.step == 2:
            raise SystemExit(9)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(run.Run, "save", save_and_stop)
        train.main(arguments(RECIPE, toy, folder, from_files))
    return folder


@pytest.fixture
def half_way(_half_way, tmp_path):
    """The folder of a run that stopped after step 2."""
    return shutil.copytree(_half_way, tmp_path / "run")


@pytest.mark.parametrize("name", ["args.json", "log.jsonl", "tensorboard", "SAM2-UNeXT-5.pth", "best.pth", "last.pth"])
def test_what_a_run_has_written_is_never_replaced_without_resume(name, tmp_path):
    (tmp_path / name).write_text("mine")
    refusals = {False: rf"{tmp_path}: holds a run \({name}\): continue it with --resume, or name another --save_path"}
    if name in ("SAM2-UNeXT-5.pth", "best.pth"):
        refusals[True] = rf"{tmp_path}: holds a run \({name}\): without last.pth it cannot be resumed; name another"
    for resume, message in refusals.items():
        with pytest.raises(ValueError, match=message):
            run.check_folder(tmp_path, resume)


def test_a_first_step_that_fails_leaves_the_folder_as_it_was(toy, from_files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "loss_terms", mock.Mock(side_effect=torch.OutOfMemoryError))
    status, _ = failure(train.main, arguments("", toy, tmp_path / "new", from_files), capsys)
    assert status == 1 and not contents(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ("--batch_size 3", "--batch_size is 3 but the run started with 2"),
        ("--seed 5 --epoch 3", "--epoch is 3 but the run started with 2; --seed is 5 but the run started with 0"),
        ("--white 4095", "--white is 4095.0 but the run started with None"),
        ("--precision bf16", "the precision is torch.bfloat16 but the run started with torch.float32"),
        ("--edge_weighted_bce", "--edge_weighted_bce is True but the run started with False"),
        ("--size 96", "--size is 96 but the run started with 64"),
        ("2 processes", "the number of processes is 2 but the run started with 1"),
    ],
)
def test_a_resumed_run_needs_the_same_recipe(change, message, half_way, toy, from_files, monkeypatch, capsys):
    """Options of training, network and loss."""
    if change == "2 processes":
        pretend_torchrun(monkeypatch, 0, 2)
        change = ""
    status, line = failure(train.main, arguments(f"{RECIPE} {change}", toy, half_way, from_files), capsys)
    remedy = f"use the original settings, or start another run with --init {half_way}/last.pth and a new --save_path"
    assert status == 2 and f"last.pth: {message}; {remedy}" in line


def test_a_resumed_run_needs_the_same_files(half_way, undisturbed, toy, from_files, tmp_path, capsys):
    """Another fold may have as many images, even of the same names."""
    moved = shutil.copytree(toy, tmp_path / "moved")
    for change in (
        lambda: (moved / "train/Mask/toy_0003.png").open("ab").write(b"x"),
        lambda: [path.rename(path.with_stem("toy_0099")) for path in moved.glob("train/*/toy_0004.*")],
    ):
        change()
        status, line = failure(train.main, arguments(RECIPE, moved, half_way, from_files), capsys)
        assert status == 2 and "the data is 6 pairs (names and sizes: " in line and "started with 6 pairs (" in line
        shutil.rmtree(moved)
        shutil.copytree(toy, moved)
    train.main(arguments(RECIPE, moved, half_way, from_files))
    assert same_checkpoint(half_way / "SAM2-UNeXT-2.pth", undisturbed / "SAM2-UNeXT-2.pth")


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
