"""What the commands share: how errors end them, and checked arguments."""

import argparse
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

NOTHING_STARTED = 2  # the user's input needs mending
NOT_COMPLETED = 1  # started, and not finished
INTERRUPTED = 130  # 128 + SIGINT
BENCHMARK_HELP = "DIS5K, COD, MAS3K, RMAS, EORSSD, ORSI-4199 or a YAML file, and the folder of its archive"


@contextmanager
def exit_on_error(status: int) -> Iterator[None]:
    """Turns what the user can mend (ValueError, OSError) and Ctrl-C into one line on standard error and SystemExit."""
    try:
        yield
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


def number(kind: type = int, least: float = 1, most: float = 2**32, multiple: int = 1) -> Callable[[str], float]:
    """An argument type: an int or float from `least` to `most` and, for sizes, a multiple of `multiple`."""

    def check(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not least <= value <= most or (multiple > 1 and value % multiple):
            of = f", a multiple of {multiple}" if multiple > 1 else ""
            raise argparse.ArgumentTypeError(f"{text} must be a number from {least:g} to {most:g}{of}")
        return value

    return check


def device(name: str) -> str:
    """`name`, or for "auto" the best device at hand. Raises ValueError where torch cannot compute there."""
    import torch  # here alone: eval.py shares this file and does without torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: torch cannot compute there ({reason}); give cpu, cuda or auto") from error
    return name


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
        raise OSError("a worker process died, perhaps for lack of memory; try fewer --workers") from error
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
