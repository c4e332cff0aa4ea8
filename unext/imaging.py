"""Reads images and masks as 8-bit pixels, whatever their files hold. Free of torch, which keeps its users small."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow reads EPS by starting Ghostscript, whatever the file is called. The others it only recognises.
NOT_READ = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
DEEP = ("I", "F")  # first letters of the modes with more than 8 bits per channel, which are all greyscale
OBJECT = 128  # scores count pixels above as the object

warnings.filterwarnings("ignore", module=r"PIL\.")  # where they matter, they are errors here


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.preinit()  # the common ones first
    Image.init()
    return tuple(name for name in Image.OPEN if name not in NOT_READ)


@cache
def extensions() -> frozenset[str]:
    """The file name extensions of these formats, in lower case with the dot."""
    return frozenset(ext for ext, name in Image.registered_extensions().items() if name in formats())


def read_image(path: str | Path, upright: bool = False) -> Image.Image:
    """The image in RGB, as stored or, if `upright`, rotated as its EXIF tag says. Raises OSError naming the file."""
    with opened(path) as image:
        return eight_bits(ImageOps.exif_transpose(image) if upright else image, "RGB")


def read_mask(path: str | Path) -> Image.Image:
    """The mask or prediction map as 8-bit greyscale (mode L). Raises OSError that names the file."""
    with opened(path) as image:
        return eight_bits(image, "L")


def read_size(path: str | Path) -> tuple[int, int]:
    """(height, width) from the file's header, without decoding it. Raises OSError that names the file."""
    with opened(path) as image:
        return image.height, image.width


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """The image in a file, only its header read. Errors in the block become OSError that names the file."""
    try:
        with open_image(path) as image:
            yield image
    except Exception as error:  # Pillow's readers raise almost anything on a damaged file
        raise OSError(f"{path}: cannot be read as an image: {why(path, error)}") from error


def open_image(path: str | Path) -> Image.Image:
    """Pillow's `open` for `formats` and images below its pixel limit. Raises what Pillow does: almost anything."""
    image = Image.open(path, formats=formats())
    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if limit and pixels > limit:  # Pillow itself only warns up to twice the limit
        image.close()
        raise Image.DecompressionBombError(
            f"{pixels:,} pixels exceed Pillow's limit of {limit:,} and could be a decompression bomb; make it smaller"
        )
    return image


def eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """The image in mode RGB or L. Raises ValueError for values that are neither 8 nor 16 bits.

    Pillow would clip greyscale of 16 bits, integers and floats at 255. Here their maximum decides the range: up to 255
    they are 8-bit values, up to 65535 16-bit values, and floats up to 1 are fractions of white.
    """
    if not image.mode.startswith(DEEP):
        return image.convert(mode)
    values = np.asarray(image)  # (H, W)
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= 65535:  # nor NaN
        raise ValueError(f"its values from {low:g} to {high:g} are neither 8 nor 16 bits; save it as 8 bits")
    white = 1 if image.mode == "F" and high <= 1 else 255 if high <= 255 else 65535
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8)).convert(mode)


def is_dark(mask: Image.Image) -> bool:
    """Whether a mask (mode L) reads as black although it is not: values of 0 and 1, or indices of a palette."""
    return 0 < mask.getextrema()[1] <= OBJECT


def why(path: str | Path, error: Exception) -> str:
    """What is wrong with a file that Pillow cannot read, on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "its format is not known to Pillow" if os.path.getsize(path) else "it is empty"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (reason.splitlines() or [type(error).__name__])[0]
