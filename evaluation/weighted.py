"""The weighted F-measure of Margolin et al., "How to Evaluate Foreground Maps?", CVPR 2014, in one pass over a map.

As pysodmetrics computes it. H, W: height and width of a map. `levels`, float64 (256,): the value in [0, 1] of each
grey level of the map.
"""

from typing import NamedTuple

import cv2
import numpy as np

EPS = np.spacing(1)  # added to denominators by the definitions
FAR = 150  # pixels from the foreground, beyond which 0.5 ** (distance / 5) is below 1e-9
RADIUS = 3  # of the Gaussian that smooths errors, pixels
REACH = 4  # rows and columns to search: a pixel within RADIUS of the foreground has its nearest pixel within REACH
# Offsets (dy, dx) at which to look for the nearest foreground pixel. Among equally near ones, the distance transform of
# scipy, which pysodmetrics uses, takes the leftmost and of those the topmost.
NEAREST_FIRST = sorted(
    ((dy, dx) for dy in range(-REACH, REACH + 1) for dx in range(-REACH, REACH + 1) if 0 < dy**2 + dx**2 <= 18),
    key=lambda offset: (offset[0] ** 2 + offset[1] ** 2, offset[1], offset[0]),
)


class Surroundings(NamedTuple):
    """What the weighted F-measure derives from a mask, computed once for the maps of all methods."""

    far: tuple[slice, slice]  # the box up to FAR from the foreground
    nearness: np.ndarray  # float32, in that box: 0.5 ** (distance to the foreground / 5)
    close: tuple[slice, slice]  # the box up to RADIUS from the foreground
    inside: np.ndarray  # uint8, the mask in that box
    outside: np.ndarray  # flat indices of the background pixels there, of the box padded by REACH
    nearest: np.ndarray  # flat indices of the foreground pixel nearest to each of `outside`


def surroundings(mask: np.ndarray) -> Surroundings | None:
    """The surroundings of the foreground of a mask, uint8 (H, W) of 0 and 1; None without foreground."""
    if not cv2.countNonZero(mask):
        return None
    far, close = around_foreground(mask, FAR), around_foreground(mask, RADIUS)
    background = cv2.threshold(mask[far], 0, 1, cv2.THRESH_BINARY_INV)[1]
    nearness = cv2.distanceTransform(background, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)  # float32
    np.minimum(nearness, FAR, out=nearness)
    nearness = cv2.exp(np.multiply(nearness, np.float32(np.log(0.5) / 5), out=nearness))
    padded = cv2.copyMakeBorder(mask[close], REACH, REACH, REACH, REACH, cv2.BORDER_CONSTANT, value=0)
    band = np.zeros_like(padded)
    inner = (slice(REACH, -REACH), slice(REACH, -REACH))
    cv2.subtract(cv2.dilate(padded, np.ones((7, 7), np.uint8))[inner], padded[inner], dst=band[inner])
    inside, pending = padded.ravel().view(bool), np.flatnonzero(band.view(bool))
    outside, nearest = [], []
    for dy, dx in NEAREST_FIRST:
        neighbours = pending + (dy * padded.shape[1] + dx)
        hit = inside[neighbours]
        outside.append(pending[hit])
        nearest.append(neighbours[hit])
        pending = pending[~hit]
    return Surroundings(far, nearness, close, mask[close], np.concatenate(outside), np.concatenate(nearest))


def weighted_f_measure(
    prediction: np.ndarray, surrounded: Surroundings | None, background: np.ndarray, foreground: np.ndarray,
    levels: np.ndarray,
) -> float:  # fmt: skip
    """The weighted F-measure (beta 1) of a map, uint8 (H, W), given the surroundings of its mask's foreground.

    `background` and `foreground` (256,) count the pixels of each grey level. An error inside the foreground is reduced
    if those around it are smaller; an error outside weighs more the further it is from the foreground.
    """
    if surrounded is None:
        return 0.0
    positives = foreground.sum()
    missed = reduced_error(prediction[surrounded.close], surrounded, levels)
    # Outside, an error weighs 2 - nearness; on the foreground itself nearness is 1.
    nearness = surrounded.nearness * cv2.LUT(prediction[surrounded.far], levels.astype(np.float32))
    near = cv2.sumElems(nearness)[0] - foreground @ levels  # in float64
    false_positives = 2 * (background @ levels) - near
    true_positives = positives - missed
    recall = 1 - missed / positives
    precision = true_positives / (true_positives + false_positives + EPS)
    return 2 * recall * precision / (recall + precision + EPS)


def reduced_error(prediction: np.ndarray, surrounded: Surroundings, levels: np.ndarray) -> float:
    """The sum over the foreground of the smaller of a pixel's error and the Gaussian mean of the errors around it.

    The Gaussian is 7 x 7 with sigma 5. In it, a background pixel has the error of the nearest foreground pixel, so only
    those within 3 pixels of the foreground matter; pixels outside the image are 0.
    """
    error = cv2.LUT(prediction, (1 - levels).astype(np.float32))
    padded = cv2.copyMakeBorder(error, REACH, REACH, REACH, REACH, cv2.BORDER_CONSTANT, value=0)
    flat = padded.ravel()
    flat[surrounded.outside] = flat[surrounded.nearest]
    smoothed = cv2.GaussianBlur(padded, (7, 7), 5, borderType=cv2.BORDER_CONSTANT)[REACH:-REACH, REACH:-REACH]
    reduced = np.minimum(error, smoothed)
    return cv2.mean(reduced, mask=surrounded.inside)[0] * cv2.countNonZero(surrounded.inside)


def around_foreground(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    """The bounding box of the foreground, extended by `margin` pixels within the image."""
    x, y, width, height = cv2.boundingRect(mask)
    return slice(max(0, y - margin), y + height + margin), slice(max(0, x - margin), x + width + margin)
