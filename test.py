"""Writes the prediction maps of a trained SAM2-UNeXT for folders of pictures, single pictures or a benchmark.

    python test.py --checkpoint runs/mine/SAM2-UNeXT-20.pth --test_image_path data/images --save_path maps
    python test.py --checkpoint runs/mine/SAM2-UNeXT-20.pth --test_image_path a.jpg --save map,cutout --save_path out
    python test.py --checkpoint runs/COD/SAM2-UNeXT-20.pth --benchmark COD /data/COD --save_path runs/COD/predictions

A map is a greyscale PNG with the picture's name: 255 where the network is surest of the foreground, 0 where least. It
has the picture's size or, with `--test_gt_path data/masks` or a benchmark, that of the ground truth of the same name.
`--save` adds, in folders of these names beside the maps: mask (0 and 255, cut at --threshold of the map), overlay (the
picture with the object tinted) and cutout (the picture with the map as transparency). A run that was stopped goes on
where it was.
"""

import argparse
import hashlib
import os
import struct
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import benchmarks
import cli
import files
from dataset import image_tensor
from SAM2UNeXT import SAM2UNeXT, probability_map, stretch

KINDS = {"map": ".png", "mask": ".png", "overlay": ".jpg", "cutout": ".png"}
LESS_MEMORY = "--precision bf16, or a smaller --batch_size or --size, need less"
TINT = (255, 0, 128)  # of the object in an overlay, RGB


class Settings(NamedTuple):
    """What to write, and how."""

    kinds: tuple[str, ...]  # of KINDS
    checkpoint: str  # its fingerprint
    precision: str  # in which the network computes
    size: int  # side of the network's input, pixels
    stretch: bool
    flip: bool
    threshold: float  # of the map in [0, 1]


class Task(NamedTuple):
    image: Path
    ground_truth: Path | None  # whose size the map takes
    folder: Path  # where the map goes

    def output(self, kind: str) -> Path:
        folder = self.folder if kind == "map" else self.folder / kind
        return folder / f"{self.image.stem}{KINDS[kind]}"


class Sample(NamedTuple):
    task: Task
    image: Tensor  # (3, S, S) normalised
    size: tuple[int, int]  # (height, width) of the map
    notes: dict[str, str]  # of the files to write, by kind
    picture: Image.Image | None  # where a kind shows it


def read(task: Task, settings: Settings) -> Sample | OSError:
    """A picture made ready for the network, or the error that names the file which cannot be read."""
    try:
        # Benchmarks take pixels as they are stored; a picture of one's own is meant as viewers show it.
        picture = files.read_image(task.image, upright=task.ground_truth is None)
        map_size = files.read_size(task.ground_truth) if task.ground_truth else (picture.height, picture.width)
        texts = notes(task, settings)
    except OSError as error:
        return error
    shown = picture if {"overlay", "cutout"} & {*settings.kinds} else None
    return Sample(task, image_tensor(picture, settings.size), map_size, texts, shown)


def notes(task: Task, settings: Settings) -> dict[str, str]:
    """What the file of each kind is made from, to be written into it: a run that goes on keeps what has its own note.

    Raises OSError that names the file that cannot be read.
    """
    made = {
        "checkpoint": settings.checkpoint,
        "precision": settings.precision,
        "size": settings.size,
        "stretch": settings.stretch,
        "flip": settings.flip,
    }
    try:
        with open(task.image, "rb") as file:
            made["picture"] = f"{zlib.crc32(file.read(2**16)):08x}-{os.fstat(file.fileno()).st_size}"
    except OSError as error:
        raise files.unreadable(task.image, error) from error
    truth = files.read_size(task.ground_truth) if task.ground_truth else ()
    made["ground truth"] = "x".join(map(str, truth)) or "none"
    text = "; ".join(f"{name} {value}" for name, value in made.items())
    cut = f"{text}; threshold {settings.threshold}"
    return {kind: cut if kind in ("mask", "overlay") else text for kind in settings.kinds}


