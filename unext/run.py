"""A training run as last.pth holds it: its progress, saving it, resuming it."""

import copy
import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unext import checkpoint, cli, device, weights
from unext.errors import InputError

if TYPE_CHECKING:
    from SAM2UNeXT import SAM2UNeXT

LAST, PREVIOUS = "last.pth", "last.previous.pth"


@dataclass
class Progress:
    """The progress of a run: `step` optimiser steps into `epoch`, and what these steps saw."""

    epoch: int = 1
    step: int = 0
    images: int = 0
    terms: dict[str, float] = field(default_factory=dict)  # of the loss, summed over these images
    best: float = -math.inf  # S-measure of best.pth

    def count(self, images: int, terms: dict[str, float]) -> None:
        """Adds a step over so many images, with the means of the loss's terms over them."""
        self.step += 1
        self.images += images
        self.terms = {name: self.terms.get(name, 0.0) + value * images for name, value in terms.items()}

    def losses(self) -> dict[str, float]:
        """The loss and its terms, means over the images of the epoch so far."""
        terms = {name: value / self.images for name, value in self.terms.items()}
        return {"loss": sum(terms.values()), **terms}

    def next_epoch(self) -> None:
        self.epoch, self.step, self.images, self.terms = self.epoch + 1, 0, 0, {}

    def __str__(self) -> str:
        return f"epoch {self.epoch}, step {self.step}"


class Run:
    """What a resumed run continues with. No random state: order and augmentation depend on (seed, epoch) alone."""

    def __init__(
        self, folder: Path, model: "SAM2UNeXT", optimizer: Optimizer, scheduler: LRScheduler, scaler: GradScaler,
        recipe: dict[str, Any],  # options that must not change, among them --epoch
    ):  # fmt: skip
        self.folder, self.model, self.recipe = folder, model, recipe
        self.stateful = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        self.progress = Progress()

    def save(self) -> None:
        """Writes last.pth, a checkpoint too; the one before becomes last.previous.pth. Raises OSError."""
        if device.ranks()[0] == 0:
            content = checkpoint.network_content(self.model, whole=not checkpoint.is_small(self.model))
            content |= {name: one.state_dict() for name, one in self.stateful.items()}
            content |= {"progress": asdict(self.progress), "recipe": self.recipe, "epoch": self.progress.epoch}
            checkpoint.save(self.folder / LAST, content, previous=self.folder / PREVIOUS)

    def begin(self, resume: bool, init: str | None) -> None:
        """Continues from last.pth, if there is one and `resume`, or makes room for a new run, from `init`.

        Raises OSError or InputError, before it removes anything.
        """
        if resume and (last := read_last(self.folder)):
            self.resume(*last)
            return
        if init:
            checkpoint.load_trained(self.model, init, checkpoint.load(init))
        if resume:
            print(f"{self.folder}: nothing to resume, starting a new run")
        else:
            self.make_room()

    def resume(self, path: Path, content: dict[str, Any]) -> None:
        """Continues from a file with this content. Raises InputError if it is damaged or of another recipe."""
        then = content["recipe"]
        changed = [f"{name} was {then.get(name)}, now it is {self.recipe[name]}"
                   for name in self.recipe if then.get(name) != self.recipe[name]]  # fmt: skip
        if changed:
            raise InputError(
                f"{path}: a run must be resumed as it began, but {'; '.join(changed)}: give what it began with, or "
                f"start another run from its weights with --init {path} and a new --save_path"
            )
        checkpoint.load_trained(self.model, path, checkpoint.parse(content, path))
        try:
            for name, one in self.stateful.items():
                one.load_state_dict(copy.deepcopy(content[name]))  # what was read is mapped from the file
            self.progress = Progress(**content["progress"])
            finished = self.progress.epoch > self.recipe["--epoch"]
        except Exception as error:  # they hardly check what they are given
            raise InputError(f"{path}: its optimiser or scheduler does not fit; the file is damaged") from error
        print(f"{path}: {'the run is finished' if finished else f'continuing after {self.progress}'}")

    def make_room(self) -> None:
        """Removes a finished run; of several processes the first one does. Raises InputError if it is not finished."""
        last = read_last(self.folder) if device.ranks()[0] == 0 else None
        if last is None:
            return
        epoch, epochs = last[1]["progress"]["epoch"], last[1]["recipe"]["--epoch"]
        del last  # its tensors are mapped from a file, which Windows would not remove
        if epoch <= epochs:
            raise InputError(
                f"{self.folder}: holds an unfinished run (epoch {epoch} of {epochs}): continue it with --resume, or "
                "name another --save_path"
            )
        print(f"{self.folder}: replacing the finished run there")
        for name in (PREVIOUS, LAST, "best.pth", "log.jsonl"):
            (self.folder / name).unlink(missing_ok=True)

    def stop_if_asked(self, stop: Sequence[int]) -> None:
        """Saves and ends all processes if one of them got a signal, whose number is in `stop`."""
        number = max(stop, default=0)
        if device.ranks()[2] > 1:
            number = int(device.reduce_all(torch.tensor(number, device=self.model.head.weight.device), "MAX"))
        if number:
            self.save()
            if device.ranks()[0]:
                raise SystemExit(128 + number)
            print(file=sys.stderr)  # behind the bar
            name = signal.Signals(number).name
            cli.fail(f"{name} after {self.progress}; --resume continues in {self.folder}", 128 + number)


def read_last(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """A run's newer complete file and its content; None if there is no file. Raises InputError if all are damaged."""
    damaged = []
    for path in (folder / LAST, folder / PREVIOUS):
        try:
            content = weights.read(path)
        except FileNotFoundError:  # the first is missing for a moment while it is being replaced
            continue
        except InputError:
            content = {}
        progress, recipe = content.get("progress"), content.get("recipe")
        whole = isinstance(progress, dict) and isinstance(recipe, dict)
        if whole and isinstance(progress.get("epoch"), int) and isinstance(recipe.get("--epoch"), int):
            if damaged:
                print(f"{damaged[0]} is damaged: continuing from {path}")
            return path, content
        damaged.append(path)
    if damaged:
        names = " and ".join(map(str, damaged))
        raise InputError(f"{names}: damaged, or from another program; name another --save_path")
    return None
