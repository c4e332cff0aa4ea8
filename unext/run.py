"""A training run: whether a folder holds one; its progress as last.pth holds it, saving it, resuming it."""

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

from unext import checkpoint, cli, device, files, weights
from unext.errors import InputError, reason

if TYPE_CHECKING:
    from SAM2UNeXT import SAM2UNeXT

LAST = "last.pth"
CHECKPOINTS = (LAST, "best.pth", "SAM2-UNeXT-*.pth")
RECORDS = ("args.json", "log.jsonl", "tensorboard")


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


def check_folder(folder: Path, resume: bool) -> None:
    """Raises InputError if a folder holds a run, unless it is to be resumed and can be."""
    if resume and (folder / LAST).exists():
        return
    names = CHECKPOINTS if resume else CHECKPOINTS + RECORDS
    if there := [path.name for name in names for path in sorted(folder.glob(name))]:
        remedy = f"without {LAST} it cannot be resumed;" if resume else "continue it with --resume, or"
        raise InputError(f"{folder}: holds a run ({files.listing(there)}): {remedy} name another --save_path")
    if resume:
        print(f"{folder}: nothing to resume, starting a new run")


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
        """Writes last.pth, a checkpoint too. Raises OSError."""
        if device.ranks()[0] == 0:
            content = checkpoint.network_content(self.model, whole=not checkpoint.is_small(self.model))
            content |= {name: one.state_dict() for name, one in self.stateful.items()}
            content |= {"progress": asdict(self.progress), "recipe": self.recipe, "epoch": self.progress.epoch}
            checkpoint.save(self.folder / LAST, content)

    def begin(self, resume: bool, init: str | None) -> None:
        """Continues from last.pth if `resume` and there is one, or starts from `init`. Raises OSError, InputError."""
        if resume and (self.folder / LAST).exists():
            self.resume(self.folder / LAST)
        elif init:
            checkpoint.load_trained(self.model, init, checkpoint.load(init, type(self.model)))

    def resume(self, path: Path) -> None:
        """Continues from a file. Raises InputError if it is damaged, of another program or of another recipe."""
        content = weights.read(path)
        recipe, progress = content.get("recipe"), content.get("progress")
        if not isinstance(recipe, dict) or not isinstance(progress, dict):
            raise InputError(f"{path}: damaged, or from another program; name another --save_path")
        changed = [f"{name} was {recipe.get(name)}, now it is {value}"
                   for name, value in self.recipe.items() if recipe.get(name) != value]  # fmt: skip
        if changed:
            raise InputError(
                f"{path}: a run must be resumed as it began, but {'; '.join(changed)}: give what it began with, or "
                f"start another run from its weights with --init {path} and a new --save_path"
            )
        checkpoint.load_trained(self.model, path, checkpoint.parse(content, path, type(self.model)))
        try:
            for name, stateful in self.stateful.items():
                stateful.load_state_dict(copy.deepcopy(content[name]))  # Windows replaces no file that is still mapped
            self.progress = Progress(**progress)
            finished = self.progress.epoch > self.recipe["--epoch"]
        except Exception as error:  # they hardly check what they are given
            problem = f"its optimiser or scheduler does not fit ({reason(error)})"
            raise InputError(f"{path}: {problem}; the file is damaged, or of another version") from error
        print(f"{path}: {'the run is finished' if finished else f'continuing after {self.progress}'}")

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
