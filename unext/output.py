"""What test.py writes for an image: map, mask, overlay, cutout, composite; and settings.json, which says how.

`args` are the options of test.py. A new kind of file is a function and a row of KINDS.
"""

import argparse
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from unext import files, pairing
from unext.cutout import composite, frame, load_background, make_cutout, object_box
from unext.errors import InputError
from unext.images import on_white
from unext.pairing import File

TINT = (255, 0, 128)  # of the object in an overlay, RGB
TINTED = 0.55 * np.arange(256, dtype=np.uint8)[None, :, None] + 0.45 * np.array(TINT, np.float32)  # by grey level
ENCODERS: dict[str, dict[str, Any]] = {  # of pixels in colour
    ".png": {"format": "PNG", "compress_level": 1, "compress_type": zlib.Z_RLE},
    ".jpg": {"format": "JPEG", "quality": 95},
    ".webp": {"format": "WebP", "quality": 90},
}
MAX_SIDES = {"JPEG": 65500, "WebP": 16383}  # px
SETTINGS = "settings.json"
RECORDED = ("path", "versions")  # in settings.json, but not compared


@dataclass
class Prediction:
    """The map of an image, and what its files show. Map and image may differ in size, see `Task`."""

    grey: np.ndarray  # the map, uint8 (H, W)
    probability: np.ndarray | None = None  # float32 (H, W)
    image: Image.Image | None = None  # RGB or RGBA
    kept: np.ndarray | None = None  # bool (H, W), where objects stay; None: everywhere

    @property
    def object_map(self) -> np.ndarray:
        """The map, black where no object stays."""
        return self.grey if self.kept is None else self.grey * self.kept

    @cached_property
    def cutout(self) -> Image.Image:
        return make_cutout(self.image, self.probability if self.kept is None else self.probability * self.kept)


def keep_largest(prediction: Prediction, threshold: float) -> Prediction:
    """The prediction with the largest connected region of its mask alone, and soft edges nearest to that region."""
    mask = prediction.grey >= threshold * 255
    if not mask.any():
        return prediction
    outside = (~mask).view(np.uint8)
    _, region = cv2.distanceTransformWithLabels(outside, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_CCOMP)
    return replace(prediction, kept=region == np.bincount(region[mask]).argmax())  # region: the nearest, int32 (H, W)


def render_mask(prediction: Prediction, args: argparse.Namespace) -> np.ndarray:
    return (prediction.object_map >= args.threshold * 255) * np.uint8(255)


