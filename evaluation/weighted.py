"""The weighted F-measure of Margolin et al., "How to Evaluate Foreground Maps?", CVPR 2014, in one pass over a map.

As pysodmetrics computes it. H, W: height and width of a map. `levels`, float64 (256,): the value in [0, 1] of each
grey level of the map.
"""

from collections.abc import Iterator

import cv2
import numpy as np

EPS = np.spacing(1)  # added to denominators by the definitions
STRIP_PIXELS = 2**18  # processed at a time
FAR = 150  # pixels from the foreground, beyond which 0.5 ** (distance / 5) is below 1e-9
RADIUS = 3  # of the Gaussian that smooths errors, pixels
REACH = 4  # rows and columns to the nearest foreground pixel, for pixels up to RADIUS from the foreground
# Offsets (dy, dx) at which to look for the nearest foreground pixel. Among equally near ones, the distance transform of
# scipy, which pysodmetrics uses, takes the leftmost and of those the topmost.
NEAREST_FIRST = sorted(
    ((dy, dx) for dy in range(-REACH, REACH + 1) for dx in range(-REACH, REACH + 1) if 0 < dy**2 + dx**2 <= 18),
    key=lambda offset: (offset[0] ** 2 + offset[1] ** 2, offset[1], offset[0]),
)


def strips(shape: tuple[int, int]) -> Iterator[slice]:
    """The rows of a map (H, W) in strips that fit in the processor's cache."""
    height, width = shape
    step = max(1, STRIP_PIXELS // max(1, width))
    for start in range(0, height, step):
        yield slice(start, min(start + step, height))


def weighted_f_measure(
    prediction: np.ndarray, mask: np.ndarray, background: np.ndarray, foreground: np.ndarray, levels: np.ndarray
) -> float:
    """The weighted F-measure (beta 1) of a map and its binary mask, uint8 (H, W).

    `background` and `foreground` (256,) count the pixels of each grey level. An error inside the foreground is reduced
    if those around it are smaller; an error outside weighs more the further it is from the foreground.
    """
    positives = foreground.sum()
    if positives == 0:
        return 0.0
    missed = reduced_error(prediction, mask, levels)
    # Outside, an error weighs 2 - nearness; on the foreground itself nearness is 1.
    near = nearness_sum(prediction, mask, levels) - foreground @ levels
    false_positives = 2 * (background @ levels) - near
    true_positives = positives - missed
    recall = 1 - missed / positives
    precision = true_positives / (true_positives + false_positives + EPS)
    return 2 * recall * precision / (recall + precision + EPS)


def nearness_sum(prediction: np.ndarray, mask: np.ndarray, levels: np.ndarray) -> float:
    """The sum over all pixels of the map times 0.5 ** (distance to the foreground / 5)."""
    place = around_foreground(mask, FAR)
    prediction, background = prediction[place], cv2.threshold(mask[place], 0, 1, cv2.THRESH_BINARY_INV)[1]
    distance = cv2.distanceTransform(background, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)  # float32
    total = 0.0
    for rows in strips(distance.shape):
        near = np.minimum(distance[rows], FAR)  # not cv2.min, which takes some narrow maps for a scalar
        near *= np.float32(np.log(0.5) / 5)
        cv2.exp(near, dst=near)
        near *= cv2.LUT(prediction[rows], levels.astype(np.float32))
        total += cv2.sumElems(near)[0]  # in float64
    return total


def reduced_error(prediction: np.ndarray, mask: np.ndarray, levels: np.ndarray) -> float:
    """The sum over the foreground of the smaller of a pixel's error and the Gaussian mean of the errors around it.

    The Gaussian is 7 x 7 with sigma 5. In it, a background pixel has the error of the nearest foreground pixel, so only
    those within 3 pixels of the foreground matter; pixels outside the image are 0.
    """
    place = around_foreground(mask, RADIUS)
    prediction, mask = prediction[place], mask[place]
    errors_of_levels = (1 - levels).astype(np.float32)
    total = 0.0
    for rows in strips(mask.shape):
        above = min(rows.start, RADIUS + REACH)  # rows above the strip that its pixels depend on
        around = slice(rows.start - above, rows.stop + RADIUS + REACH)
        error = cv2.LUT(prediction[around], errors_of_levels)
        reduced = np.minimum(error, smoothed_error(error, mask[around]))
        own = slice(above, above + rows.stop - rows.start)
        inside = mask[rows]
        total += cv2.mean(reduced[own], mask=inside)[0] * cv2.countNonZero(inside)
    return total


def smoothed_error(error: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The Gaussian mean of errors, float32 (H, W), with the nearest inside error for pixels outside the foreground."""
    mask = cv2.copyMakeBorder(mask, REACH, REACH, REACH, REACH, cv2.BORDER_CONSTANT, value=0)
    inner = (slice(REACH, -REACH), slice(REACH, -REACH))
    padded = np.zeros(mask.shape, np.float32)
    padded[inner] = error
    band = np.zeros_like(mask)
    cv2.subtract(cv2.dilate(mask, np.ones((7, 7), np.uint8))[inner], mask[inner], dst=band[inner])

    inside, errors = mask.ravel().view(bool), padded.ravel()
    pending = np.flatnonzero(band.view(bool))
    for dy, dx in NEAREST_FIRST:
        nearest = pending + (dy * mask.shape[1] + dx)
        found = inside[nearest]
        errors[pending[found]] = errors[nearest[found]]
        pending = pending[~found]
    return cv2.GaussianBlur(padded, (7, 7), 5, borderType=cv2.BORDER_CONSTANT)[inner]


def around_foreground(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    """The bounding box of the foreground, extended by `margin` pixels within the image."""
    x, y, width, height = cv2.boundingRect(mask)
    return slice(max(0, y - margin), y + height + margin), slice(max(0, x - margin), x + width + margin)
