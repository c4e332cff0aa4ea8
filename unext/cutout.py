"""Cutouts: the object's own colours, without the old background, on a new one, cropped. Free of torch."""

import hashlib
import io
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageOps

from unext.errors import InputError
from unext.images import changes_colours, for_network, on_white, read_photo

NOTHING, ALL = 0.05, 0.95  # the probabilities up to and from which a cutout has nothing and all of a pixel
ALPHA = np.rint(255 * np.clip((np.arange(256) / 255 - NOTHING) / (ALL - NOTHING), 0, 1)).astype(np.uint8)  # by 255 x p
HALF = 127  # an alpha above is more than a half
SURE = 0.95  # alpha from which a pixel is surely the object's; up to 1 minus that, the background's
DETAIL = 1024  # px a side: the network's maps have no more, so that colours are estimated at no more
ROWS = 256  # of an image at a time: floats of all of its pixels would take most of the memory


def cutout(image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The object of an image, uint8 RGB (H, W, 3), by its alpha, uint8 (H, W): uint8 RGBA (H, W, 4).

    Pixels are as they are where alpha is 255, and blank where it is 0. Where it is partial, they mix object and
    background; there the object's colour is estimated, unless alpha has nothing that is surely object or background.
    """
    pixels = np.dstack([image * (alpha > 0)[..., None], alpha])
    partial = (alpha > 0) & (alpha < 255)
    if partial.any() and (estimates := estimate_colours(image, alpha)):
        layers = image, alpha[..., None], *estimates
        for top in range(0, len(alpha), ROWS):
            rows = slice(top, top + ROWS)
            pixels[rows][partial[rows], :3] = unmix(*(layer[rows][partial[rows]] for layer in layers))
    return pixels


def estimate_colours(image: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Smooth colours of foreground and background, uint8 (H, W, 3) each; None if nothing is surely one of them."""
    size = min(alpha.shape[1], DETAIL), min(alpha.shape[0], DETAIL)
    small, share = (cv2.resize(layer, size, interpolation=cv2.INTER_AREA) / np.float32(255) for layer in (image, alpha))
    foreground, background = share >= SURE, share <= 1 - SURE
    if not foreground.any() or not background.any():
        return None
    estimates = (spread(small, sure.astype(np.float32)[..., None]) for sure in (foreground, background))
    front, back = (cv2.resize(np.rint(255 * colours).astype(np.uint8), alpha.shape[::-1]) for colours in estimates)
    return front, back


def spread(colours: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Spreads the colours, float32 (H, W, 3), from where `known`, float32 (H, W, 1), is 1 to where it is 0, smoothly.

    Push-pull: unknown pixels take the weighted mean of the known ones from the finest scale that has any. Source:
    Gortler et al., "The Lumigraph", SIGGRAPH 1996.
    """
    height, width = known.shape[:2]
    if height == width == 1:
        return colours
    half = (width + 1) // 2, (height + 1) // 2
    layers = (cv2.resize(layer, half, interpolation=cv2.INTER_AREA) for layer in (colours * known, known))
    total, share = (layer.reshape(*half[::-1], -1) for layer in layers)  # OpenCV drops a single channel
    coarse = spread(total / np.maximum(share, 1e-8), np.minimum(4 * share, 1))
    return known * colours + (1 - known) * cv2.resize(coarse, (width, height)).reshape(colours.shape)


def unmix(image: np.ndarray, alpha: np.ndarray, front: np.ndarray, back: np.ndarray) -> np.ndarray:
    """The foreground's colours, uint8 (N, 3), of an image's pixels, uint8 (N, 3), with alpha, uint8 (N, 1).

    `front` and `back`, uint8 (N, 3), are the smooth colours of foreground and background. Both are moved by the least
    (in squares) that makes them mix to the image, whose texture they then have.
    """
    share = alpha / np.float32(255)
    missing = image - share * front - (1 - share) * back
    return np.rint(front + missing * share / (share**2 + (1 - share) ** 2)).clip(0, 255).astype(np.uint8)


def cut_out(photo: Image.Image, grey: np.ndarray) -> Image.Image:
    """The object of an RGB or RGBA image by its probability, 255 x p in uint8 (of any size): RGBA, with its `info`.

    Where the image itself is transparent its alpha multiplies, and its colours, which are not mixed, stay.
    """
    if grey.shape != (photo.height, photo.width):  # it has the ground truth's size
        grey = cv2.resize(grey, photo.size, interpolation=cv2.INTER_LINEAR)
    alpha, own = cv2.LUT(grey, ALPHA), np.asarray(photo)
    if photo.mode == "RGBA":
        alpha = np.rint(own[..., 3] * (alpha / np.float32(255))).astype(np.uint8)
    pixels = cutout(np.asarray(on_white(photo)), alpha)
    if photo.mode == "RGBA":
        unmixed = (own[..., 3] < 255) & (alpha > 0)
        np.copyto(pixels[..., :3], own[..., :3], where=unmixed[..., None])
    image = Image.fromarray(pixels)
    image.info = dict(photo.info)
    return image


def find_box(cut: Image.Image, margin: float = 0) -> tuple[int, int, int, int] | None:
    """(left, top, right, bottom) of the object in a cutout, where its alpha is above a half; None if it has none.

    The box is larger by `margin`, a share of its longer side, on each side, as far as the image goes.
    """
    alpha = np.asarray(cut.getchannel("A"))
    left, top, width, height = cv2.boundingRect((alpha > HALF).view(np.uint8))
    more = round(margin * max(width, height))
    box = left - more, top - more, left + width + more, top + height + more
    return tuple(np.clip(box, 0, cut.size * 2).tolist()) if width else None


def plain(colour: str) -> Image.Image:
    """A background of one pixel, RGB, from a colour's CSS name or #rrggbb. Raises ValueError for anything else."""
    red, green, blue = ImageColor.getrgb(colour)  # ValueError for four: with alpha
    return Image.new("RGB", (1, 1), (red, green, blue))


@lru_cache(maxsize=1)
def background(text: str) -> Image.Image:
    """What a colour's CSS name, #rrggbb or an image file stands for, RGB in sRGB.

    Raises InputError or OSError that names the option.
    """
    with suppress(ValueError):
        return plain(text)
    if not Path(text).is_file():
        raise InputError(
            f"--background {text}: is neither an opaque colour, such as white or #ff8000, nor an image file"
        )
    try:
        return for_network(read_photo(text))
    except OSError as error:
        raise OSError(f"--background {error}") from error


def identity(ground: Image.Image) -> str:
    """What tells a background from others: #rrggbb of a colour, a hash of an image's pixels."""
    content = ground.tobytes()
    return f"#{content.hex()}" if ground.size == (1, 1) else f"sha256:{hashlib.sha256(content).hexdigest()}"


def on_background(cut: Image.Image, ground: Image.Image) -> Image.Image:
    """A cutout on a background in sRGB, which is scaled to cover it and centred: RGB, in the colours of the cutout."""
    ground = ImageOps.fit(ground, cut.size, Image.Resampling.BICUBIC)
    profile = cut.info.get("icc_profile")
    with suppress(ImageCms.PyCMSError, OSError, ValueError):  # a damaged profile, or one of other colours
        if profile and changes_colours(profile):
            target = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            ground = ImageCms.profileToProfile(ground, ImageCms.createProfile("sRGB"), target, outputMode="RGB")
    ground.paste(cut, mask=cut.getchannel("A"))
    return ground
