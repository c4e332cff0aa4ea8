"""What test.py writes for an image: map, mask, overlay, cutout, composite; and settings.json, which says how."""

import io
import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from unext import files
from unext.cutout import background, on_background
from unext.cutout import cutout as cutout  # also known from here
from unext.errors import InputError
from unext.images import extensions, on_white, read_size
from unext.pairing import File

KINDS = {"map": ".png", "mask": ".png", "overlay": ".jpg", "cutout": ".png", "composite": ".jpg"}
CUTS = {"cutout", "composite"}  # made from a cutout
USED_BY = {"threshold": {"mask", "overlay"}, "crop": CUTS, "format": {"cutout"}, "background": {"composite"}}  # options
FORMATS: dict[str, dict[str, Any]] = {  # of what is in colour, and how they are written
    ".png": {"format": "PNG", "compress_level": 1, "compress_type": zlib.Z_RLE},
    ".jpg": {"format": "JPEG", "quality": 95},
    ".webp": {"format": "WebP", "quality": 90},
}
MAX_SIDES = {"JPEG": 65500, "WebP": 16383}  # px
TINT = (255, 0, 128)  # of the object in an overlay, RGB
TINTED = 0.55 * np.arange(256, dtype=np.uint8)[None, :, None] + 0.45 * np.array(TINT, np.float32)  # by grey level
SETTINGS = "settings.json"
RECORDED = ("path", "versions")  # in settings.json, but not compared


class Task(NamedTuple):
    """An image to predict."""

    image: File
    ground_truth: File | None  # whose size the map takes
    folder: Path  # for the map
    format: str = "png"  # of the cutout

    def output(self, kind: str) -> File:
        extension = f".{self.format}" if kind == "cutout" else KINDS[kind]
        return File(place(self.folder, kind), self.image.stem, extension)


def place(folder: Path, kind: str) -> Path:
    """The folder for files of a kind, where maps are in `folder`."""
    return folder if kind == "map" else folder / kind


def needs_photo(kinds: Sequence[str]) -> bool:
    """Whether one of the kinds shows the image."""
    return not {"map", "mask"}.issuperset(kinds)


def render(
    kind: str, grey: np.ndarray, image: Image.Image | None, threshold: float = 0.5, ground: str = ""
) -> np.ndarray:
    """The pixels of one of KINDS: grey (H, W), RGB or (cutout) RGBA.

    `grey` is the map in grey levels, uint8 (H, W); `image`, for what shows it, the image, RGB or RGBA, or (CUTS) its
    cutout; `ground`, for the composite, a background as the user names it.
    """
    if kind == "cutout":
        return np.asarray(image)
    if kind == "composite":
        return np.asarray(on_background(image, background(ground)))
    if kind == "map":
        return grey
    if kind == "mask":
        return (grey >= threshold * 255) * np.uint8(255)
    pixels = np.asarray(on_white(image))  # (H, W, 3)
    if grey.shape != pixels.shape[:2]:  # it has the ground truth's size
        grey = cv2.resize(grey, pixels.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    mask = (grey >= threshold * 255).astype(np.uint8)
    pixels = np.where(mask[..., None] > 0, cv2.LUT(pixels, TINTED.astype(np.uint8)), pixels)
    outline, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(pixels, outline, -1, TINT, thickness=max(1, round(max(mask.shape) / 400)))


def encode(pixels: np.ndarray, extension: str, info: dict[str, Any]) -> bytes:
    """A file of pixels (H, W), RGB or RGBA; `info` is that of the image, with its ICC profile and resolution.

    Raises InputError if the format does not allow for its size.
    """
    if pixels.ndim == 2:
        return cv2.imencode(extension, pixels)[1].tobytes()
    options = FORMATS[extension]
    limit = MAX_SIDES.get(options["format"])
    if limit and max(pixels.shape) > limit:
        raise InputError(f"the sides of a {options['format']} file are at most {limit:,} px")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **options, **info)
    return buffer.getvalue()


def check_looks(kinds: Sequence[str], crop: float | None, form: str, ground: str | None) -> None:
    """Raises InputError or OSError for options that do not fit the kinds, or a background that cannot be read."""
    given = {"crop": crop is not None, "format": form != "png", "background": bool(ground)}
    for option in filter(given.get, given):
        if not USED_BY[option] & {*kinds}:
            raise InputError(f"--{option} belongs to --save {' or '.join(sorted(USED_BY[option]))}")
    if "composite" in kinds and not ground:
        raise InputError("--save composite needs --background: a colour, such as white or #ff8000, or an image file")
    if ground:
        background(ground)


