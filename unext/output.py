"""What test.py writes for an image: map, mask, overlay, cutout, each with a note of how it was made.

The note is a comment inside the file. A rerun keeps files with its own note and never takes others for its own.
"""

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from unext import files

KINDS = {"map": ".png", "mask": ".png", "overlay": ".jpg", "cutout": ".png"}
TINT = (255, 0, 128)  # of the object in an overlay, RGB


class Settings(NamedTuple):
    """What to write, and how."""

    kinds: tuple[str, ...]  # of KINDS
    checkpoint: str  # its fingerprint
    precision: str  # of the network
    size: int  # side of the network's input, pixels
    stretch: bool
    flip: bool
    threshold: float  # of the map in [0, 1]


class Task(NamedTuple):
    """An image to predict."""

    image: Path
    ground_truth: Path | None  # whose size the map takes
    folder: Path  # for the map

    def output(self, kind: str) -> Path:
        folder = self.folder if kind == "map" else self.folder / kind
        return folder / f"{self.image.stem}{KINDS[kind]}"


def notes(task: Task, settings: Settings) -> dict[str, str]:
    """The note for the file of each kind. Raises OSError that names a file that cannot be read."""
    made = settings._asdict()
    kinds, threshold = made.pop("kinds"), made.pop("threshold")
    try:
        with open(task.image, "rb") as file:
            made["picture"] = f"{zlib.crc32(file.read(2**16)):08x}-{os.fstat(file.fileno()).st_size}"
    except OSError as error:
        raise files.unreadable(task.image, error) from error
    truth = files.read_size(task.ground_truth) if task.ground_truth else ()
    made["ground truth"] = "x".join(map(str, truth)) or "none"
    text = "; ".join(f"{name} {value}" for name, value in made.items())
    return {kind: f"{text}; threshold {threshold}" if kind in ("mask", "overlay") else text for kind in kinds}


def with_note(content: bytes, text: str) -> bytes:
    """A PNG or JPEG file with a comment: a tEXt chunk after the header, or a COM segment."""
    comment = text.encode("ascii")
    if content.startswith(b"\xff\xd8"):
        return content[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + content[2:]
    chunk = b"tEXtComment\0" + comment
    end = 33  # of signature and header
    framed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content[:end] + framed + content[end:]


def read_note(path: Path) -> str:
    """The comment in a file; empty if there is none."""
    try:
        with files.opened(path) as image:
            comment = image.info.get("Comment") or image.info.get("comment") or ""
    except OSError:
        return ""
    return comment.decode("ascii", "replace") if isinstance(comment, bytes) else comment


def render(kind: str, grey: np.ndarray, image: Image.Image | None, threshold: float) -> bytes:
    """The content of one file, PNG or (overlay) JPEG, from the map in grey levels, uint8 (H, W)."""
    if kind in ("overlay", "cutout"):
        pixels = np.asarray(image)[..., ::-1]  # (H, W, 3), BGR for OpenCV
        if grey.shape != pixels.shape[:2]:  # it has the ground truth's size
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


def check_outputs(tasks: Sequence[Task], kinds: Sequence[str]) -> None:
    """Raises ValueError if a file would replace an image or its ground truth."""
    inputs = {path.resolve() for task in tasks for path in (task.image, task.ground_truth) if path}
    for task in tasks:
        if any(task.output(kind).resolve() in inputs for kind in kinds):
            raise ValueError(
                f"--save_path {files.shown(task.folder)}: maps would replace images or ground truth; name another one"
            )


def remaining(tasks: list[Task], settings: Settings, overwrite: bool, batch_size: int) -> list[Task]:
    """The tasks whose files are not all there yet; makes the folders.

    They come in whole batches, because an image's batch decides the last bits of its map. Raises ValueError if some
    files were made differently, OSError if nothing can be written.
    """
    done = set()
    other: dict[str, list[str]] = {}  # what differs -> the files
    for task in [] if overwrite else tasks:
        there = {kind: path for kind in settings.kinds if (path := task.output(kind)).exists()}
        expected = notes(task, settings) if there else {}
        for kind, path in there.items():
            found, wanted = read_note(path).split("; "), expected[kind].split("; ")
            if found == wanted:
                done.add(path)
                continue
            fields = {part.rsplit(" ", 1)[0] for part in set(wanted) - set(found)} if len(found) > 1 else {"program"}
            other.setdefault(" and ".join(sorted(fields)), []).append(path.name)
    if other:
        listed = "; ".join(f"with another {fields}: {files.listing(names)}" for fields, names in other.items())
        raise ValueError(
            f"--save_path {files.shown(tasks[0].folder)}: has files that were made differently ({listed}); replace "
            "them with --overwrite or name another folder"
        )
    for folder in sorted({task.output(kind).parent for task in tasks for kind in settings.kinds}):
        files.output_folder(folder)
    groups = (tasks[start : start + batch_size] for start in range(0, len(tasks), batch_size))
    return [
        task for group in groups
        if not all(task.output(kind) in done for task in group for kind in settings.kinds)
        for task in group
    ]  # fmt: skip
