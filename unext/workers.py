"""Results in order from threads and processes, the number of cores, progress bars. Free of torch."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """The number of cores that this process may use, or of all where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def progress_bar(*args: Any, **options: Any) -> tqdm:
    """A tqdm bar. Where standard error is no terminal it writes once a minute, at the start, and at the end."""
    interval = {} if sys.stderr.isatty() else {"mininterval": 60, "maxinterval": 60}
    return tqdm(*args, **interval, **options)


def in_order(pool: Executor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """function(item) for each item, in order, computed by `pool` at most `ahead` items in advance."""
    futures: deque[Future[R]] = deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def in_processes(function: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[R]:
    """function(item) for each item, in order, from worker processes; with one worker, in this process."""
    workers = min(workers, len(items), 61)  # Windows allows at most 61
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
        for process in multiprocessing.active_children():  # perhaps in the middle of an item
            process.terminate()


def _start_worker() -> None:
    """In each worker process: leaves Ctrl-C to the parent, and ends with it."""

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
