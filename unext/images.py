"""Reads images as 8-bit RGB, whatever their format, bit depth and colours. Free of torch."""

import io
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError
from PIL.Image import Transpose

from unext.errors import InputError, is_out_of_memory

# Pillow reads EPS by starting Ghostscript, whatever the file is called; it identifies, but cannot decode, the others.
NOT_READ = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
DEEP = ("I", "F")  # first letters of the modes with more than 8 bits per channel, which are all greyscale
# Environment variables, so that worker processes have these settings too, see `configure_reading`.
LIMIT, WHITE = "SAM2UNEXT_MAX_PIXELS", "SAM2UNEXT_WHITE"
FAR = "far from white"  # key in `info`: a message if the maximum is 16 times below or above white
ORIENTATION = 0x0112  # EXIF tag
TURNS = {  # what makes an image upright, by the value of that tag
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip
TIFF_BITS, TIFF_PLANAR = 258, 284  # tags
HEIC = (".heic", ".heif")
GET_HEIF = "convert to JPEG, or pip install pillow-heif"


def configure_reading(max_pixels: int | str, white: float | str | None = None) -> None:
    """Sets the largest image, in pixels, and the white level of images with more than 8 bits (None: the format's)."""
    os.environ |= {LIMIT: str(max_pixels), WHITE: str(white or "")}
    Image.MAX_IMAGE_PIXELS = None  # `opened` has the limit
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB: editors write long texts and profiles
    warnings.filterwarnings("ignore", module=r"PIL\.")  # where they matter, they are errors here
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it logs what it also raises


if LIMIT in os.environ:
    configure_reading(os.environ[LIMIT], os.environ.get(WHITE))


@cache
def formats() -> tuple[str, ...]:
    """The formats to read: Pillow's, and HEIF if pillow-heif is installed."""
    Image.preinit()  # the common ones first
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in Image.OPEN if name not in NOT_READ)


@cache
def extensions() -> frozenset[str]:
    """The file name extensions of these formats, in lower case with the dot."""
    known = {*formats(), "MPO"}  # opened by the reader of JPEG
    return frozenset(ext for ext, name in Image.registered_extensions().items() if name in known)


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """The image in RGB with the pixels as they are stored. Raises OSError that names the file."""
    with opened(path) as image:
        image = decoded(image).convert("RGB")
        image.info = {}  # without its profile, nothing converts the stored colours
        return image


def read_photo(path: str | os.PathLike[str], as_shown: bool = True) -> Image.Image:
    """The image as `photo_of` returns it and, if `as_shown`, upright as its EXIF tag says. Raises OSError."""
    with opened(path) as image:
        return upright(image)[0] if as_shown else photo_of(image, as_shown=False)


def photo_of(image: Image.Image, as_shown: bool = True) -> Image.Image:
    """An opened image in RGB or, if it may be transparent, RGBA; its `info` has ICC profile, resolution and FAR.

    Without `as_shown` its RGB pixels are those of `read_image`; with it, CMYK and grey are converted by their profile.
    """
    profile, dpi, has_rgb = image.info.get("icc_profile"), image.info.get("dpi"), image.mode in ("RGB", "RGBA", "P")
    image = decoded(image)
    info = {key: value for key, value in image.info.items() if key == FAR}
    if profile and has_rgb:
        info["icc_profile"] = profile
    if dpi and all(1 <= value < 2**16 for value in dpi):  # the range that JPEG can store
        info["dpi"] = tuple(map(float, dpi))
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif as_shown and profile and not has_rgb:  # CMYK and grey
        image = in_srgb(image, profile)
    else:
        image = image.convert("RGB")
    image.info = info
    return image


def upright(image: Image.Image | np.ndarray) -> tuple[Image.Image, Image.Transpose | None]:
    """The image as `photo_of` returns it, upright, and the transposition that turns it back. Raises InputError."""
    kind = type(image).__name__
    if isinstance(image, np.ndarray):
        kind = f"{image.dtype} array {image.shape}"
        if image.dtype == np.uint8 and image.size and (image.ndim == 2 or image.shape[2:] == (3,)):
            image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise InputError(f"an image must be a PIL image, or a uint8 array (H, W, 3) or (H, W); this is a {kind}")
    photo, tag = photo_of(image), orientation(image)
    if tag not in TURNS:
        return photo, None
    return photo.transpose(TURNS[tag]), TURNS[{6: 8, 8: 6}.get(tag, tag)]  # the opposite undoes a quarter turn


def for_network(photo: Image.Image) -> Image.Image:
    """An image from `photo_of` as viewers show it: RGB, in sRGB, on white where it is transparent."""
    return on_white(in_srgb(photo))


def on_white(photo: Image.Image) -> Image.Image:
    """An RGB or RGBA image in RGB, on white where it is transparent."""
    if photo.mode == "RGB":
        return photo
    background = Image.new("RGB", photo.size, "white")
    background.paste(photo, mask=photo.getchannel("A"))
    return background


