"""Reads images as 8-bit pixels, whatever their files hold. Free of torch, which keeps its users small."""

import io
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from unext.errors import InputError, is_out_of_memory

# Pillow reads EPS by starting Ghostscript, whatever the file is called. The others it only recognises.
NOT_READ = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
DEEP = ("I", "F")  # first letters of the modes with more than 8 bits per channel, which are all greyscale
ALLOWED = "SAM2UNEXT_MAX_PIXELS"  # an environment variable, so that worker processes know too what the user allows
WHITE = "SAM2UNEXT_WHITE"  # likewise: the value that is white in images of more than 8 bits
FAR = "far from white"  # in the `info` of such an image: where its values end, if 16 times below or above it
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {  # what makes an image upright, by the value of that tag
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TIFF_BITS, TIFF_PLANAR = 258, 284  # tags
HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"mif1", b"msf1")  # brands
GET_HEIF = "convert to JPEG, or pip install pillow-heif"


def allow_pixels(number: int) -> None:
    """Sets up Pillow for a command and its worker processes: images of so many pixels, long texts, no warnings."""
    os.environ[ALLOWED] = str(number)
    Image.MAX_IMAGE_PIXELS = number
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB: editors write long texts and profiles
    warnings.filterwarnings("ignore", module=r"PIL\.")  # where they matter, they are errors here
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it logs what it also raises


def set_white(value: float | None) -> None:
    """Sets what is white in images of more than 8 bits, for this process and those that it starts; None: the format."""
    os.environ[WHITE] = str(value or "")


if ALLOWED in os.environ:
    allow_pixels(int(os.environ[ALLOWED]))


@cache
def formats() -> tuple[str, ...]:
    """The names of the formats that are read: Pillow's, and HEIF if pillow-heif is installed."""
    Image.preinit()  # the common ones first
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in Image.OPEN if name not in NOT_READ)


@cache
def extensions() -> frozenset[str]:
    """The file name extensions of these formats, in lower case with the dot."""
    known = {*formats(), "MPO"}  # several JPEG in one, which the reader of JPEG opens
    return frozenset(ext for ext, name in Image.registered_extensions().items() if name in known)


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """The image in RGB with the pixels as they are stored. Raises OSError that names the file."""
    with opened(path) as image:
        image = decoded(image).convert("RGB")
        image.info = {}  # its profile is not to be applied
        return image


def read_photo(path: str | os.PathLike[str], as_shown: bool = True) -> Image.Image:
    """The image as `photo_of` returns it and, if `as_shown`, upright as its EXIF tag says. Raises OSError."""
    with opened(path) as image:
        photo = photo_of(image, as_shown)
        turn = TURNS.get(orientation(image)) if as_shown else None
        return photo if turn is None else photo.transpose(turn)


def photo_of(image: Image.Image, as_shown: bool = True) -> Image.Image:
    """An opened image in RGB or, if it may be transparent, RGBA; in `info` the colours' ICC profile, its dpi, and FAR.

    Without `as_shown` its RGB pixels are those of `read_image`; with it, CMYK and grey follow their profile.
    """
    profile, kept = image.info.get("icc_profile"), image.mode in ("RGB", "RGBA", "P")
    dpi = image.info.get("dpi")
    image = decoded(image)
    far = {key: text for key, text in image.info.items() if key == FAR}
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif as_shown and profile and not kept:  # CMYK and grey
        image = to_srgb(image, profile)
    else:
        image = image.convert("RGB")
    image.info = far | ({"icc_profile": profile} if profile and kept else {})
    with suppress(TypeError, ValueError):  # no or damaged ones
        x, y = map(float, dpi)
        if 1 <= min(x, y) <= max(x, y) < 2**16:  # what JPEG can hold
            image.info["dpi"] = x, y
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
    return photo.transpose(TURNS[tag]), TURNS[{6: 8, 8: 6}.get(tag, tag)]  # of a quarter turn the opposite one


def for_network(photo: Image.Image) -> Image.Image:
    """What viewers show of an image from `photo_of`, in RGB: in sRGB, and on white where it is transparent."""
    return on_white(in_srgb(photo))


def in_srgb(photo: Image.Image) -> Image.Image:
    """An RGB or RGBA image in sRGB, by the ICC profile in its `info`."""
    profile = photo.info.get("icc_profile")
    return to_srgb(photo, profile) if profile else photo


