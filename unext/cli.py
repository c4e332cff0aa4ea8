"""What the commands share: errors as one line, checked arguments, the device, worker processes. No torch at import."""

import argparse
import ctypes
import importlib.util
import multiprocessing
import os
import platform
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")

NOTHING_STARTED = 2  # exit status: the user's input needs mending
NOT_COMPLETED = 1  # started and not completed
INTERRUPTED = 130  # 128 + SIGINT
ANY = 2**32  # the largest number if no other bound is given
NATIVE_BF16 = {"amx_bf16", "avx512_bf16"}  # CPU features
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
BENCHMARK_HELP = "DIS5K, COD, MAS3K, RMAS, EORSSD, ORSI-4199 or a YAML file, and the folder of its archive"
WORKER_LOST = "a worker process died, perhaps for lack of memory; try fewer --workers"
# torch has no error classes for these: what its messages contain -> what the user is told instead.
DIAGNOSES = {
    ("Bus error", "out of shared memory", "No space left on device (28)"): (
        "/dev/shm is too small for the workers: --workers 0 does without; docker run --shm-size 8g enlarges it"
    ),
    ("DataLoader worker (pid",): WORKER_LOST,
    ("Connection closed by peer", "Connection reset by peer", "DistBackendError", "DistNetworkError", "NCCL error"): (
        "another process of the run is gone; the same command with --resume continues"
    ),
}
OUT_OF_MEMORY = (
    "OutOfMemoryError", "MemoryError", "can't allocate memory", "not enough memory",
    "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "bad_alloc", "Failed to allocate memory", "Insufficient memory",  # onnxruntime and OpenCV
)  # fmt: skip


@contextmanager
def exit_on_error(status: int, less_memory: str = "") -> Iterator[None]:
    """Turns errors that the user can mend (ValueError, OSError) and Ctrl-C into one line on stderr and SystemExit.

    Workers that died are treated likewise, and so is running out of memory, where `less_memory` says what helps.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's, for GPU and CPU, and Python's
        line = diagnosis(f"{type(error).__name__}: {error}", less_memory)
        if not line:
            raise
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        raise SystemExit(NOT_COMPLETED) from error
    except (ValueError, OSError) as error:
        # torch's data loader wraps a worker's message into its traceback; the last line is the message itself.
        line = (str(error).strip() or type(error).__name__).splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        raise SystemExit(status) from error
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def end_on_signals() -> None:
    """Makes SIGTERM and SIGHUP end the program as an exception, so that its temporary files are removed.

    Meanwhile further signals are ignored. A SIGHUP that nohup ignores remains ignored.
    """

    def end(number: int, frame: object) -> None:
        for other in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(other, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def diagnosis(words: str, less_memory: str) -> str:
    """What to tell the user about an error of torch's; empty for a bug, whose traceback should be seen."""
    for signs, line in DIAGNOSES.items():
        if any(sign in words for sign in signs):
            return line
    if less_memory and any(sign in words for sign in OUT_OF_MEMORY):
        return f"out of memory: {less_memory}"
    return ""


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser that shows defaults and prints the module's docstring as it is."""
    return argparse.ArgumentParser(description=description, formatter_class=_Formatter, allow_abbrev=False)


