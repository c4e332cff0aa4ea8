"""What test.py writes for an image: map, mask, overlay, cutout, composite; and settings.json, which says how."""

import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from unext import files, pairing
from unext.cutout import background, on_background
from unext.cutout import cutout as cutout  # also known from here
from unext.errors import InputError
from unext.images import on_white
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
    save_path: Path
    below: str = ""  # the sub-folder, of each kind: a test set's, or where the image was
    format: str = "png"  # of the cutout

    def folder(self, kind: str) -> Path:
        """The folder of its file of a kind."""
        return (self.save_path if kind == "map" else self.save_path / kind) / self.below

    def output(self, kind: str) -> File:
        extension = f".{self.format}" if kind == "cutout" else KINDS[kind]
        return File(self.folder(kind), self.image.stem, extension)


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


def by_folder(tasks: Sequence[Task], kinds: Sequence[str]) -> list[tuple[Path, str, list[Task]]]:
    """Each folder to write to, the kind of its files, and the tasks that make them."""
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.below, []).append(task)
    return [(group[0].folder(kind), kind, group) for group in groups.values() for kind in kinds]


def check_outputs(tasks: Sequence[Task], kinds: Sequence[str]) -> None:
    """Raises InputError if a folder to write to has images or ground truth, or would get files of two kinds."""
    inputs = {folder.resolve() for folder in {path.parent for task in tasks for path in task[:2] if path}}
    folders: set[Path] = set()
    for folder, _, _ in by_folder(tasks, kinds):
        if folder.resolve() in inputs:
            raise InputError(f"--save_path: {folder} has images or ground truth; name another folder")
        if folder in folders:
            raise InputError(f"--save_path: {folder} would get files of two kinds; rename that folder")
        folders.add(folder)


def existing(folder: Path) -> set[str]:
    """The names of the images in a folder, which may be missing."""
    if not folder.is_dir():
        return set()
    return {stem + extension for stem, extension, _ in pairing.entries(folder) if pairing.is_image(extension)}


def of_kind(settings: dict[str, Any], kind: str) -> dict[str, Any]:
    """The settings that decide the files of a kind."""
    return {name: value for name, value in settings.items() if kind in USED_BY.get(name, KINDS)}


def check_settings(tasks: Sequence[Task], kinds: Sequence[str], settings: dict[str, Any], overwrite: bool) -> None:
    """Raises InputError if a folder has files of other settings, images or programs.

    With `overwrite` only if the tasks do not make all of its files again: what exists is of the settings beside it.
    """
    for folder, kind, group in by_folder(tasks, kinds):
        if not (names := existing(folder)):
            continue
        before, after = read_settings(folder), of_kind(settings, kind)
        changed = [key for key in sorted(after.keys() & before.keys() - {*RECORDED}) if after[key] != before[key]]
        known = before.get("images", [])  # folders
        new = {parent for parent in {task.image.parent for task in group} if str(parent.resolve()) not in known}
        strange = names & {task.output(kind).name for task in group if task.image.parent in new} if before else names
        if changed:
            problem = f"was made with another {' and '.join(changed)}, see {SETTINGS} there"
        elif strange:
            problem = f"has files of other images or another program ({files.listing(sorted(strange))})"
        else:
            continue
        if not overwrite:
            raise InputError(
                f"--save_path {folder}: {problem}; replace its files with --overwrite or name another folder"
            )
        if kept := names - {task.output(kind).name for task in group}:
            kept = files.listing(sorted(kept))
            raise InputError(f"--save_path {folder}: {problem}; --overwrite leaves {kept}: name another folder")


def remove(tasks: Sequence[Task], kinds: Sequence[str]) -> None:
    """Removes the files that the tasks make again, so that what exists is of this run. Raises OSError."""
    for task in tasks:
        for kind in kinds:
            Path(task.output(kind)).unlink(missing_ok=True)


def make_folders(tasks: Sequence[Task], kinds: Sequence[str]) -> None:
    """Makes the folders of the tasks' files. Raises OSError if files cannot be written there."""
    for folder, _, _ in by_folder(tasks, kinds):
        files.output_folder(folder)


def write_settings(tasks: Sequence[Task], kinds: Sequence[str], settings: dict[str, Any]) -> None:
    """Writes settings.json to the folders of the tasks' files, with the folders of their images. Raises OSError."""
    for folder, kind, group in by_folder(tasks, kinds):
        before = read_settings(folder) if existing(folder) else {}
        images = {str(parent.resolve()) for parent in {task.image.parent for task in group}}
        after = of_kind(settings, kind) | before | {"images": sorted(images.union(before.get("images", [])))}
        if after != before:
            with files.replacing(folder / SETTINGS) as file:
                file.write(json.dumps(after, indent=1).encode() + b"\n")


def is_of_maps(folder: Path) -> bool:
    """Whether test.py wrote its files there."""
    return "checkpoint" in read_settings(folder)


def read_settings(folder: Path) -> dict[str, Any]:
    """How the files in a folder were made; empty if nothing says so."""
    try:
        content = json.loads((folder / SETTINGS).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def remaining(tasks: Sequence[Task], kinds: Sequence[str]) -> list[Task]:
    """The tasks of which a file is missing."""
    names = {folder: existing(folder) for folder, _, _ in by_folder(tasks, kinds)}
    return [task for task in tasks if not all(file.name in names[file.parent] for file in map(task.output, kinds))]
