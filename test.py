"""Writes the prediction maps of a trained SAM2-UNeXT for folders of images, single images or a benchmark.

    python test.py --checkpoint runs/mine/SAM2-UNeXT-20.pth --test_image_path data/images --save_path maps
    python test.py --checkpoint runs/mine/SAM2-UNeXT-20.pth --test_image_path a.jpg --save map,cutout --save_path out
    python test.py ... --save cutout,composite --crop --format webp --background white
    python test.py ... --save cutout --largest --crop 0.1 --canvas 2000x2000
    python test.py --checkpoint runs/COD/SAM2-UNeXT-20.pth --benchmark COD /data/COD --save_path runs/COD/predictions
    torchrun --standalone --nproc_per_node 4 test.py ...                                     on four GPUs

A map is a greyscale PNG with the image's name: 255 where the network is most certain of the object, 0 where least. It
has the image's size or, with `--test_gt_path data/masks` or a benchmark, that of the ground truth of the same name.
`--save` adds, in folders of these names beside the maps: mask (0 and 255, the map cut at --threshold), overlay (the
image with the object tinted), cutout (the object in its own colours, with alpha) and composite (that on --background).
The same command continues an interrupted run.
"""

import argparse
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dataset import image_tensor
from evaluation import benchmarks
from SAM2UNeXT import SAM2UNeXT, probability_map, stretch
from unext import checkpoint, cli, device, files, output, pairing
from unext.cutout import identity, object_box
from unext.errors import InputError, diagnosis
from unext.images import FAR, configure_reading, for_network, read_photo, read_size
from unext.log import versions
from unext.output import KINDS, Prediction, Task
from unext.pairing import SAME, MaskNames
from unext.workers import cores, in_order, progress_bar

LESS_MEMORY = "--precision bf16, or a smaller --batch_size or --size, need less"


class Sample(NamedTuple):
    """An image ready for the network."""

    task: Task
    tensor: Tensor  # (3, S, S) normalised
    size: tuple[int, int]  # (height, width) of the map
    image: Image.Image | None  # RGB or RGBA, for files that show it
    far: str  # a warning about an unusual range of values, or empty


def read(task: Task, size: int, keep_image: bool = False) -> Sample | OSError:
    """The sample for a network whose input has the side `size`, or the error that names a file."""
    try:
        # Benchmarks take pixels as they are stored; without ground truth, an image is taken as viewers show it.
        image = read_photo(task.image, as_shown=task.ground_truth is None)
        map_size = read_size(task.ground_truth) if task.ground_truth else (image.height, image.width)
    except OSError as error:
        return error
    pixels = image.convert("RGB") if task.ground_truth else for_network(image)
    far = image.info.pop(FAR, "")
    return Sample(task, image_tensor(pixels, size), map_size, image if keep_image else None, far)


@torch.inference_mode()
def predict_batch(model: SAM2UNeXT, batch: Sequence[Sample], flip: bool, min_images: int = 1) -> Tensor:
    """The logits (B, views, 1, S, S) of the images: as they are and, with `flip`, mirrored and mirrored back.

    The network gets at least `min_images`: a compiled one would be compiled again for a smaller batch.
    """
    device = next(model.parameters()).device
    images = [sample.tensor for sample in batch]
    images += images[:1] * (min_images - len(images))
    # Pinned: from other memory, the copy would wait for the network.
    pinned = torch.empty(len(images), *images[0].shape, pin_memory=device.type == "cuda")  # (B, 3, S, S)
    images = torch.stack(images, out=pinned).to(device, non_blocking=True)
    views = [model(images).clone()]  # a CUDA graph's result is valid until the next call only
    if flip:
        views.append(model(images.flip(-1)).flip(-1))
    return torch.stack(views, dim=1)[: len(batch)]


@torch.inference_mode()
def make_prediction(logits: Tensor, sample: Sample, stretched: bool, with_probability: bool = False) -> Prediction:
    """The map of an image, and what else its files show, from its logits (views, 1, S, S)."""
    maps = [probability_map(view, sample.size) for view in logits]
    probability = maps[0] if len(maps) == 1 else torch.stack(maps).mean(0)
    grey = (stretch(probability) if stretched else (probability * 255).to(torch.uint8)).cpu().numpy()
    return Prediction(grey, probability.cpu().numpy() if with_probability else None, sample.image)


def finish(logits: Tensor, sample: Sample, args: argparse.Namespace) -> OSError | None:
    """Writes the files of one image, or returns the error that names it. Raises OSError if one cannot be written."""
    try:
        prediction = make_prediction(logits, sample, not args.no_stretch, "probability" in output.needs(args.save))
        if args.largest:
            prediction = output.keep_largest(prediction, args.threshold)
        contents = output.files_of(prediction, sample.task, args)
    except (InputError, OSError, RuntimeError, MemoryError, cv2.error) as error:  # raised by libraries on bad input
        return OSError(f"{sample.task.image}: its files cannot be made: {diagnosis(error, LESS_MEMORY) or error}")
    if args.crop is not None and not object_box(prediction.cutout):
        tqdm.write(files.printable(f"{sample.task.image}: has no object, so it is not cropped"))
    for path, content in contents.items():
        with files.replacing(path) as file:
            file.write(content)
    return None


