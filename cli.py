"""What the commands share: how errors end them, and checked arguments."""

import argparse
import ctypes
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
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")

NOTHING_STARTED = 2  # the user's input needs mending
NOT_COMPLETED = 1  # started, and not finished
INTERRUPTED = 130  # 128 + SIGINT
ANY = 2**32  # greatest number where no other bound is given
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
NATIVE_BF16 = {"amx_bf16", "avx512_bf16"}
# What torch says where /dev/shm, through which a data loader's workers hand over batches, is full; and where one of
# them was killed.
SHARED_MEMORY_FULL = ("Bus error", "out of shared memory", "No space left on device (28)")
WORKER_DIED = ("DataLoader worker (pid", "killed by signal", "exited unexpectedly")
MORE_SHARED_MEMORY = (
    "/dev/shm is too small for the workers: --workers 0 does without; docker run --shm-size 8g gives more"
)
WORKER_LOST = "a worker process died, perhaps for lack of memory; try fewer --workers"
OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError", "can't allocate memory", "not enough memory")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
BENCHMARK_HELP = "DIS5K, COD, MAS3K, RMAS, EORSSD, ORSI-4199 or a YAML file, and the folder of its archive"


@contextmanager
def exit_on_error(status: int, memory_mend: str = "") -> Iterator[None]:
    """Turns what the user can mend (ValueError, OSError) and Ctrl-C into one line on standard error and SystemExit.

    So do workers that died, and memory that runs out, where `memory_mend` says what helps.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # of torch, for GPUs and for the CPU, and of Python
        words = f"{type(error).__name__}: {error}"
        if any(sign in words for sign in SHARED_MEMORY_FULL):
            line = MORE_SHARED_MEMORY
        elif WORKER_DIED[0] in words and any(sign in words for sign in WORKER_DIED[1:]):
            line = WORKER_LOST
        elif memory_mend and any(sign in words for sign in OUT_OF_MEMORY):
            line = f"out of memory: {memory_mend}"
        else:
            raise
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        raise SystemExit(NOT_COMPLETED) from error
    except (ValueError, OSError) as error:
        # torch's data loader puts a worker's whole traceback into the message; its last line is the message proper.
        line = (str(error).strip() or type(error).__name__).splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        raise SystemExit(status) from error
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser that shows defaults and takes the module's docstring as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=_Formatter, allow_abbrev=False)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


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
    """This process among those that torchrun started: its rank, its rank on this machine, how many there are.

    Without torchrun (0, 0, 1).
    """
    rank, local_rank, processes = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    return rank, local_rank, processes


def device(name: str) -> str:
    """`name`, or for "auto" the best device at hand; of several GPUs the one of this process under torchrun.

    Raises ValueError where torch cannot compute there.
    """
    import torch  # here alone: eval.py shares this file and does without torch

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
    """The type of `name`, fp32, bf16 or fp16; for "auto" bfloat16 where `device` computes in it natively, else float32.

    That is so on GPUs from NVIDIA's Ampere on and on CPUs with AMX or AVX512-BF16. Raises ValueError where torch cannot
    compute in the type.
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


def keep_freed_memory(device: str) -> None:
    """Makes glibc keep what large freed arrays occupied, if `device` is the CPU; elsewhere nothing happens.

    By default glibc returns each array above 32 MB to the system when it is freed, and the system clears the pages of
    the next one: a fifth of the time of a forward pass. MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 in the
    environment of a process do the same (mallopt(3)).
    """
    if device == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def cpu_flags() -> set[str]:
    """What the CPU can do, in Linux's words; empty elsewhere."""
    information = Path("/proc/cpuinfo")
    return set(information.read_text().split()) if information.exists() else set()


def in_order(pool: Executor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """function(item) of each item, in the order of the items, computed by `pool`, at most `ahead` items in advance."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def counted(items: Iterable[T], update: Callable[[], object]) -> Iterator[T]:
    """The items, `update` called as each arrives: a progress bar that need not be exhausted to be right."""
    for item in items:
        update()
        yield item


def in_processes(
    function: Callable[[T], R], items: Sequence[T], workers: int, prepare: Callable[[], object]
) -> Iterator[R]:
    """`function` of each item, in order, computed by worker processes that call `prepare` when they start.

    Functions are found by their names in the workers. Close the iterator to end the workers early. Raises what
    `function` raises, OSError where a worker died.
    """
    workers = max(1, min(workers, len(items)))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(prepare,))
    try:
        yield from in_order(pool, function, items, ahead=4 * workers)
    except BrokenProcessPool as error:
        raise OSError(WORKER_LOST) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():  # none is needed any more, whatever it is at
            process.terminate()


def _start_worker(prepare: Callable[[], object]) -> None:
    """In each worker process: Ctrl-C left to the parent, and no life after it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    prepare()


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
