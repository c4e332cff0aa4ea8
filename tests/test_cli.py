"""unext/cli.py, unext/errors.py: errors are one line with the right status, whatever the names in it."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, failure

from unext import cli
from unext.errors import InputError

ODD = "a\nb\x1b[31m\u2028\u202e é\udcff"  # a line break, a colour of terminals, right to left, not UTF-8
ESCAPED = r"a\nb\x1b[31m\u2028\u202e é\udcff: is odd"
IN_WORKER = f'Caught OSError in DataLoader worker process 0.\nTraceback:\n  File "x"\nOSError: {ODD}: is odd'
SHM = "/dev/shm is too small for the workers: give --workers 0, or enlarge it with docker run --shm-size 8g"
BUS_ERROR = (
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit."
)
PRINT = """
from unext import cli
with cli.one_line_errors() as command:
    command.started()
    print("ü\\udcff")
"""


def raised(error, started=False):
    """A command that ends with this error, to be called by `failure`."""

    def main(args):
        with cli.one_line_errors("buy more") as command:
            if started:
                command.started()
            raise error

    return main


@pytest.mark.parametrize(
    "error, started, status, line",
    [
        (InputError("x.png: is odd"), False, 2, "x.png: is odd"),
        (OSError("x.png: is odd"), False, 2, "x.png: is odd"),
        (InputError("x.png: is odd"), True, 1, "x.png: is odd"),
        (OSError("x.png: is odd"), True, 1, "x.png: is odd"),
        (OSError(f"{ODD}: is odd"), False, 2, ESCAPED),
        (OSError(IN_WORKER), True, 1, ESCAPED),
        (InputError(IN_WORKER.replace("\nOSError", "\nunext.errors.InputError")), True, 1, ESCAPED),
        (KeyboardInterrupt(), True, 130, "interrupted"),
        (RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)"), True, 1, SHM),
        (RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\n...\n{BUS_ERROR}"), True, 1, SHM),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True, 1, "out of memory: buy more"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True, 1, "out of memory: buy more"),
        (MemoryError(), True, 1, "out of memory: buy more"),
        (
            RuntimeError("CUDA error: invalid configuration argument\nCompile with `TORCH_USE_CUDA_DSA`"), True, 1,
            "the batch is too large for a kernel of CUDA: give a smaller --batch_size",
        ),
        (
            RuntimeError("backend='inductor' raised:\nTritonMissing: Cannot find a working Triton"), True, 1,
            "--compile needs C and C++ compilers, Python's headers and, on a GPU, Triton: install them or leave it out",
        ),
    ],
)  # fmt: skip
def test_an_error_is_one_line_with_the_status_of_the_work_so_far(error, started, status, line, capsys):
    assert failure(raised(error, started), None, capsys) == (status, f"{os.path.basename(sys.argv[0])}: {line}")


@pytest.mark.parametrize("kind", [ValueError, KeyError, TypeError, RuntimeError])
def test_any_other_error_is_a_bug_and_shows_its_traceback(kind):
    error = kind("a mistake of ours")
    with pytest.raises(kind) as caught:
        raised(error)(None)
    assert caught.value is error


def test_output_in_another_encoding_is_escaped():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    output = subprocess.check_output([sys.executable, "-c", PRINT], cwd=ROOT, env=environment, text=True)
    assert output == "\\xfc\\udcff\n"


@pytest.mark.posix
@pytest.mark.parametrize("errors", [subprocess.PIPE, subprocess.STDOUT])
def test_a_reader_that_leaves_ends_the_command_silently_with_status_1(errors):
    """As `| head` does."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run([sys.executable, "-c", PRINT], cwd=ROOT, stdout=write, stderr=errors)
    os.close(write)
    assert process.returncode == 1 and not process.stderr


def test_missing_packages_are_named_with_the_command_that_installs_them():
    with pytest.raises(ValueError, match=r"^needs nonesuch: bash tools/setup.sh requirements-export.txt installs"):
        cli.require(["json", "nonesuch"], "requirements-export.txt")


def test_a_noted_signal_is_confirmed_at_once_and_a_second_one_acts_as_usual(capfd):
    with pytest.raises(KeyboardInterrupt), cli.noted_signals() as numbers:
        signal.raise_signal(signal.SIGINT)
        assert numbers == [signal.SIGINT]
        assert capfd.readouterr().err == "\nending after this step; a second signal ends at once\n"
        signal.raise_signal(signal.SIGINT)
