"""Scores all pairs of maps and ground truth in one pool of processes. Free of torch."""

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from evaluation import metrics
from evaluation.results import ImageScores, Task
from unext import files, pairing
from unext.errors import InputError
from unext.images import opened
from unext.masks import has_grey_regions, is_coloured, mask_of, read_and_check_mask
from unext.pairing import File
from unext.workers import in_processes, progress_bar

ENGINES = {"fast": metrics.score, "pysodmetrics": metrics.score_with_pysodmetrics}
EMPTY = "empty"  # a mask without an object, beside MASK_PROBLEMS
# What may be wrong with most of a method's maps of a data set -> what it means; docs/benchmarks.md has the rules.
MAP_PROBLEMS = {
    "are in colour": "read as greyscale; save them in grey levels",
    "are constant": "they have one grey level, though there is an object",
    "score higher inverted": "their MAE is above 0.5",
    "are binary and the ground truth is grey": "swapped?",
}
COLOURED, CONSTANT, INVERTED, SWAPPED = MAP_PROBLEMS


class Scored(NamedTuple):
    """What became of a map."""

    scores: metrics.PairScores | None  # None for one of another size that is not to be resized
    misfit: str  # its size and that of the ground truth, in words; empty if they are equal
    problem: str  # of MAP_PROBLEMS, or empty


def score_files(task: Task, engine: str, resize: bool, names: Sequence[str]) -> tuple[list[Scored], float, str]:
    """The scores of each map, the object's share of the image, and what is wrong with the mask: of MASK_PROBLEMS."""
    cv2.setNumThreads(1)  # in each worker; together they use all cores
    mask, problem = read_and_check_mask(task.mask)
    ground_truth = metrics.prepare(np.array(mask))
    share = ground_truth.share()
    scored = []
    for path in task.maps:
        with opened(path) as image:
            prediction, coloured = mask_of(image), is_coloured(image)
        levels = np.count_nonzero(prediction.histogram())
        misfit, scores = "", None
        if prediction.size != mask.size:
            misfit = f"{path.name} {prediction.size[::-1]} instead of {mask.size[::-1]}"
            prediction = prediction.resize(mask.size, Image.Resampling.BILINEAR)
        if resize or not misfit:
            scores = ENGINES[engine](np.array(prediction), ground_truth, names)
        if coloured:
            map_problem = COLOURED
        elif levels == 1 and 0 < share < 1:
            map_problem = CONSTANT
        elif scores and scores.MAE > 0.5:
            map_problem = INVERTED
        else:
            map_problem = SWAPPED if levels <= 2 and has_grey_regions(np.asarray(mask)) else ""
        scored.append(Scored(scores, misfit, map_problem))
    return scored, share, problem


def evaluate(
    tasks: Sequence[Task], engine: str, resize: bool, names: Sequence[str], workers: int
) -> tuple[list[ImageScores], dict[str, dict[str, metrics.Mean]], list[str]]:
    """The figures of each image, the means of each method and data set, and notes; with one progress bar.

    Raises InputError that lists the maps of another size than their ground truth, unless `resize`.
    """
    images: list[ImageScores] = []
    means: dict[str, dict[str, metrics.Mean]] = {}
    problems: dict[str, dict[File, str]] = {}  # of the masks, by data set
    misfits: dict[str, list[str]] = {}  # by method and data set
    map_problems: dict[str, Counter[str]] = {}  # likewise
    several = len({method for task in tasks for method in task.methods}) > 1
    function = partial(score_files, engine=engine, resize=resize, names=names)
    with closing(in_processes(function, tasks, workers)) as results:
        bar = progress_bar(zip(tasks, results, strict=True), total=len(tasks), unit="img", desc="scoring")
        for task, (scored, share, problem) in bar:
            problems.setdefault(task.dataset, {})[task.mask] = problem or ("" if share else EMPTY)
            for method, one in zip(task.methods, scored, strict=True):
                label = f"{method}, {task.dataset}" if several else task.dataset
                map_problems.setdefault(label, Counter())[one.problem] += 1
                if one.misfit:
                    misfits.setdefault(label, []).append(one.misfit)
            by_method = {method: one.scores for method, one in zip(task.methods, scored, strict=True) if one.scores}
            if len(by_method) < len(task.methods):
                continue
            for method, one in by_method.items():
                means.setdefault(method, {}).setdefault(task.dataset, metrics.Mean()).add(one)
            figures = {method: one.figures(names) for method, one in by_method.items()}
            curves = {method: one.curves(names) for method, one in by_method.items()}
            maps = dict(zip(task.methods, task.maps, strict=True))
            images.append(ImageScores(*task[:4], share, maps, figures, curves))
    if misfits and not resize:
        wrong = [f"{label}: {files.count(len(found), 'map')} of another (height, width): {files.listing(sorted(found))}"
                 for label, found in misfits.items()]  # fmt: skip
        raise InputError("; ".join([*wrong, "--resize resizes them"]))
    notes = [
        f"{label}: {files.count(len(found), 'map')} resized to the ground truth" for label, found in misfits.items()
    ]
    for name, found in problems.items():
        notes += [f"warning: {name}: {line}" for line in pairing.mask_warnings(found)]
        if empty := list(found.values()).count(EMPTY):
            number = f"{empty:,} of {files.count(len(found), 'ground truth')} without an object"
            notes.append(f"{name}: {number}, where Dice, IoU and F-measures are 0 by definition")
    for label, counts in map_problems.items():
        [(problem, number)] = counts.most_common(1)
        if problem and 2 * number > counts.total():
            line = f"{number:,} of {counts.total():,} maps {problem}: {MAP_PROBLEMS[problem]}"
            notes.append(f"warning: {label}: {line}")
    return images, means, notes
