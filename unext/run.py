"""What a training run saves and reports: last.pth to resume from, logs, validation scores.

Apart from train.py because none of it is about learning. H, W: height and width.
"""

import argparse
import copy
import json
import math
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import to_tensor

from dataset import image_tensor
from evaluation import metrics
from SAM2UNeXT import SAM2UNeXT, probability_map, stretch
from unext import checkpoint, cli, files, weights

ROOT = Path(__file__).resolve().parent.parent
LAST, PREVIOUS = "last.pth", "last.previous.pth"
PANELS = 3  # images to look at after each epoch


@dataclass
class Progress:
    """How far a run is: `step` optimiser steps into `epoch`, and what these steps saw."""

    epoch: int = 1
    step: int = 0
    pictures: int = 0
    bce: float = 0.0  # sums over the images of the epoch
    wiou: float = 0.0
    best: float = -math.inf  # S-measure of best.pth

    def count(self, figures: dict[str, float]) -> None:
        """Adds a step."""
        self.step += 1
        self.pictures += int(figures["pictures"])
        self.bce += figures["bce"] * figures["pictures"]
        self.wiou += figures["wiou"] * figures["pictures"]

    def losses(self) -> dict[str, float]:
        """The means over the images of the epoch so far."""
        bce, wiou = self.bce / self.pictures, self.wiou / self.pictures
        return {"loss": bce + wiou, "bce": bce, "wiou": wiou}

    def next_epoch(self) -> None:
        self.epoch, self.step, self.pictures, self.bce, self.wiou = self.epoch + 1, 0, 0, 0.0, 0.0

    def __str__(self) -> str:
        return f"epoch {self.epoch}, step {self.step}"


class State(NamedTuple):
    """What a resumed run continues with. No random state: order and flips depend on (seed, epoch) alone."""

    folder: Path
    model: SAM2UNeXT
    parts: dict[str, Any]  # with a `state_dict()`: optimizer, scheduler, scaler
    progress: Progress
    recipe: dict[str, Any]  # options that must not change


def save_last(state: State) -> None:
    """Writes last.pth: the network as `checkpoint.save_network` does, and all that its training continues with.

    The previous file becomes last.previous.pth. Of several processes the first one writes. Raises OSError.
    """
    if cli.ranks()[0] == 0:
        content = checkpoint.network_content(state.model, whole=not checkpoint.is_small(state.model))
        content |= {"parts": {name: part.state_dict() for name, part in state.parts.items()}}
        content |= {"progress": asdict(state.progress), "recipe": state.recipe, "epoch": state.progress.epoch}
        checkpoint.save(state.folder / LAST, content, previous=state.folder / PREVIOUS)


def stop_if_asked(state: State, stop: list[int]) -> None:
    """Saves and ends all processes if one of them got a signal, whose number is in `stop`."""
    device = state.model.head.weight.device
    number = int(cli.reduce_all(torch.tensor(max(stop, default=0), device=device), "MAX"))
    if number:
        save_last(state)
        if cli.ranks()[0] == 0:
            name, folder = signal.Signals(number).name, files.shown(state.folder)
            print(f"\ntrain.py: {name} after {state.progress}; --resume continues in {folder}", file=sys.stderr)
        raise SystemExit(128 + number)


