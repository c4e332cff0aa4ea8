"""Reads masks and prediction maps as 8-bit greyscale and detects wrong masks. Free of torch."""

import os

import numpy as np
from PIL import Image, ImageChops

from unext.errors import InputError
from unext.images import DEEP, decoded, opened

LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF")  # formats
OBJECT = 128  # in scores, pixels above are the object
TOLERANCE = 16  # grey levels by which JPEG, resizing and rounding may change a pixel
MAX_LABEL = 120  # grey level of a class; 127 and 128 mean "unknown" in trimaps
MAX_LABELS = 40  # classes in a mask

MASK_PROBLEMS = {  # problem -> meaning and remedy
    "0/1 mask": "reads as black; make the object 255",
    "mask too dark": f"no pixel is above {OBJECT}, so scores see no object; make the object 255",
    "mask of labels": "has small labels and one bright level, such as PASCAL VOC's border, which alone counts as the "
    "object; make the object 255 and all else 0",
    "mask in colour": "is read as greyscale; make the object white and all else black",
}


def read_mask(path: str | os.PathLike[str]) -> Image.Image:
    """The mask or prediction map as 8-bit greyscale (mode L). Raises OSError that names the file."""
    with opened(path) as image:
        return mask_of(image)


def read_and_check_mask(path: str | os.PathLike[str]) -> tuple[Image.Image, str]:
    """The mask as `read_mask` returns it, and its problem: a key of MASK_PROBLEMS, or empty."""
    with opened(path) as image:
        mask = mask_of(image)
        return mask, mask_problem(image, mask)


def mask_of(image: Image.Image) -> Image.Image:
    """The mask (mode L) in an opened image: grey levels, or the alpha channel if all visible pixels share a colour."""
    image = decoded(image, is_mask=True)
    grey, channel = image.convert("L"), alpha_of(image)
    if channel is None:
        return grey
    colours, alpha = np.asarray(image.convert("RGBA"))[..., :3], np.asarray(channel)  # (H, W, 3), (H, W)
    has_transparent_colour = image.mode in ("1", "L", "P", "RGB")
    if has_transparent_colour and np.ptp(colours, axis=2).max() <= TOLERANCE:
        return grey
    if np.ptp(alpha) <= TOLERANCE and np.ptp(grey) > TOLERANCE:  # only alpha is constant
        return grey
    visible = alpha >= TOLERANCE
    if visible.any() and np.abs(np.subtract(grey, alpha, dtype=np.int16)).max() > TOLERANCE:
        if np.ptp(colours[visible], axis=0).max() > TOLERANCE:
            raise InputError("its colours and its alpha channel could both be the mask; save the mask as greyscale")
        if np.max(grey) - int(np.asarray(grey)[visible].max()) > TOLERANCE:
            raise InputError("it has white where its alpha channel is 0; save the mask as greyscale")
    return channel


def alpha_of(image: Image.Image) -> Image.Image | None:
    """The alpha channel (mode L) of an image; None if it is opaque."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return alpha if alpha.getextrema()[0] < 255 - TOLERANCE else None


def mask_problem(image: Image.Image, mask: Image.Image) -> str:
    """The problem of an opened mask, which `mask_of` read as `mask`: a key of MASK_PROBLEMS, or empty."""
    brightest, is_lossy = mask.getextrema()[1], image.format in LOSSY
    if (TOLERANCE if is_lossy else 0) < brightest <= OBJECT:
        return "0/1 mask" if brightest == 1 else "mask too dark"
    is_deep = image.mode.startswith(DEEP)
    values = np.asarray(image if is_deep else mask)
    if not is_lossy and has_labels(values, np.unique(values) if is_deep else np.flatnonzero(mask.histogram())):
        return "mask of labels"
    return "mask in colour" if is_coloured(image) else ""


def is_coloured(image: Image.Image) -> bool:
    """Whether an opened mask or map is in colour."""
    if image.mode.startswith(DEEP) or image.mode in ("1", "L", "LA") or alpha_of(image):
        return False
    red, *others = decoded(image, is_mask=True).convert("RGB").split()
    return max(ImageChops.difference(red, other).getextrema()[1] for other in others) > TOLERANCE


def has_grey_regions(mask: np.ndarray) -> bool:
    """Whether a mask, uint8 (H, W), has 3 x 3 grey pixels, which soft edges do not have."""
    return has_region((mask > TOLERANCE) & (mask < 255 - TOLERANCE))


def has_labels(values: np.ndarray, levels: np.ndarray) -> bool:
    """Whether a mask (H, W) of these levels has regions (3 x 3 pixels) of a few small labels, and a brighter level."""
    labels = levels[(levels >= 1) & (levels <= MAX_LABEL) & (levels < levels.max())]
    if not 0 < len(labels) <= MAX_LABELS or (levels > MAX_LABEL).sum() > 1:
        return False
    return has_region(np.isin(values, labels))


def has_region(pixels: np.ndarray) -> bool:
    """Whether 3 x 3 of the pixels, bool (H, W), are True."""
    import cv2

    return bool(cv2.erode(pixels.astype(np.uint8), np.ones((3, 3))).any())
