"""What a training run reports: log.jsonl, TensorBoard, args.json. H, W: height and width."""

import argparse
import json
import math
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import to_tensor

from unext import files
from unext.images import read_image
from unext.masks import read_mask
from unext.pairing import Pair
from unext.run import Progress

if TYPE_CHECKING:
    from SAM2UNeXT import SAM2UNeXT

ROOT = Path(__file__).resolve().parent.parent
PANELS = 3  # shown after each epoch
PANEL_SIDE = 256  # the longer side of each of its images, pixels


class Step(NamedTuple):
    """What an optimiser step saw, over all processes."""

    images: int
    terms: dict[str, float]  # of the loss, means over these images
    grad_norm: float
    lr: float


class Log:
    """log.jsonl and the same in TensorBoard: means over `every` steps of the run, up to an epoch's end, and per epoch.

    The files, and args.json with `record`, are written once the first step is done: a start that fails leaves the
    folder as it was. Lines beyond `progress`, where a resumed run starts, are removed, so that no step is logged twice.
    """

    def __init__(
        self, folder: Path, progress: Progress, record: dict[str, Any], every: int, steps_per_epoch: int, epochs: int
    ):
        self.folder, self.start, self.record = folder, replace(progress), record
        self.every, self.steps_per_epoch, self.epochs = every, steps_per_epoch, epochs
        self.file: TextIO | None = None
        self.restart_clock()

    def open(self) -> None:
        """Opens the files if they are not open yet. Raises OSError that names the one that cannot be written."""
        if self.file:
            return
        with files.replacing(self.folder / "args.json") as file:
            file.write(json.dumps(self.record, indent=1, default=str).encode() + b"\n")
        threading.excepthook = quiet  # TensorBoard writes in a thread, and its next call raises what failed there
        with files.writing(self.folder / "tensorboard"):
            self.board = SummaryWriter(self.folder / "tensorboard", purge_step=self.total(self.start) + 1)
        path = self.folder / "log.jsonl"
        lines = path.read_bytes().splitlines(True) if path.exists() else []
        with files.replacing(path) as file:
            file.write(b"".join(line for line in lines if is_before(line, self.start)))
        self.file = open(path, "a")  # noqa: SIM115 (closed in `__exit__`)

    def total(self, progress: Progress) -> int:
        """Steps since the start of the run."""
        return (progress.epoch - 1) * self.steps_per_epoch + progress.step

    def restart_clock(self) -> None:
        """Excludes what was not training (validation, the first start) from the rates."""
        self.window: list[Step] = []
        self.since = time.perf_counter()

    def step(self, progress: Progress, step: Step, device: str) -> None:
        """Logs a step, the last one that `progress` counted."""
        self.open()
        self.window.append(step)
        if self.total(progress) % self.every and progress.step < self.steps_per_epoch:
            return
        seconds = time.perf_counter() - self.since
        terms = {name: float(np.mean([one.terms[name] for one in self.window])) for name in step.terms}
        line = {"loss": sum(terms.values()), **terms, "lr": step.lr}
        line["grad_norm"] = float(np.mean([one.grad_norm for one in self.window]))
        line["images_per_second"] = sum(one.images for one in self.window) / seconds
        left = self.epochs * self.steps_per_epoch - self.total(progress)
        line["seconds_left"] = left * seconds / len(self.window)
        if device.startswith("cuda"):
            line["memory_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
        self.write({"epoch": progress.epoch, "step": progress.step}, line, "step", self.total(progress))
        self.restart_clock()

    def epoch(self, progress: Progress, figures: dict[str, float], panels: Iterable[tuple[str, Tensor]]) -> None:
        """Logs the end of an epoch; in TensorBoard with named panels (3, H, W) in [0, 1]."""
        self.open()
        self.write({"epoch": progress.epoch}, figures, "epoch", self.total(progress))
        for name, panel in panels:
            with files.writing(self.board.log_dir):
                self.board.add_image(name, panel, self.total(progress))
        self.restart_clock()

    def write(self, place: dict[str, int], figures: dict[str, float], group: str, total: int) -> None:
        with files.writing(self.file.name):
            self.file.write(json.dumps(place | figures) + "\n")
            self.file.flush()
        with files.writing(self.board.log_dir):
            for name, value in figures.items():
                self.board.add_scalar(f"{group}/{name}", value, total)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Closes the files; what goes wrong then does not replace the error that ended the run."""
        if not self.file:
            return
        self.file.close()
        threading.excepthook = threading.__excepthook__
        with suppress(OSError) if kind else files.writing(self.board.log_dir):
            self.board.close()


def quiet(failure: threading.ExceptHookArgs) -> None:
    """Reports what failed in a thread unless it is about a file."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def is_before(line: bytes, progress: Progress) -> bool:
    """Whether a line of the log belongs to the steps up to `progress`; False for an incomplete line."""
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return (entry["epoch"], entry.get("step", math.inf)) <= (progress.epoch, progress.step) and line.endswith(b"\n")


def panels(model: "SAM2UNeXT", pairs: Sequence[Pair]) -> Iterator[tuple[str, Tensor]]:
    """Image, mask and prediction side by side, (3, H, 3 W) in [0, 1], of the first pairs, with their names."""
    model.eval()
    for image_path, mask_path in pairs[:PANELS]:
        image, mask = read_image(image_path), read_mask(mask_path)
        scale = PANEL_SIDE / max(image.size)
        size = [max(1, round(side * scale)) for side in (image.height, image.width)]
        parts = to_tensor(image), to_tensor(mask), torch.from_numpy(model.predict(image))[None]
        parts = [F.interpolate(part.expand(1, 3, -1, -1), size, mode="area") for part in parts]
        yield files.printable(image_path.stem), torch.cat(parts, dim=3)[0]


def record(args: argparse.Namespace, more: dict[str, Any]) -> dict[str, Any]:
    """The content of args.json: how the run was started, with the versions and the git revision."""
    return {"command": sys.argv, "arguments": vars(args), **more, "versions": versions(), "git": git_revision()}


def versions() -> dict[str, str]:
    """What decides the last bits of the figures."""
    packages = {name: metadata.version(name) for name in ("torchvision", "timm", "numpy", "pillow")}
    return {"python": platform.python_version(), "torch": torch.__version__, **packages}


def git_revision() -> str | None:
    """This program's revision, with "-dirty" if files differ from it; None outside a git repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