def with_note(content: bytes, text: str) -> bytes:
    """A PNG or JPEG file with a comment, in the chunk or segment that the formats have for it."""
    comment = text.encode("ascii")
    if content.startswith(b"\xff\xd8"):
        return content[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + content[2:]
    chunk = b"tEXtComment\0" + comment
    ends = 33  # of the signature and the header, which must be first
    framed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content[:ends] + framed + content[ends:]


def read_note(path: Path) -> str:
    """The comment in a file; empty where there is none."""
    try:
        with files.opened(path) as picture:
            comment = picture.info.get("Comment") or picture.info.get("comment") or ""
    except OSError:
        return ""
    return comment.decode("ascii", "replace") if isinstance(comment, bytes) else comment


def render(kind: str, grey: np.ndarray, picture: Image.Image | None, threshold: float) -> bytes:
    """The content of one file: PNG or, for the overlay, JPEG, from the map (H, W) in grey levels."""
    if kind in ("overlay", "cutout"):
        pixels = np.asarray(picture)[..., ::-1]  # (H, W, 3), blue first as OpenCV has it
        if grey.shape != pixels.shape[:2]:  # of the ground truth's size
            grey = cv2.resize(grey, pixels.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    mask = (grey >= threshold * 255).astype(np.uint8)
    if kind == "map":
        pixels = grey
    elif kind == "mask":
        pixels = mask * 255
    elif kind == "cutout":
        pixels = np.dstack([pixels, grey])
    else:
        tint = np.array(TINT[::-1], np.float32)
        pixels = np.where(mask[..., None] > 0, 0.55 * pixels + 0.45 * tint, pixels).astype(np.uint8)
        outline, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(pixels, outline, -1, TINT[::-1], thickness=max(1, round(max(mask.shape) / 400)))
    return cv2.imencode(KINDS[kind], pixels)[1].tobytes()


def write(grey: np.ndarray, sample: Sample, settings: Settings) -> None:
    """Writes the files of one picture. Raises OSError that names the file."""
    for kind, text in sample.notes.items():
        with files.replacing(sample.task.output(kind)) as file:
            file.write(with_note(render(kind, grey, sample.picture, settings.threshold), text))


@torch.inference_mode()
def grey_map(logits: Tensor, sample: Sample, settings: Settings) -> np.ndarray:
    """The map of one picture in grey levels, uint8 (H, W), from its logits (views, 1, S, S)."""
    probability = torch.stack([probability_map(view, sample.size) for view in logits]).mean(0)
    grey = stretch(probability) if settings.stretch else (probability * 255).to(torch.uint8)
    return grey.cpu().numpy()


def finish(logits: Tensor, sample: Sample, settings: Settings) -> None:
    write(grey_map(logits, sample, settings), sample, settings)


@torch.inference_mode()
def predict_batch(model: SAM2UNeXT, batch: Sequence[Sample], flip: bool, least: int = 1) -> Tensor:
    """The logits (B, views, 1, S, S) of the pictures: as they are and, with `flip`, mirrored and mirrored back.

    The network sees at least `least` pictures: a compiled one would be compiled again for a shorter batch.
    """
    device = next(model.parameters()).device
    images = [sample.image for sample in batch]
    images = torch.stack(images + images[:1] * (least - len(images)))  # (B, 3, S, S)
    if device.type == "cuda":
        images = images.pin_memory()  # or the copy would wait for the network
    images = images.to(device, non_blocking=True)
    views = [model(images)]
    if flip:
        views.append(model(images.flip(-1)).flip(-1))
    return torch.stack(views, dim=1)[: len(batch)]


def predict(
    model: SAM2UNeXT,
    tasks: Iterable[Task],
    settings: Settings,
    batch_size: int,
    workers: int,
    bar: tqdm,
    least: int = 1,
) -> list[OSError]:
    """Reads, predicts and writes: threads decode the next pictures and encode the last maps while the network runs.

    The network sees at least `least` pictures at a time. However many there are, about 4 batches and 2 maps a worker
    are held at a time. Returns the errors of the pictures that cannot be read, each with the file's name. Raises
    OSError that names the file that cannot be written.
    """
    ahead = max(workers, 2 * batch_size)
    written: deque[Future[None]] = deque()
    failed: list[OSError] = []
    with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(workers) as writers:
        samples = cli.in_order(readers, lambda task: read(task, settings), tasks, ahead)
        while group := list(islice(samples, batch_size)):
            failed += [sample for sample in group if isinstance(sample, OSError)]
            batch = [sample for sample in group if isinstance(sample, Sample)]
            logits = predict_batch(model, batch, settings.flip, least) if batch else []
            for sample, views in zip(batch, logits, strict=True):
                if views.is_cuda:  # waiting for the GPU is left to the writers: it has its next batch meanwhile
                    work = writers.submit(finish, views, sample, settings)
                else:  # computing in several threads would slow down the network
                    work = writers.submit(write, grey_map(views, sample, settings), sample, settings)
                written.append(work)
                if len(written) > 2 * workers:
                    written.popleft().result()
            bar.update(len(group))
        while written:
            written.popleft().result()
    return failed


def find_tasks(image_paths: Sequence[str], gt_path: str | None, save_path: Path) -> list[Task]:
    """One task a picture, with its ground truth where `gt_path` has one; ValueError where it has none at all."""
    pictures = files.gather(image_paths)
    truths = files.find(gt_path) if gt_path else {}
    tasks = [Task(path, truths.get(stem), save_path) for stem, path in pictures.items()]
    without = [task.image.name for task in tasks if task.ground_truth is None]
    if gt_path and len(without) == len(tasks):
        raise ValueError(
            f"no ground truth in {files.shown(gt_path)} has the name of a picture in {files.listing(image_paths)}"
        )
    if gt_path and without:
        print(
            f"{len(without)} pictures without ground truth, their maps get the pictures' size: {files.listing(without)}"
        )
    return tasks


def find_benchmark_tasks(name: str, root: str, sets: Sequence[str], save_path: Path) -> list[Task]:
    """One task a picture of a benchmark's test sets, each set in a folder of its name below `save_path`."""
    tasks = []
    for test_set, places in benchmarks.find_test(benchmarks.load(name), root, sets).items():
        for place in places:
            print(place)
            tasks += [Task(image, truth, save_path / test_set) for image, truth in place.pairs]
    return tasks


def check_outputs(tasks: Sequence[Task], kinds: Sequence[str]) -> None:
    """Raises ValueError where a file would be written over a picture or its ground truth."""
    inputs = {path.resolve() for task in tasks for path in (task.image, task.ground_truth) if path}
    for task in tasks:
        if any(task.output(kind).resolve() in inputs for kind in kinds):
            raise ValueError(
                f"--save_path {files.shown(task.folder)}: maps would replace pictures or ground truth; "
                "name another folder"
            )


def fingerprint(model: SAM2UNeXT) -> str:
    """Tells trained networks apart: a hash of all that was trained."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def still_to_do(tasks: list[Task], settings: Settings, overwrite: bool, batch_size: int) -> list[Task]:
    """The tasks whose files are not all there yet; makes the folders.

    They come in whole batches: what a picture shares its batch with decides the last bits of its map. Raises ValueError
    where files are there that were made otherwise, OSError where nothing can be written.
    """
    done = set()
    other: dict[str, list[str]] = {}  # what differs, and the files
    for task in [] if overwrite else tasks:
        there = {kind: path for kind in settings.kinds if (path := task.output(kind)).exists()}
        texts = notes(task, settings) if there else {}
        for kind, path in there.items():
            found, wanted = read_note(path).split("; "), texts[kind].split("; ")
            if found == wanted:
                done.add(path)
                continue
            fields = {part.rsplit(" ", 1)[0] for part in set(wanted) - set(found)} if len(found) > 1 else {"program"}
            other.setdefault(" and ".join(sorted(fields)), []).append(path.name)
    if other:
        listed = "; ".join(f"with another {fields}: {files.listing(names)}" for fields, names in other.items())
        raise ValueError(
            f"--save_path {files.shown(tasks[0].folder)}: holds files made otherwise ({listed}); replace them with "
            "--overwrite or name another folder"
        )
    for folder in sorted({task.output(kind).parent for task in tasks for kind in settings.kinds}):
        files.output_folder(folder)
    groups = (tasks[start : start + batch_size] for start in range(0, len(tasks), batch_size))
    return [
        task for group in groups
        if not all(task.output(kind) in done for task in group for kind in settings.kinds)
        for task in group
    ]  # fmt: skip


def main(args: argparse.Namespace) -> None:
    rank, _, processes = cli.ranks()
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (only the first process tells how it goes)
    with cli.exit_on_error(cli.NOTHING_STARTED, LESS_MEMORY):
        device = cli.device(args.device)
        cli.keep_freed_memory(device)
        precision = cli.precision(args.precision, device)
        save_path = args.save_path
        if bool(args.benchmark) == bool(args.test_image_path):
            raise ValueError("give either --test_image_path or --benchmark")
        if args.benchmark and args.test_gt_path:
            raise ValueError("--benchmark knows the ground truth: leave out --test_gt_path")
        if args.sets and not args.benchmark:
            raise ValueError("--sets belongs to --benchmark")
        if args.benchmark:
            tasks = find_benchmark_tasks(*args.benchmark, args.sets, save_path)
        else:
            tasks = find_tasks(args.test_image_path, args.test_gt_path, save_path)
        check_outputs(tasks, args.save)
        total = len(tasks)
        # Of several processes each takes every so many batches, and looks after their files alone.
        tasks = [task for i, task in enumerate(tasks) if i // args.batch_size % processes == rank]
        files.output_folder(save_path)
        paths = args.checkpoint, args.hiera_path, args.dinov2_path
        model = SAM2UNeXT.from_checkpoint(*paths, precision=precision, download=args.download).to(device)
        settings = Settings(
            kinds=args.save,
            checkpoint=fingerprint(model),
            precision=str(precision).removeprefix("torch."),
            size=args.size or model.size,
            stretch=not args.no_stretch,
            flip=args.flip,
            threshold=args.threshold,
        )
        remaining = still_to_do(tasks, settings, args.overwrite, args.batch_size)
        if args.compile:
            model.compile()
    share = f", of which this process takes {len(tasks):,}" if processes > 1 else ""
    before = f"; {len(tasks) - len(remaining):,} of {len(tasks):,} are done already" if remaining != tasks else ""
    print(
        f"{files.shown(args.checkpoint)} on {device} in {settings.precision}; "
        f"{files.count(total, 'picture')}{share}{before}"
    )
    with cli.exit_on_error(cli.NOT_COMPLETED, LESS_MEMORY):
        done = len(tasks) - len(remaining)
        with tqdm(total=len(tasks), initial=done, unit="img", disable=rank > 0) as bar:
            least = args.batch_size if args.compile else 1
            failed = predict(model, remaining, settings, args.batch_size, args.workers, bar, least)
        if failed:
            print(*failed, sep="\n", file=sys.stderr)
            raise OSError(f"{len(failed)} of {len(tasks)} pictures could not be read; all others are done")
    written = ", ".join(f"{kind}s" for kind in settings.kinds)
    print(f"{files.count(len(tasks), 'picture')}: {written} in {files.shown(save_path)}")


def kinds(text: str) -> tuple[str, ...]:
    """An argument type: names of KINDS, separated by commas."""
    words = [word.strip() for word in text.split(",")]
    if unknown := [word for word in words if word not in KINDS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in words)


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="SAM2-UNeXT-<epoch>.pth, of this program or the original")
    parser.add_argument("--hiera_path", help="SAM 2's weights, where they are not where a small checkpoint says")
    parser.add_argument("--dinov2_path", help="the auxiliary encoder's weights, likewise")
    parser.add_argument("--download", action="store_true", help="download the encoders that are not found to weights/")

    data = parser.add_argument_group("pictures")
    data.add_argument("--test_image_path", nargs="+", metavar="PATH", help="folders of pictures, or single pictures")
    data.add_argument("--test_gt_path", metavar="DIR", help="their ground truth, for the size of the maps only")
    data.add_argument("--benchmark", nargs=2, metavar=("NAME", "ROOT"), help=cli.BENCHMARK_HELP)
    data.add_argument("--sets", nargs="+", default=[], metavar="SET", help="of the benchmark, these test sets only")

    output = parser.add_argument_group("output")
    output.add_argument("--save_path", type=cli.path, required=True, metavar="DIR", help="where the maps go")
    output.add_argument("--save", type=kinds, default="map", metavar="KINDS", help=f"some of {','.join(KINDS)}")
    output.add_argument("--threshold", type=cli.number(float, 0, 1), default=0.5, help="of masks and overlays")
    output.add_argument("--no_stretch", action="store_true", help="255 x probability, not stretched to 0 to 255")
    output.add_argument("--overwrite", action="store_true", help="make again what is there already")

    run = parser.add_argument_group("run")
    run.add_argument("--precision", default="auto", choices=cli.PRECISIONS, help="auto: bf16 where native, else fp32")
    run.add_argument("--flip", action="store_true", help="mean with the mirrored picture; takes twice the time")
    run.add_argument("--compile", action="store_true", help="by torch, for GPUs: takes minutes at the start")
    run.add_argument(
        "--size", type=cli.number(multiple=32, least=32), help="side of the input, px; default: that of the training"
    )
    run.add_argument("--batch_size", type=cli.number(), default=1, help="pictures at a time")
    run.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... or auto")
    run.add_argument(
        "--workers", type=cli.number(), default=min(8, os.cpu_count() or 1), help="threads that read, and that write"
    )
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
