"""Finds and pairs images and masks, and writes files atomically. Free of torch, which keeps its users small."""

import hashlib
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout
from PIL import Image

from unext import imaging

LISTED = 10  # names that a message lists before it only counts
LOCK = ".lock"  # the file in a folder that is locked
PATIENCE = 6.0  # seconds to wait for it; the data loader's workers, which may hold it, outlive a killed process by five


def require_folder(path: str | Path) -> Path:
    """The path. Raises OSError if it is not a folder."""
    path = Path(path)
    if not path.is_dir():
        reason = "is not a folder" if path.exists() else "there is no such folder"
        raise NotADirectoryError(f"{path}: {reason}")
    return path


def images_in(folder: str | Path) -> list[Path]:
    """The images directly in `folder`, sorted, without hidden files. Raises OSError if it cannot be listed."""
    folder = require_folder(folder)
    return [
        path for path in sorted(folder.iterdir())
        if path.suffix.lower() in imaging.extensions() and not path.name.startswith(".") and path.is_file()
    ]  # fmt: skip


def find(folder: str | Path) -> dict[str, Path]:
    """The images in `folder` by stem, sorted. Raises OSError, or ValueError for no image or two of one stem."""
    found: dict[str, Path] = {}
    repeated = []
    for path in images_in(folder):
        if path.stem in found:
            repeated.append(f"{found[path.stem].name} and {path.name}")
        found[path.stem] = path
    if repeated:
        raise ValueError(f"{folder}: files that differ only in their extension, keep one of each: {listing(repeated)}")
    if not found:
        raise ValueError(f"{folder}: has no images")
    return dict(sorted(found.items()))


def gather(paths: Iterable[str | Path]) -> dict[str, Path]:
    """The images in `paths`, folders and single files, by stem. Raises OSError or ValueError as `find` does."""
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        for stem, image in ({path.stem: path} if path.is_file() else find(path)).items():
            if stem in found:
                raise ValueError(f"{found[stem]} and {image}: have the same name; write them to different folders")
            found[stem] = image
    return found


def pair(
    image_folders: Sequence[str | Path], mask_folders: Sequence[str | Path], skip_unpaired: bool = False
) -> list[tuple[Path, Path]]:
    """The (image, mask) files of the same stem in the i-th folder of either, joined.

    Raises ValueError for different numbers of folders, for files without a partner (unless `skip_unpaired`) or if there
    is no pair; and what `find` raises.
    """
    remedy = "add the missing files or ignore these with --skip_unpaired"
    if len(image_folders) != len(mask_folders):
        number = f"{len(image_folders)} folder(s) of images but {len(mask_folders)} of masks"
        raise ValueError(f"{number}: give one of masks for each of images, in the same order")
    pairs: list[tuple[Path, Path]] = []
    for image_folder, mask_folder in zip(image_folders, mask_folders, strict=True):
        images, masks = find(image_folder), find(mask_folder)
        if not images.keys() & masks.keys():
            image, mask = (next(iter(side.values())).name for side in (images, masks))
            example = f"for example {image} and {mask}"
            raise ValueError(f"no image in {image_folder} has the name of a mask in {mask_folder} ({example})")
        pairs += match(images, masks, f"{image_folder} and {mask_folder}", skip_unpaired, remedy)
    return pairs


def match(
    images: dict[str, Path], masks: dict[str, Path], where: str, skip: bool = False, remedy: str = "add what is missing"
) -> list[tuple[Path, Path]]:
    """The pairs of the same stem. Raises ValueError, about `where`, if a file has no partner, unless `skip`."""
    problems = []
    for wanted, side, other in (("mask", images, masks), ("image", masks, images)):
        if alone := [path.name for stem, path in side.items() if stem not in other]:
            problems.append(f"without their {wanted}: {listing(alone)}")
    if problems and not skip:
        raise ValueError(f"{where} do not match; {'; '.join(problems)}; {remedy}")
    return [(path, masks[stem]) for stem, path in images.items() if stem in masks]


def count(number: int, noun: str) -> str:
    """The number with its noun: "1 map", "1,024 maps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: object) -> str:
    """A name or message as text on one line: what cannot be printed is escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def listing(names: Iterable[object]) -> str:
    """The first names of a list, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(printable, names[:LISTED])) + more


def dark_masks(names: Sequence[str], total: int) -> str:
    """A warning about the masks that are dark, of `total` that were checked."""
    return (
        f"{len(names):,} of {count(total, 'mask')} are black or nearly so, with no pixel above {imaging.OBJECT} of 255: white "
        f"is the object, so multiply masks of 0 and 1 by 255 ({listing(names)})"
    )


def require_apart(path: str | Path, inputs: Iterable[str | Path]) -> None:
    """Raises ValueError if writing to `path` would replace one of the inputs."""
    if Path(path).resolve() in {Path(used).resolve() for used in inputs}:
        raise ValueError(f"{path}: is one of the inputs and would be replaced; name another file")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Names the file in the message of an OSError that writing to it raises."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` once it is safely on the disk, or disappears if the block fails.

    So a file under its final name is always complete. Raises OSError that names the file.
    """
    path = Path(path)
    # Not derived by a suffix: the name of `path` may be as long as names can be.
    temporary = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.tmp")
    try:
        with writing(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # even the folder may be gone
            temporary.unlink()


def save_image(image: Image.Image, path: Path, **options: int) -> None:
    """Writes an image in the format of the extension, completely or not at all. Raises OSError that names the file."""
    buffer = io.BytesIO()  # Pillow does not notice a file that takes only part of what it writes
    image.save(buffer, Image.registered_extensions()[path.suffix], **options)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def output_folder(path: str | Path) -> Path:
    """Makes the folder if it is missing. Raises OSError if files cannot be written there."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise OSError(f"{path}: nothing can be written there: {error.strerror}") from error


def check_output_file(option: str, path: Path | None) -> None:
    """Raises OSError if no file can be written to the path that an option names; makes its folder."""
    if path and path.is_dir():
        raise IsADirectoryError(f"{option} {path}: is a folder; name a file")
    if path:
        output_folder(path.parent)


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Locks a folder, made if missing, and removed if it stays empty. Raises ValueError if another process has it."""
    path = Path(path)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    lock = FileLock(output_folder(path) / LOCK)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise ValueError(f"{path}: another process writes there; wait, or name another folder") from None
    except OSError:  # a file system without locks, or a lock of another user
        pass
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):  # of a folder that holds something, or that is gone
            if made and not {file.name for file in path.iterdir()} - {LOCK}:
                (path / LOCK).unlink(missing_ok=True)
                for folder in made:
                    folder.rmdir()
