"""The metrics of binary segmentation, for one pair of prediction map and ground truth and for data sets.

pysodmetrics (https://github.com/lartpang/PySODMetrics) defines them. `score` computes the same figures in one pass over
the pixels; `score_with_pysodmetrics` calls the library itself. Free of torch. H, W: height and width of a map.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import cv2
import numpy as np

from evaluation import library
from evaluation.structure import quadrants, s_measure, split_at_centroid
from evaluation.weighted import EPS, Surroundings, surroundings, weighted_f_measure
from unext.errors import InputError

BETA_SQUARED = 0.3  # weight of precision in the F-measure
HISTOGRAM_PIXELS = 2**24  # at a time: OpenCV counts in float32
BOUNDARY = 0.02  # width of the boundary in the boundary IoU, as a share of the image's diagonal
NINE = ("mDice", "mIoU", "Smeasure", "wFmeasure", "adpFm", "meanFm", "maxFm", "meanEm", "MAE")  # always in files


@dataclass(frozen=True)
class PairScores:
    """The scores of a pair, or their mean over many; in [0, 1], higher is better except for MAE.

    Curves are float64 (256,) over the thresholds 0 to 255: a pixel counts as foreground if the stretched map, in grey
    levels, reaches the threshold.
    """

    Smeasure: float  # Fan et al., "Structure-measure", ICCV 2017
    wFmeasure: float  # Margolin et al., "How to Evaluate Foreground Maps?", CVPR 2014
    adpFm: float  # F-measure at twice the map's mean; Achanta et al., CVPR 2009
    adpEm: float  # E-measure there
    MAE: float  # mean absolute error; Perazzi et al., CVPR 2012
    precision: np.ndarray
    recall: np.ndarray
    Fm: np.ndarray  # F-measure
    Em: np.ndarray  # E-measure; Fan et al., "Enhanced-alignment Measure", IJCAI 2018
    IoU: np.ndarray  # Jaccard index
    Dice: np.ndarray  # Dice coefficient
    others: dict[str, float] = field(default_factory=dict)  # the requested metrics with `Metric.of_pair`

    def figures(self, names: Iterable[str] = NINE) -> dict[str, float]:
        """The metrics called `names`, in the order of METRICS."""
        names = set(names)
        return {name: self.figure(name) for name in METRICS if name in names}

    def figure(self, name: str) -> float:
        figure = METRICS[name].figure
        return float(figure(self) if figure else self.others[name])

    def curves(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The curves, float32 (256,), of the metrics that are the maximum of a curve."""
        return {name: getattr(self, curve).astype(np.float32) for name in names if (curve := METRICS[name].curve)}


FIELDS = tuple(item.name for item in fields(PairScores) if item.name != "others")


class PairCounts(NamedTuple):
    """A map, its ground truth and the pixels in which they agree or differ at threshold 0.5, for `Metric.of_pair`."""

    prediction: np.ndarray  # uint8 (H, W)
    mask: np.ndarray  # uint8 (H, W), 0 or 255
    above: np.ndarray  # bool (256,), the grey levels that exceed 0.5 in the stretched map
    tp: float  # pixels: true positives, ...
    fp: float
    fn: float
    tn: float


class Metric(NamedTuple):
    """A column of the tables: `figure` is computed from scores or their mean, `of_pair` from each pair."""

    latex: str
    figure: Callable[[PairScores], float] | None = None
    lower_is_better: bool = False
    curve: str | None = None  # of which the metric is the maximum, taken after averaging over images
    of_pair: Callable[[PairCounts], float] | None = None
    digits: int = 3  # in tables