def on_white(photo: Image.Image) -> Image.Image:
    """An RGB or RGBA image in RGB, its transparent parts on white."""
    if photo.mode == "RGB":
        return photo
    ground = Image.new("RGB", photo.size, "white")
    ground.paste(photo, mask=photo.getchannel("A"))
    return ground


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An image with this ICC profile in sRGB, RGB or RGBA; a damaged profile, or one of other colours, is ignored."""
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    with suppress(ImageCms.PyCMSError, OSError, ValueError):
        if changes_colours(profile):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            image = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    image = image.convert(mode)
    image.info = {}
    return image


def changes_colours(profile: bytes) -> bool:
    """Whether an ICC profile is another one than sRGB. False if it is damaged."""
    with suppress(ImageCms.PyCMSError, OSError, ValueError):
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
        return "sRGB" not in name or "linear" in name.lower()
    return False


def orientation(image: Image.Image) -> int | None:
    """The EXIF tag for the rotation of an opened image; None without one. Other tags may be damaged."""
    image.load()  # PNG may have it behind the pixels, and Pillow itself turns TIFF
    try:
        value = image.getexif().get(ORIENTATION)
    except Exception:  # Pillow's reader raises almost anything
        return None
    return value if isinstance(value, int) else None


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) from the file's header, without decoding it. Raises OSError that names the file."""
    with opened(path) as image:
        return image.height, image.width


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """The image in a file, only its header read. Errors become OSError that names the file, or MemoryError."""
    try:
        with open_image(path) as image:
            yield image
    except Exception as error:  # Pillow's readers raise almost anything on a damaged file
        if is_out_of_memory(error):
            raise MemoryError from error
        raise OSError(f"{path}: cannot be read as an image: {why(path, error)}") from error


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Pillow's `open` for `formats` and images below its pixel limit. Raises what Pillow does: almost anything."""
    image = Image.open(os.fspath(path), formats=formats())
    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if limit and pixels > limit:  # Pillow itself only warns up to twice the limit
        image.close()
        raise Image.DecompressionBombError(f"{pixels} pixels")
    return image


def decoded(image: Image.Image, is_mask: bool = False) -> Image.Image:
    """An opened image with 8 bits per channel; what has no more is returned as it is, perhaps not yet decoded.

    Pillow clips deeper greyscale at 255 and keeps the high bytes of 16-bit colours. Here white is 65535, of floats 1,
    or what `set_white` says, and more is clipped; of a mask it is the maximum, which is the object. Raises InputError
    for negative values and NaN.
    """
    if image.mode.startswith(DEEP):
        return scaled(np.asarray(image), is_mask)
    tags = getattr(image, "tag_v2", {})
    if tags.get(TIFF_PLANAR) == 2 and max(tags[TIFF_BITS]) > 8:  # neither Pillow nor OpenCV reads these right
        raise InputError("it is a TIFF of 16 bits whose colours lie in separate planes; save it as 8-bit RGB")
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
        colours.putalpha(Image.fromarray((pixels[..., 3] >> 8).astype(np.uint8)))  # of which 65535 is opaque
    return colours


def is_deep(image: Image.Image) -> bool:
    """Whether an opened image that was not decoded yet has more than 8 bits per channel, in grey or colour."""
    tiles = image.tile if getattr(image, "fp", None) else ()
    colour = any(re.match(r"(LA|RGB|RGBA|RGBX);16", str(np.ravel(tile[3])[0])) for tile in tiles)
    return colour or image.mode.startswith(DEEP)


def scaled(values: np.ndarray, is_mask: bool) -> Image.Image:
    """An image of these values, (H, W) or (H, W, 3), see `decoded`."""
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high < np.inf:  # nor NaN
        raise InputError(f"its values from {low:g} to {high:g} are no grey levels; save it as 8 bits")
    white = high if is_mask else float(os.environ.get(WHITE) or (1 if values.dtype.kind == "f" else 65535))
    is_short = values.dtype == np.uint16  # by a table, without an array of floats
    levels = np.minimum(np.arange(65536) if is_short else values, white) / (white or 1)
    levels = np.rint(255 * levels).astype(np.uint8)
    image = Image.fromarray(levels[values] if is_short else levels)
    if high and not white / 16 <= high <= 16 * white:
        image.info[FAR] = f"its values reach {high:g}, and {white:g} is white"
    return image


def why(path: str | os.PathLike[str], error: Exception) -> str:
    """What is wrong with a file that Pillow cannot read and, where it is known, the remedy; on one line."""
    if isinstance(error, UnidentifiedImageError):
        return unknown_format(path)
    if isinstance(error, Image.DecompressionBombError):
        pixels = int(re.search(r"\d[\d,]*", str(error))[0].replace(",", ""))
        limit = f"its {pixels:,} pixels exceed the limit of {Image.MAX_IMAGE_PIXELS:,}"
        return f"{limit}: it could be a decompression bomb; --max_pixels allows more"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (reason.splitlines() or [type(error).__name__])[0]


def unknown_format(path: str | os.PathLike[str]) -> str:
    """What a file is that Pillow does not know."""
    with open(path, "rb") as file:
        start = file.read(16)
        if not start:
            return "it is empty"
        if start[4:8] == b"ftyp" and start[8:12] in HEIC and "HEIF" not in formats():
            return f"it is HEIC, which Pillow does not know; {GET_HEIF}"
        if start.startswith(tuple(TiffImagePlugin.PREFIXES)):
            return "it is a TIFF of bands or numbers that Pillow does not know; save it as 8-bit RGB"
    return "its format is not known to Pillow"
