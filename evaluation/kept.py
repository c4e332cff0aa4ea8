"""scores.npz, which keeps what was scored: tables and figures are made anew from it, without a map.

Its arrays: `shares` (images,), `figures` (images, trainings, metrics), NaN without a map, `curves` (images,
trainings, curves, 256), and `header`, the rest as JSON: names, files, notes, and the sums over each data set.
"""

import io
import json
import os
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from evaluation import methods
from evaluation.benchmarks import Benchmark
from evaluation.metrics import METRICS, Mean
from evaluation.results import THIS_RUN, About, Evaluation, ImageScores, Note
from unext import files
from unext.errors import InputError
from unext.pairing import File

NAME = "scores.npz"
REMEDY = "rename or choose them first, in a folder of their own: --save_path FOLDER --methods ... --from "
OF_BENCHMARK = ("name", "columns", "together", "groups", "from_paper")  # without what only finds the files
# What a damaged file, or one of another version, raises.
ERRORS = (ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile, zlib.error, tokenize.TokenError)
OF_METHODS = ("maps", "figures", "curves")  # fields of an image


def content(evaluation: Evaluation) -> bytes:
    """The content of scores.npz."""
    images, keys, metrics = evaluation.images, evaluation.methods, evaluation.scored()
    means = evaluation.dataset_means
    curves = [name for name in metrics if METRICS[name].curve]
    shape = len(images), len(keys)
    arrays = {
        "shares": np.array([image.share for image in images]),
        "figures": np.full((*shape, len(metrics)), np.nan),
        "curves": np.zeros((*shape, len(curves), 256), np.float32),
    }
    for i, image in enumerate(images):
        for k, key in enumerate(keys):
            if key in image.figures:
                arrays["figures"][i, k] = [image.figures[key][name] for name in metrics]
                arrays["curves"][i, k] = [image.curves[key][name] for name in curves]
    header = {
        "benchmark": {name: getattr(evaluation.benchmark, name) for name in OF_BENCHMARK},
        "about": [(key, *evaluation.about[key]) for key in keys],
        "metrics": metrics,
        "images": [(image.dataset, image.name) for image in images],
        "files": [list(map(absolute, (image.image, image.mask, *map(image.maps.get, keys)))) for image in images],
        "means": [[(name, *vars(mean).values()) for name, mean in means[key].items()] for key in keys],
        "notes": evaluation.notes,
        "origins": [evaluation.origins.get(key, "") for key in keys],
    }  # fmt: skip
    buffer = io.BytesIO()
    np.savez_compressed(buffer, header=json.dumps(header, default=np.ndarray.tolist), **arrays)
    return buffer.getvalue()


def absolute(file: File | None) -> str:
    return os.path.abspath(file) if file else ""


def file_at(path: str) -> File | None:
    folder, name = os.path.split(path)
    return File(Path(folder), *os.path.splitext(name)) if path else None


def read(folder: Path) -> Evaluation:
    """What the scores.npz of a folder holds; the columns are to be chosen. Raises InputError or OSError."""
    path = files.require_folder(folder) / NAME
    try:
        with np.load(path) as arrays:
            shares, figures, curves = (arrays[name] for name in ("shares", "figures", "curves"))
            header = json.loads(str(arrays["header"]))
        benchmark = header["benchmark"] | {"columns": tuple(header["benchmark"]["columns"])}
        keys, names = [key for key, *_ in header["about"]], header["metrics"]
        with_curve = [name for name in names if METRICS[name].curve]
        means = [
            {name: Mean(count, {key: np.array(total) for key, total in totals.items()}, others)
             for name, count, totals, others in of_method} for of_method in header["means"]
        ]  # fmt: skip
        images = []
        for i, (image, paths) in enumerate(zip(header["images"], header["files"], strict=True)):
            photo, mask, *maps = map(file_at, paths)
            scored = [k for k, map_path in enumerate(maps) if map_path]
            maps = {keys[k]: maps[k] for k in scored}
            of_keys = {keys[k]: dict(zip(names, figures[i, k].tolist(), strict=True)) for k in scored}
            curves_of = {keys[k]: dict(zip(with_curve, curves[i, k], strict=True)) for k in scored}
            images.append(ImageScores(*image, photo, mask, maps, float(shares[i]), of_keys, curves_of))
    except FileNotFoundError:
        raise InputError(f"{folder}: has no {NAME}, which eval.py writes; score the maps again") from None
    except ERRORS as error:
        raise InputError(f"{path}: is damaged or of another version; score the maps again") from error
    notes, about = [Note(*note) for note in header["notes"]], {key: About(*rest) for key, *rest in header["about"]}
    means, origins = (dict(zip(keys, values, strict=True)) for values in (means, header["origins"]))
    return Evaluation(Benchmark(**benchmark), tuple(keys), (), (), images, means, (), notes, origins, about)


def renamed(evaluation: Evaluation, keys: Mapping[str, tuple[str, About]]) -> Evaluation:
    """The trainings called `keys`, in this order, with the keys and names given there."""

    def rename(values: Mapping[str, object]) -> dict:
        return {new: values[old] for old, (new, _) in keys.items() if old in values}

    images = [
        replace(image, **{name: rename(getattr(image, name)) for name in OF_METHODS}) for image in evaluation.images
    ]
    notes = [note._replace(method=keys[note.method][0] if note.method else "")
             for note in evaluation.notes if note.method in ("", *keys)]  # fmt: skip
    of_trainings = {"dataset_means": rename(evaluation.dataset_means), "origins": rename(evaluation.origins)}
    about = dict(keys.values())
    return replace(evaluation, methods=tuple(about), about=about, images=images, notes=notes, **of_trainings)


