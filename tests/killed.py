"""Runs train.py's main again and again, each time in a process that kills itself at a given moment.

    python killed.py ARGUMENTS MOMENT...

ARGUMENTS is a JSON list of words. A MOMENT is where and the how-manieth time, such as `optimizer 3`; the run after the
last one is left alone. Prints how each ended. All are forks of one process that has loaded the libraries, to save time.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import micro  # noqa: F401
import torch

import train

SAVE = torch.save


def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def save_half(content, file):
    """What a kill in the midst of writing leaves."""
    SAVE(content, file)
    file.truncate(file.tell() // 2)
    file.flush()
    die()


os.fsync = lambda descriptor: None  # no test has to outlast a power cut
PLACES = {
    "optimizer": (torch.optim.AdamW, "step", die),
    "backward": (torch.Tensor, "backward", die),
    "write": (torch, "save", save_half),
    "fsync": (os, "fsync", die),
    "rename": (os, "replace", die),
}


def patch(place: str, count: int) -> None:
    owner, name, act = PLACES[place]
    original, calls = getattr(owner, name), []

    def counted(*args, **options):
        calls.append(1)
        return (act if len(calls) == count else original)(*args, **options)

    setattr(owner, name, counted)


def run(words: list[str], moment: str) -> int:
    """The exit status, or minus the signal, of train.py with these words, killed at the moment if there is one."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 99
    try:
        if moment:
            place, count = moment.split()
            patch(place, int(count))
        train.main(train.get_args_parser().parse_args(words))
        status = 0
    except SystemExit as stop:
        status = stop.code
    finally:
        os._exit(status)


if __name__ == "__main__":
    for moment in [*sys.argv[2:], ""]:
        print(run(json.loads(sys.argv[1]), moment), flush=True)