def boundary_iou(pair: PairCounts) -> float:
    """The IoU of the pixels near the boundaries (Cheng et al., "Boundary IoU", CVPR 2021), at threshold 0.5."""
    width = max(1, round(BOUNDARY * float(np.hypot(*pair.mask.shape))))
    inner = []
    for binary in (pair.above.astype(np.uint8)[pair.prediction], pair.mask // 255):
        padded = cv2.copyMakeBorder(binary, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1]
        inner.append((binary - eroded).astype(bool))
    return ratio(np.count_nonzero(inner[0] & inner[1]), np.count_nonzero(inner[0] | inner[1]))


def balanced_error_rate(pair: PairCounts) -> float:
    return 1 - (ratio(pair.tp, pair.tp + pair.fn) + ratio(pair.tn, pair.tn + pair.fp)) / 2


METRICS = {
    "mDice": Metric("mDice", lambda scores: scores.Dice.mean()),
    "mIoU": Metric("mIoU", lambda scores: scores.IoU.mean()),
    "Smeasure": Metric("$S_\\alpha$", lambda scores: scores.Smeasure),
    "wFmeasure": Metric("$F_\\beta^w$", lambda scores: scores.wFmeasure),
    "adpFm": Metric("$F_\\beta^{\\mathrm{adp}}$", lambda scores: scores.adpFm),
    "meanFm": Metric("$F_\\beta^{\\mathrm{mean}}$", lambda scores: scores.Fm.mean()),
    "maxFm": Metric("$F_\\beta^{\\mathrm{max}}$", lambda scores: scores.Fm.max(), curve="Fm"),
    "meanEm": Metric("$E_\\phi$", lambda scores: scores.Em.mean()),
    "MAE": Metric("MAE", lambda scores: scores.MAE, lower_is_better=True),
    "maxEm": Metric("$E_\\phi^{\\mathrm{max}}$", lambda scores: scores.Em.max(), curve="Em"),
    "adpEm": Metric("$E_\\phi^{\\mathrm{adp}}$", lambda scores: scores.adpEm),
    "IoU": Metric("IoU", of_pair=lambda pair: ratio(pair.tp, pair.tp + pair.fp + pair.fn)),
    "Dice": Metric("Dice", of_pair=lambda pair: ratio(2 * pair.tp, 2 * pair.tp + pair.fp + pair.fn)),
    "BER": Metric("BER", of_pair=balanced_error_rate, lower_is_better=True),
    "specificity": Metric("Spe.", of_pair=lambda pair: ratio(pair.tn, pair.tn + pair.fp)),
    "precision": Metric("Prec.", of_pair=lambda pair: ratio(pair.tp, pair.tp + pair.fp)),
    "recall": Metric("Rec.", of_pair=lambda pair: ratio(pair.tp, pair.tp + pair.fn)),
    "BIoU": Metric("BIoU", of_pair=boundary_iou),
    "HCE": Metric("HCE", of_pair=lambda pair: library.correction_effort(*pair[:2]), lower_is_better=True, digits=0),
    "MSIoU": Metric("MSIoU", of_pair=lambda pair: library.multiscale_iou(*pair[:2])),
    "siFm": Metric("$SI\\mbox{-}F_\\beta$", of_pair=lambda pair: library.size_invariant_f_measure(*pair[:2])),
    "siMAE": Metric("SI-MAE", of_pair=lambda pair: library.size_invariant_mae(*pair[:2]), lower_is_better=True),
}

COMMON = tuple(name for name, metric in METRICS.items() if metric.figure)  # computed of every pair, whatever is shown


@dataclass
class Mean:
    """The mean of each score and curve over pairs or, weighted with their numbers of pairs, over data sets.

    Keeps sums and adds in the given order, so equal input gives equal bits.
    """

    count: int = 0
    totals: dict[str, float | np.ndarray] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)

    def add(self, scores: PairScores, weight: int = 1) -> None:
        self.count += weight
        for name in FIELDS:
            self.totals[name] = self.totals.get(name, 0.0) + weight * getattr(scores, name)
        for name, value in scores.others.items():
            self.others[name] = self.others.get(name, 0.0) + weight * value

    def scores(self) -> PairScores:
        others = {name: total / self.count for name, total in self.others.items()}
        return PairScores(**{name: total / self.count for name, total in self.totals.items()}, others=others)