def in_srgb(image: Image.Image, profile: bytes | None = None) -> Image.Image:
    """Converts to sRGB (mode RGB or RGBA) by `profile` or that in `info`; a profile that cannot be used is ignored."""
    if not (profile := profile or image.info.get("icc_profile")):
        return image
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    with suppress(ImageCms.PyCMSError, OSError, ValueError):
        if changes_colours(profile):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            image = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    image = image.convert(mode)
    image.info = {}
    return image


def changes_colours(profile: bytes) -> bool:
    """Whether an ICC profile is intact and not that of sRGB."""
    with suppress(ImageCms.PyCMSError, OSError, ValueError):
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
        return "sRGB" not in name or "linear" in name.lower()
    return False


def orientation(image: Image.Image) -> int | None:
    """The EXIF orientation of an opened image, or None. Other EXIF tags may be damaged."""
    image.load()  # a PNG may have its EXIF data after the pixels; Pillow rotates a TIFF as it loads
    with suppress(Exception):  # Pillow's reader raises almost anything
        return image.getexif().get(ORIENTATION)
    return None


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) from the file's header. Raises OSError that names the file."""
    with opened(path) as image:
        return image.height, image.width


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """The image in a file, of which only the header is read. Raises OSError that names the file, or MemoryError."""
    try:
        # Not by name: Pillow would map an uncompressed TIFF into memory, and scramble it if it is to be rotated.
        with open(path, "rb") as file, Image.open(file, formats=formats()) as image:
            pixels, limit = image.width * image.height, int(os.environ.get(LIMIT) or 0)
            if 0 < limit < pixels:
                reason = f"its {pixels:,} pixels exceed the limit of {limit:,}"
                raise InputError(f"{reason}: it could be a decompression bomb; --max_pixels allows more")
            yield image
    except Exception as error:  # Pillow raises almost anything on a damaged file
        if is_out_of_memory(error):
            raise MemoryError from error
        raise OSError(f"{path}: cannot be read as an image: {why(path, error)}") from error


def decoded(image: Image.Image, is_mask: bool = False) -> Image.Image:
    """An opened image with 8 bits per channel; one of 8 bits is returned as it is, perhaps not yet decoded.

    White is 65535, 1 for floats, or what `configure_reading` has set; for a mask, the object, it is the maximum. Larger
    values are clipped. Raises InputError for negative values and NaN.
    """
    if image.mode.startswith(DEEP):
        return scaled(np.asarray(image), is_mask)
    tags = getattr(image, "tag_v2", {})
    if tags.get(TIFF_PLANAR) == 2 and max(tags[TIFF_BITS]) > 8:  # Pillow and OpenCV misread it
        raise InputError("it has 16-bit colours in separate planes; save it as 8-bit RGB")
    if not is_deep(image):
        return image
    import cv2

    image.fp.seek(0)
    content = image.fp.read()
    with Image.open(io.BytesIO(content)) as checked:
        checked.load()  # unlike OpenCV, Pillow refuses damaged files
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)  # (H, W, 3) BGR or (H, W, 4) BGRA
    if pixels is None or pixels.ndim < 3 or pixels.shape[:2] != (checked.height, checked.width):
        raise InputError("its 16-bit colours cannot be decoded; save it as 8-bit RGB")
    colours = scaled(cv2.cvtColor(pixels[..., :3], cv2.COLOR_BGR2RGB), is_mask)
    if pixels.shape[2] == 4 and image.mode in ("RGBA", "LA"):
        colours.putalpha(Image.fromarray((pixels[..., 3] >> 8).astype(np.uint8)))  # 65535 is opaque
    return colours


def is_deep(image: Image.Image) -> bool:
    """Whether an opened image, not yet decoded, has more than 8 bits per channel."""
    tiles = image.tile if getattr(image, "fp", None) else ()
    colour = any(re.match(r"(LA|RGB|RGBA|RGBX);16", str(np.ravel(tile[3])[0])) for tile in tiles)
    return colour or image.mode.startswith(DEEP)


def scaled(values: np.ndarray, is_mask: bool) -> Image.Image:
    """An 8-bit image of deeper values (H, W) or (H, W, 3), see `decoded`."""
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high < np.inf:  # nor NaN
        raise InputError(f"its values from {low:g} to {high:g} are no grey levels; save it as 8 bits")
    white = high if is_mask else float(os.environ.get(WHITE) or (1 if values.dtype.kind == "f" else 65535))
    is_short = values.dtype == np.uint16  # looked up in a table, without an array of floats
    levels = np.minimum(np.arange(65536) if is_short else values, white) / (white or 1)
    levels = np.rint(255 * levels).astype(np.uint8)
    image = Image.fromarray(levels[values] if is_short else levels)
    if high and not white / 16 <= high <= 16 * white:
        image.info[FAR] = f"its values reach {high:g}, and {white:g} is white"
    return image


def why(path: str | os.PathLike[str], error: Exception) -> str:
    """What is wrong with a file that cannot be read and, if known, the remedy; on one line."""
    if not isinstance(error, UnidentifiedImageError):
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return (reason.splitlines() or [type(error).__name__])[0]
    if os.path.getsize(path) == 0:
        return "it is empty"
    remedy = GET_HEIF if os.fspath(path).lower().endswith(HEIC) else "save it as 8-bit RGB"
    return f"its format is not known to Pillow; {remedy}"