def read_last(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newer complete file and its content; None if there is no file. Raises ValueError if all are damaged."""
    damaged = []
    for path in (folder / LAST, folder / PREVIOUS):
        try:
            content = weights.read(path)
            if is_run(content):
                if damaged:
                    print(f"{files.shown(damaged[0])} is damaged: continuing from {files.shown(path)}")
                return path, content
            damaged.append(path)
        except FileNotFoundError:  # the first is missing for a moment while it is being replaced
            continue
        except ValueError:
            damaged.append(path)
    if damaged:
        names = " and ".join(map(files.shown, damaged))
        raise ValueError(f"{names}: damaged, or from another program; remove them or name another --save_path")
    return None


def is_run(content: dict[str, Any]) -> bool:
    """Whether a file holds what `save_last` writes."""
    progress, recipe = content.get("progress"), content.get("recipe")
    return (
        isinstance(content.get("parts"), dict)
        and isinstance(progress, dict) and progress.keys() == asdict(Progress()).keys()
        and all(isinstance(value, (int, float)) for value in progress.values())
        and isinstance(recipe, dict) and isinstance(recipe.get("--epoch"), int)
    )  # fmt: skip


def restore_parts(path: Path, content: dict[str, Any], parts: dict[str, Any]) -> Progress:
    """Fills optimiser, scheduler and scaler from what `read_last` found; returns the progress. Raises ValueError."""
    try:
        for name, part in parts.items():
            part.load_state_dict(copy.deepcopy(content["parts"][name]))  # what was read is mapped from the file
    except Exception as error:  # they hardly check what they are given
        raise ValueError(
            f"{files.shown(path)}: its optimiser or scheduler does not fit; the file is damaged"
        ) from error
    return Progress(**content["progress"])


def start_anew(folder: Path) -> None:
    """Removes a finished run to make room for a new one. Raises ValueError if the run there is not finished."""
    found = read_last(folder)
    if found is None:
        return
    epoch, epochs = found[1]["progress"]["epoch"], found[1]["recipe"]["--epoch"]
    if epoch <= epochs:
        raise ValueError(
            f"{files.shown(folder)}: holds an unfinished run (epoch {epoch} of {epochs}): continue it with --resume, "
            f"or for a new run name another --save_path or delete {LAST} and {PREVIOUS}"
        )
    print(f"{files.shown(folder)}: replacing the finished run there")
    for name in (LAST, PREVIOUS, "best.pth", "log.jsonl"):
        (folder / name).unlink(missing_ok=True)


def check_recipe(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ValueError, with the remedy, if a resumed run would not continue as it began."""
    changed = [f"{name} was {then.get(name)}, now it is {now[name]}" for name in now if then.get(name) != now[name]]
    if changed:
        raise ValueError(
            f"{files.shown(path)}: a run must be resumed as it began, but {'; '.join(changed)}: give what it began "
            f"with, or start another run from its weights with --init {files.shown(path)} and a new --save_path"
        )


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Adds SIGTERM and Ctrl-C to the list, so that the current step can be finished; a second one acts as usual."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Log:
    """log.jsonl and the same in TensorBoard: a line every `every` steps with the means over them, and one per epoch.

    Lines beyond `progress`, where a resumed run starts, are removed, so that no step is logged twice.
    """

    def __init__(self, folder: Path, progress: Progress, every: int, steps_per_epoch: int, epochs: int):
        self.every, self.steps_per_epoch, self.epochs = every, steps_per_epoch, epochs
        path = folder / "log.jsonl"
        lines = path.read_bytes().splitlines(True) if path.exists() else []
        with files.replacing(path) as file:
            file.write(b"".join(line for line in lines if is_before(line, progress)))
        self.file = open(path, "a")  # noqa: SIM115 (closed in `close`)
        threading.excepthook = quiet  # TensorBoard writes in a thread, and its next call raises what failed there
        with files.writing(folder / "tensorboard"):
            self.board = SummaryWriter(folder / "tensorboard", purge_step=self.total(progress) + 1)
        self.restart_clock()

    def total(self, progress: Progress) -> int:
        """Steps since the start of the run."""
        return (progress.epoch - 1) * self.steps_per_epoch + progress.step

    def restart_clock(self) -> None:
        """Excludes what was not training (validation, the first start) from the rates."""
        self.window: list[dict[str, float]] = []
        self.since = time.perf_counter()

    def step(self, progress: Progress, figures: dict[str, float], device: str) -> None:
        """Logs a step. `figures`: pictures, bce, wiou, grad_norm, lr."""
        self.window.append(figures)
        if progress.step % self.every:
            return
        seconds = time.perf_counter() - self.since
        mean = {name: float(np.mean([figures[name] for figures in self.window])) for name in figures}
        pictures = mean.pop("pictures") * len(self.window)
        left = self.epochs * self.steps_per_epoch - self.total(progress)
        line = {"loss": mean["bce"] + mean["wiou"], **mean, "pictures_per_second": pictures / seconds}
        line |= {"memory_mb": peak_memory(device), "seconds_left": left * seconds / len(self.window)}
        self.write({"epoch": progress.epoch, "step": progress.step}, line, "step", self.total(progress))
        self.restart_clock()

    def epoch(self, progress: Progress, figures: dict[str, float], panels: Iterable[tuple[str, Tensor]]) -> None:
        """Logs the end of an epoch; in TensorBoard with named panels (3, H, W) in [0, 1]."""
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

    def close(self) -> None:
        self.file.close()
        with files.writing(self.board.log_dir):
            self.board.close()
        threading.excepthook = threading.__excepthook__


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


def peak_memory(device: str) -> float:
    """The peak, in megabytes, of tensors on the GPU or, on a CPU, of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # kB on Linux


def write_arguments(args: argparse.Namespace, more: dict[str, Any]) -> None:
    """Writes args.json: how the run was started, with the versions and the git revision. Raises OSError."""
    versions = {name: metadata.version(name) for name in ("torchvision", "timm", "numpy", "pillow")}
    versions |= {"python": platform.python_version(), "torch": torch.__version__}
    content = {"command": sys.argv, "arguments": vars(args), **more, "versions": versions, "git": git_revision()}
    with files.replacing(args.save_path / "args.json") as file:
        file.write(json.dumps(content, indent=1, default=str).encode() + b"\n")


def git_revision() -> str | None:
    """The revision of this program, with "-dirty" if files differ from it; None outside a git repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@torch.no_grad()
def validate(
    model: SAM2UNeXT, pairs: Sequence[tuple[Path, Path]], workers: int, stop: list[int]
) -> dict[str, float] | None:
    """S-measure, weighted F-measure and MAE of the maps that test.py would write; None if `stop` fills meanwhile."""
    rank, _, processes = cli.ranks()
    model.eval()
    device = model.head.weight.device
    scores = []

    def read(pair: tuple[Path, Path]) -> tuple[Tensor, np.ndarray]:
        return image_tensor(files.read_image(pair[0]), model.size), np.array(files.read_mask(pair[1]))

    with ThreadPoolExecutor(max(1, workers)) as pool:
        for image, truth in cli.in_order(pool, read, pairs[rank::processes], ahead=2 * workers):
            if stop:
                break
            probability = probability_map(model(image[None].to(device))[0], truth.shape)  # (H, W) in [0, 1]
            scores.append(pool.submit(metrics.score, stretch(probability).cpu().numpy(), truth))
        scores = cli.gather_all([None if stop else score.result() for score in scores] + [None] * bool(stop))
    if None in scores:
        return None
    figures = metrics.mean(scores).figures()
    return {name: figures[name] for name in ("Smeasure", "wFmeasure", "MAE")}


def panels(model: SAM2UNeXT, pairs: Sequence[tuple[Path, Path]]) -> Iterator[tuple[str, Tensor]]:
    """Image, mask and prediction side by side, (3, 256, 768) in [0, 1], of the first pairs, with their names."""
    model.eval()
    for image_path, mask_path in pairs[:PANELS]:
        image, mask = files.read_image(image_path), files.read_mask(mask_path)
        parts = to_tensor(image), to_tensor(mask), torch.from_numpy(model.predict(image))[None]
        parts = [F.interpolate(part.expand(1, 3, -1, -1), (256, 256), mode="area") for part in parts]
        yield files.shown(image_path.stem), torch.cat(parts, dim=3)[0]
