"""Finds, pairs and reads pictures and masks, and writes files whole. Free of torch, so that its users stay small."""

import hashlib
import io
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

LISTED = 10  # how many file names an error message lists before it only counts
USUAL = ("JPEG", "PNG", "BMP", "GIF", "PPM")  # tried first, as Pillow does
# Pillow starts Ghostscript to read EPS, which is a program, whatever the file is called. The others it only recognises.
NOT_READ = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
DEEP = ("I", "F")  # beginnings of the modes with more than 8 bits a channel, which are all grey
OBJECT = 128  # scores take what is above for the object

warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters of them is an error here


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return USUAL + tuple(name for name in Image.OPEN if name not in NOT_READ.union(USUAL))


@cache
def extensions() -> frozenset[str]:
    """The lower-case file name extensions, dot included, of the formats that are read."""
    return frozenset(ext for ext, name in Image.registered_extensions().items() if name in formats())


def pictures(folder: str | Path) -> list[Path]:
    """The pictures that lie directly in `folder`, sorted. Raises OSError where it cannot be listed.

    Hidden files and files that Pillow does not read by their extension are passed over.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(
            f"{shown(folder)}: {'is not a folder' if folder.exists() else 'there is no such folder'}"
        )
    return [
        path for path in sorted(folder.iterdir())
        if path.suffix.lower() in extensions() and not path.name.startswith(".") and path.is_file()
    ]  # fmt: skip


def find(folder: str | Path) -> dict[str, Path]:
    """The `pictures` in `folder` by stem (file name without extension), in the order of the stems.

    Raises OSError where the folder cannot be listed, ValueError where it holds no picture or two of one stem.
    """
    found: dict[str, Path] = {}
    doubled = []
    for path in pictures(folder):
        if path.stem in found:
            doubled.append(f"{found[path.stem].name} and {path.name}")
        found[path.stem] = path
    if doubled:
        raise ValueError(
            f"{shown(folder)}: files that differ only in their extension, keep one of each: {listing(doubled)}"
        )
    if not found:
        raise ValueError(f"{shown(folder)}: holds no picture")
    return dict(sorted(found.items()))


def gather(paths: Iterable[str | Path]) -> dict[str, Path]:
    """The pictures in `paths`, folders and single files, by stem. Raises OSError or ValueError as `find` does."""
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        for stem, picture in ({path.stem: path} if path.is_file() else find(path)).items():
            if stem in found:
                raise ValueError(
                    f"{shown(found[stem])} and {shown(picture)}: have one name; write them to different folders"
                )
            found[stem] = picture
    return found


def pair(
    first: list[str] | list[Path],
    second: list[str] | list[Path],
    skip_unpaired: bool = False,
    names: tuple[str, str] = ("image", "mask"),
    mend: str = "add the missing files",
) -> list[tuple[Path, Path]]:
    """Pairs the pictures of the folders `first` with those of `second` by stem, never by order.

    Folders go together by position: the i-th of `first` with the i-th of `second`, and the pairs of all of them are
    joined. `names` is what messages call a file of either side, `mend` what they advise. Raises ValueError where the
    numbers of folders differ, where a file has no partner (unless `skip_unpaired`) or where no pair is left; what
    `find` raises, too.
    """
    if len(first) != len(second):
        raise ValueError(
            f"{len(first)} folder(s) of {names[0]}s but {len(second)} of {names[1]}s: name them in the same order, "
            f"one {names[1]} folder for each {names[0]} folder"
        )
    pairs: list[tuple[Path, Path]] = []
    for one, other in zip(first, second, strict=True):
        left, right = find(one), find(other)
        if not left.keys() & right.keys():
            raise ValueError(
                f"no {names[0]} in {shown(one)} has the name of a {names[1]} in {shown(other)} "
                f"(for example {shown(next(iter(left.values())).name)} and {shown(next(iter(right.values())).name)})"
            )
        pairs += match(left, right, f"{one} and {other}", skip_unpaired, names, mend)
    return pairs


def match(
    left: dict[str, Path],
    right: dict[str, Path],
    where: str,
    skip_unpaired: bool = False,
    names: tuple[str, str] = ("image", "mask"),
    mend: str = "add the missing files",
) -> list[tuple[Path, Path]]:
    """Pairs the files of two folders by stem; `where` is what a message calls the folders.

    Raises ValueError where a file has no partner, unless `skip_unpaired`.
    """
    problems = [
        f"without their {wanted}: {listing(path.name for path in alone)}"
        for alone, wanted in (
            ([path for stem, path in left.items() if stem not in right], names[1]),
            ([path for stem, path in right.items() if stem not in left], names[0]),
        )
        if alone
    ]
    if problems and not skip_unpaired:
        raise ValueError(f"{shown(where)} do not match; {'; '.join(problems)}; {mend}")
    return [(path, right[stem]) for stem, path in left.items() if stem in right]


def count(number: int, noun: str) -> str:
    """The number with its noun, "1 map" or "1,024 maps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shown(name: object) -> str:
    """A name, mostly of a file, for one line of a message: line breaks and bytes that are no text are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(name))


def listing(names: Iterable[str]) -> str:
    """The first names of a list and, where it is long, how many more there are."""
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(shown, names[:LISTED])) + more


def read_image(path: str | Path, upright: bool = False) -> Image.Image:
    """The picture as RGB, pixels in the order of the file or, if `upright`, turned as its EXIF tag says.

    Raises OSError that names the file.
    """
    with opened(path) as picture:
        return eight_bits(ImageOps.exif_transpose(picture) if upright else picture, "RGB")


def read_mask(path: str | Path) -> Image.Image:
    """The mask or prediction map as 8-bit greyscale (mode L). Raises OSError that names the file."""
    with opened(path) as picture:
        return eight_bits(picture, "L")


def read_size(path: str | Path) -> tuple[int, int]:
    """(height, width) from the file's header, pixels not decoded. Raises OSError that names the file."""
    with opened(path) as picture:
        return picture.height, picture.width


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """The picture in a file, its header read. What goes wrong in the block becomes an OSError that names the file."""
    try:
        with open_picture(path) as picture:
            yield picture
    except Exception as error:  # Pillow's readers raise nearly anything at a broken file
        raise unreadable(path, error) from error