def render_overlay(prediction: Prediction, args: argparse.Namespace) -> Image.Image:
    pixels, grey = np.asarray(on_white(prediction.image)), prediction.object_map  # (H, W, 3), (H, W)
    if grey.shape != pixels.shape[:2]:
        grey = cv2.resize(grey, pixels.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    mask = (grey >= args.threshold * 255).astype(np.uint8)
    pixels = np.where(mask[..., None] > 0, cv2.LUT(pixels, TINTED.astype(np.uint8)), pixels)
    outline, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(pixels, outline, -1, TINT, thickness=max(1, round(max(mask.shape) / 400)))
    return Image.fromarray(pixels)


def framed(image: Image.Image, cutout: Image.Image, args: argparse.Namespace) -> Image.Image:
    """An RGBA image as --crop and --canvas frame its cutout. On a canvas, a margin may reach beyond the image."""
    box = None if args.crop is None else object_box(cutout, args.crop, within=args.canvas is None)
    return frame(image, box, args.canvas)


def render_cutout(prediction: Prediction, args: argparse.Namespace) -> Image.Image:
    return framed(prediction.cutout, prediction.cutout, args)


def render_composite(prediction: Prediction, args: argparse.Namespace) -> Image.Image:
    return composite(render_cutout(prediction, args), load_background(args.background))


class Kind(NamedTuple):
    """A kind of file."""

    render: Callable[[Prediction, argparse.Namespace], np.ndarray | Image.Image]  # grey (H, W), or RGB, RGBA
    extension: str
    options: Sequence[str] = ()  # options that affect it
    needs: Sequence[str] = ()  # fields of Prediction, beside the map


KINDS = {
    "map": Kind(lambda prediction, args: prediction.grey, ".png"),
    "mask": Kind(render_mask, ".png", ["threshold", "largest"]),
    "overlay": Kind(render_overlay, ".jpg", ["threshold", "largest"], ["image"]),
    "cutout": Kind(render_cutout, ".png", ["largest", "crop", "canvas", "format"], ["image", "probability"]),
    "composite": Kind(render_composite, ".jpg", ["largest", "crop", "canvas", "background"], ["image", "probability"]),
}


def kinds_with(option: str) -> list[str]:
    """The kinds of files that an option affects."""
    return [name for name, kind in KINDS.items() if option in kind.options]


def needs(kinds: Iterable[str]) -> set[str]:
    """The fields of Prediction that these kinds need, beside the map."""
    return {field for kind in kinds for field in KINDS[kind].needs}


def check_options(args: argparse.Namespace) -> None:
    """Raises InputError or OSError for options that do not fit the kinds, or a background that cannot be read."""
    given = {"crop": args.crop is not None, "format": args.format != "png"}
    given |= {option: bool(getattr(args, option)) for option in ("largest", "canvas", "background")}
    for option in filter(given.get, given):
        if not {*kinds_with(option)} & {*args.save}:
            raise InputError(f"--{option} belongs to --save {' or '.join(kinds_with(option))}")
    if "composite" in args.save and not args.background:
        raise InputError("--save composite needs --background: a colour, such as white or #ff8000, or an image file")
    if args.background:
        load_background(args.background)


class Task(NamedTuple):
    """An image to predict."""

    image: File
    ground_truth: File | None  # whose size the map takes
    subfolder: str = ""  # of each kind: that of a test set, or where the image was


def folder_of(kind: str, subfolder: str, args: argparse.Namespace) -> Path:
    return (args.save_path if kind == "map" else args.save_path / kind) / subfolder


def file_of(task: Task, kind: str, args: argparse.Namespace) -> File:
    """The file of a kind for an image."""
    extension = f".{args.format}" if "format" in KINDS[kind].options else KINDS[kind].extension
    return File(folder_of(kind, task.subfolder, args), task.image.stem, extension)


def files_of(prediction: Prediction, task: Task, args: argparse.Namespace) -> dict[File, bytes]:
    """The files of an image with their content. Raises InputError if a format does not allow for its size."""
    contents = {}
    for kind in args.save:
        pixels, file = KINDS[kind].render(prediction, args), file_of(task, kind, args)
        contents[file] = encode(pixels, file.suffix, prediction.image.info if prediction.image else {})
    return contents


def encode(pixels: np.ndarray | Image.Image, extension: str, info: dict[str, Any]) -> bytes:
    """An image file; `info` is that of the image, with its ICC profile and resolution. Raises InputError."""
    if isinstance(pixels, np.ndarray):
        return cv2.imencode(extension, pixels)[1].tobytes()
    options = ENCODERS[extension]
    limit = MAX_SIDES.get(options["format"])
    if limit and max(pixels.size) > limit:
        raise InputError(f"the sides of a {options['format']} file are at most {limit:,} px")
    buffer = io.BytesIO()
    pixels.save(buffer, **options, **info)
    return buffer.getvalue()


def by_folder(tasks: Iterable[Task], args: argparse.Namespace) -> list[tuple[Path, str, list[Task]]]:
    """Each folder to write to, the kind of its files, and the tasks that make them."""
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.subfolder, []).append(task)
    return [(folder_of(kind, name, args), kind, group) for name, group in groups.items() for kind in args.save]