def predict(model: SAM2UNeXT, tasks: Iterable[Task], args: argparse.Namespace, bar: tqdm) -> list[OSError]:
    """Reads, predicts and writes: threads decode the next images and encode the last maps while the network runs.

    At most about four batches of images are in memory, and two maps per worker or those of a batch, whichever is more.
    Returns the errors of the images that cannot be read or rendered. Raises OSError for a file that cannot be written.
    """
    keep_image = "image" in output.needs(args.save)
    written: deque[Future[OSError | None]] = deque()
    failed: list[OSError | None] = []
    far: list[Sample] = []
    with ThreadPoolExecutor(args.workers) as readers, ThreadPoolExecutor(args.workers) as writers:
        ahead = max(args.workers, 2 * args.batch_size)
        samples = in_order(readers, lambda task: read(task, model.size, keep_image), tasks, ahead)
        while group := list(islice(samples, args.batch_size)):
            failed += [sample for sample in group if isinstance(sample, OSError)]
            batch = [sample for sample in group if isinstance(sample, Sample)]
            if not far and (far := [sample for sample in batch if sample.far]):
                warning = f"warning: {far[0].task.image}: {far[0].far}; --white N says another value"
                tqdm.write(files.printable(warning))
            logits = predict_batch(model, batch, args.flip, args.batch_size if args.compile else 1) if batch else []
            for sample, views in zip(batch, logits, strict=True):
                # Finished in another thread: waiting for the logits here would leave the GPU idle.
                written.append(writers.submit(finish, views, sample, args))
                if len(written) > max(2 * args.workers, args.batch_size):  # never wait for the batch just submitted
                    failed.append(written.popleft().result())
            bar.update(len(group))
        failed += [future.result() for future in written]
    return [error for error in failed if error]


def tasks_of(args: argparse.Namespace) -> list[Task]:
    """A task for each image that the arguments name. Raises InputError or OSError."""
    if args.benchmark and args.test_gt_path:
        raise InputError("--benchmark knows the ground truth: leave out --test_gt_path")
    if args.sets and not args.benchmark:
        raise InputError("--sets belongs to --benchmark")
    if args.recursive and args.benchmark:
        raise InputError("--recursive belongs to --test_image_path")
    names = pairing.names_given(args, args.test_gt_path)
    if not args.benchmark:
        return tasks_of_images(args.test_image_path, args.test_gt_path, names, args.recursive)
    name, root = args.benchmark
    tasks = []
    for test_set, splits in benchmarks.find_test(benchmarks.load(name), root, args.sets).items():
        for split in splits:
            print(split)
            tasks += [Task(image, mask, test_set) for image, mask in split.pairs]
    return tasks


def tasks_of_images(
    paths: Sequence[str], gt_path: str | None = None, names: MaskNames = SAME, recursive: bool = False
) -> list[Task]:
    """A task for each image, with its ground truth if `gt_path` has it; prints what is left out."""

    def skip(folder: Path) -> bool:
        return output.is_of_maps(folder) or (gt_path is not None and folder.resolve() == Path(gt_path).resolve())

    folders = [Path(path) for path in paths if not Path(path).is_file()]
    if maps := list(filter(output.is_of_maps, folders)):
        raise InputError(f"{maps[0]}: is a folder of maps (see {output.SETTINGS} there); name a folder of images")
    listed = pairing.gather(paths, recursive, skip, keep_extensions=not gt_path)
    ground_truth = pairing.gather([gt_path], recursive) if gt_path else {}
    images, masks = pairing.tell_apart(listed, ground_truth, names)
    tasks = [Task(path, masks.get(name), sys.intern(name.rpartition("/")[0])) for name, path in images.items()]
    without = [task.image.name for task in tasks if gt_path and task.ground_truth is None]
    if without and len(without) == len(tasks):
        hint = pairing.names_hint(listed, ground_truth)
        raise InputError(f"no ground truth in {gt_path} has the name of an image in {files.listing(paths)}{hint}")
    if without:
        number = files.count(len(without), "image")
        print(f"{number} without ground truth, so the maps have the size of the images: {files.listing(without)}")
    if recursive:
        folders = [folder for top in folders for folder in pairing.tree(top, skip)]
    elif number := sum(pairing.images_below(folder, skip) for folder in folders):
        print(f"left out: {files.count(number, 'image')} in sub-folders (--recursive reads them)")
    if others := pairing.left_out(folders):
        print(f"left out: {others}")
    return tasks


def settings_of(args: argparse.Namespace, model: SAM2UNeXT) -> dict[str, Any]:
    """What decides the files of an image, for settings.json."""
    return {
        "checkpoint": checkpoint.trained_fingerprint(model),
        "path": str(args.checkpoint),
        "precision": str(model.precision).removeprefix("torch."),
        "size": model.size,
        "white": args.white or "of the format",
        "stretch": not args.no_stretch,
        "ground_truth": bool(args.benchmark or args.test_gt_path),  # whose size the maps have
        "versions": versions(),
        "background": args.background and identity(args.background),
        "largest": args.threshold if args.largest else None,  # at which cutouts are divided into regions, too
        "canvas": args.canvas and list(args.canvas),
    } | {name: getattr(args, name) for name in ("flip", "threshold", "crop", "format")}