def add_encoders(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say where the encoders of a small checkpoint are."""
    parser.add_argument("--hiera_path", help="SAM 2's weights, if a small checkpoint's are not found")
    parser.add_argument("--dinov2_path", help="the auxiliary encoder's weights, likewise")
    parser.add_argument("--download", action="store_true", help="download encoders that are not found to weights/")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def require(packages: Iterable[str], requirements: str) -> None:
    """Raises ValueError that says how to install the packages of a file of requirements if one is missing."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ValueError(f"needs {', '.join(missing)}: bash tools/setup.sh {requirements} installs what is missing")


def path(text: str) -> Path:
    """An argument type: a path to write to. An empty one, such as an unset shell variable, is not this folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{ascii(text)} is not UTF-8; name another path") from None
    return Path(text)


def number(kind: type = int, least: float = 1, most: float = ANY, multiple: int = 1) -> Callable[[str], float]:
    """An argument type: an int or float from `least` to `most` and, for sizes, a multiple of `multiple`."""

    def check(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not least <= value <= most or (multiple > 1 and value % multiple):
            of = f", a multiple of {multiple}" if multiple > 1 else ""
            bounds = f"of at least {least:g}" if most == ANY else f"from {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"{text} must be a number {bounds}{of}")
        return value

    return check


def ranks() -> tuple[int, int, int]:
    """This process among those that torchrun started: its rank, its rank on this machine, their number.

    (0, 0, 1) without torchrun.
    """
    return int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def silence_other_ranks() -> None:
    """Leaves standard output to the first of several processes."""
    if ranks()[0]:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def distribute(model: "torch.nn.Module", device: str, sync_bn: bool) -> "torch.nn.Module":
    """The model wrapped for training by all processes that torchrun started."""
    import torch  # not at the top: eval.py shares this file and does without torch

    gpu = device.startswith("cuda")
    if gpu:
        torch.cuda.set_device(device)  # where NCCL gathers objects
    torch.distributed.init_process_group("nccl" if gpu else "gloo", **fresh_store())
    if sync_bn:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=[device] if gpu else None)


def fresh_store() -> dict[str, Any]:
    """Arguments of init_process_group where torchrun restarts processes on one machine; else none.

    torchrun's store keeps the addresses of the processes before a restart, and the next ones would wait for them
    (https://github.com/pytorch/pytorch/issues/135712). Its count of restarts tells them apart on one machine only.
    """
    import torch.distributed as dist

    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or os.environ["GROUP_WORLD_SIZE"] != "1":
        return {}
    store, rank, processes = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    return {"store": store, "rank": rank, "world_size": processes}


def reduce_all(figures: "torch.Tensor", operation: str = "SUM") -> "torch.Tensor":
    """Reduces the figures over all processes, in place; `operation` is a name in torch.distributed.ReduceOp."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.all_reduce(figures, getattr(dist.ReduceOp, operation))
    return figures


def gather_all(items: list) -> list:
    """The items of all processes, concatenated."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return items
    parts: list[list] = [[]] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def device(name: str) -> str:
    """`name`, or for "auto" the best device available; under torchrun the GPU of this process.

    Raises ValueError if torch cannot compute there.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    _, local_rank, processes = ranks()
    if name == "cuda" and processes > 1:
        name = f"cuda:{local_rank}"
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: torch cannot compute there ({reason}); give cpu, cuda or auto") from error
    return name


def precision(name: str, device: str) -> "torch.dtype":
    """The dtype called `name`: fp32, bf16 or fp16; for "auto" bfloat16 if `device` supports it natively, else float32.

    Native support: NVIDIA GPUs since Ampere, CPUs with AMX or AVX512-BF16. Raises ValueError if torch cannot compute in
    the dtype.
    """
    import torch

    if name == "auto":
        if device.startswith("cuda"):
            native = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            native = device == "cpu" and not NATIVE_BF16.isdisjoint(cpu_flags())
        return torch.bfloat16 if native else torch.float32
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    try:
        image = torch.ones(1, 1, 3, 3, dtype=dtype, device=device, requires_grad=True)
        torch.nn.functional.conv2d(image, image).sum().backward()
    except RuntimeError as error:
        raise ValueError(f"--precision {name}: torch cannot compute in it on {device}; give auto or fp32") from error
    return dtype


def make_deterministic(device: str) -> None:
    """Makes torch use deterministic kernels where it has them, and warn where it has none."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    if device.startswith("cuda"):  # with warn_only, the gradients of fused attention still differ between runs
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)


def keep_freed_memory(device: str) -> None:
    """On the CPU, makes glibc keep the memory of large freed arrays for the next ones (mallopt(3)).

    By default glibc returns every array above 32 MB to the system, which has to clear the pages of the next one. The
    variables MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=2147483647 in a process's environment have the same effect.
    """
    if device == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def cpu_flags() -> set[str]:
    """The features of the CPU in Linux's words; empty on other systems."""
    information = Path("/proc/cpuinfo")
    return set(information.read_text().split()) if information.exists() else set()


def in_order(pool: Executor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """function(item) for each item, in order, computed by `pool` at most `ahead` items in advance."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def in_processes(function: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[R]:
    """function(item) for each item, in order, computed by worker processes, which find the function by its name.

    Close the iterator to end the workers early. Raises what `function` raises, and OSError if a worker died.
    """
    workers = max(1, min(workers, len(items)))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    try:
        yield from in_order(pool, function, items, ahead=4 * workers)
    except BrokenProcessPool as error:
        raise OSError(WORKER_LOST) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():  # they may be in the middle of an item
            process.terminate()


def _start_worker() -> None:
    """In each worker process: leaves Ctrl-C to the parent, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
