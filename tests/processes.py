"""Runs train.py's main in several processes, as torchrun starts them, with BatchNorm in eval mode and plain descent.

    python processes.py NUMBER PORT ARGUMENTS [RANK STEP]

ARGUMENTS is a JSON list of words. The process RANK gets SIGTERM in STEP. Prints the exit status of each.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from torch import nn, optim

import train
from SAM2UNeXT import SAM2UNeXT


class Descent(optim.SGD):
    """Its step is proportional to the gradient: equal gradients, equal weights. Adam's is not, near 0."""

    def __init__(self, parameters, lr, weight_decay):
        super().__init__(parameters, lr, weight_decay=weight_decay)
        self.steps = 0

    def step(self):
        self.steps += 1
        if sys.argv[4:] == [os.environ["RANK"], str(self.steps)]:
            os.kill(os.getpid(), signal.SIGTERM)
        super().step()


def start(rank: int, number: str, port: str, words: list[str]) -> int:
    """The id of a forked process."""
    if pid := os.fork():
        return pid
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": number}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    status = 99
    try:
        train.main(train.get_args_parser().parse_args(words))
        status = 0
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    optim.AdamW = Descent
    SAM2UNeXT.train = lambda self, mode=True: nn.Module.train(self, False)
    number, port, words = sys.argv[1:4]
    pids = [start(rank, number, port, json.loads(words)) for rank in range(int(number))]
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]))
