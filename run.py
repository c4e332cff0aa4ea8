"""What a training run keeps and tells: last.pth to go on from, logs, scores on validation pictures.

Apart from train.py because none of it is about learning. H, W: height and width.
"""

import argparse
import copy
import json
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import checkpoint
import cli
import files
import metrics
import weights
from dataset import MEAN, STD, image_tensor, mask_tensor
from SAM2UNeXT import SAM2UNeXT, probability_map, stretch

ROOT = Path(__file__).resolve().parent
LAST, PREVIOUS = "last.pth", "last.previous.pth"
MASKS_LOOKED_AT = 64  # at the start, about
PANELS = 3  # pictures to look at after each epoch


@dataclass
class Progress:
    """How far a run is: `step` optimiser steps into `epoch`, and what these steps saw."""

    epoch: int = 1
    step: int = 0
    pictures: int = 0
    bce: float = 0.0  # sums over the epoch's pictures
    wiou: float = 0.0
    best: float = -math.inf  # S-measure of best.pth

    def count(self, figures: dict[str, float]) -> None:
        """Adds a step."""
        self.step += 1
        self.pictures += int(figures["pictures"])
        self.bce += figures["bce"] * figures["pictures"]
        self.wiou += figures["wiou"] * figures["pictures"]

    def losses(self) -> dict[str, float]:
        """The means over the epoch's pictures so far."""
        bce, wiou = self.bce / self.pictures, self.wiou / self.pictures
        return {"loss": bce + wiou, "bce": bce, "wiou": wiou}

    def next_epoch(self) -> None:
        """Forgets the steps of the epoch that ends."""
        self.epoch, self.step, self.pictures, self.bce, self.wiou = self.epoch + 1, 0, 0, 0.0, 0.0


