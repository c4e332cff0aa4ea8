"""InputError, and what errors of the libraries mean to a user. Free of torch, and of the rest of this program."""

import re

WORKER_LOST = "a worker process died, perhaps for lack of memory; try fewer --workers"
# Errors of the libraries that have no class: a part of the message -> what the user is told instead.
DIAGNOSES = {
    ("Bus error", "out of shared memory", "No space left on device (28)"): (
        "/dev/shm is too small for the workers: give --workers 0, or enlarge it with docker run --shm-size 8g"
    ),
    ("DataLoader worker (pid", "BrokenProcessPool"): WORKER_LOST,
    ("invalid configuration argument",): "the batch is too large for a kernel of CUDA: give a smaller --batch_size",
    ("InvalidCxxCompiler", "Failed to find C compiler", "cuda_utils.c", "TritonMissing", "GPUTooOldForTriton"): (
        "--compile needs C and C++ compilers, Python's headers and, on a GPU, Triton: install them or leave it out"
    ),
    ("not implemented for '",): "torch cannot compute this in this precision here: give --precision fp32",
    ("Connection closed by peer", "Connection reset by peer", "DistBackendError", "DistNetworkError", "NCCL error"): (
        "another process of the run is gone; the same command with --resume continues"
    ),
}
OUT_OF_MEMORY = (
    "OutOfMemoryError", "MemoryError", "can't allocate memory", "not enough memory", "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED", "bad_alloc", "Failed to allocate memory", "Insufficient memory",  # the last: OpenCV's
)  # fmt: skip


class InputError(ValueError):
    """An error that the user can fix: the message names the file or option, what is wrong with it, and the remedy.

    The commands print it, like an OSError, as one line. Any other exception is a bug and shows its traceback.
    """


def message(error: Exception) -> str:
    """The message of an error, without the traceback that torch's data loader puts before that of a worker."""
    name = type(error).__name__
    return re.split(rf"\n(?:[\w.]+\.)?{name}: ", str(error).strip())[-1] or name


def diagnosis(error: Exception, less_memory: str) -> str:
    """What to tell the user about an error of a library; empty for a bug, which should show its traceback."""
    text = f"{type(error).__name__}: {error}"
    for signs, line in DIAGNOSES.items():
        if any(sign in text for sign in signs):
            return line
    return f"out of memory: {less_memory}" if less_memory and is_out_of_memory(error) else ""


def is_out_of_memory(error: Exception) -> bool:
    text = f"{type(error).__name__}: {error}"
    return any(sign in text for sign in OUT_OF_MEMORY)


def reason(error: Exception) -> str:
    """The first sentence of an error's message, or its type; torch's second one recommends weights_only=False."""
    return re.split(r"(?<=[\w`'\"])\. |\n", str(error).strip())[0][:200] or type(error).__name__
