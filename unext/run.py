"""A training run's folder: what it holds, the run's progress, its checkpoints, resuming from last.pth."""

import copy
import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unext import checkpoint, cli, device, files, weights
from unext.errors import InputError

if TYPE_CHECKING:
    from SAM2UNeXT import SAM2UNeXT

LAST, BEST = "last.pth", "best.pth"
CHECKPOINTS = (LAST, BEST, "SAM2-UNeXT-*.pth")
RECORDS = ("args.json", "log.jsonl", "tensorboard")
KEPT_EVERY = 5  # epochs


class Step(NamedTuple):
    """The figures of an optimiser step, over all processes."""

    images: int
    terms: dict[str, float]  # of the loss, means over these images
    grad_norm: float
    lr: float


@dataclass
class Progress:
    """The progress of a run: `step` optimiser steps into `epoch`."""

    epoch: int = 1
    step: int = 0
    images: int = 0  # in these steps
    terms: dict[str, float] = field(default_factory=dict)  # of the loss, summed over these images
    best: float = -math.inf  # S-measure of best.pth

    def count(self, step: Step) -> None:
        self.step += 1
        self.images += step.images
        self.terms = {name: self.terms.get(name, 0.0) + mean * step.images for name, mean in step.terms.items()}

    def losses(self) -> dict[str, float]:
        """The loss and its terms, means over the images of the epoch so far."""
        terms = {name: total / self.images for name, total in self.terms.items()}
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
    if present := [path.name for name in names for path in sorted(folder.glob(name))]:
        remedy = f"without {LAST} it cannot be resumed;" if resume else "continue it with --resume, or"
        raise InputError(f"{folder}: holds a run ({files.listing(present)}): {remedy} name another --save_path")
    if resume:
        print(f"{folder}: nothing to resume, starting a new run")


class Run:
    """What a resumed run continues with. No random state: order and augmentation depend on (seed, epoch) alone."""

    def __init__(
        self, folder: Path, model: "SAM2UNeXT", optimizer: Optimizer, scheduler: LRScheduler, scaler: GradScaler,
        recipe: dict[str, Any],  # settings that must not change on --resume, keyed as shown in messages
    ):  # fmt: skip
        self.folder, self.model = folder, model
        self.stateful = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        self.recipe = recipe | {f"--{name}": value for name, value in model.config.items()}
        self.recipe |= {"the precision": str(model.precision), "the number of processes": device.ranks()[2]}
        self.epochs = recipe["--epoch"]
        self.progress = Progress()

    def begin(self, resume: bool, init: str | None) -> Progress:
        """Continues from last.pth if `resume` and it exists, else starts from `init` if given; returns the progress."""
        path = self.folder / LAST
        if not resume or not path.exists():
            if init:
                checkpoint.load_trained(self.model, init, checkpoint.parse(checkpoint.read(init), init))
            return self.progress
        content = weights.read(path)
        recipe, progress = content.get("recipe"), content.get("progress")
        if not isinstance(recipe, dict) or not isinstance(progress, dict):
            raise InputError(f"{path}: damaged, or from another program; name another --save_path")
        if changed := [name for name, value in self.recipe.items() if recipe.get(name) != value]:
            changes = [f"{name} is {self.recipe[name]} but the run started with {recipe.get(name)}" for name in changed]
            remedy = f"use the original settings, or start another run with --init {path} and a new --save_path"
            raise InputError(f"{path}: {'; '.join(changes)}; {remedy}")
        checkpoint.load_trained(self.model, path, checkpoint.parse(content, path))
        for name, stateful in self.stateful.items():
            stateful.load_state_dict(copy.deepcopy(content[name]))  # Windows cannot replace a mapped file
        self.progress = Progress(**progress)
        finished = self.progress.epoch > self.epochs
        print(f"{path}: " + ("the run is finished" if finished else f"continuing after {self.progress}"))
        return self.progress

    def save(self) -> None:
        """Writes last.pth, which is a checkpoint too; only the first process writes."""
        if device.ranks()[0] == 0:
            content = checkpoint.network_content(self.model)
            content |= {name: stateful.state_dict() for name, stateful in self.stateful.items()}
            content |= {"progress": asdict(self.progress), "recipe": self.recipe, "epoch": self.progress.epoch}
            checkpoint.save(self.folder / LAST, content)

    def end_epoch(self, scores: dict[str, float]) -> None:
        """Keeps the epoch's checkpoints and makes the next epoch that of last.pth."""
        self.keep(scores)
        self.progress.next_epoch()
        self.save()

    def keep(self, scores: dict[str, float]) -> None:
        """Saves best.pth if the scores are the best so far, and SAM2-UNeXT-N.pth every fifth and at the last epoch."""
        progress = self.progress
        if device.ranks()[0]:  # only the first process writes
            return
        if scores:
            outcome = f"{BEST} stays, with {progress.best:.4f}"
            if scores["Smeasure"] > progress.best:
                outcome = f"{BEST} is replaced"
                progress.best = scores["Smeasure"]
                checkpoint.save_network(self.folder / BEST, self.model, progress.epoch)
            figures = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            print(f"epoch {progress.epoch}: {figures}; {outcome}")
        if progress.epoch % KEPT_EVERY == 0 or progress.epoch == self.epochs:
            path = self.folder / f"SAM2-UNeXT-{progress.epoch}.pth"
            checkpoint.save_network(path, self.model, progress.epoch)
            print(f"saved {path}")

    def stop_if_asked(self, stop: Sequence[int]) -> None:
        """Saves and ends all processes if any of them noted a signal, whose number is in `stop`."""
        number = max(stop, default=0)
        if device.ranks()[2] > 1:
            number = torch.tensor(number, device=next(self.model.parameters()).device)
            number = int(device.reduce_all(number, "MAX"))
        if number:
            self.save()
            if device.ranks()[0]:
                raise SystemExit(128 + number)
            print(file=sys.stderr)  # ends the bar's line
            name = signal.Signals(number).name
            cli.fail(f"{name} after {self.progress}; --resume continues in {self.folder}", 128 + number)
