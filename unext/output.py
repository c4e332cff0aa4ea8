"""What test.py writes for an image: map, mask, overlay, cutout; and settings.json beside them, which says how."""

import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from unext import files, imaging
from unext.pairing import File

KINDS = {"map": ".png", "mask": ".png", "overlay": ".jpg", "cutout": ".png"}
MAX_JPEG = 65500  # px, of a side
TINT = (255, 0, 128)  # of the object in an overlay, RGB
TINTED = 0.55 * np.arange(256, dtype=np.uint8)[None, :, None] + 0.45 * np.array(TINT, np.float32)  # by grey level
SETTINGS = "settings.json"
RECORDED = ("path", "versions")  # in settings.json, but not compared


class Task(NamedTuple):
    """An image to predict."""

    image: File
    ground_truth: File | None  # whose size the map takes
    folder: Path  # for the map

    def output(self, kind: str) -> File:
        return File(place(self.folder, kind), self.image.stem, KINDS[kind])


def place(folder: Path, kind: str) -> Path:
    """The folder for files of a kind, where maps are in `folder`."""
    return folder if kind == "map" else folder / kind


def needs_photo(kinds: Sequence[str]) -> bool:
    """Whether one of the kinds shows the image."""
    return not {"map", "mask"}.issuperset(kinds)


def render(kind: str, grey: np.ndarray, image: Image.Image | None, threshold: float = 0.5) -> np.ndarray:
    """The pixels of one of KINDS, from the map in grey levels, uint8 (H, W): grey (H, W), RGB or (cutout) RGBA.

    `image`, for what shows it, is RGB or RGBA; what is transparent in it is so in the cutout.
    """
    if kind == "map":
        return grey
    if kind == "mask":
        return (grey >= threshold * 255) * np.uint8(255)
    pixels = np.asarray(image if kind == "cutout" else imaging.on_white(image))  # (H, W, 3) or (H, W, 4)
    if grey.shape != pixels.shape[:2]:  # it has the ground truth's size
        grey = cv2.resize(grey, pixels.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    if kind == "cutout":
        if pixels.shape[2] == 4:
            grey = np.rint(pixels[..., 3] * (grey / np.float32(255))).astype(np.uint8)
        return np.dstack([pixels[..., :3], grey])
    mask = (grey >= threshold * 255).astype(np.uint8)
    pixels = np.where(mask[..., None] > 0, cv2.LUT(pixels, TINTED.astype(np.uint8)), pixels)
    outline, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(pixels, outline, -1, TINT, thickness=max(1, round(max(mask.shape) / 400)))


def encode(kind: str, pixels: np.ndarray, profile: bytes | None = None) -> bytes:
    """A PNG or (overlay) JPEG file of what `render` returns, with the ICC profile of the image's colours.

    Raises ValueError if the format does not allow for its size.
    """
    if pixels.ndim == 2:
        return cv2.imencode(KINDS[kind], pixels)[1].tobytes()
    options: dict[str, Any] = {"compress_level": 1} if KINDS[kind] == ".png" else {"quality": 95}
    if KINDS[kind] == ".jpg" and max(pixels.shape) > MAX_JPEG:
        raise ValueError(f"an {kind} is a JPEG file, whose sides are at most {MAX_JPEG:,} px")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, Image.registered_extensions()[KINDS[kind]], icc_profile=profile, **options)
    return buffer.getvalue()


def check_outputs(tasks: Sequence[Task], kinds: Sequence[str]) -> None:
    """Raises ValueError if a folder to write to has images or ground truth, or would get files of two kinds."""
    inputs = {folder.resolve() for folder in {path.parent for task in tasks for path in task[:2] if path}}
    owners: dict[Path, tuple[Path, str]] = {}
    for folder in dict.fromkeys(task.folder for task in tasks):
        for kind in kinds:
            if place(folder, kind).resolve() in inputs:
                raise ValueError(f"--save_path: {place(folder, kind)} has images or ground truth; name another folder")
            if owners.setdefault(place(folder, kind), (folder, kind)) != (folder, kind):
                raise ValueError(f"--save_path: {place(folder, kind)} would get files of two kinds; rename that folder")


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
    filled = {folder for folder, found in suffixes.items() if found & imaging.extensions()}
    return lambda file: file.parent in filled and os.path.exists(file)


def check_settings(tasks: Sequence[Task], kinds: Sequence[str], settings: dict[str, Any], overwrite: bool) -> None:
    """Raises ValueError, unless `overwrite`, if a folder of the tasks has files that were made with other settings."""
    if overwrite:
        return
    exists = existing(tasks, kinds)
    for folder, own in by_folder(tasks).items():
        before = read_settings(folder)
        names = [name for name in settings.keys() & before.keys() if before[name] != settings[name]]
        if names := sorted({*names} - {*RECORDED}):
            raise ValueError(
                f"--save_path {folder}: was made with another {' and '.join(names)}, see {SETTINGS} there; replace its "
                "files with --overwrite or name another folder"
            )
        known = before.get("images", [])  # folders
        new = {parent for parent in {task.image.parent for task in own} if str(parent.resolve()) not in known}
        paths = (task.output(kind) for task in own if task.image.parent in new for kind in kinds)
        if strange := [path.name for path in paths if exists(path)]:
            raise ValueError(
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
        fits = not mask or "map" not in kinds or imaging.read_size(mask) == imaging.read_size(task.output("map"))
        return fits and all(os.stat(path).st_mtime_ns >= newest for path in paths)
    except OSError:  # one is missing
        return False
