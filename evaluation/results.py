"""What was scored, of which methods, and how they differ: the data that tables, plots and the page share."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np

from evaluation.benchmarks import Benchmark
from evaluation.metrics import METRICS, Mean, PairScores, together
from unext import files
from unext.errors import InputError
from unext.pairing import File

THIS_RUN = "this run"  # the name of a single method without a name
LEVEL = 0.05  # significance level of Holm's p
MIN_IMAGES = 20  # to test differences: with fewer, p is too small too often


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """An image of a data set, its ground truth and the prediction maps."""

    dataset: str
    name: str
    image: File | None
    mask: File
    maps: Mapping[str, File]  # by method, without methods that have no map of the data set


@dataclass(frozen=True, slots=True)
class ImageScores(ImageFiles):
    """An image with the scores of every method."""

    share: float  # of the image that is object
    figures: Mapping[str, Mapping[str, float]]  # by method and metric
    curves: Mapping[str, Mapping[str, np.ndarray]]  # by method and metric, of those with a curve: float32 (256,)

    def has_files(self) -> bool:
        """Whether its files are where they were when they were scored."""
        return all(os.path.exists(file) for file in (self.image, self.mask, *self.maps.values()) if file)


class About(NamedTuple):
    """What tables say of a method."""

    name: str
    citation: str = ""  # a key for \\cite, or a LaTeX command
    year: str = ""
    venue: str = ""


class Note(NamedTuple):
    """A line about a data set, the maps of a method, or both."""

    text: str
    dataset: str = ""
    method: str = ""
    is_warning: bool = False

    def __str__(self) -> str:
        subject = label(self.method, self.dataset)
        return files.printable(f"{'warning: ' * self.is_warning}{subject}{': ' if subject else ''}{self.text}")


class Difference(NamedTuple):
    """A line of comparison.csv: how much higher the first method scores than another."""

    dataset: str  # or several together
    method: str
    metric: str
    images: int
    difference: float  # of the means, the first minus this method
    low: float  # its 95 % interval
    high: float
    p: float | None  # two-sided; None for too few images
    p_holm: float | None  # corrected for all comparisons of the table

    def verdict(self) -> str:
        """Whether the first method is better or worse beyond chance: "better", "worse", "unclear"; "" if untested."""
        if self.p_holm is None:
            return ""
        return "unclear" if self.p_holm >= LEVEL else better_or_worse(self.metric, self.difference)


class TrainingScores(NamedTuple):
    """The mean scores of each training of a method; most have one."""

    scores: Sequence[PairScores]

    def figure(self, name: str) -> float:
        return float(np.mean([scores.figure(name) for scores in self.scores]))

    def deviations(self, names: Iterable[str]) -> dict[str, float]:
        """The standard deviation of each metric over several trainings; empty for one."""
        several = names if len(self.scores) > 1 else ()
        return {name: float(np.std([scores.figure(name) for scores in self.scores], ddof=1)) for name in several}

    def curve(self, name: str) -> np.ndarray:
        """A curve of `metrics.PairScores`, the mean over trainings."""
        return np.mean([getattr(scores, name) for scores in self.scores], axis=0)


@dataclass(frozen=True)
class Evaluation:
    """All scores of all methods. A row of the tables is a data set or several together.

    After scoring, each training of a method counts as a method of its own, until `by_method` puts them together.
    """

    benchmark: Benchmark
    methods: tuple[str, ...]  # the first is compared with the others
    columns: tuple[str, ...]  # of the tables
    metrics: tuple[str, ...]  # of the files
    images: Sequence[ImageScores]
    dataset_means: Mapping[str, Mapping[str, Mean]]  # by training and data set
    differences: Sequence[Difference] = ()
    notes: Sequence[Note] = ()
    origins: Mapping[str, str] = field(default_factory=dict)  # by training: where its maps are and how they were made
    about: Mapping[str, About] = field(default_factory=dict)  # by method; may lack some
    trainings: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by method; may lack methods with one

    @cached_property
    def rows(self) -> dict[str, tuple[str, ...]]:
        """The data sets of each row."""
        rows = {image.dataset: (image.dataset,) for image in self.images}
        return rows | {row: sets for row, sets in self.benchmark.together.items() if rows.keys() >= set(sets)}

    @cached_property
    def means(self) -> dict[str, dict[str, TrainingScores]]:
        """The scores by method and row, without rows of which the method has no map."""
        means: dict[str, dict[str, TrainingScores]] = {method: {} for method in self.methods}
        for method, (row, datasets) in product(self.methods, self.rows.items()):
            trainings = [self.dataset_means[key] for key in self.trainings.get(method, [method])]
            if all(of_datasets.keys() >= set(datasets) for of_datasets in trainings):
                scores = [together([of_datasets[name] for name in datasets]) for of_datasets in trainings]
                means[method][row] = TrainingScores(scores)
        return means

    def has_several(self) -> bool:
        return len(self.methods) > 1

    def scored(self) -> list[str]:
        """The metrics that every method was scored with."""
        by_method = [image.figures[method].keys() for image in self.images for method in image.figures]
        return [name for name in METRICS if all(name in names for names in by_method)]

    def lines(self) -> list[str]:
        """The notes as text: on data sets first, then those of each method."""
        order = {training: i for i, training in enumerate(self.dataset_means)}
        return [str(note) for note in sorted(self.notes, key=lambda note: order.get(note.method, -1))]

    def images_of(self, row: str) -> list[ImageScores]:
        return [image for dataset in self.rows[row] for image in self.images if image.dataset == dataset]

    def results(self) -> dict[str, dict[str, dict[str, float]]]:
        """`{method: {row: {"images": n, metric: value, ...}}}`, unrounded; of several trainings also "std"."""
        counts = {row: len(self.images_of(row)) for row in self.rows}
        results = {}
        for method, of_rows in self.means.items():
            results[method] = {}
            for row, scores in of_rows.items():
                figures = {name: scores.figure(name) for name in self.metrics}
                results[method][row] = {"images": counts[row], **figures}
                if deviations := scores.deviations(self.metrics):
                    results[method][row] |= {"trainings": len(scores.scores), "std": deviations}
        return results


def by_method(evaluation: Evaluation) -> Evaluation:
    """The same with the trainings of each method put together.

    Figures of an image become means, curves (trainings, 256); the map is that of the first training.
    """
    about = {key: evaluation.about.get(key, About(key)) for key in evaluation.methods}
    trainings: dict[str, list[str]] = {}
    for key in evaluation.methods:
        trainings.setdefault(about[key].name, []).append(key)

    def pooled(image: ImageScores) -> ImageScores:
        maps, figures, curves = {}, {}, {}
        for method, keys in trainings.items():
            if all(key in image.figures for key in keys):
                of_trainings = [image.figures[key] for key in keys]
                maps[method] = image.maps[keys[0]]
                figures[method] = {
                    name: float(np.mean([row[name] for row in of_trainings])) for name in of_trainings[0]
                }
                of_curves = [image.curves[key] for key in keys]
                curves[method] = {name: np.array([row[name] for row in of_curves]) for name in of_curves[0]}
        return replace(image, maps=maps, figures=figures, curves=curves)

    images = evaluation.images if len(trainings) == len(about) else [pooled(image) for image in evaluation.images]
    about = {method: about[keys[0]] for method, keys in trainings.items()}
    return replace(evaluation, methods=tuple(trainings), images=images, about=about, trainings=trainings)


def better_or_worse(metric: str, difference: float) -> str:
    """Whether a figure that is higher by `difference` is "better" or "worse"."""
    return "better" if (difference < 0) == METRICS[metric].lower_is_better else "worse"


def label(method: str, dataset: str) -> str:
    """What messages call the maps of a method for a data set."""
    return ", ".join(name for name in (method, dataset) if name not in ("", THIS_RUN))


def positions(images: Sequence[ImageFiles], names: Iterable[str]) -> list[int]:
    """Where the images called NAME or DATASET/NAME are in `images`. Raises InputError for a name without an image."""
    chosen = []
    for name in names:
        hits = [i for i, image in enumerate(images) if name in (image.name, f"{image.dataset}/{image.name}")]
        if not hits:
            raise InputError(f"--examples: no image that is scored is called {name}; give names without extension")
        chosen += hits
    return chosen
