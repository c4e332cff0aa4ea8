"""Runs train.py's main, each time in one or several processes, which can be sent a signal at a given moment.

    python processes.py RUN...

A RUN is a JSON object: "arguments", those of train.py, and perhaps
    "processes": how many torchrun would start (default: none, a single process without torchrun)
    "moment": where and the how-manieth time, such as "optimizer 3", the process of "rank" (0) gets "signal" (SIGKILL)
    "compiled": the number of graphs that --compile must make, with the backend of graphs.py
    "exact": float64 and plain gradient descent; BatchNorm in eval mode, which differs by design, unless "statistics"
Prints the exit status of each process, a line for each run. All are forks of one process that has loaded the libraries,
to save time.
"""

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import micro  # noqa: F401
import torch
from graphs import Graphs
from torch import nn, optim

import train
from SAM2UNeXT import SAM2UNeXT

PLACES = {
    "optimizer": (optim.AdamW, "step"),
    "backward": (torch.Tensor, "backward"),
    "write": (torch, "save"),
    "fsync": (os, "fsync"),
    "rename": (os, "replace"),
}


class Descent(optim.SGD):
    """Its step is proportional to the gradient: equal gradients, equal weights. Adam's is not, near 0."""

    def __init__(self, parameters, lr, weight_decay, fused):
        super().__init__(parameters, lr, weight_decay=weight_decay)


def signal_at(moment: str, number: int) -> None:
    place, count = moment.split()
    owner, name = PLACES[place]
    original, calls = getattr(owner, name), []

    def counted(*args, **options):
        calls.append(1)
        if len(calls) == int(count):
            if place == "write":  # half of the file
                original(*args)
                args[1].truncate(args[1].tell() // 2)
                args[1].flush()
            os.kill(os.getpid(), number)
        return original(*args, **options)

    setattr(owner, name, counted)


def prepare(run: dict, rank: int) -> None:
    """Changes what the run asks for, in its process."""
    os.fsync = lambda descriptor: None  # no test has to outlast a power cut
    if run.get("exact"):
        PLACES["optimizer"] = Descent, "step"
        optim.AdamW = Descent
        torch.set_default_dtype(torch.float64)  # so that the order of sums does not show
        SAM2UNeXT.set_precision = lambda self, dtype: setattr(self, "precision", dtype)
        if not run.get("statistics"):
            SAM2UNeXT.train = lambda self, mode=True: nn.Module.train(self, False)
    if "moment" in run and rank == run.get("rank", 0):
        signal_at(run["moment"], run.get("signal", signal.SIGKILL))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(run: dict, rank: int, environment: dict[str, str]) -> int:
    """The id of a forked process."""
    if pid := os.fork():
        return pid
    os.environ |= environment
    status = 99
    try:
        prepare(run, rank)
        backend = Graphs()
        backend.install()
        train.main(train.get_args_parser().parse_args(run["arguments"]))
        status = 0 if backend.graphs == run.get("compiled", 0) else 98
    except SystemExit as stop:
        status = stop.code
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    for run in map(json.loads, sys.argv[1:]):
        environments = [{}]
        if processes := run.get("processes"):
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
            environments = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        pids = [start(run, rank, environment) for rank, environment in enumerate(environments)]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
