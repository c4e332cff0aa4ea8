"""scores.npz, which keeps what was scored: tables and figures are made anew from it, without a map.

Its arrays: `shares` (images,), `figures` (images, methods, metrics), NaN without a map, `curves` (images, methods,
curves, 256), and `header`, the rest as JSON: names, files, notes, and the sums over each data set.
"""

import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from evaluation.benchmarks import Benchmark
from evaluation.metrics import METRICS, Mean
from evaluation.results import THIS_RUN, Evaluation, ImageScores, Note
from unext import files
from unext.errors import InputError
from unext.pairing import File

NAME = "scores.npz"
OF_BENCHMARK = ("name", "columns", "together", "groups", "from_paper")  # without what only finds the files
Image = tuple[str, str]  # data set, name


def content(evaluation: Evaluation) -> bytes:
    """The content of scores.npz."""
    images, methods, metrics = evaluation.images, evaluation.methods, evaluation.scored()
    means = evaluation.dataset_means
    curves = [name for name in metrics if METRICS[name].curve]
    shape = len(images), len(methods)
    arrays = {
        "shares": np.array([image.share for image in images]),
        "figures": np.full((*shape, len(metrics)), np.nan),
        "curves": np.zeros((*shape, len(curves), 256), np.float32),
    }
    for i, image in enumerate(images):
        for k, method in enumerate(methods):
            if method in image.figures:
                arrays["figures"][i, k] = [image.figures[method][name] for name in metrics]
                arrays["curves"][i, k] = [image.curves[method][name] for name in curves]
    header = {
        "benchmark": {name: getattr(evaluation.benchmark, name) for name in OF_BENCHMARK},
        "methods": methods,
        "metrics": metrics,
        "images": [(image.dataset, image.name) for image in images],
        "files": [list(map(absolute, (image.image, image.mask, *map(image.maps.get, methods)))) for image in images],
        "means": [[(name, *sums(mean)) for name, mean in means[method].items()] for method in methods],
        "notes": evaluation.notes,
        "origins": [evaluation.origins.get(method, "") for method in methods],
    }  # fmt: skip
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # as numpy.savez_compressed, three times as fast
        for name, array in {"header": np.array(json.dumps(header)), **arrays}.items():
            npy = io.BytesIO()
            np.lib.format.write_array(npy, array)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), npy.getbuffer(), zipfile.ZIP_DEFLATED, compresslevel=1)
    return buffer.getvalue()


def absolute(file: File | None) -> str:
    return os.path.abspath(file) if file else ""


def file_at(path: str) -> File | None:
    folder, name = os.path.split(path)
    return File(Path(folder), *os.path.splitext(name)) if path else None


def sums(mean: Mean) -> tuple[int, dict[str, float | list[float]], dict[str, float]]:
    """What a Mean holds; JSON keeps every digit."""
    return mean.count, {name: np.asarray(total).tolist() for name, total in mean.totals.items()}, mean.others


def mean_of(count: int, totals: Mapping[str, float | list[float]], others: Mapping[str, float]) -> Mean:
    mean = Mean()
    mean.count, mean.others = count, dict(others)
    mean.totals = {name: np.array(total) if isinstance(total, list) else total for name, total in totals.items()}
    return mean