def open_picture(path: str | Path) -> Image.Image:
    """As Pillow's `open`, but for formats that are not read and for pictures above Pillow's limit of pixels.

    Raises what Pillow raises, which is nearly anything.
    """
    picture = Image.open(path, formats=formats())
    pixels, limit = picture.width * picture.height, Image.MAX_IMAGE_PIXELS
    if limit and pixels > limit:  # up to twice as many Pillow only warns
        picture.close()
        raise Image.DecompressionBombError(
            f"{pixels:,} pixels are more than Pillow's limit, {limit:,}, and could be a decompression bomb; "
            "make it smaller"
        )
    return picture


def eight_bits(picture: Image.Image, mode: str) -> Image.Image:
    """The picture in the mode RGB or L.

    Greyscale of 16 bits, integers and floats, which Pillow cuts off at 255, go by their greatest value: up to 255 they
    are taken as they are, up to 65535 for 16 bits; floats up to 1 for shares of white. Raises ValueError for others.
    """
    if not picture.mode.startswith(DEEP):
        return picture.convert(mode)
    values = np.asarray(picture)  # (H, W)
    least, greatest = values.min(), values.max()
    if not 0 <= least <= greatest <= 65535:  # nor NaN
        raise ValueError(f"values from {least:g} to {greatest:g} are neither 8 nor 16 bits; save it as 8 bits")
    white = 1 if picture.mode == "F" and greatest <= 1 else 255 if greatest <= 255 else 65535
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8)).convert(mode)


def is_dark(mask: Image.Image) -> bool:
    """Whether a mask (mode L) reads as black though it is not: 0 and 1 in place of 0 and 255, or a palette's colours.

    A mask that is all black is none: there may be no object.
    """
    return 0 < mask.getextrema()[1] <= OBJECT


def dark_masks(names: Sequence[str], total: int) -> str:
    """A warning of the masks that are dark, among the `total` that were looked at."""
    return (
        f"{len(names):,} of {count(total, 'mask')} are black or nearly, with nothing above {OBJECT} of 255: white is "
        f"the object, so multiply masks of 0 and 1 by 255 ({listing(names)})"
    )


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` when the block ends well, and vanishes when it does not.

    It lies beside `path` until it is safely on the disk: a file under its final name is always whole. Raises OSError
    that names the file.
    """
    path = Path(path)
    # A name of its own, for that of `path` may be as long as a name can be.
    temporary = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{shown(path)}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # the folder itself may be gone
            temporary.unlink()


def save_picture(picture: Image.Image, path: str | Path, **options: int) -> None:
    """Writes a picture in the format of the extension, whole or not at all.

    Raises OSError that names the file, ValueError for an extension that says nothing.
    """
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"{shown(path)}: is no picture by its extension; name a .png or .jpg")
    buffer = io.BytesIO()  # to a file itself Pillow writes without looking at how much of it went through
    picture.save(buffer, kind, **options)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def output_folder(path: str | Path) -> Path:
    """Makes the folder where it is missing. Raises OSError unless files can be written there."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise OSError(f"{shown(path)}: nothing can be written there: {error.strerror}") from error


def unreadable(path: str | Path, error: Exception) -> OSError:
    """Pillow's complaint with the file's name, which Pillow mostly leaves out."""
    return OSError(f"{shown(path)}: cannot be read as a picture: {why(path, error)}")


def why(path: str | Path, error: Exception) -> str:
    """What is wrong with a file that Pillow cannot read, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "in no format that Pillow knows" if os.path.getsize(path) else "an empty file"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shown((reason.splitlines() or [type(error).__name__])[0])
