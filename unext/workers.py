"""Results in order from threads and processes. Free of torch."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


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
    """function(item) for each item, in order, from worker processes; a single worker is this process itself.

    Raises BrokenProcessPool if one died, OSError if there can be none.
    """
    workers = min(workers, len(items), 61)  # more are not possible on Windows
    if workers <= 1:
        yield from map(function, items)
        return
    try:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    except OSError as error:
        reason = f"worker processes cannot start without /dev/shm: {error.strerror}"
        raise OSError(f"{reason}; --workers 1 does without them") from error
    try:
        yield from in_order(pool, function, items, ahead=4 * workers)
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
