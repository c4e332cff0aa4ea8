"""The nine metrics of binary segmentation, for one pair of prediction map and ground truth and for data sets.

pysodmetrics (https://github.com/lartpang/PySODMetrics) defines them. `score` computes the same figures in one pass over
the pixels; `score_with_pysodmetrics` calls the library itself. Free of torch. H, W: height and width of a map.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from itertools import repeat
from typing import NamedTuple

import cv2
import numpy as np

from evaluation.weighted import EPS, strips, weighted_f_measure

BETA_SQUARED = 0.3  # weight of precision in the F-measure


@dataclass(frozen=True)
class PairScores:
    """The scores of one pair, or the mean over many; each in [0, 1], higher is better except for MAE.

    Curves are float64 (256,) over the thresholds 0 to 255: a pixel counts as foreground if the stretched map, in grey
    levels, reaches the threshold.
    """

    Smeasure: float  # Fan et al., "Structure-measure", ICCV 2017
    wFmeasure: float  # Margolin et al., "How to Evaluate Foreground Maps?", CVPR 2014
    adpFm: float  # F-measure at twice the map's mean; Achanta et al., CVPR 2009
    MAE: float  # mean absolute error; Perazzi et al., CVPR 2012
    precision: np.ndarray
    recall: np.ndarray
    Fm: np.ndarray  # F-measure
    Em: np.ndarray  # E-measure; Fan et al., "Enhanced-alignment Measure", IJCAI 2018
    IoU: np.ndarray  # Jaccard index
    Dice: np.ndarray  # Dice coefficient

    def figures(self) -> dict[str, float]:
        """The metrics by name, in the order of METRICS."""
        return {name: float(metric.figure(self)) for name, metric in METRICS.items()}


class Metric(NamedTuple):
    """A column of the tables."""

    latex: str
    figure: Callable[[PairScores], float]  # of a pair, or of the mean over many
    lower_is_better: bool = False


METRICS = {
    "mDice": Metric("mDice", lambda scores: scores.Dice.mean()),
    "mIoU": Metric("mIoU", lambda scores: scores.IoU.mean()),
    "Smeasure": Metric("$S_\\alpha$", lambda scores: scores.Smeasure),
    "wFmeasure": Metric("$F_\\beta^w$", lambda scores: scores.wFmeasure),
    "adpFm": Metric("$F_\\beta^{adp}$", lambda scores: scores.adpFm),
    "meanFm": Metric("$F_\\beta^{mean}$", lambda scores: scores.Fm.mean()),
    "maxFm": Metric("$F_\\beta^{max}$", lambda scores: scores.Fm.max()),
    "meanEm": Metric("$E_\\phi$", lambda scores: scores.Em.mean()),
    "MAE": Metric("MAE", lambda scores: scores.MAE, lower_is_better=True),
}


def mean(scores: Iterable[PairScores], weights: Iterable[int] = repeat(1)) -> PairScores:
    """The mean of each score and curve over pairs or, weighted with their numbers of pairs, over data sets.

    Holds one at a time and sums in the given order, so equal input gives equal bits. Raises ValueError for no scores.
    """
    totals = {field.name: 0.0 for field in fields(PairScores)}
    count = 0
    for one, weight in zip(scores, weights, strict=False):
        count += weight
        for name in totals:
            totals[name] = totals[name] + weight * getattr(one, name)
    if not count:
        raise ValueError("no pair to score")
    return PairScores(**{name: total / count for name, total in totals.items()})


def score_with_pysodmetrics(prediction: np.ndarray, ground_truth: np.ndarray) -> PairScores:
    """`score` by the library itself, with the same arguments, result and errors."""
    import py_sod_metrics as sod  # not at the top: it takes a second and 100 MB

    check(prediction, ground_truth)
    handlers = {
        "precision": sod.PrecisionHandler(with_dynamic=True, with_adaptive=False),
        "recall": sod.RecallHandler(with_dynamic=True, with_adaptive=False),
        "Fm": sod.FmeasureHandler(with_dynamic=True, with_adaptive=False, beta=BETA_SQUARED),
        "IoU": sod.IOUHandler(with_dynamic=True, with_adaptive=False),
        "Dice": sod.DICEHandler(with_dynamic=True, with_adaptive=False),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Fmeasure, which defines adpFm, is deprecated
        library = {"S": sod.Smeasure(), "wF": sod.WeightedFmeasure(), "F": sod.Fmeasure(), "MAE": sod.MAE()}
        library |= {"E": sod.Emeasure(), "curves": sod.FmeasureV2(handlers)}
        for metric in library.values():
            metric.step(prediction, ground_truth)
        curves = {name: handler["dynamic"] for name, handler in library["curves"].get_results().items()}
        curves["Em"] = library["E"].get_results()["em"]["curve"]
        return PairScores(
            Smeasure=library["S"].get_results()["sm"],
            wFmeasure=library["wF"].get_results()["wfm"],
            adpFm=library["F"].get_results()["fm"]["adp"],
            MAE=library["MAE"].get_results()["mae"],
            **{name: curve[::-1] for name, curve in curves.items()},  # the library starts at threshold 255
        )


def check(prediction: np.ndarray, ground_truth: np.ndarray) -> None:
    """Raises ValueError unless both are uint8 (H, W) arrays of one size."""
    for array in (prediction, ground_truth):
        if array.dtype != np.uint8 or array.ndim != 2 or array.size == 0:
            raise ValueError(f"a map must be uint8 (H, W), got {array.dtype} {array.shape}")
    if prediction.shape != ground_truth.shape:
        sizes = (f"{height} x {width}" for height, width in (prediction.shape, ground_truth.shape))
        raise ValueError("the map is {}, its ground truth {} (height x width)".format(*sizes))


def score(prediction: np.ndarray, ground_truth: np.ndarray) -> PairScores:
    """The scores of a prediction map against its ground truth, both uint8 (H, W).

    Ground truth above 128 is foreground; the map is stretched so that its minimum and maximum become 0 and 1. Equals
    pysodmetrics within 1e-6, usually within 1e-12, with one exception: if the foreground's centroid is in the last row
    or column, an empty quadrant makes the library's S-measure NaN; here that quadrant is ignored. Raises ValueError for
    other arrays.
    """
    check(prediction, ground_truth)
    cv2.ipp.setUseIPP(False)  # IPP's last bits depend on the address of an array
    mask = cv2.threshold(ground_truth, 128, 1, cv2.THRESH_BINARY)[1]  # 0 or 1
    rows, columns = split_at_centroid(mask)
    # Pixels by quadrant, (background, foreground) and grey level: all that most metrics need.
    counts = np.array(
        [joint_histogram(prediction[part], mask[part]) for part in quadrants(rows, columns)], dtype=np.int64
    )
    levels = stretched_levels(counts.sum(axis=(0, 1)))
    background, foreground = counts.sum(axis=0)
    return PairScores(
        Smeasure=s_measure(counts, levels, prediction, (rows, columns)),
        wFmeasure=weighted_f_measure(prediction, mask, background, foreground, levels),
        adpFm=adaptive_f_measure(background, foreground, levels, prediction),
        MAE=(foreground @ (1 - levels) + background @ levels) / prediction.size,
        **threshold_curves(background, foreground, levels),
    )


def split_at_centroid(mask: np.ndarray) -> tuple[int, int]:
    """The (row, column) after the foreground's centroid, where the S-measure splits a map into quadrants."""
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