def check_files(pairs: Sequence[tuple[Path, Path]], workers: int) -> None:
    """Opens every file's header, and some masks whole; prints what is odd. Raises OSError that lists unreadable ones.

    So that a run does not end in the middle for a file that could have been found out at once.
    """
    paths = [path for pair in pairs for path in pair]
    masks = paths[1 :: 2 * max(1, len(pairs) // MASKS_LOOKED_AT)]

    def read(function: Callable[[Path], Any], path: Path) -> Any:
        try:
            return function(path)
        except OSError as error:
            return error

    with ThreadPoolExecutor(max(1, workers)) as pool:
        sizes = pool.map(partial(read, files.read_size), paths)
        # Seen where it takes longer than that: on network drives.
        sizes = list(tqdm(sizes, "opening files", len(paths), unit="file", delay=2, leave=False))
        dark = list(pool.map(partial(read, lambda path: files.is_dark(files.read_mask(path))), masks))
    failed = {str(result): None for result in [*sizes, *dark] if isinstance(result, OSError)}
    if failed:
        raise OSError("; ".join(failed))
    if any(dark):
        names = [path.name for path, is_dark in zip(masks, dark, strict=True) if is_dark]
        print(f"warning: {files.dark_masks(names, len(masks))}; tools/check_dataset.py looks at all masks")
    wrong = [
        f"{mask.name} {has} instead of {wanted}"
        for (_, mask), wanted, has in zip(pairs, sizes[::2], sizes[1::2], strict=True)
        if has != wanted
    ]
    if wrong:
        print(
            f"warning: {files.count(len(wrong), 'mask')} of another (height, width) than the picture; both are fitted "
            f"to the network's square: {files.listing(wrong)}"
        )


def save_last(folder: Path, model: torch.nn.Module, parts: dict[str, Any], progress: Progress, recipe: dict) -> None:
    """Writes last.pth: the network as `checkpoint.save_network` has it and all that its training goes on with.

    `parts` have a `state_dict()`: optimiser, scheduler, scaler. No random state: order and flips come from (seed,
    epoch), and nothing else is drawn. The file before it stays as last.previous.pth. Raises OSError.
    """
    content = checkpoint.network_content(model, whole=not checkpoint.is_small(model))
    content |= {"parts": {name: part.state_dict() for name, part in parts.items()}}
    content |= {"progress": asdict(progress), "recipe": recipe, "epoch": progress.epoch}
    checkpoint.save(folder / LAST, content, previous=folder / PREVIOUS)


def read_last(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole file of both and what it holds; None where there is neither. Says so where it falls back.

    Raises ValueError where none is whole.
    """
    damaged = []
    for path in (folder / LAST, folder / PREVIOUS):
        try:
            content = weights.read(path)
            if is_run(content):
                if damaged:
                    print(f"{files.shown(damaged[0])} is damaged: going on from {files.shown(path)}")
                return path, content
            damaged.append(path)
        except FileNotFoundError:  # the first is missing for a moment while it is being replaced
            continue
        except ValueError:
            damaged.append(path)
    if damaged:
        raise ValueError(
            f"{' and '.join(map(files.shown, damaged))}: damaged or another program's; delete to start anew"
        )
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


def go_on(path: Path, content: dict[str, Any], parts: dict[str, Any]) -> Progress:
    """Fills optimiser, scheduler and scaler from what `read_last` found; how far the run is. Raises ValueError."""
    try:
        for name, part in parts.items():
            part.load_state_dict(copy.deepcopy(content["parts"][name]))  # what was read is mapped from the file
    except Exception as error:  # they check little of what they are given
        raise ValueError(
            f"{files.shown(path)}: its optimiser or scheduler does not fit: the file is damaged"
        ) from error
    return Progress(**content["progress"])


def start_anew(folder: Path) -> None:
    """Clears the way for a new run where a finished one lies. Raises ValueError where it is not finished."""
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
    """Raises ValueError, with the mend, unless a run goes on as it began."""
    changed = [f"{name} was {then.get(name)}, now it is {now[name]}" for name in now if then.get(name) != now[name]]
    if changed:
        raise ValueError(
            f"{files.shown(path)}: a run must be resumed as it began, but {'; '.join(changed)}: give what it began "
            f"with, or start another run from its weights with --init {files.shown(path)} and a new --save_path"
        )


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C are only noted, in the list, so that the step under way can be finished and saved.

    A second one acts as ever.
    """
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


def obey_parent_alone(worker: int) -> None:
    """Starts a worker of the data loader: whoever else sends it SIGTERM or Ctrl-C, the step under way needs it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=end_when_parent_says, daemon=True).start()


def end_when_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class Log:
    """log.jsonl and the same in TensorBoard: a line every `every` steps, means over these steps, and one each epoch.

    Lines beyond `progress`, where a resumed run starts, are cut off: no step stands there twice.
    """

    def __init__(self, folder: Path, progress: Progress, every: int, steps_per_epoch: int, epochs: int):
        self.every, self.steps_per_epoch, self.epochs = every, steps_per_epoch, epochs
        path = folder / "log.jsonl"
        kept = (
            [line for line in path.read_bytes().splitlines(True) if is_behind(line, progress)] if path.exists() else []
        )
        with files.replacing(path) as file:
            file.write(b"".join(kept))
        self.file = open(path, "a")  # noqa: SIM115 (closed in `close`)
        self.board = SummaryWriter(folder / "tensorboard", purge_step=self.total(progress) + 1)
        self.restart_clock()

    def total(self, progress: Progress) -> int:
        """Steps since the beginning."""
        return (progress.epoch - 1) * self.steps_per_epoch + progress.step

    def restart_clock(self) -> None:
        """Leaves what was not training (validation, the first start) out of the rates."""
        self.window: list[dict[str, float]] = []
        self.since = time.perf_counter()

    def step(self, progress: Progress, figures: dict[str, float], device: str) -> None:
        """Takes note of a step. `figures`: pictures, bce, wiou, grad_norm, lr."""
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

    def epoch(self, progress: Progress, figures: dict[str, float]) -> None:
        """Takes note of the end of an epoch."""
        self.write({"epoch": progress.epoch}, figures, "epoch", self.total(progress))

    def write(self, place: dict[str, int], figures: dict[str, float], group: str, total: int) -> None:
        try:
            self.file.write(json.dumps(place | figures) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(f"{files.shown(self.file.name)}: cannot be written: {error.strerror}") from error
        for name, value in figures.items():
            self.board.add_scalar(f"{group}/{name}", value, total)

    def panels(self, progress: Progress, panels: Iterable[tuple[str, Tensor]]) -> None:
        """Named panels (3, H, W) in [0, 1] for TensorBoard."""
        for name, panel in panels:
            self.board.add_image(name, panel, self.total(progress))

    def close(self) -> None:
        self.file.close()
        self.board.close()


def is_behind(line: bytes, progress: Progress) -> bool:
    """Whether a line of the log tells of what a run at `progress` has behind it; False for one that was cut short."""
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return (entry["epoch"], entry.get("step", math.inf)) <= (progress.epoch, progress.step) and line.endswith(b"\n")


def peak_memory(device: str) -> float:
    """The most megabytes that tensors took on the GPU or, on a CPU, that the process took."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # kB on Linux


def write_arguments(folder: Path, args: argparse.Namespace, more: dict[str, Any]) -> None:
    """args.json: with what a run was started, down to versions and the git revision. Raises OSError."""
    libraries = {"torch": torch, "torchvision": torchvision, "timm": timm, "numpy": np, "pillow": PIL}
    versions = {"python": platform.python_version()} | {name: lib.__version__ for name, lib in libraries.items()}
    content = {"command": sys.argv, "arguments": vars(args), **more, "versions": versions, "git": git_revision()}
    with files.replacing(folder / "args.json") as file:
        file.write(json.dumps(content, indent=1, default=str).encode() + b"\n")


def git_revision() -> str | None:
    """The revision of this program, "-dirty" behind it where files differ from it; None outside a git repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@torch.no_grad()
def validate(
    model: SAM2UNeXT, pairs: Sequence[tuple[Path, Path]], workers: int, stop: list[int]
) -> dict[str, float] | None:
    """S-measure, weighted F-measure and MAE of the maps that test.py would write; None where `stop` fills meanwhile.

    Each process takes a share of the pairs. Raises OSError or ValueError that names a file.
    """
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
        scores = of_all_processes([None if stop else score.result() for score in scores] + [None] * bool(stop))
    if None in scores:
        return None
    figures = metrics.mean(scores).figures()
    return {name: figures[name] for name in ("Smeasure", "wFmeasure", "MAE")}


@torch.no_grad()
def panels(model: SAM2UNeXT, pairs: Sequence[tuple[Path, Path]]) -> Iterator[tuple[str, Tensor]]:
    """Picture, mask and prediction side by side, (3, 256, 768) in [0, 1], of the first pairs, with their names."""
    model.eval()
    for image_path, mask_path in pairs[:PANELS]:
        image = image_tensor(files.read_image(image_path), model.size)
        prediction = model(image[None].to(model.head.weight.device))[0].sigmoid().cpu()
        picture = image * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        mask = mask_tensor(files.read_mask(mask_path), model.size)
        panel = torch.cat([picture, mask.expand(3, -1, -1), prediction.expand(3, -1, -1)], dim=2)
        yield files.shown(image_path.stem), F.interpolate(panel[None], (256, 768), mode="area")[0].clamp(0, 1)


def over_processes(figures: Tensor, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """The figures of all processes put together, in place."""
    if dist.is_initialized():
        dist.all_reduce(figures, operation)
    return figures


def of_all_processes(items: list) -> list:
    """The items of all processes one behind the other."""
    if not dist.is_initialized():
        return items
    parts: list[list] = [[]] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]
