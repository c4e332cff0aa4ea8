"""The S-measure of Fan et al., "Structure-measure", ICCV 2017, from the numbers of pixels of each grey level.

As pysodmetrics computes it. `levels`, float64 (256,): the value in [0, 1] of each grey level of the map.
"""

import cv2
import numpy as np

from evaluation.weighted import EPS


def split_at_centroid(mask: np.ndarray) -> tuple[int, int]:
    """The (row, column) one past the foreground's centroid, where the S-measure splits a map into quadrants."""
    height, width = mask.shape
    in_row = cv2.reduce(mask, 1, cv2.REDUCE_SUM, dtype=cv2.CV_32S).ravel()
    in_column = cv2.reduce(mask, 0, cv2.REDUCE_SUM, dtype=cv2.CV_32S).ravel()
    total = in_row.sum(dtype=np.int64)
    if total == 0:
        return round(height / 2) + 1, round(width / 2) + 1
    row, column = in_row @ np.arange(height) / total, in_column @ np.arange(width) / total
    return int(np.round(row)) + 1, int(np.round(column)) + 1


def quadrants(row: int, column: int) -> list[tuple[slice, slice]]:
    """Top left, top right, bottom left, bottom right."""
    return [(y, x) for y in (slice(None, row), slice(row, None)) for x in (slice(None, column), slice(column, None))]


def s_measure(counts: np.ndarray, levels: np.ndarray, prediction: np.ndarray, split: tuple[int, int]) -> float:
    """The S-measure from `counts`, pixels by (quadrant, background or foreground, level)."""
    background, foreground = counts.sum(axis=0)
    share = foreground.sum() / prediction.size
    if share in (0, 1):
        average = (background + foreground) @ levels / prediction.size
        return average if share == 1 else 1 - average
    objects = share * object_score(foreground, levels) + (1 - share) * object_score(background, 1 - levels)
    regions = sum(
        of_quadrant.sum() / prediction.size * ssim(of_quadrant, levels, prediction, place)
        for of_quadrant, place in zip(counts, quadrants(*split), strict=True) if of_quadrant.any()
    )  # fmt: skip
    return max(0.0, 0.5 * objects + 0.5 * regions)


def object_score(counts: np.ndarray, values: np.ndarray) -> float:
    """The object score, high for high and uniform values: `values` with `counts` pixels each."""
    pixels = counts.sum()
    average = counts @ values / pixels
    deviation = np.sqrt(counts @ (values - average) ** 2 / (pixels - 1)) if pixels > 1 else 0.0
    return 2 * average / (average**2 + 1 + deviation + EPS)


def ssim(counts: np.ndarray, levels: np.ndarray, prediction: np.ndarray, place: tuple[slice, slice]) -> float:
    """The structural similarity of a quadrant, from its pixels by (background or foreground, level)."""
    background, foreground = counts
    total = background + foreground
    pixels, positives = total.sum(), foreground.sum()
    x, y = total @ levels / pixels, positives / pixels  # means of map and mask
    if np.count_nonzero(total) == 1 and 0 < x < 1 and y in (0, 1):
        # Map and mask are constant: the rounding of the library's mean decides between 1 and 0.
        constant = levels[total > 0][0]
        x = np.full(prediction.shape, constant)[place].mean()
        return float(x == constant)
    variance_x = total @ (levels - x) ** 2 / (pixels - 1 + EPS)
    variance_y = (positives * (1 - y) ** 2 + (pixels - positives) * y**2) / (pixels - 1 + EPS)
    covariance = ((foreground @ (levels - x)) * (1 - y) - (background @ (levels - x)) * y) / (pixels - 1 + EPS)
    numerator = 4 * x * y * covariance
    denominator = (x**2 + y**2) * (variance_x + variance_y)
    if numerator == 0:
        return float(denominator == 0)
    return numerator / (denominator + EPS)
