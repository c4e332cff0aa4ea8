"""Cutouts: the object with an alpha channel and its own colours at soft edges, and on a background. Free of torch."""

import hashlib
import io
from contextlib import suppress
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageOps

from unext.errors import InputError
from unext.images import changes_colours, for_network, on_white, read_photo

TRANSPARENT, OPAQUE = 0.05, 0.95  # probabilities: alpha is 0 up to the first and 1 from the second
ALPHA = np.clip((np.arange(256) / 255 - TRANSPARENT) / (OPAQUE - TRANSPARENT), 0, 1)
ALPHA = np.rint(255 * ALPHA).astype(np.uint8)  # by 255 x probability
SURE = 0.95  # alpha >= SURE is certainly object, alpha <= 1 - SURE certainly background
DETAIL = 1024  # px a side at which colours are estimated: the network's maps have no more detail
ROWS = 256  # rows computed at a time, to bound memory


def make_cutout(photo: Image.Image, probability: np.ndarray) -> Image.Image:
    """The object of an RGB or RGBA image by its probability, float32 in [0, 1] of any size: RGBA, with its `info`.

    The image's own alpha is multiplied in; its transparent pixels keep their colours.
    """
    grey = np.multiply(probability, 255, out=np.empty(probability.shape, np.uint8), casting="unsafe")
    if grey.shape != (photo.height, photo.width):  # it has the ground truth's size
        grey = cv2.resize(grey, photo.size, interpolation=cv2.INTER_LINEAR)
    alpha, stored = cv2.LUT(grey, ALPHA), np.asarray(photo)
    if photo.mode == "RGBA":
        alpha = np.rint(stored[..., 3] * (alpha / np.float32(255))).astype(np.uint8)
    pixels = extract_object(np.asarray(on_white(photo)), alpha)
    if photo.mode == "RGBA":
        unmixed = (stored[..., 3] < 255) & (alpha > 0)
        np.copyto(pixels[..., :3], stored[..., :3], where=unmixed[..., None])
    cutout = Image.fromarray(pixels)
    cutout.info = dict(photo.info)
    return cutout


