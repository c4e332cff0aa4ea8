"""Writes the prediction maps of a trained SAM2-UNeXT for the pictures of a folder.

    python test.py --checkpoint runs/mine/SAM2-UNeXT-20.pth --test_image_path data/images --save_path runs/mine/maps

A map is a greyscale PNG with the picture's name: 255 where the network is surest of the foreground, 0 where least. It
has the picture's size or, with `--test_gt_path data/masks`, that of the ground truth of the same name.
"""

import argparse
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import cli
import files
from dataset import image_tensor
from SAM2UNeXT import SAM2UNeXT, probability_map


class Task(NamedTuple):
    image: Path
    ground_truth: Path | None  # whose size the map takes
    output: Path


class Sample(NamedTuple):
    task: Task
    image: Tensor  # (3, S, S) normalised
    size: tuple[int, int]  # (height, width) of the map


def read(task: Task, size: int) -> Sample:
    """A picture made ready for the network. Raises OSError that names the file."""
    picture = files.read_image(task.image)
    map_size = files.read_size(task.ground_truth) if task.ground_truth else (picture.height, picture.width)
    return Sample(task, image_tensor(picture, size), map_size)


def stretch(probability: np.ndarray) -> np.ndarray:
    """A map in [0, 1] with its range stretched to all of 0 to 255: uint8, fractions cut off."""
    low, high = probability.min(), probability.max()
    return ((probability - low) / (high - low + 1e-8) * 255).astype(np.uint8)


def write(probability: np.ndarray, path: Path) -> None:
    """Writes the stretched map as PNG. Raises OSError that names the file."""
    _, png = cv2.imencode(".png", stretch(probability))
    try:
        with files.replacing(path) as file:
            file.write(png)
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror}") from error


def batched(samples: Iterator[Sample], batch_size: int) -> Iterator[list[Sample]]:
    while batch := list(islice(samples, batch_size)):
        yield batch


@torch.inference_mode()
def predict(model: SAM2UNeXT, tasks: Iterable[Task], size: int, batch_size: int, workers: int, bar: tqdm) -> None:
    """Reads, predicts and writes: threads decode the next pictures and encode the last maps while the network runs.

    However many pictures there are, about 4 batches and 2 maps a worker are held at a time. Raises OSError that names
    the file that cannot be read or written.
    """
    device = next(model.parameters()).device
    ahead = max(workers, 2 * batch_size)
    written: deque[Future[None]] = deque()
    with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(workers) as writers:
        samples = cli.in_order(readers, lambda task: read(task, size), tasks, ahead)
        for batch in batched(samples, batch_size):
            images = torch.stack([sample.image for sample in batch]).to(device, non_blocking=True)  # (B, 3, S, S)
            for sample, logits in zip(batch, model(images), strict=True):
                probability = probability_map(logits, sample.size)  # (H, W) in [0, 1]
                written.append(writers.submit(write, probability, sample.task.output))
                if len(written) > 2 * workers:
                    written.popleft().result()
            bar.update(len(batch))
        while written:
            written.popleft().result()


def find_tasks(image_path: str, gt_path: str | None, save_path: Path) -> list[Task]:
    """One task a picture, with its ground truth where `gt_path` has one.

    Raises ValueError where it has none at all, or where a map would be written over a picture or its ground truth.
    """
    pictures = files.find(image_path)
    truths = files.find(gt_path) if gt_path else {}
    tasks = [Task(path, truths.get(stem), save_path / f"{stem}.png") for stem, path in pictures.items()]
    inputs = {path.resolve() for path in (*pictures.values(), *truths.values())}
    if any(task.output.resolve() in inputs for task in tasks):
        raise ValueError(f"--save_path {save_path}: maps would replace pictures or ground truth; name a new folder")
    without = [task.image.name for task in tasks if task.ground_truth is None]
    if gt_path and len(without) == len(tasks):
        raise ValueError(f"no ground truth in {gt_path} has the name of a picture in {image_path}")
    if gt_path and without:
        print(
            f"{len(without)} pictures without ground truth, their maps get the pictures' size: {files.listing(without)}"
        )
    return tasks


def main(args: argparse.Namespace) -> None:
    with cli.exit_on_error(cli.NOTHING_STARTED):
        device = cli.device(args.device)
        tasks = find_tasks(args.test_image_path, args.test_gt_path, Path(args.save_path))
        save_path = files.output_folder(args.save_path)
        model = SAM2UNeXT.from_checkpoint(args.checkpoint).to(device)
    print(f"{args.checkpoint} on {device}")
    with cli.exit_on_error(cli.NOT_COMPLETED), tqdm(total=len(tasks), unit="img") as bar:
        predict(model, tasks, args.size or model.size, args.batch_size, args.workers, bar)
    print(f"{len(tasks)} maps in {save_path}")


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="SAM2-UNeXT-<epoch>.pth, of this program or the original")
    parser.add_argument("--test_image_path", required=True, metavar="DIR", help="the pictures")
    parser.add_argument("--test_gt_path", metavar="DIR", help="their ground truth, for the size of the maps only")
    parser.add_argument("--save_path", required=True, metavar="DIR", help="where the maps go")
    parser.add_argument(
        "--size", type=cli.number(multiple=32, least=32), help="side of the input, px; default: that of the training"
    )
    parser.add_argument("--batch_size", type=cli.number(), default=1, help="pictures at a time")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... or auto")
    parser.add_argument(
        "--workers", type=cli.number(), default=min(8, os.cpu_count() or 1), help="threads that read, and that write"
    )
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
