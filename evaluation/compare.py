"""Whether a difference between methods is more than chance, and on which groups of images methods fail."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from evaluation.metrics import METRICS
from evaluation.results import MIN_IMAGES, Difference, Evaluation, ImageScores

RESAMPLES = 5000
SMALLEST_P = 1e-6  # the tails are not known better
SEED = 0
CHUNK = 2**22  # weights of resampled images in memory at a time
SIZES = {"under 1 %": 0.01, "1 to 10 %": 0.1, "over 10 %": np.inf}  # upper bound of the object's share of the image


def differences(evaluation: Evaluation) -> list[Difference]:
    """The first method against each other, for every row and column of the table (paired bootstrap over images)."""
    first, *others = evaluation.methods
    means = evaluation.means
    lines = []
    for row in means[first]:
        images, methods = evaluation.images_of(row), [method for method in others if row in means[method]]
        resampled = resample(images, first, methods, evaluation.columns, RESAMPLES) if methods else {}
        for (method, metric), values in resampled.items():
            difference = means[first][row].figure(metric) - means[method][row].figure(metric)
            low, high = np.percentile(values, [2.5, 97.5]).tolist()
            p = p_value(difference, values, len(images)) if len(images) >= MIN_IMAGES else None
            lines.append(Difference(row, method, metric, len(images), difference, low, high, p, None))
    corrected = iter(holm([line.p for line in lines if line.p is not None]))
    return [line if line.p is None else line._replace(p_holm=next(corrected)) for line in lines]


def resample(
    images: Sequence[ImageScores], first: str, others: Sequence[str], metrics: Sequence[str], number: int
) -> dict[tuple[str, str], np.ndarray]:
    """The first method minus each other, by (method, metric), on resamples of the images: float64 (number,).

    A metric that is the maximum of a curve is that of the resample's mean curve, as in the tables.
    """
    plain = [(method, metric) for method in others for metric in metrics if not METRICS[metric].curve]
    pairwise = np.array(  # (images, plain)
        [[image.figures[first][metric] - image.figures[method][metric] for method, metric in plain] for image in images]
    )
    curves = {
        (method, metric): np.array([image.curves[method][metric] for image in images])  # float32
        for method in (first, *others) for metric in metrics if METRICS[metric].curve
    }  # fmt: skip
    chunks: list[dict[tuple[str, str], np.ndarray]] = []
    for weights in resample_weights(len(images), number):
        chunk = dict(zip(plain, (weights @ pairwise).T, strict=True))
        weights = weights.astype(np.float32)  # curves of 5,000 resamples take seconds
        maxima = {}
        for key, curve in curves.items():  # (images, trainings, 256), or (images, 256) of one
            means = (weights @ curve.reshape(len(curve), -1)).reshape(len(weights), -1, 256)
            maxima[key] = means.max(axis=2).mean(axis=1, dtype=np.float64)  # the mean over trainings
        chunk |= {(method, metric): maxima[first, metric] - maxima[method, metric] for method, metric in curves}
        chunks.append(chunk)
    keys = [(method, metric) for method in others for metric in metrics]
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in keys}


def resample_weights(images: int, number: int) -> Iterator[np.ndarray]:
    """The weights of the images, float64 (k, images), in `number` samples drawn with replacement, some at a time."""
    rng = np.random.default_rng(SEED)
    step = max(1, CHUNK // images)
    for start in range(0, number, step):
        count = min(step, number - start)
        chosen = rng.integers(images, size=(count, images)) + images * np.arange(count)[:, None]
        yield np.bincount(chosen.ravel(), minlength=count * images).reshape(count, images) / images


def p_value(difference: float, resampled: np.ndarray, images: int) -> float:
    """The two-sided p of no difference: the larger of two, since each alone is too small for few images or far tails.

    One is twice the share of the resampled differences on the rarer side of 0. The other is that of a t-test, with
    their standard deviation as the standard error (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993).
    """
    from scipy.special import stdtr  # here: workers import this file, and do without 50 MB

    share = 2 * min(np.count_nonzero(resampled <= 0), np.count_nonzero(resampled >= 0)) / len(resampled)
    error = resampled.std()
    tail = 2 * stdtr(images - 1, -abs(difference) / error) if error else float(not difference)
    return float(min(1, max(share, tail, SMALLEST_P)))


def holm(values: Sequence[float]) -> list[float]:
    """The p of all comparisons corrected for their number (Holm, 1979)."""
    order = np.argsort(values, kind="stable")
    factors = np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.maximum.accumulate(np.array(values)[order] * factors).clip(max=1)
    return corrected.tolist()


class Group(NamedTuple):
    """The images of a data set that have something in common."""

    dataset: str
    kind: str  # what they are grouped by
    name: str
    images: list[ImageScores]

    def figures(self, method: str, metrics: Sequence[str]) -> dict[str, float]:
        """The means of a method's metrics over these images; empty if it has no map of the data set."""
        if method not in self.images[0].figures:
            return {}
        figures = {}
        for name in metrics:
            scores = [(image.curves if METRICS[name].curve else image.figures)[method][name] for image in self.images]
            mean = np.mean(scores, axis=0, dtype=np.float64)  # a number, or a curve of each training
            figures[name] = float(np.atleast_1d(mean).max(axis=-1).mean())
        return figures


def groups(images: Sequence[ImageScores], patterns: Mapping[str, str]) -> list[Group]:
    """The images of each data set by the size of the object, and by what the patterns match in their names.

    The first group of a pattern's match names the group; images without a match are in none.
    """
    result = []
    for dataset in dict.fromkeys(image.dataset for image in images):
        members = [image for image in images if image.dataset == dataset]
        kinds = {"object size": [next(name for name, max_ in SIZES.items() if image.share < max_) for image in members]}
        for kind, pattern in patterns.items():
            kinds[kind] = [match[1] if (match := re.search(pattern, image.name)) else None for image in members]
        for kind, names in kinds.items():
            for name in SIZES if kind == "object size" else sorted({*names} - {None}):
                chosen = [image for image, group in zip(members, names, strict=True) if group == name]
                result += [Group(dataset, kind, name, chosen)] if chosen else []
    return result