def check_folders(tasks: Sequence[Task], args: argparse.Namespace) -> None:
    """Raises InputError if a folder to write to has images or ground truth, or would get files of two kinds."""
    inputs = {folder.resolve() for folder in {path.parent for task in tasks for path in task[:2] if path}}
    folders = [folder for folder, _, _ in by_folder(tasks, args)]
    for folder in folders:
        if folder.resolve() in inputs:
            raise InputError(f"--save_path: {folder} has images or ground truth; name another folder")
        if folders.count(folder) > 1:
            raise InputError(f"--save_path: {folder} would get files of two kinds; rename that folder")


def check_settings(tasks: Sequence[Task], args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Raises InputError if a folder has files made with other settings, from other images, or by another program.

    With --overwrite only if files would stay that this run does not write, as settings.json describes all of a folder.
    """
    for folder, kind, group in by_folder(tasks, args):
        names, recorded, current = existing(folder), read_settings(folder), of_kind(settings, kind)
        compared = sorted(current.keys() & recorded.keys() - {*RECORDED})
        changed = [key for key in compared if current[key] != recorded[key]]
        sources = {file_of(task, kind, args).name: task.image.parent for task in group}
        places = {path: str(path.resolve()) for path in {*sources.values()}}
        recorded_places = {*recorded.get("images", [])}
        new_sources = {path for path, place in places.items() if place not in recorded_places}
        foreign = {name for name in names if not recorded or sources.get(name) in new_sources}
        for place in recorded_places.difference(places.values()):  # it may have made a file whose name it has, too
            stems = {os.path.splitext(name)[0] for name in existing(Path(place))}
            foreign |= {name for name in names & sources.keys() if os.path.splitext(name)[0] in stems}
        if names and changed:
            problem = f"--save_path {folder}: was made with another {' and '.join(changed)}, see {SETTINGS} there"
        elif foreign:
            listed = files.listing(sorted(foreign))
            problem = f"--save_path {folder}: has files of other images or another program ({listed})"
        else:
            continue
        if not args.overwrite:
            raise InputError(f"{problem}; replace its files with --overwrite or name another folder")
        if left := names - sources.keys():
            raise InputError(f"{problem}; --overwrite leaves {files.listing(sorted(left))}: name another folder")


def prepare(tasks: Sequence[Task], args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Makes the folders and settings.json in each; removes the files that --overwrite makes again. Raises OSError."""
    for folder, kind, group in by_folder(tasks, args):
        files.output_folder(folder)
        for task in group if args.overwrite else ():
            Path(file_of(task, kind, args)).unlink(missing_ok=True)
        before = read_settings(folder) if existing(folder) else {}
        images = {str(parent.resolve()) for parent in {task.image.parent for task in group}}
        after = of_kind(settings, kind) | before | {"images": sorted(images.union(before.get("images", [])))}
        files.write_json(folder / SETTINGS, after)


def remaining(tasks: Sequence[Task], args: argparse.Namespace) -> list[Task]:
    """The tasks of which a file is missing."""
    present = {folder: existing(folder) for folder, _, _ in by_folder(tasks, args)}
    files_by_task = ((task, [file_of(task, kind, args) for kind in args.save]) for task in tasks)
    return [task for task, files in files_by_task if any(file.name not in present[file.parent] for file in files)]


def existing(folder: Path) -> set[str]:
    """The names of the images in a folder, which may be missing."""
    return {image.name for image in pairing.images_in(folder)} if folder.is_dir() else set()


def of_kind(settings: dict[str, Any], kind: str) -> dict[str, Any]:
    """The settings that decide the files of a kind; those tied to no kind apply to all."""
    return {name: value for name, value in settings.items() if kind in (kinds_with(name) or KINDS)}


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the files in a folder; empty if it has none."""
    try:
        return json.loads((folder / SETTINGS).read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def is_of_maps(folder: Path) -> bool:
    """Whether test.py wrote its files there."""
    return "checkpoint" in read_settings(folder)
