"""unext/cli.py: errors are one line with the right status; names of any kind and a reader that leaves end nothing."""

import io
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, failure, predict_arguments, program, read_maps, save_image
from recipe import photo

import eval as evaluation
import test as prediction
import train
from unext import cli, files
from unext.errors import InputError

ODD = "a\nb\x1b[31m\u2028\u202e é\udcff"  # a line break, a colour of terminals, right to left, not UTF-8


def raised(error, started=False, less_memory=""):
    """A command that ends with this error, to be called by `failure`."""

    def main(args):
        with cli.one_line_errors(less_memory) as command:
            if started:
                command.started()
            raise error

    return main


@pytest.mark.parametrize("error", [InputError("x.png: is odd"), OSError("x.png: is odd")])
@pytest.mark.parametrize("started, status", [(False, 2), (True, 1)])
def test_the_status_of_an_error_says_whether_work_had_begun(error, started, status, capsys):
    found, line = failure(raised(error, started), None, capsys)
    assert found == status and line.endswith(": x.png: is odd")


@pytest.mark.parametrize("kind", [ValueError, KeyError, TypeError, RuntimeError])
def test_any_other_error_is_a_bug_and_shows_its_traceback(kind):
    error = kind("a mistake of ours")
    with pytest.raises(kind) as caught:
        raised(error, less_memory="less")(None)
    assert caught.value is error


def test_ctrl_c_is_one_line_and_status_130(capsys):
    status, line = failure(raised(KeyboardInterrupt()), None, capsys)
    assert status == 130 and line.endswith(": interrupted")


def test_a_message_is_one_printable_line_whatever_the_names_in_it(capsys):
    wrapped = f'Caught OSError in DataLoader worker process 0.\nTraceback:\n  File "x"\nOSError: {ODD}: is odd'
    qualified = InputError(wrapped.replace("\nOSError", "\nunext.errors.InputError"))
    for error in (OSError(f"{ODD}: is odd"), OSError(wrapped), qualified):
        _, line = failure(raised(error), None, capsys)
        assert line.endswith(r": a\nb\x1b[31m\u2028\u202e é\udcff: is odd")


def test_an_odd_name_is_one_line_in_each_command_and_no_obstacle(micro_checkpoint, tmp_path, capsys):
    """With standard output that takes UTF-8 alone."""
    image, broken = save_image(tmp_path / "in" / f"{ODD}.png", photo("odd", 40, 60, 0)), tmp_path / "in" / f"{ODD}2.png"
    broken.write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        prediction.main(predict_arguments(micro_checkpoint, image.parent, tmp_path / "maps"))
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert stop.value.code == 1 and list(read_maps(tmp_path / "maps")) == [f"{ODD}.png"]
    assert [line for line in lines if files.printable(f"{broken}: cannot be read as an image: it is empty") in line]
    for main, parse, words in (
        (train.main, train.get_args_parser, "--hiera_path random --aux none --save_path {0}/run "
                                            "--train_image_path {0}/in --train_mask_path {0}/maps"),
        (evaluation.main, evaluation.get_args_parser, "--dataset_name x --pred_path {0}/maps --gt_path {0}/in"),
    ):  # fmt: skip
        status, line = failure(main, parse().parse_args(words.format(tmp_path).split()), capsys)
        assert status == 2 and line.isprintable() and files.printable(f"{ODD}2.png") in line


def test_output_in_another_encoding_is_escaped(tmp_path):
    printed = cli.Output(io.TextIOWrapper(io.BytesIO(), "ascii"))
    print("ü\udcff", file=printed, flush=True)
    assert printed.buffer.getvalue() == b"\\xfc\\udcff\n"


@pytest.mark.slow
@pytest.mark.posix
def test_a_reader_that_leaves_ends_no_run_and_loses_no_result(micro_checkpoint, toy, tmp_path):
    words = ["--checkpoint", micro_checkpoint, "--test_image_path", toy / "test/Image", "--save_path", tmp_path]
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(program("test.py", *words, "--precision", "fp32"), cwd=ROOT, stdout=write, stderr=write)
    os.close(write)
    assert process.returncode == 0 and len(read_maps(tmp_path)) == 4


@pytest.mark.parametrize(
    "message",
    [
        "unable to write to file </torch_1_2_3>: No space left on device (28)",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
    ],
)
def test_too_small_a_dev_shm_comes_with_a_remedy(message, capsys):
    error = RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\nTraceback: ...\n{message}")
    status, line = failure(raised(error, started=True), None, capsys)
    assert status == 1 and "--workers 0" in line and "--shm-size" in line


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_is_one_line(error, capsys):
    status, line = failure(raised(error, less_memory="buy more"), None, capsys)
    assert status == 1 and line.endswith("out of memory: buy more")


def test_a_batch_beyond_cudas_grid_is_one_line(capsys):
    error = RuntimeError("CUDA error: invalid configuration argument\nCompile with `TORCH_USE_CUDA_DSA`")
    status, line = failure(raised(error, started=True), None, capsys)
    assert status == 1 and line.endswith("the batch is too large for a kernel of CUDA: give a smaller --batch_size")


@pytest.mark.parametrize(
    "parse, words",
    [
        (train.get_args_parser, "--hiera_path x --save_path="),
        (prediction.get_args_parser, "--checkpoint x --test_image_path x --save_path="),
        (evaluation.get_args_parser, "--pred_path x --gt_path x --json="),
    ],
)
def test_an_empty_path_does_not_mean_the_current_folder(parse, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse().parse_args(words.split())
    assert stop.value.code == 2 and f"{words.split()[-1][:-1]}: is empty" in capsys.readouterr().err


def test_missing_packages_are_named_with_the_command_that_installs_them():
    with pytest.raises(ValueError, match=r"^needs nonesuch: bash tools/setup.sh requirements-export.txt installs"):
        cli.require(["json", "nonesuch"], "requirements-export.txt")


def test_importing_it_needs_no_torch():
    code = "import sys, unext.cli, unext.workers, unext.output; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