def mean(scores: Iterable[PairScores]) -> PairScores:
    """The mean over pairs, at least one."""
    total = Mean()
    for pair_scores in scores:
        total.add(pair_scores)
    return total.scores()


def together(means: Sequence[Mean]) -> PairScores:
    """The mean over all pairs of several data sets."""
    if len(means) == 1:
        return means[0].scores()  # x n / n would round
    total = Mean()
    for dataset_mean in means:
        total.add(dataset_mean.scores(), dataset_mean.count)
    return total.scores()


def check(prediction: np.ndarray, ground_truth: np.ndarray) -> None:
    """Raises InputError unless these are uint8 (H, W) arrays of equal size."""
    if {prediction.dtype, ground_truth.dtype} != {np.dtype(np.uint8)} or prediction.ndim != 2 or prediction.size == 0:
        raise InputError(f"a map must be uint8 (H, W), got {prediction.dtype} {prediction.shape}")
    if prediction.shape != ground_truth.shape:
        raise InputError(f"the map is {prediction.shape}, its ground truth {ground_truth.shape} (height, width)")


class GroundTruth(NamedTuple):
    """A mask with what the scores derive from it, computed once for the maps of all methods."""

    mask: np.ndarray  # uint8 (H, W), 0 or 1
    split: tuple[int, int]  # see `split_at_centroid`
    surrounded: Surroundings | None

    def share(self) -> float:
        """The share of the image that is foreground."""
        return cv2.countNonZero(self.mask) / self.mask.size


def prepare(ground_truth: np.ndarray) -> GroundTruth:
    """The ground truth, uint8 (H, W), for `score`."""
    cv2.ipp.setUseIPP(False)  # IPP's last bits depend on the address of an array
    check(ground_truth, ground_truth)
    mask = cv2.threshold(ground_truth, 128, 1, cv2.THRESH_BINARY)[1]
    return GroundTruth(mask, split_at_centroid(mask), surroundings(mask))


def score(prediction: np.ndarray, ground_truth: np.ndarray | GroundTruth, names: Iterable[str] = ()) -> PairScores:
    """The scores of a prediction map against its ground truth, uint8 (H, W) each, and the metrics called `names`.

    Ground truth above 128 is foreground; the map is stretched so that its minimum and maximum become 0 and 1. Equals
    pysodmetrics within 1e-6, usually within 1e-12, with one exception: if the foreground's centroid is in the last row
    or column, an empty quadrant makes the library's S-measure NaN; here that quadrant is ignored. Raises InputError for
    other arrays.
    """
    if not isinstance(ground_truth, GroundTruth):
        ground_truth = prepare(ground_truth)
    mask, split, surrounded = ground_truth
    check(prediction, mask)
    # Pixels by quadrant, (background, foreground) and grey level: all that most metrics need.
    counts = np.array([joint_histogram(prediction[place], mask[place]) for place in quadrants(*split)], dtype=np.int64)
    levels = stretched_levels(counts.sum(axis=(0, 1)))
    background, foreground = counts.sum(axis=0)
    adaptive = counts_at_adaptive_threshold(background, foreground, levels, prediction)
    others = {}
    if requested := {name: of_pair for name in names if (of_pair := METRICS[name].of_pair)}:
        above = levels > 0.5
        tp, fp = foreground[above].sum(), background[above].sum()
        rest = foreground.sum() - tp, background.sum() - fp
        pair = PairCounts(prediction, mask * np.uint8(255), above, tp, fp, *rest)
        others = {name: float(of_pair(pair)) for name, of_pair in requested.items()}
    return PairScores(
        Smeasure=s_measure(counts, levels, prediction, split),
        wFmeasure=weighted_f_measure(prediction, surrounded, background, foreground, levels),
        adpFm=float(f_measure(*adaptive, foreground.sum())),
        adpEm=e_measure(*np.array(adaptive)[:, None], foreground.sum(), background.sum())[0],
        MAE=(foreground @ (1 - levels) + background @ levels) / prediction.size,
        others=others,
        **threshold_curves(background, foreground, levels),
    )


