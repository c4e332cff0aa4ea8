"""Runs train.py's main in several processes, as torchrun starts them, in float64 with plain gradient descent.

    python processes.py RUN...

A RUN is a JSON object: "processes", how many; "words", the arguments of train.py; perhaps "signal", a list of the rank
of the process that gets it, the step in which, and its number; and perhaps "statistics", whether BatchNorm gathers them
(else it stays in eval mode, since they differ by design). Prints the exit status of each process, a line for each run.
All are forks of one process that has loaded the libraries, to save time.
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import micro  # noqa: F401
import torch
from torch import nn, optim

import train
from SAM2UNeXT import SAM2UNeXT


class Descent(optim.SGD):
    """Its step is proportional to the gradient: equal gradients, equal weights. Adam's is not, near 0."""

    signal_at: list[int] = [-1, 0, 0]  # rank, step, number

    def __init__(self, parameters, lr, weight_decay, fused):
        super().__init__(parameters, lr, weight_decay=weight_decay)
        self.steps = 0

    def step(self):
        self.steps += 1
        if self.signal_at[:2] == [int(os.environ["RANK"]), self.steps]:
            os.kill(os.getpid(), self.signal_at[2])
        super().step()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(rank: int, processes: int, port: int, words: list[str]) -> int:
    """The id of a forked process."""
    if pid := os.fork():
        return pid
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    status = 99
    try:
        train.main(train.get_args_parser().parse_args(words))
        status = 0
    except SystemExit as stop:
        status = stop.code
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    optim.AdamW = Descent
    torch.set_default_dtype(torch.float64)  # so that the order of sums does not show
    SAM2UNeXT.set_precision = lambda self, dtype: setattr(self, "precision", dtype)
    gathering = SAM2UNeXT.train
    for run in map(json.loads, sys.argv[1:]):
        Descent.signal_at = run.get("signal", Descent.signal_at)
        still = lambda self, mode=True: nn.Module.train(self, False)  # noqa: E731
        SAM2UNeXT.train = gathering if run.get("statistics") else still
        port = free_port()
        pids = [start(rank, run["processes"], port, run["words"]) for rank in range(run["processes"])]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