def main(args: argparse.Namespace) -> None:
    with cli.one_line_errors(LESS_MEMORY) as command, ExitStack() as stack:
        precision = device.start(args)
        configure_reading(args.max_pixels, args.white)
        rank, _, processes = device.ranks()
        output.check_options(args)
        all_tasks = tasks_of(args)
        output.check_folders(all_tasks, args)
        # Of several processes, each takes every n-th batch.
        tasks = [task for i, task in enumerate(all_tasks) if i // args.batch_size % processes == rank]
        paths = args.checkpoint, args.hiera_path, args.dinov2_path
        model = SAM2UNeXT.from_checkpoint(*paths, precision=precision, download=args.download).to(args.device)
        model.size = args.size or model.size
        settings = settings_of(args, model)
        if args.compile:
            device.compile_module(model)
        if rank == 0:
            stack.enter_context(files.locked(args.save_path))
        output.check_settings(all_tasks, args, settings)

        command.started()
        command.after_interrupt = f"; the same command{' without --overwrite' if args.overwrite else ''} continues"
        if rank == 0:
            output.prepare(all_tasks, args, settings)
        device.wait_for_all()
        todo = output.remaining(tasks, args)
        share = f", of which this process takes {len(tasks):,}" if processes > 1 else ""
        kept = f"; {len(tasks) - len(todo):,} of {len(tasks):,} exist and are kept, --overwrite makes them again"
        where = f"{args.checkpoint} on {args.device} in {settings['precision']}"
        print(f"{where}; {files.count(len(all_tasks), 'image')}{share}{kept if len(todo) < len(tasks) else ''}")
        with progress_bar(total=len(tasks), initial=len(tasks) - len(todo), unit="img", disable=rank > 0) as bar:
            failed = predict(model, todo, args, bar)
        if failed:
            print(*map(files.printable, failed), sep="\n", file=sys.stderr)
            raise OSError(f"{len(failed)} of {len(tasks)} images failed; all others are done")
        print(f"{files.count(len(tasks), 'image')}: {', '.join(f'{kind}s' for kind in args.save)} in {args.save_path}")


def kinds(text: str) -> tuple[str, ...]:
    """An argument type: names of KINDS, separated by commas."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in KINDS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in names)


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="SAM2-UNeXT-<epoch>.pth, of this program or the original")
    cli.add_encoders(parser)

    data = parser.add_argument_group("images")
    source = data.add_mutually_exclusive_group(required=True)
    source.add_argument("--test_image_path", nargs="+", metavar="PATH", help="folders of images, or single images")
    source.add_argument("--benchmark", nargs=2, metavar=("NAME", "ROOT"), help=benchmarks.HELP)
    data.add_argument("--recursive", action="store_true", help="read sub-folders too, and write to the same")
    data.add_argument("--test_gt_path", metavar="DIR", help="their ground truth, only for the size of the maps")
    data.add_argument("--sets", nargs="+", default=[], metavar="SET", help="only these test sets of the benchmark")
    cli.add_reading(data)

    writing = parser.add_argument_group("output")
    writing.add_argument("--save_path", type=cli.path, required=True, metavar="DIR", help="for the maps")
    writing.add_argument("--save", type=kinds, default="map", metavar="KINDS", help=f"some of {','.join(KINDS)}")
    writing.add_argument("--threshold", type=cli.number(float, 0, 1), default=0.5, help="of masks and overlays")
    largest = "keep the largest connected region of the mask alone, in all kinds but the map"
    writing.add_argument("--largest", action="store_true", help=largest)
    writing.add_argument("--background", help="of composites: a CSS colour name, #rrggbb or an image")
    crop = "crop cutouts and composites to the object and a margin, a share of its longer side up to 1"
    writing.add_argument("--crop", type=cli.number(float, 0, 1), nargs="?", const=0.0, metavar="MARGIN", help=crop)
    canvas = "of cutouts and composites: centred on this size, px; shrunk if larger, never enlarged"
    writing.add_argument("--canvas", type=cli.size, metavar="WxH", help=canvas)
    writing.add_argument("--format", default="png", choices=("png", "webp"), help="of cutouts")
    writing.add_argument("--no_stretch", action="store_true", help="255 x probability, not stretched to 0 to 255")
    writing.add_argument("--overwrite", action="store_true", help="make files that exist again")

    group = parser.add_argument_group("run")
    group.add_argument("--flip", action="store_true", help="average with the mirrored image; takes twice the time")
    group.add_argument("--compile", action="store_true", help="compile the network, for GPUs: takes a minute or two")
    side = cli.number(multiple=32, minimum=32)
    group.add_argument("--size", type=side, help="side of the input, px; default: that of the training")
    group.add_argument("--batch_size", type=cli.number(), default=1, help="images at a time")
    cli.add_device(group)
    threads = "threads that read, as many that write"
    group.add_argument("--workers", type=cli.number(), default=min(8, cores()), help=threads)
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
