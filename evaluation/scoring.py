"""Scores all pairs of maps and ground truth in one pool of processes. Free of torch."""

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from evaluation import compare, metrics
from unext import files, pairing
from unext.errors import InputError
from unext.masks import read_and_check_mask, read_mask
from unext.pairing import File
from unext.workers import in_processes, progress_bar

ENGINES = {"fast": metrics.score, "pysodmetrics": metrics.score_with_pysodmetrics}


class Task(NamedTuple):
    """A ground truth and what is scored against it."""

    dataset: str
    name: str
    image: File | None
    mask: File
    methods: tuple[str, ...]  # that have a map
    maps: tuple[File, ...]


class Scored(NamedTuple):
    """What became of a map."""

    scores: metrics.PairScores | None  # None for one of another size that is not to be resized
    misfit: str  # its size and that of the ground truth, in words; empty if they are equal


def score_files(task: Task, engine: str, resize: bool, names: Sequence[str]) -> tuple[list[Scored], float, str]:
    """The scores of each map, the object's share of the image, and what is wrong with the mask: of MASK_PROBLEMS."""
    cv2.setNumThreads(1)  # in each worker; together they use all cores
    mask, problem = read_and_check_mask(task.mask)
    ground_truth = metrics.prepare(np.array(mask))
    scored = []
    for path in task.maps:
        prediction, misfit, scores = read_mask(path), "", None
        if prediction.size != mask.size:
            misfit = f"{path.name} {prediction.size[::-1]} instead of {mask.size[::-1]}"
            prediction = prediction.resize(mask.size, Image.Resampling.BILINEAR)
        if resize or not misfit:
            scores = ENGINES[engine](np.array(prediction), ground_truth, names)
        scored.append(Scored(scores, misfit))
    return scored, ground_truth.share(), problem


def evaluate(
    tasks: Sequence[Task], engine: str, resize: bool, names: Sequence[str], workers: int
) -> tuple[list[compare.ImageScores], dict[str, dict[str, metrics.Mean]], list[str]]:
    """The figures of each image, the means of each method and data set, and notes; with one progress bar.

    Raises InputError that lists the maps of another size than their ground truth, unless `resize`.
    """
    images: list[compare.ImageScores] = []
    means: dict[str, dict[str, metrics.Mean]] = {}
    problems: dict[str, dict[File, str]] = {}  # of the masks, by data set
    misfits: dict[str, list[str]] = {}  # by method and data set
    several = len({method for task in tasks for method in task.methods}) > 1
    function = partial(score_files, engine=engine, resize=resize, names=names)
    with closing(in_processes(function, tasks, workers)) as results:
        bar = progress_bar(zip(tasks, results, strict=True), total=len(tasks), unit="img", desc="scoring")
        for task, (scored, share, problem) in bar:
            problems.setdefault(task.dataset, {})[task.mask] = problem
            for method, one in zip(task.methods, scored, strict=True):
                if one.misfit:
                    label = f"{method}, {task.dataset}" if several else task.dataset
                    misfits.setdefault(label, []).append(one.misfit)
            by_method = {method: one.scores for method, one in zip(task.methods, scored, strict=True) if one.scores}
            if len(by_method) < len(task.methods):
                continue
            for method, one in by_method.items():
                means.setdefault(method, {}).setdefault(task.dataset, metrics.Mean()).add(one)
            figures = {method: one.figures(names) for method, one in by_method.items()}
            curves = {method: one.curves(names) for method, one in by_method.items()}
            maps = dict(zip(task.methods, task.maps, strict=True))
            images.append(compare.ImageScores(*task[:4], share, maps, figures, curves))
    if misfits and not resize:
        wrong = [f"{label}: {len(found):,} maps of another (height, width): {files.listing(sorted(found))}"
                 for label, found in misfits.items()]  # fmt: skip
        raise InputError("; ".join([*wrong, "--resize resizes them"]))
    notes = [
        f"{label}: {files.count(len(found), 'map')} resized to the ground truth" for label, found in misfits.items()
    ]
    notes += [f"warning: {name}: {line}" for name, found in problems.items() for line in pairing.mask_warnings(found)]
    return images, means, notes