def check_outputs(tasks: Sequence[Task], kinds: Sequence[str]) -> None:
    """Raises InputError if a folder to write to has images or ground truth, or would get files of two kinds."""
    inputs = {folder.resolve() for folder in {path.parent for task in tasks for path in task[:2] if path}}
    owners: dict[Path, tuple[Path, str]] = {}
    for folder in dict.fromkeys(task.folder for task in tasks):
        for kind in kinds:
            if place(folder, kind).resolve() in inputs:
                raise InputError(f"--save_path: {place(folder, kind)} has images or ground truth; name another folder")
            if owners.setdefault(place(folder, kind), (folder, kind)) != (folder, kind):
                raise InputError(f"--save_path: {place(folder, kind)} would get files of two kinds; rename that folder")


def by_folder(tasks: Sequence[Task]) -> dict[Path, list[Task]]:
    """The tasks by the folder of their maps."""
    found: dict[Path, list[Task]] = {}
    for task in tasks:
        found.setdefault(task.folder, []).append(task)
    return found


def existing(tasks: Sequence[Task], kinds: Sequence[str]) -> Callable[[File], bool]:
    """Whether a file that one of the tasks writes is there; folders without any image are not asked for each."""
    places = {place(folder, kind) for folder in {task.folder for task in tasks} for kind in kinds}
    suffixes = {folder: {path.suffix.lower() for path in folder.iterdir()} for folder in places if folder.is_dir()}
    filled = {folder for folder, found in suffixes.items() if found & extensions()}
    return lambda file: file.parent in filled and os.path.exists(file)


def check_settings(tasks: Sequence[Task], kinds: Sequence[str], settings: dict[str, Any], overwrite: bool) -> None:
    """Raises InputError, unless `overwrite`, if a folder of the tasks has files that were made with other settings."""
    if overwrite:
        return
    exists = existing(tasks, kinds)
    for folder, own in by_folder(tasks).items():
        before = read_settings(folder)
        names = [name for name in settings.keys() & before.keys() if before[name] != settings[name]]
        if names := sorted({*names} - {*RECORDED}):
            raise InputError(
                f"--save_path {folder}: was made with another {' and '.join(names)}, see {SETTINGS} there; replace its "
                "files with --overwrite or name another folder"
            )
        known = before.get("images", [])  # folders
        new = {parent for parent in {task.image.parent for task in own} if str(parent.resolve()) not in known}
        paths = (task.output(kind) for task in own if task.image.parent in new for kind in kinds)
        if strange := [path.name for path in paths if exists(path)]:
            raise InputError(
                f"--save_path {folder}: has files of other images or another program ({files.listing(strange)}); "
                "replace them with --overwrite or name another folder"
            )


def make_folders(tasks: Sequence[Task], kinds: Sequence[str]) -> None:
    """Makes the folders of the tasks' files. Raises OSError if files cannot be written there."""
    folders = {task.folder for task in tasks}
    for folder in sorted(folders | {place(folder, kind) for folder in folders for kind in kinds}):
        files.output_folder(folder)


def write_settings(tasks: Sequence[Task], settings: dict[str, Any], overwrite: bool) -> None:
    """Writes settings.json to the tasks' folders, with the folders of their images. Raises OSError.

    `overwrite` makes it anew: what is older must be made again. Otherwise it keeps its time.
    """
    for folder, own in by_folder(tasks).items():
        path, before = folder / SETTINGS, {} if overwrite else read_settings(folder)
        images = {str(parent.resolve()) for parent in {task.image.parent for task in own}}
        after = settings | before
        after["images"] = sorted(images.union(before.get("images", [])))
        if after != before:
            time = path.stat().st_mtime_ns if before else None
            with files.replacing(path) as file:
                file.write(json.dumps(after, indent=1).encode() + b"\n")
            if time:
                os.utime(path, ns=(time, time))


def is_of_maps(folder: Path) -> bool:
    """Whether test.py wrote maps there."""
    return "checkpoint" in read_settings(folder)


def read_settings(folder: Path) -> dict[str, Any]:
    """How the maps in a folder were made; empty if nothing says so."""
    try:
        content = json.loads((folder / SETTINGS).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def remaining(tasks: Sequence[Task], kinds: Sequence[str], batch_size: int) -> list[Task]:
    """What is not done, in whole batches, because an image's batch decides the last bits of its map."""
    exists = existing(tasks, kinds)
    groups = (tasks[start : start + batch_size] for start in range(0, len(tasks), batch_size))
    return [task for group in groups if not all(is_done(task, kinds, exists) for task in group) for task in group]


def is_done(task: Task, kinds: Sequence[str], exists: Callable[[File], bool]) -> bool:
    """Whether the files are there, newer than image, ground truth and settings.json, and of the right size."""
    mask, paths = task.ground_truth, [task.output(kind) for kind in kinds]
    if not all(map(exists, paths)):
        return False
    try:
        newest = max(os.stat(path).st_mtime_ns for path in (task.image, mask, task.folder / SETTINGS) if path)
        fits = not mask or "map" not in kinds or read_size(mask) == read_size(task.output("map"))
        return fits and all(os.stat(path).st_mtime_ns >= newest for path in paths)
    except OSError:  # one is missing
        return False
