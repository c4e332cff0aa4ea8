"""InputError, and what the libraries' errors mean to a user. Free of torch, and of everything else here."""

import re

WORKER_LOST = "a worker process died, perhaps for lack of memory; try fewer --workers"
# The libraries have no error classes for these: what their messages contain -> what the user is told instead.
DIAGNOSES = {
    ("Bus error", "out of shared memory", "No space left on device (28)"): (
        "/dev/shm is too small for the workers: --workers 0 does without; docker run --shm-size 8g enlarges it"
    ),
    ("DataLoader worker (pid", "BrokenProcessPool"): WORKER_LOST,
    ("invalid configuration argument",): "the batch is too large for a kernel of CUDA: give a smaller --batch_size",
    ("not implemented for '",): "torch cannot do this here in this precision: give --precision fp32",
    ("Connection closed by peer", "Connection reset by peer", "DistBackendError", "DistNetworkError", "NCCL error"): (
        "another process of the run is gone; the same command with --resume continues"
    ),
}
OUT_OF_MEMORY = (
    "OutOfMemoryError", "MemoryError", "can't allocate memory", "not enough memory",
    "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "bad_alloc", "Failed to allocate memory", "Insufficient memory",  # onnxruntime and OpenCV
)  # fmt: skip


class InputError(ValueError):
    """Something that the user can mend: the message names the file or option, what is wrong with it, and the remedy.

    The commands print it, like an OSError, as one line; every other exception is a bug and shows its traceback.
    """


def message(error: Exception) -> str:
    """What an error says, without the traceback that torch's data loader puts before a worker's message."""
    name = type(error).__name__
    return re.split(rf"\n(?:[\w.]+\.)?{name}: ", str(error).strip())[-1] or name


def diagnosis(error: Exception, less_memory: str) -> str:
    """What to tell the user about an error of a library; empty for a bug, whose traceback should be seen."""
    text = f"{type(error).__name__}: {error}"
    for signs, line in DIAGNOSES.items():
        if any(sign in text for sign in signs):
            return line
    return f"out of memory: {less_memory}" if less_memory and is_out_of_memory(error) else ""


def is_out_of_memory(error: Exception) -> bool:
    text = f"{type(error).__name__}: {error}"
    return any(sign in text for sign in OUT_OF_MEMORY)


def reason(error: Exception) -> str:
    """The first sentence of an error's message, or its type; torch goes on to advise loading without protection."""
    return re.split(r"(?<=[\w`'\"])\. |\n", str(error).strip())[0][:200] or type(error).__name__