def joint_histogram(prediction: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts of each grey level in the background and in the foreground: float64 (256,) each."""
    total, foreground = np.zeros(256), np.zeros(256)
    for rows in strips(prediction.shape) if prediction.size else ():
        part = prediction[rows]
        total += cv2.calcHist([part], [0], None, [256], [0, 256]).ravel()
        foreground += cv2.calcHist([part], [0], mask[rows], [256], [0, 256]).ravel()
    return total - foreground, foreground


def stretched_levels(counts: np.ndarray) -> np.ndarray:
    """The values of the grey levels, float64 (256,), so that those that occur (`counts` > 0) span [0, 1], if two do."""
    levels = np.arange(256) / 255
    occurring = levels[counts > 0]
    low, high = occurring[0], occurring[-1]
    return ((levels - low) / (high - low)).clip(0, 1) if high > low else levels


def threshold_curves(background: np.ndarray, foreground: np.ndarray, levels: np.ndarray) -> dict[str, np.ndarray]:
    """The curves of `PairScores` from the pixels (256,) of each grey level."""
    greys = (levels * 255).astype(np.uint8)
    tp = np.cumsum(np.bincount(greys, foreground, 256)[::-1])[::-1]  # foreground at or above each threshold
    fp = np.cumsum(np.bincount(greys, background, 256)[::-1])[::-1]
    positives, negatives = foreground.sum(), background.sum()
    precision, recall = ratio(tp, tp + fp), ratio(tp, positives + 0 * tp)
    return {
        "precision": precision,
        "recall": recall,
        "Fm": ratio((1 + BETA_SQUARED) * precision * recall, BETA_SQUARED * precision + recall),
        "Em": e_measure(tp, fp, positives, negatives),
        "IoU": ratio(tp, positives + fp),
        "Dice": ratio(2 * tp, positives + tp + fp),
    }


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient; 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator != 0)


def e_measure(tp: np.ndarray, fp: np.ndarray, positives: int, negatives: int) -> np.ndarray:
    """The E-measure at each threshold (Fan et al., IJCAI 2018): the alignment of two binary maps about their means."""
    pixels = positives + negatives
    predicted = tp + fp
    if positives == 0:
        return (pixels - predicted) / (pixels - 1 + EPS)
    if negatives == 0:
        return predicted / (pixels - 1 + EPS)
    total = np.zeros(len(tp))
    for map_value, mask_value, count in (
        (1, 1, tp),
        (1, 0, fp),
        (0, 1, positives - tp),
        (0, 0, negatives - fp),
    ):
        a, b = map_value - predicted / pixels, mask_value - positives / pixels
        alignment = 2 * a * b / (a**2 + b**2 + EPS)
        total += (alignment + 1) ** 2 / 4 * count
    return total / (pixels - 1 + EPS)


def adaptive_f_measure(
    background: np.ndarray, foreground: np.ndarray, levels: np.ndarray, prediction: np.ndarray
) -> float:
    """The F-measure of the map thresholded at twice its mean."""
    counts = background + foreground
    threshold = min(2 * (counts @ levels) / prediction.size, 1)
    if np.abs(levels - threshold)[counts > 0].min() < 1e-9:  # a tie, which the last bit of the library's mean decides
        threshold = min(2 * levels[prediction].mean(), 1)
    chosen = levels >= threshold
    tp = foreground[chosen].sum()
    if tp == 0:
        return 0.0
    precision, recall = tp / counts[chosen].sum(), tp / foreground.sum()
    return (1 + BETA_SQUARED) * precision * recall / (BETA_SQUARED * precision + recall)


def s_measure(counts: np.ndarray, levels: np.ndarray, prediction: np.ndarray, split: tuple[int, int]) -> float:
    """The S-measure (Fan et al., ICCV 2017) from `counts`, pixels by (quadrant, background or foreground, level)."""
    background, foreground = counts.sum(axis=0)
    share = foreground.sum() / prediction.size
    if share in (0, 1):
        average = (background + foreground) @ levels / prediction.size
        return average if share == 1 else 1 - average
    objects = share * object_score(foreground, levels) + (1 - share) * object_score(background, 1 - levels)
    parts = zip(counts, quadrants(*split), strict=True)
    regions = sum(
        part.sum() / prediction.size * ssim(part, levels, prediction, place) for part, place in parts if part.any()
    )
    return max(0.0, 0.5 * objects + 0.5 * regions)


def object_score(counts: np.ndarray, values: np.ndarray) -> float:
    """How high and uniform the values are, `counts` being their pixels."""
    pixels = counts.sum()
    average = counts @ values / pixels
    deviation = np.sqrt(counts @ (values - average) ** 2 / (pixels - 1)) if pixels > 1 else 0.0
    return 2 * average / (average**2 + 1 + deviation + EPS)


def ssim(counts: np.ndarray, levels: np.ndarray, prediction: np.ndarray, place: tuple[slice, slice]) -> float:
    """The structural similarity of one quadrant, from its pixels by (background or foreground, level)."""
    background, foreground = counts
    both = background + foreground
    pixels, positives = both.sum(), foreground.sum()
    x, y = both @ levels / pixels, positives / pixels  # means of map and mask
    if np.count_nonzero(both) == 1 and 0 < x < 1 and y in (0, 1):
        # Map and mask are both constant: the rounding of the library's mean decides between 1 and 0.
        constant = levels[both > 0][0]
        x = np.full(prediction.shape, constant)[place].mean()
        return float(x == constant)
    variance_x = both @ (levels - x) ** 2 / (pixels - 1 + EPS)
    variance_y = (positives * (1 - y) ** 2 + (pixels - positives) * y**2) / (pixels - 1 + EPS)
    covariance = ((foreground @ (levels - x)) * (1 - y) - (background @ (levels - x)) * y) / (pixels - 1 + EPS)
    numerator = 4 * x * y * covariance
    denominator = (x**2 + y**2) * (variance_x + variance_y)
    if numerator == 0:
        return float(denominator == 0)
    return numerator / (denominator + EPS)
