"""What was scored, of which methods, and how they differ: the data that tables, plots and the page share."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from evaluation.metrics import Mean, PairScores, together
from unext.errors import InputError
from unext.pairing import File

T = TypeVar("T")
LEVEL = 0.05  # of Holm's p, below which a difference is beyond chance


class Task(NamedTuple):
    """A ground truth and what is scored against it."""

    dataset: str
    name: str
    image: File | None
    mask: File
    methods: tuple[str, ...]  # that have a map
    maps: tuple[File, ...]


class ImageScores(NamedTuple):
    """One image and what every method scores on it."""

    dataset: str
    name: str
    image: File | None
    ground_truth: File
    share: float  # of the image that is object
    maps: Mapping[str, File]  # by method; one that has no map of the data set is missing
    figures: Mapping[str, Mapping[str, float]]  # by method and metric
    curves: Mapping[str, Mapping[str, np.ndarray]]  # by method and metric, of those with a curve: float64 (256,)


class Evaluation(NamedTuple):
    """All scores of all methods. A row of the tables is a data set or several together."""

    methods: tuple[str, ...]  # the first is compared with the others
    columns: tuple[str, ...]  # of the tables
    rows: Mapping[str, tuple[str, ...]]  # the data sets of each row
    means: Mapping[str, Mapping[str, PairScores]]  # by method and row
    images: Sequence[ImageScores]
    metrics: tuple[str, ...]  # all that were computed
    published: Mapping[str, Mapping[str, Mapping[str, float]]]  # by row, method and metric
    groups: Mapping[str, str]  # regular expressions by what they group

    def several(self) -> bool:
        return len(self.methods) > 1

    def images_of(self, row: str) -> list[ImageScores]:
        return [one for dataset in self.rows[row] for one in self.images if one.dataset == dataset]

    def results(self) -> dict[str, dict[str, dict[str, float]]]:
        """`{method: {row: {"images": n, metric: value, ...}}}`, unrounded."""
        counts = {row: len(self.images_of(row)) for row in self.rows}
        return {
            method: {row: {"images": counts[row]} | scores.figures(self.metrics) for row, scores in of_rows.items()}
            for method, of_rows in self.means.items()
        }


class Difference(NamedTuple):
    """A line of comparison.csv: how much higher the first method scores than another one."""

    dataset: str
    method: str
    metric: str
    images: int
    difference: float  # of the means, the first minus this method
    low: float  # its 95 % interval
    high: float
    p: float  # two-sided, of the paired bootstrap
    p_holm: float  # corrected for all comparisons of the table

    def is_beyond_chance(self) -> bool:
        return self.p_holm < LEVEL


def of_rows(means: Mapping[str, Mean], rows: Mapping[str, Sequence[str]]) -> dict[str, PairScores]:
    """The scores of the rows from those of the data sets; without rows of which a data set was not scored."""
    return {row: together([means[one] for one in sets]) for row, sets in rows.items() if means.keys() >= set(sets)}


def find(images: Sequence[T], wanted: Sequence[str]) -> list[T]:
    """Those images (with `dataset` and `name`) that are called NAME or DATASET/NAME. Raises InputError."""
    found = []
    for name in wanted:
        hits = [one for one in images if name in (one.name, f"{one.dataset}/{one.name}")]
        if not hits:
            raise InputError(f"--examples: no image that is scored is called {name}; give names without extension")
        found += hits
    return found
