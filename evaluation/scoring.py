"""Scores all pairs of maps and ground truth in worker processes. Free of torch."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from evaluation import metrics
from evaluation.results import ImageFiles, ImageScores, Note, label
from unext import files, pairing
from unext.errors import InputError
from unext.images import opened
from unext.masks import has_grey_regions, is_coloured, mask_of, read_and_check_mask
from unext.pairing import File
from unext.workers import in_processes, progress_bar

ENGINES = {"fast": metrics.score, "pysodmetrics": metrics.score_with_pysodmetrics}
EMPTY = "empty"  # a mask without an object, used like a key of MASK_PROBLEMS
# What may be wrong with most of a method's maps of a data set: meaning; docs/benchmarks.md has the rules.
MAP_PROBLEMS = {
    "are in colour": "read as greyscale; save them in grey levels",
    "are constant": "they have one grey level, though there is an object",
    "score higher inverted": "their MAE is above 0.5",
    "are binary and the ground truth is grey": "swapped?",
}


class MapScores(NamedTuple):
    """The scores of a map, and what is wrong with it."""

    scores: metrics.PairScores | None  # None for a map of another size that is not to be resized
    size_problem: str  # its size and the ground truth's; empty if they are equal
    problem: str  # of MAP_PROBLEMS, or empty


def score_files(
    image: ImageFiles, engine: str, resize: bool, names: Sequence[str]
) -> tuple[list[MapScores], float, str]:
    """The scores of each map, the object's share of the image, and the mask's problem: of MASK_PROBLEMS, or empty."""
    cv2.setNumThreads(1)  # in each worker; together they use all cores
    mask, mask_problem = read_and_check_mask(image.mask)
    ground_truth = metrics.prepare(np.array(mask))
    share = ground_truth.share()
    scored = []
    for path in image.maps.values():
        with opened(path) as file:
            prediction, coloured = mask_of(file), is_coloured(file)
        levels = np.count_nonzero(prediction.histogram())
        size_problem, scores = "", None
        if prediction.size != mask.size:
            size_problem = f"{path.name} {prediction.size[::-1]} instead of {mask.size[::-1]}"
            prediction = prediction.resize(mask.size, Image.Resampling.BILINEAR)
        if resize or not size_problem:
            scores = ENGINES[engine](np.array(prediction), ground_truth, names)
        constant, inverted = levels == 1 and 0 < share < 1, scores is not None and scores.MAE > 0.5
        checks = coloured, constant, inverted, levels <= 2 and has_grey_regions(np.asarray(mask))
        problem = next((problem for problem, is_so in zip(MAP_PROBLEMS, checks, strict=True) if is_so), "")
        scored.append(MapScores(scores, size_problem, problem))
    return scored, share, mask_problem


def evaluate(
    images: Sequence[ImageFiles], engine: str, resize: bool, names: Sequence[str], workers: int
) -> tuple[list[ImageScores], dict[str, dict[str, metrics.Mean]], list[Note]]:
    """The scores of each image, the means by method and data set, and notes; with a progress bar."""
    scored_images: list[ImageScores] = []
    means: dict[str, dict[str, metrics.Mean]] = defaultdict(lambda: defaultdict(metrics.Mean))
    mask_problems: dict[str, dict[File, str]] = defaultdict(dict)  # by data set
    size_problems: dict[tuple[str, str], list[str]] = defaultdict(list)  # by data set and method
    problems: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)  # likewise
    function = partial(score_files, engine=engine, resize=resize, names=names)
    with closing(in_processes(function, images, workers)) as results:
        bar = progress_bar(zip(images, results, strict=True), total=len(images), unit="img", desc="scoring")
        for image, (scored, share, mask_problem) in bar:
            mask_problems[image.dataset][image.mask] = mask_problem or ("" if share else EMPTY)
            figures, curves = {}, {}
            for method, (scores, size_problem, problem) in zip(image.maps, scored, strict=True):
                key = image.dataset, method
                problems[key][problem] += 1
                if size_problem:
                    size_problems[key].append(size_problem)
                if scores:
                    means[method][image.dataset].add(scores)
                    figures[method], curves[method] = scores.figures(names), scores.curves(names)
            paths = image.image, image.mask, image.maps
            scored_images.append(ImageScores(image.dataset, image.name, *paths, share, figures, curves))
    if size_problems and not resize:
        lines = [
            f"{label(method, dataset)}: {files.count(len(sizes), 'map')} of another (height, width): "
            f"{files.listing(sorted(sizes))}"
            for (dataset, method), sizes in size_problems.items()
        ]
        raise InputError("; ".join([*lines, "--resize resizes them"]))
    notes = [
        Note(f"{files.count(len(maps), 'map')} resized to the ground truth", *key)
        for key, maps in size_problems.items()
    ]
    for dataset, by_mask in mask_problems.items():
        notes += [Note(line, dataset, is_warning=True) for line in pairing.mask_warnings(by_mask)]
        if empty := list(by_mask.values()).count(EMPTY):
            number = f"{empty:,} of {files.count(len(by_mask), 'ground truth')} without an object"
            notes.append(Note(f"{number}, where Dice, IoU and F-measures are 0 by definition", dataset))
    for key, counts in problems.items():
        [(problem, number)] = counts.most_common(1)
        if problem and 2 * number > counts.total():
            line = f"{number:,} of {counts.total():,} maps {problem}: {MAP_PROBLEMS[problem]}"
            notes.append(Note(line, *key, is_warning=True))
    return scored_images, means, notes