def chosen(evaluation: Evaluation, texts: Sequence[str]) -> Evaluation:
    """The methods of --methods in this order: each NAME or NEW=NAME, or a YAML file of them. Raises InputError."""
    keys_of: dict[str, list[str]] = {}
    for key, about in evaluation.about.items():
        keys_of.setdefault(about.name, []).append(key)
    wanted = []  # old name, what to say of it
    if methods.is_file(texts):
        wanted = [(name, methods.about_of(name, entry)) for name, entry in methods.read(Path(texts[0])).items()]
    else:
        for text in texts:
            new, _, old = ("", "", text) if text in keys_of or "=" not in text else text.partition("=")
            about = evaluation.about[keys_of[old][0]] if old in keys_of else About(old)
            wanted.append((old, about._replace(name=files.printable(new or old))))
    names = [old for old, _ in wanted], [about.name for _, about in wanted]
    if unknown := [old for old in names[0] if old not in keys_of]:
        raise InputError(f"--methods: {unknown[0]} is not among {files.listing(keys_of)}")
    if any(len({*side}) < len(side) for side in names):
        raise InputError("--methods: each method and each name may occur only once")
    keys: dict[str, tuple[str, About]] = {}
    for old, about in wanted:
        for key in keys_of[old]:
            keys[key] = methods.free_key(about.name, {new for new, _ in keys.values()}), about
    return renamed(evaluation, keys)


def of_sets(evaluation: Evaluation, sets: Sequence[str]) -> Evaluation:
    """The evaluation of these data sets alone, in the order in which they were scored. Raises InputError."""
    known = {image.dataset.casefold(): image.dataset for image in evaluation.images}
    if unknown := [name for name in sets if name.casefold() not in known]:
        raise InputError(f"--sets: {unknown[0]} is not among {files.listing(known.values())}")
    kept = {known[name.casefold()] for name in sets}
    means = {
        key: {name: mean for name, mean in of_datasets.items() if name in kept}
        for key, of_datasets in evaluation.dataset_means.items()
    }
    empty = [key for key, of_datasets in means.items() if not of_datasets]
    evaluation = replace(
        evaluation,
        images=[image for image in evaluation.images if image.dataset in kept],
        dataset_means=means,
        notes=[note for note in evaluation.notes if note.dataset in ("", *kept)],
    )
    rest = {key: (key, about) for key, about in evaluation.about.items() if key not in empty}
    return renamed(evaluation, rest) if empty else evaluation


def load(texts: Sequence[str]) -> Evaluation:
    """The scores of all methods in folders of results, each DIR or NAME=DIR. Raises InputError or OSError.

    The same NAME twice is two trainings of a method.
    """
    merged, given = None, []
    for text in texts:
        name, folder = methods.name_and_folder(text)
        run = read(Path(folder))
        names = [*dict.fromkeys(about.name for about in run.about.values())]
        if not name and names == [THIS_RUN] and len(texts) > 1:
            run = chosen(run, [f"{methods.base_name(folder)}={THIS_RUN}"])
        if name and len(names) > 1:
            raise InputError(f"--from {text}: has several methods: {files.listing(names)}; {REMEDY}{folder}")
        if name:
            run = chosen(run, [f"{name}={names[0]}"])
        given += [name] * bool(name)
        merged = run if merged is None else merge(merged, run, folder, trainings=given.count(name) > 1)
    return merged


def merge(first: Evaluation, other: Evaluation, folder: str, trainings: bool) -> Evaluation:
    """The methods of two runs, which must have scored the same images. Raises InputError.

    `trainings`: methods of the same name are trainings of it.
    """
    images, added = ({(image.dataset, image.name): image for image in run.images} for run in (first, other))
    if different := images.keys() ^ added.keys():
        names = files.listing("/".join(key) for key in sorted(different))
        raise InputError(f"--from: {folder} has not scored the same images as those before it: {names}")
    if different := [key for key, image in added.items() if image.share != images[key].share]:
        names = files.listing("/".join(key) for key in different)
        raise InputError(f"--from: {folder} has other ground truth than those before it: {names}")
    if not trainings and (repeated := {*first.methods} & {*other.methods}):
        remedy = f"name a folder of one method, as in ours={folder}; of several, {REMEDY}{folder}"
        raise InputError(f"--from: two methods are called {min(repeated)}; {remedy}")
    keys: dict[str, tuple[str, About]] = {}
    for key, about in other.about.items():
        keys[key] = methods.free_key(about.name, {*first.methods, *(new for new, _ in keys.values())}), about
    other = renamed(other, keys)
    added = {(image.dataset, image.name): image for image in other.images}

    def joined(image: ImageScores) -> ImageScores:
        more = added[image.dataset, image.name]
        return replace(image, **{name: getattr(image, name) | getattr(more, name) for name in OF_METHODS})

    return replace(
        first,
        methods=first.methods + other.methods,
        images=[joined(image) for image in first.images],
        dataset_means={**first.dataset_means, **other.dataset_means},
        notes=[*dict.fromkeys(chain(first.notes, other.notes))],
        origins={**first.origins, **other.origins},
        about={**first.about, **other.about},
    )