def score_with_pysodmetrics(
    prediction: np.ndarray, ground_truth: np.ndarray | GroundTruth, names: Iterable[str] = ()
) -> PairScores:
    """The same as `score`, computed by the library itself, apart from the metrics with `Metric.of_pair`."""
    if isinstance(ground_truth, GroundTruth):
        ground_truth = ground_truth.mask * np.uint8(255)
    check(prediction, ground_truth)
    requested = [name for name in names if METRICS[name].of_pair]
    others = score(prediction, ground_truth, requested).others if requested else {}
    return PairScores(**library.scores(prediction, ground_truth, BETA_SQUARED), others=others)


def joint_histogram(prediction: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts of each grey level in the background and in the foreground: float64 (256,) each."""
    total, foreground = np.zeros(256), np.zeros(256)
    step = max(1, HISTOGRAM_PIXELS // max(1, prediction.shape[1]))
    for start in range(0, len(prediction), step) if prediction.size else ():
        rows = slice(start, start + step)
        total += cv2.calcHist([prediction[rows]], [0], None, [256], [0, 256]).ravel()
        foreground += cv2.calcHist([prediction[rows]], [0], mask[rows], [256], [0, 256]).ravel()
    return total - foreground, foreground


def stretched_levels(counts: np.ndarray) -> np.ndarray:
    """The values of the grey levels, float64 (256,): those that occur (`counts` > 0) span [0, 1], if there are two."""
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
    return {
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, positives),
        "Fm": f_measure(tp, fp, positives),
        "Em": e_measure(tp, fp, positives, negatives),
        "IoU": ratio(tp, positives + fp),
        "Dice": ratio(2 * tp, positives + tp + fp),
    }


def ratio(numerator: np.ndarray | float, denominator: np.ndarray | float) -> np.ndarray:
    """The quotient; 0 where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator != 0)


def f_measure(tp: np.ndarray | int, fp: np.ndarray | int, positives: int) -> np.ndarray:
    """The F-measure of binary maps."""
    precision, recall = ratio(tp, tp + fp), ratio(tp, positives)
    return ratio((1 + BETA_SQUARED) * precision * recall, BETA_SQUARED * precision + recall)


def e_measure(tp: np.ndarray, fp: np.ndarray, positives: int, negatives: int) -> np.ndarray:
    """The E-measure at each threshold (Fan et al., IJCAI 2018): the alignment of two binary maps about their means."""
    pixels = positives + negatives
    predicted = tp + fp
    if positives == 0:
        return (pixels - predicted) / (pixels - 1 + EPS)
    if negatives == 0:
        return predicted / (pixels - 1 + EPS)
    total = np.zeros(len(tp))
    for map_value, mask_value, count in ((1, 1, tp), (1, 0, fp), (0, 1, positives - tp), (0, 0, negatives - fp)):
        a, b = map_value - predicted / pixels, mask_value - positives / pixels
        alignment = 2 * a * b / (a**2 + b**2 + EPS)
        total += (alignment + 1) ** 2 / 4 * count
    return total / (pixels - 1 + EPS)


def counts_at_adaptive_threshold(
    background: np.ndarray, foreground: np.ndarray, levels: np.ndarray, prediction: np.ndarray
) -> tuple[int, int]:
    """The true and false positives of the map thresholded at twice its mean."""
    counts = background + foreground
    threshold = min(2 * (counts @ levels) / prediction.size, 1)
    if np.abs(levels - threshold)[counts > 0].min() < 1e-9:  # a tie, which the last bit of the library's mean decides
        threshold = min(2 * levels[prediction].mean(), 1)
    chosen = levels >= threshold
    return foreground[chosen].sum(), background[chosen].sum()