def read(folder: Path) -> Evaluation:
    """What the scores.npz of a folder holds; the columns are to be chosen. Raises InputError or OSError."""
    path = files.require_folder(folder) / NAME
    try:
        with np.load(path) as arrays:
            shares, figures, curves = (arrays[name] for name in ("shares", "figures", "curves"))
            header = json.loads(str(arrays["header"]))
        benchmark = header["benchmark"] | {"columns": tuple(header["benchmark"]["columns"])}
        methods, names = header["methods"], header["metrics"]
        with_curve = [name for name in names if METRICS[name].curve]
        means = [{name: mean_of(*rest) for name, *rest in of_method} for of_method in header["means"]]
        images = []
        for i, (image, paths) in enumerate(zip(header["images"], header["files"], strict=True)):
            photo, mask, *maps = map(file_at, paths)
            scored = [k for k, map_path in enumerate(maps) if map_path]
            maps = {methods[k]: maps[k] for k in scored}
            of_methods = {methods[k]: dict(zip(names, figures[i, k].tolist(), strict=True)) for k in scored}
            curves_of = {methods[k]: dict(zip(with_curve, curves[i, k], strict=True)) for k in scored}
            images.append(ImageScores(*image, photo, mask, maps, float(shares[i]), of_methods, curves_of))
    except FileNotFoundError:
        raise InputError(f"{folder}: has no {NAME}, which eval.py writes; score the maps again") from None
    except (ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: is damaged or of another version; score the maps again") from error
    by_method = dict(zip(methods, means, strict=True)), dict(zip(methods, header["origins"], strict=True))
    notes = [Note(*note) for note in header["notes"]]
    return Evaluation(Benchmark(**benchmark), tuple(methods), (), (), images, by_method[0], (), notes, by_method[1])


def renamed(evaluation: Evaluation, names: Mapping[str, str]) -> Evaluation:
    """The same with other names of methods, by old name, in this order; methods without a new name are left out."""

    def rename(values: Mapping[str, object]) -> dict:
        return {new: values[old] for old, new in names.items() if old in values}

    images = [
        replace(image, maps=rename(image.maps), figures=rename(image.figures), curves=rename(image.curves))
        for image in evaluation.images
    ]
    notes = [note._replace(method=names.get(note.method, "")) for note in evaluation.notes
             if note.method in ("", *names)]  # fmt: skip
    of_methods = {"dataset_means": rename(evaluation.dataset_means), "origins": rename(evaluation.origins)}
    return replace(evaluation, methods=tuple(names.values()), images=images, notes=notes, **of_methods)


def chosen(evaluation: Evaluation, texts: Sequence[str]) -> Evaluation:
    """The methods that --methods names, each NAME or NEW=NAME, in this order. Raises InputError."""
    names: dict[str, str] = {}
    for text in texts:
        new, _, old = ("", "", text) if text in evaluation.methods else text.partition("=")
        if old not in evaluation.methods:
            raise InputError(f"--methods: {old or text} is not among {files.listing(evaluation.methods)}")
        names[old] = files.printable(new or old)
    if len(names) < len(texts) or len({*names.values()}) < len(names):
        raise InputError("--methods: each method and each name may occur only once")
    return renamed(evaluation, names)


def load(texts: Sequence[str]) -> Evaluation:
    """The scores of all methods in folders of results, each DIR or NAME=DIR. Raises InputError or OSError."""
    runs: list[tuple[str, Evaluation]] = []
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).is_dir():
            name, folder = "", text
        run = read(Path(folder))
        if not name and run.methods == (THIS_RUN,) and len(texts) > 1:
            name = Path(folder).resolve().name
        if name and len(run.methods) > 1:
            raise InputError(
                f"--from {text}: has several methods: {files.listing(run.methods)}; --methods renames them"
            )
        runs.append((folder, renamed(run, {run.methods[0]: files.printable(name)}) if name else run))
    return merged(runs)


def merged(runs: Sequence[tuple[str, Evaluation]]) -> Evaluation:
    """The methods of all runs, which must have scored the same images. Raises InputError."""
    (folder, first), *others = runs
    images = {(image.dataset, image.name): image for image in first.images}
    for other_folder, other in others:
        added = {(image.dataset, image.name): image for image in other.images}
        if different := images.keys() ^ added.keys():
            names = files.listing("/".join(key) for key in sorted(different))
            raise InputError(f"--from: {folder} and {other_folder} have not scored the same images: {names}")
        if different := [key for key, image in added.items() if image.share != images[key].share]:
            names = files.listing("/".join(key) for key in different)
            raise InputError(f"--from: {folder} and {other_folder} have different ground truth: {names}")
        if repeated := {*first.methods} & {*other.methods}:
            raise InputError(f"--from: two methods are called {min(repeated)}; name them, as in ours={other_folder}")
        images = {key: joined(image, added[key]) for key, image in images.items()}
        first = replace(
            first,
            methods=first.methods + other.methods,
            images=list(images.values()),
            dataset_means={**first.dataset_means, **other.dataset_means},
            notes=[*dict.fromkeys(chain(first.notes, other.notes))],
            origins={**first.origins, **other.origins},
        )
    return first


def joined(image: ImageScores, other: ImageScores) -> ImageScores:
    """An image with the scores of the methods of two runs."""
    return replace(
        image,
        maps={**image.maps, **other.maps},
        figures={**image.figures, **other.figures},
        curves={**image.curves, **other.curves},
    )