def extract_object(image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The object of an image, uint8 RGB (H, W, 3), by its alpha, uint8 (H, W): uint8 RGBA (H, W, 4).

    Pixels are unchanged where alpha is 255 and blank where it is 0. In between they mix object and background, and the
    object's colour is estimated, unless alpha is nowhere certain of object or background.
    """
    pixels = np.dstack([image, alpha])
    pixels[alpha == 0] = 0
    partial = (alpha > 0) & (alpha < 255)
    if partial.any() and (estimates := estimate_colours(image, alpha)):
        layers = image, alpha[..., None], *estimates
        for top in range(0, len(alpha), ROWS):
            rows = slice(top, top + ROWS)
            pixels[rows][partial[rows], :3] = unmix(*(layer[rows][partial[rows]] for layer in layers))
    return pixels


def estimate_colours(image: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Smooth colours of foreground and background, uint8 (H, W, 3) each.

    None if no pixel is certainly foreground, or none certainly background.
    """
    size = min(alpha.shape[1], DETAIL), min(alpha.shape[0], DETAIL)
    small, weight = (
        cv2.resize(layer, size, interpolation=cv2.INTER_AREA) / np.float32(255) for layer in (image, alpha)
    )
    foreground, background = weight >= SURE, weight <= 1 - SURE
    if not foreground.any() or not background.any():
        return None
    estimates = (spread(small, known.astype(np.float32)[..., None]) for known in (foreground, background))
    front, back = (cv2.resize(np.rint(255 * colours).astype(np.uint8), alpha.shape[::-1]) for colours in estimates)
    return front, back


def spread(colours: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The colours, float32 (H, W, 3), spread smoothly from where `known`, float32 (H, W, 1), is 1 to where it is 0.

    Push-pull (Gortler et al., "The Lumigraph", SIGGRAPH 1996): unknown pixels take the weighted mean of the known ones
    from the finest scale that has any.
    """
    height, width = known.shape[:2]
    if height == width == 1:
        return colours
    half = (width + 1) // 2, (height + 1) // 2
    layers = (cv2.resize(layer, half, interpolation=cv2.INTER_AREA) for layer in (colours * known, known))
    total, weight = (layer.reshape(*half[::-1], -1) for layer in layers)  # OpenCV drops a single channel
    coarse = spread(total / np.maximum(weight, 1e-8), np.minimum(4 * weight, 1))
    return known * colours + (1 - known) * cv2.resize(coarse, (width, height)).reshape(colours.shape)


def unmix(image: np.ndarray, alpha: np.ndarray, front: np.ndarray, back: np.ndarray) -> np.ndarray:
    """The foreground's colours, uint8 (N, 3), of an image's pixels, uint8 (N, 3), with alpha, uint8 (N, 1).

    `front` and `back`, uint8 (N, 3), are the smooth colours of foreground and background. Both are shifted by the
    least-squares correction that makes them blend exactly to the image; this restores its texture.
    """
    share = alpha / np.float32(255)
    missing = image - share * front - (1 - share) * back
    return np.rint(front + missing * share / (share**2 + (1 - share) ** 2)).clip(0, 255).astype(np.uint8)


def object_box(cutout: Image.Image, margin: float = 0, within: bool = True) -> tuple[int, int, int, int] | None:
    """(left, top, right, bottom) of the object in a cutout, where its alpha is above a half; None if it has none.

    The box is larger on each side by `margin`, a share of its longer side, and cut to the image if `within`.
    """
    alpha = np.asarray(cutout.getchannel("A"))
    left, top, width, height = cv2.boundingRect((alpha > 127).view(np.uint8))
    more = round(margin * max(width, height))
    box = [left - more, top - more, left + width + more, top + height + more]
    if within:
        box = np.clip(box, 0, cutout.size * 2).tolist()
    return tuple(box) if width else None


def frame(
    image: Image.Image, box: tuple[int, int, int, int] | None, canvas: tuple[int, int] | None = None
) -> Image.Image:
    """An RGBA image cropped to a box, or whole, and centred on a transparent canvas of (width, height).

    It is shrunk to the canvas if it is larger, and never enlarged.
    """
    framed = image if box is None else image.crop(box)
    if canvas is None:
        return framed
    shrunk = framed.copy()
    shrunk.thumbnail(canvas, Image.Resampling.LANCZOS)
    framed = Image.new("RGBA", canvas)
    framed.paste(shrunk, ((canvas[0] - shrunk.width) // 2, (canvas[1] - shrunk.height) // 2))
    framed.info = dict(image.info)
    return framed


def plain_background(colour: str) -> Image.Image:
    """A background of a colour, by its CSS name or #rrggbb: RGB, one pixel. Raises ValueError for anything else."""
    red, green, blue = ImageColor.getrgb(colour)  # ValueError for four: with alpha
    return Image.new("RGB", (1, 1), (red, green, blue))


@lru_cache(maxsize=1)
def load_background(text: str) -> Image.Image:
    """The background that a CSS colour name, #rrggbb or an image file stands for: RGB, in sRGB. Raises InputError."""
    with suppress(ValueError):
        return plain_background(text)
    try:
        return for_network(read_photo(text))
    except OSError as error:
        raise InputError(f"--background {error}, nor is it an opaque colour, such as white or #ff8000") from error


def identity(text: str) -> str:
    """#rrggbb of a background that is a colour, a hash of the pixels of an image. Raises as `load_background`."""
    content = load_background(text).tobytes()
    return f"#{content.hex()}" if len(content) == 3 else f"sha256:{hashlib.sha256(content).hexdigest()}"


def composite(cutout: Image.Image, background: Image.Image) -> Image.Image:
    """A cutout on a background in sRGB, scaled to cover it and centred: RGB, in the colours of the cutout's profile."""
    background = ImageOps.fit(background, cutout.size, Image.Resampling.BICUBIC)
    profile = cutout.info.get("icc_profile")
    with suppress(ImageCms.PyCMSError, OSError, ValueError):  # a damaged or unsuitable profile
        if profile and changes_colours(profile):
            target = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            srgb = ImageCms.createProfile("sRGB")
            background = ImageCms.profileToProfile(background, srgb, target, outputMode="RGB")
    background.paste(cutout, mask=cutout.getchannel("A"))
    return background
