"""Methods side by side: whether a difference is more than chance, and where methods fail."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from evaluation.metrics import METRICS
from evaluation.results import Difference, Evaluation, ImageScores

RESAMPLES = 2000  # at least, and PER_COMPARISON for each: with fewer, Holm's correction leaves nothing below LEVEL
PER_COMPARISON = 100
SEED = 0
CHUNK = 2**22  # numbers of a resample held at a time
SIZES = {"under 1 %": 0.01, "1 to 10 %": 0.1, "over 10 %": np.inf}  # share of the image that is object -> less than


def differences(scored: Evaluation) -> list[Difference]:
    """The first method against each other, for every row and column of the table (paired bootstrap over images)."""
    first = scored.methods[0]
    pairs = {
        row: [method for method in scored.methods[1:] if row in scored.means[method]] for row in scored.means[first]
    }
    number = max(RESAMPLES, PER_COMPARISON * len(scored.columns) * sum(map(len, pairs.values())))
    found = []
    for row, others in pairs.items():
        images = scored.images_of(row)
        drawn = resampled(images, first, others, scored.columns, number) if others else {}
        for (method, metric), values in drawn.items():
            mean = scored.means[first][row].figure(metric) - scored.means[method][row].figure(metric)
            low, high, p = interval_and_p(values)
            p = max(p, 2.0 ** (1 - len(images)))  # the least p of an exact sign test: few images prove nothing
            found.append(Difference(row, method, metric, len(images), mean, low, high, p, p))
    corrected = holm([one.p for one in found])
    return [one._replace(p_holm=p) for one, p in zip(found, corrected, strict=True)]


def resampled(
    images: Sequence[ImageScores], first: str, others: Sequence[str], metrics: Sequence[str], number: int
) -> dict[tuple[str, str], np.ndarray]:
    """The first method minus each other, by (method, metric), on resamples of the images: float64 (number,).

    A metric that is the maximum of a curve is that of the resample's mean curve, as in the tables.
    """
    keys = [(method, metric) for method in others for metric in metrics]
    plain = [key for key in keys if not METRICS[key[1]].curve]
    apart = np.array(  # (images, plain)
        [[one.figures[first][metric] - one.figures[method][metric] for method, metric in plain] for one in images]
    )
    curves = {
        (method, metric): np.array([one.curves[method][metric] for one in images])  # (images, 256)
        for method in (first, *others)
        for metric in metrics
        if METRICS[metric].curve
    }
    drawn: dict[tuple[str, str], list[np.ndarray]] = {key: [] for key in keys}
    for weights in resamples(len(images), number):
        for key, values in zip(plain, (weights @ apart).T, strict=True):
            drawn[key].append(values)
        maxima = {key: (weights @ curve).max(axis=1) for key, curve in curves.items()}
        for method, metric in keys:
            if METRICS[metric].curve:
                drawn[method, metric].append(maxima[first, metric] - maxima[method, metric])
    return {key: np.concatenate(parts) for key, parts in drawn.items()}


def resamples(images: int, number: int) -> Iterator[np.ndarray]:
    """The weights of the images, float64 (k, images), in `number` samples drawn with replacement, some at a time."""
    rng = np.random.default_rng(SEED)
    step = max(1, CHUNK // images)
    for start in range(0, number, step):
        count = min(step, number - start)
        chosen = rng.integers(images, size=(count, images)) + images * np.arange(count)[:, None]
        yield np.bincount(chosen.ravel(), minlength=count * images).reshape(count, images) / images


def interval_and_p(drawn: np.ndarray) -> tuple[float, float, float]:
    """The 95 % percentile interval of resampled differences, and the two-sided p of the hypothesis that there is none.

    The p is twice the share of the resamples on the rarer side of 0, counting one more so that it is never 0 (Davison
    and Hinkley, "Bootstrap Methods and their Application", 1997).
    """
    low, high = np.percentile(drawn, [2.5, 97.5])
    rarer = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
    return float(low), float(high), min(1.0, 2 * (rarer + 1) / (len(drawn) + 1))


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
        """The means of a method's metrics over these images."""
        means = {}
        for metric in metrics:
            if METRICS[metric].curve:
                means[metric] = float(np.mean([one.curves[method][metric] for one in self.images], axis=0).max())
            else:
                means[metric] = float(np.mean([one.figures[method][metric] for one in self.images]))
        return means


def groups(images: Sequence[ImageScores], patterns: Mapping[str, str]) -> list[Group]:
    """The images of each data set by the size of the object, and by what the patterns find in their names.

    The first group of a pattern's match names the group; images that it does not match are in none.
    """
    found = []
    for dataset in dict.fromkeys(one.dataset for one in images):
        own = [one for one in images if one.dataset == dataset]
        kinds = {"object size": [next(name for name, bound in SIZES.items() if one.share < bound) for one in own]}
        for kind, pattern in patterns.items():
            matches = [re.search(pattern, one.name) for one in own]
            kinds[kind] = [match[1] if match else None for match in matches]
        for kind, names in kinds.items():
            for name in SIZES if kind == "object size" else sorted({*names} - {None}):
                if some := [one for one, its in zip(own, names, strict=True) if its == name]:
                    found.append(Group(dataset, kind, name, some))
    return found
