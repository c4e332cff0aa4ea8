"""Writes the prediction maps of a trained SAM2-UNeXT for folders of images, single images or a benchmark.

    python test.py --checkpoint runs/mine/SAM2-UNeXT-20.pth --test_image_path data/images --save_path maps
    python test.py --checkpoint runs/mine/SAM2-UNeXT-20.pth --test_image_path a.jpg --save map,cutout --save_path out
    python test.py ... --save cutout,composite --crop --format webp --background white
    python test.py --checkpoint runs/COD/SAM2-UNeXT-20.pth --benchmark COD /data/COD --save_path runs/COD/predictions
    torchrun --standalone --nproc_per_node 4 test.py ...                                     on four GPUs

A map is a greyscale PNG with the image's name: 255 where the network is most certain of the object, 0 where least. It
has the image's size or, with `--test_gt_path data/masks` or a benchmark, that of the ground truth of the same name.
`--save` adds, in folders of these names beside the maps: mask (0 and 255, the map cut at --threshold), overlay (the
image with the object tinted), cutout (the object in its own colours, with an alpha channel) and composite (the cutout
on --background). settings.json records how they were made. An interrupted run continues where it was.
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

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dataset import image_tensor
from evaluation import benchmarks
from SAM2UNeXT import SAM2UNeXT, probability_map, stretch
from unext import checkpoint, cli, cutout, device, files, output, pairing
from unext.errors import InputError, diagnosis
from unext.images import FAR, allow_pixels, for_network, read_photo, read_size, set_white
from unext.log import versions
from unext.output import Task
from unext.pairing import SAME, MaskNames
from unext.workers import cores, in_order, progress_bar

LESS_MEMORY = "--precision bf16, or a smaller --batch_size or --size, need less"


class Sample(NamedTuple):
    """An image ready for the network."""

    task: Task
    tensor: Tensor  # (3, S, S) normalised
    size: tuple[int, int]  # (height, width) of the map
    photo: Image.Image | None  # RGB or RGBA, for what shows it
    far: str  # in what way its values are far from white; empty if they are not


class Maps(NamedTuple):
    """What the network says of an image, in grey levels, uint8 (H, W)."""

    grey: np.ndarray  # the map
    probability: np.ndarray | None  # 255 times, for cutouts


def read(task: Task, size: int, kinds: Sequence[str] = ()) -> Sample | OSError:
    """The sample for a network whose input has the side `size` and files of `kinds`, or the error that names a file."""
    try:
        # Benchmarks take pixels as they are stored; a user's own image is taken as viewers show it.
        photo = read_photo(task.image, as_shown=task.ground_truth is None)
        map_size = read_size(task.ground_truth) if task.ground_truth else (photo.height, photo.width)
    except OSError as error:
        return error
    seen = photo.convert("RGB") if task.ground_truth else for_network(photo)
    far = photo.info.pop(FAR, "")
    return Sample(task, image_tensor(seen, size), map_size, photo if output.needs_photo(kinds) else None, far)


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
def grey_maps(logits: Tensor, size: tuple[int, int], stretched: bool = True, for_cutout: bool = False) -> Maps:
    """The map of one image, and its probability for a cutout, from its logits (views, 1, S, S)."""
    maps = [probability_map(view, size) for view in logits]
    probability = maps[0] if len(maps) == 1 else torch.stack(maps).mean(0)
    plain = None if stretched and not for_cutout else (probability * 255).to(torch.uint8).cpu().numpy()
    return Maps(stretch(probability).cpu().numpy() if stretched else plain, plain)


def failure(task: Task, kind: str, error: Exception) -> OSError:
    """The error that names an image of which a file cannot be made."""
    return OSError(f"{task.image}: its {kind} cannot be made: {diagnosis(error, LESS_MEMORY) or error}")


def make_maps(logits: Tensor, sample: Sample, args: argparse.Namespace) -> Maps | OSError:
    """The map of one image and what else its files need, or the error that names it if that cannot be made."""
    try:
        return grey_maps(logits, sample.size, not args.no_stretch, bool(output.CUTS & {*args.save}))
    except RuntimeError as error:  # for example for lack of memory
        return failure(sample.task, "map", error)


def write(maps: Maps | OSError, sample: Sample, args: argparse.Namespace) -> OSError | None:
    """Writes the files of one image from its map, or returns the error that names it if one cannot be made.

    Raises OSError that names the file that cannot be written.
    """
    if isinstance(maps, OSError):
        return maps
    task, photo = sample.task, sample.photo
    kind, cut, contents = "cutout", None, {}
    try:
        if output.CUTS & {*args.save}:
            cut = cutout.cut_out(photo, maps.probability)
            if args.crop is not None:
                box = cutout.find_box(cut, args.crop)
                cut = cut.crop(box)  # all of it without a box
                if not box:
                    tqdm.write(files.printable(f"{task.image}: no object is found, so it is not cropped"))
        for kind in args.save:
            shown = cut if kind in output.CUTS else photo
            pixels = output.render(kind, maps.grey, shown, args.threshold, args.background)
            contents[kind] = output.encode(pixels, task.output(kind).suffix, photo.info if photo else {})
    except Exception as error:  # the libraries raise almost anything
        return failure(task, kind, error)
    for kind, content in contents.items():
        with files.replacing(task.output(kind)) as file:
            file.write(content)
    return None


def predict(model: SAM2UNeXT, tasks: Iterable[Task], args: argparse.Namespace, bar: tqdm) -> list[OSError]:
    """Reads, predicts and writes: threads decode the next images and encode the last maps while the network runs.

    Whatever the number of images, about 4 batches and 2 maps per worker, or those of a batch, are in memory. Returns
    the errors of the images that cannot be read or rendered. Raises OSError for a file that cannot be written.
    """

    def finish(logits: Tensor, sample: Sample) -> OSError | None:
        return write(make_maps(logits, sample, args), sample, args)

    written: deque[Future[OSError | None]] = deque()
    failed: list[OSError | None] = []
    far: list[Sample] = []
    with ThreadPoolExecutor(args.workers) as readers, ThreadPoolExecutor(args.workers) as writers:
        ahead = max(args.workers, 2 * args.batch_size)
        samples = in_order(readers, lambda task: read(task, model.size, args.save), tasks, ahead)
        while group := list(islice(samples, args.batch_size)):
            failed += [sample for sample in group if isinstance(sample, OSError)]
            batch = [sample for sample in group if isinstance(sample, Sample)]
            if not far and (far := [sample for sample in batch if sample.far]):
                line = f"warning: {far[0].task.image}: {far[0].far}; --white N says another value"
                tqdm.write(files.printable(line))
            logits = predict_batch(model, batch, args.flip, args.batch_size if args.compile else 1) if batch else []
            for sample, views in zip(batch, logits, strict=True):
                if views.is_cuda:  # the writers wait for the GPU, which gets its next batch meanwhile
                    written.append(writers.submit(finish, views, sample))
                else:  # computing in several threads would slow the network down
                    written.append(writers.submit(write, make_maps(views, sample, args), sample, args))
                if len(written) > max(2 * args.workers, args.batch_size):  # never wait for the last batch
                    failed.append(written.popleft().result())
            bar.update(len(group))
        failed += [one.result() for one in written]
    return [error for error in failed if error]


def find_tasks(args: argparse.Namespace) -> list[Task]:
    """One task for each image that the arguments name. Raises InputError or OSError that names the remedy."""
    if bool(args.benchmark) == bool(args.test_image_path):
        raise InputError("give either --test_image_path or --benchmark")
    if args.benchmark and args.test_gt_path:
        raise InputError("--benchmark knows the ground truth: leave out --test_gt_path")
    if args.sets and not args.benchmark:
        raise InputError("--sets belongs to --benchmark")
    if args.recursive and args.benchmark:
        raise InputError("--recursive belongs to --test_image_path")
    names = pairing.names_given(args, args.test_gt_path)
    if not args.benchmark:
        return find_own_tasks(args.test_image_path, args.test_gt_path, args.save_path, names, args.recursive)
    name, root = args.benchmark
    tasks = []
    for test_set, splits in benchmarks.find_test(benchmarks.load(name), root, args.sets).items():
        for split in splits:
            print(split)
            tasks += [Task(image, mask, args.save_path, test_set) for image, mask in split.pairs]
    return tasks


def find_own_tasks(
    image_paths: Sequence[str], gt_path: str | None, save_path: Path, names: MaskNames = SAME, recursive: bool = False
) -> list[Task]:
    """One task per image, with its ground truth if `gt_path` has one. Raises InputError if it has none at all."""

    def skip(folder: Path) -> bool:
        return output.is_of_maps(folder) or (gt_path is not None and folder.resolve() == Path(gt_path).resolve())

    folders = [Path(path) for path in image_paths if not Path(path).is_file()]
    for folder in folders:
        if output.is_of_maps(folder):
            raise InputError(f"{folder}: is a folder of maps, see {output.SETTINGS} there; name one of images")
        if gt_path:
            pairing.require_apart(folder, gt_path, names)
    found = pairing.gather(image_paths, recursive, skip, with_extension=not gt_path)
    ground_truth = pairing.gather([gt_path], recursive) if gt_path else {}
    images, masks = pairing.tell_apart(found, ground_truth, names)
    tasks = [Task(path, masks.get(key), save_path, sys.intern(key.rpartition("/")[0])) for key, path in images.items()]
    without = [task.image.name for task in tasks if task.ground_truth is None]
    if gt_path and len(without) == len(tasks):
        hint = pairing.names_hint(found, ground_truth)
        raise InputError(f"no ground truth in {gt_path} has the name of an image in {files.listing(image_paths)}{hint}")
    if gt_path and without:
        number = files.count(len(without), "image")
        print(f"{number} without ground truth, whose maps get the image's size: {files.listing(without)}")
    others = [pairing.left_out(one for top in folders for one in (pairing.tree(top, skip) if recursive else [top]))]
    if deeper := 0 if recursive else sum(pairing.images_below(folder, skip) for folder in folders):
        others.append(f"{files.count(deeper, 'image')} in sub-folders (--recursive reads them)")
    if any(others):
        print(f"left out: {', '.join(filter(None, others))}")
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
        "flip": args.flip,
        "ground_truth": bool(args.benchmark or args.test_gt_path),  # whose size the maps have
        "versions": versions(),
        "threshold": args.threshold,
        "crop": args.crop,
        "format": args.format,
        "background": args.background and cutout.identity(cutout.background(args.background)),
    }


def main(args: argparse.Namespace) -> None:
    with cli.one_line_errors(LESS_MEMORY) as command, ExitStack() as stack:
        precision = device.start(args)
        allow_pixels(args.max_pixels)
        set_white(args.white)
        rank, _, processes = device.ranks()
        output.check_looks(args.save, args.crop, args.format, args.background)
        every = [task._replace(format=args.format) for task in find_tasks(args)]
        output.check_outputs(every, args.save)
        # Of several processes, each takes every n-th batch and handles the files of these only.
        tasks = [task for i, task in enumerate(every) if i // args.batch_size % processes == rank]
        if rank == 0:
            stack.enter_context(files.locked(args.save_path))
        paths = args.checkpoint, args.hiera_path, args.dinov2_path
        model = SAM2UNeXT.from_checkpoint(*paths, precision=precision, download=args.download).to(args.device)
        model.size = args.size or model.size
        settings = settings_of(args, model)
        output.check_settings(every, args.save, settings, args.overwrite)
        if args.compile:
            # A CUDA graph launches all kernels at once.
            model.compile(mode="reduce-overhead" if args.device.startswith("cuda") else None)
        output.make_folders(every, args.save)

        command.started()
        command.after_interrupt = f"; the same command{' without --overwrite' if args.overwrite else ''} continues"
        if rank == 0:
            if args.overwrite:
                output.remove(every, args.save)
            output.write_settings(every, args.save, settings)
        device.wait_for_all()
        todo = output.remaining(tasks, args.save)
        share = f", of which this process takes {len(tasks):,}" if processes > 1 else ""
        kept = f"; {len(tasks) - len(todo):,} of {len(tasks):,} exist and are kept, --overwrite makes them again"
        where = f"{args.checkpoint} on {args.device} in {settings['precision']}"
        print(f"{where}; {files.count(len(every), 'image')}{share}{kept if len(todo) < len(tasks) else ''}")
        with progress_bar(total=len(tasks), initial=len(tasks) - len(todo), unit="img", disable=rank > 0) as bar:
            failed = predict(model, todo, args, bar)
        if failed:
            print(*map(files.printable, failed), sep="\n", file=sys.stderr)
            raise OSError(f"{len(failed)} of {len(tasks)} images failed; all others are done")
        print(f"{files.count(len(tasks), 'image')}: {', '.join(f'{kind}s' for kind in args.save)} in {args.save_path}")


def kinds(text: str) -> tuple[str, ...]:
    """An argument type: names of output.KINDS, separated by commas."""
    words = [word.strip() for word in text.split(",")]
    if unknown := [word for word in words if word not in output.KINDS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(output.KINDS)}")
    return tuple(kind for kind in output.KINDS if kind in words)


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="SAM2-UNeXT-<epoch>.pth, of this program or the original")
    cli.add_encoders(parser)

    data = parser.add_argument_group("images")
    data.add_argument("--test_image_path", nargs="+", metavar="PATH", help="folders of images, or single images")
    data.add_argument("--recursive", action="store_true", help="read sub-folders too, and write to such ones")
    data.add_argument("--test_gt_path", metavar="DIR", help="their ground truth, only for the size of the maps")
    data.add_argument("--benchmark", nargs=2, metavar=("NAME", "ROOT"), help=benchmarks.HELP)
    data.add_argument("--sets", nargs="+", default=[], metavar="SET", help="only these test sets of the benchmark")
    cli.add_reading(data)

    writing = parser.add_argument_group("output")
    writing.add_argument("--save_path", type=cli.path, required=True, metavar="DIR", help="for the maps")
    writing.add_argument("--save", type=kinds, default="map", metavar="KINDS", help=f"some of {','.join(output.KINDS)}")
    writing.add_argument("--threshold", type=cli.number(float, 0, 1), default=0.5, help="of masks and overlays")
    writing.add_argument("--background", metavar="GROUND", help="of composites: a CSS colour name, #rrggbb or an image")
    writing.add_argument(
        "--crop",
        type=cli.number(float, 0),
        nargs="?",
        const=0.0,
        metavar="MARGIN",
        help="crop cutouts and composites to the object and, around it, this share of its longer side",
    )
    writing.add_argument("--format", default="png", choices=("png", "webp"), help="of cutouts")
    writing.add_argument("--no_stretch", action="store_true", help="255 x probability, not stretched to 0 to 255")
    writing.add_argument("--overwrite", action="store_true", help="make files that exist again")

    group = parser.add_argument_group("run")
    group.add_argument("--flip", action="store_true", help="average with the mirrored image; takes twice the time")
    group.add_argument("--compile", action="store_true", help="compile the network, for GPUs: minutes at the start")
    side = cli.number(multiple=32, minimum=32)
    group.add_argument("--size", type=side, help="side of the input, px; default: that of the training")
    group.add_argument("--batch_size", type=cli.number(), default=1, help="images at a time")
    cli.add_device(group)
    workers = min(8, cores())
    group.add_argument("--workers", type=cli.number(), default=workers, help="threads that read, as many that write")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
