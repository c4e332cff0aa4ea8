"""What a training run reports: its first lines, log.jsonl, TensorBoard, args.json. H, W: height and width."""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import to_tensor

from unext import device, files
from unext.images import read_image
from unext.masks import read_mask
from unext.pairing import Pair
from unext.run import Progress, Run, Step

if TYPE_CHECKING:
    from SAM2UNeXT import SAM2UNeXT

PANELS = 3  # shown after each epoch
PANEL_SIDE = 256  # the longer side of each of its images, pixels


class Log:
    """log.jsonl and the same in TensorBoard: means over each `--log_every` steps and over each epoch.

    Only the first process writes. It makes the files, and args.json, after the first step: a start that fails leaves
    the folder as it was. A resumed run removes the lines beyond its progress, so no step is logged twice.
    """

    def __init__(self, args: argparse.Namespace, run: Run, pairs: int, steps_per_epoch: int):
        self.args, self.run, self.pairs, self.steps_per_epoch = args, run, pairs, steps_per_epoch
        self.progress, self.start = run.progress, replace(run.progress)
        self.processes = device.ranks()[2]
        self.images_per_step = self.processes * args.batch_size * args.accumulate
        self.path = run.folder / "log.jsonl"
        self.board: SummaryWriter | None = None
        self.restart_clock()

    def __enter__(self) -> "Log":
        """Prints what is trained."""
        args, model = self.args, self.run.model
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        pairs = files.count(self.pairs, "pair")
        print(f"{pairs}; {trained:,} trainable parameters; training on {args.device} in {model.precision}")
        factors = f"{self.processes} (processes) x {args.batch_size} (--batch_size) x {args.accumulate} (--accumulate)"
        print(f"{files.count(self.images_per_step, 'image')} per step: {factors}")
        return self

    def open(self) -> None:
        if self.board:
            return
        folder, start = self.run.folder, self.start
        record = {"command": sys.argv, "arguments": vars(self.args), "precision": self.run.model.precision}
        record |= {"processes": self.processes, "effective_batch": self.images_per_step}
        record |= {"versions": versions(), "git": git_revision()}
        files.write_json(folder / "args.json", record)
        with files.writing(folder / "tensorboard"):
            self.board = SummaryWriter(folder / "tensorboard", purge_step=self.total(start) + 1)
        lines = self.path.read_bytes().splitlines(True) if self.path.exists() else []
        with files.replacing(self.path) as file:
            for line in lines:
                entry = json.loads(line) if line.endswith(b"\n") else {"epoch": math.inf}  # a truncated line
                if (entry["epoch"], entry.get("step", math.inf)) <= (start.epoch, start.step):
                    file.write(line)

    def total(self, progress: Progress) -> int:  # steps since the start of the run
        return (progress.epoch - 1) * self.steps_per_epoch + progress.step

    def restart_clock(self) -> None:
        """Excludes what was not training (validation, the first start) from the rates."""
        self.window: list[Step] = []
        self.since = time.perf_counter()

    def step(self, step: Step) -> None:
        """Logs the step that `progress` has just counted."""
        if device.ranks()[0]:
            return
        self.open()
        self.window.append(step)
        total = self.total(self.progress)
        if total % self.args.log_every and self.progress.step < self.steps_per_epoch:
            return
        seconds = time.perf_counter() - self.since
        terms = {name: float(np.mean([step.terms[name] for step in self.window])) for name in step.terms}
        figures = {"loss": sum(terms.values()), **terms, "lr": step.lr}
        if norms := [step.grad_norm for step in self.window if math.isfinite(step.grad_norm)]:  # else fp16 skipped them
            figures["grad_norm"] = float(np.mean(norms))
        figures["images_per_second"] = sum(step.images for step in self.window) / seconds
        figures["seconds_left"] = (self.args.epoch * self.steps_per_epoch - total) * seconds / len(self.window)
        if self.args.device.startswith("cuda"):
            figures["memory_mb"] = torch.cuda.max_memory_allocated(self.args.device) / 2**20
        self.write({"epoch": self.progress.epoch, "step": self.progress.step}, figures, "step")
        self.restart_clock()

    def epoch(self, scores: dict[str, float], pairs: Sequence[Pair]) -> None:
        """Logs the end of an epoch: its losses and scores, and in TensorBoard panels of the first pairs."""
        if device.ranks()[0]:
            return
        self.open()
        self.write({"epoch": self.progress.epoch}, self.progress.losses() | scores, "epoch")
        for name, panel in panels(self.run.model, pairs):
            with files.writing(self.board.log_dir):
                self.board.add_image(name, panel, self.total(self.progress))
        self.restart_clock()

    def write(self, place: dict[str, int], figures: dict[str, float], group: str) -> None:
        with files.writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(place | figures) + "\n")
        with files.writing(self.board.log_dir):
            for name, value in figures.items():
                self.board.add_scalar(f"{group}/{name}", value, self.total(self.progress))

    def __exit__(self, *_: object) -> None:
        if self.board:
            with files.writing(self.board.log_dir):
                self.board.close()


def panels(model: "SAM2UNeXT", pairs: Sequence[Pair]) -> Iterator[tuple[str, Tensor]]:
    """Image, mask and prediction side by side, (3, H, 3 W) in [0, 1], of the first pairs, with their names."""
    model.eval()
    for image_path, mask_path in pairs[:PANELS]:
        image, mask = read_image(image_path), read_mask(mask_path)
        scale = PANEL_SIDE / max(image.size)
        size = [max(1, round(side * scale)) for side in (image.height, image.width)]
        panel = to_tensor(image), to_tensor(mask), torch.from_numpy(model.predict(image))[None]
        panel = [F.interpolate(tensor.expand(1, 3, -1, -1), size, mode="area") for tensor in panel]
        yield files.printable(image_path.stem), torch.cat(panel, dim=3)[0]


def versions() -> dict[str, str]:
    """Versions that can change results in the last bits."""
    packages = {name: metadata.version(name) for name in ("torchvision", "timm", "numpy", "pillow")}
    return {"python": platform.python_version(), "torch": torch.__version__, **packages}


def git_revision() -> str | None:
    """This program's revision, with "-dirty" if files differ from it; None outside a git repository."""
    command = ["git", "-C", os.path.dirname(__file__), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
