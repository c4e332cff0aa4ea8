"""The paper's benchmarks: their splits, where those lie in the archives, and the columns of the paper's tables.

A benchmark is a name of `BENCHMARKS` or, for data of one's own, a YAML file of the same shape:

    columns: [Smeasure, wFmeasure, MAE]
    train: {folder: train, images: photos, masks: drawings}
    test:
      easy: {folder: test/easy, count: 120}
      hard: [{folder: test/hard}, {folder: test/harder}]

A split is a place, a list of places that are joined, or `either:` with a list of layouts of which one is there. Folders
are patterns, matched without regard to case below the root that the user names or up to two folders further down: `|`
separates alternatives, `*`, `?` and `[]` are those of file names, `{images}` and `{masks}` stand for the usual names of
such folders and are what `images` and `masks` are unless given.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml

import files
from metrics import METRICS

USUAL = {
    "{images}": ("im", "ims", "img", "imgs", "image", "images"),
    "{masks}": ("gt", "gts", "gt_object", "mask", "masks", "label", "labels"),
}
DEPTH = 2  # how many folders below the root a layout may begin
DESCRIPTIONS = (".yaml", ".yml")  # files that describe a benchmark
OURS = "SAM2-UNeXT"  # its rows in published.json


def halves(split: str, count: int) -> dict[str, Any]:
    """The layouts of archives with one training and one test set: `train/Image`, `trainset/images`, `train-images`."""
    apart = {"images": split + "[-_]{images}", "masks": split + "[-_]{masks}"}
    return {"either": [{"folder": f"{split}|{split}set", "count": count}, {**apart, "count": count}]}


NOT_CAMOUFLAGED = "COD10K-[!C]*"  # COD10K-v3 has COD10K-NonCAM-* among the COD10K-CAM-*, which alone count
COD10K = {"leave_out": NOT_CAMOUFLAGED}
COD_TRAIN = "TrainDataset|TrainValDataset"
CAMO = {"surplus_masks": True}  # the archive has one folder of masks for training and test
MARINE = ("mIoU", "Smeasure", "wFmeasure", "meanEm", "MAE")
REMOTE = ("Smeasure", "meanFm", "maxFm", "meanEm", "MAE")
DIS_TESTS = [f"DIS-TE{i}" for i in (1, 2, 3, 4)]

BENCHMARKS: dict[str, dict[str, Any]] = {
    "DIS5K": {
        "columns": ("Smeasure", "wFmeasure", "meanEm", "MAE"),
        "train": {"folder": "DIS-TR", "count": 3000},
        "test": {
            "DIS-VD": {"folder": "DIS-VD", "count": 470},
            **{name: {"folder": name, "count": 500} for name in DIS_TESTS},
        },
        "together": {"DIS-TE(1-4)": DIS_TESTS},
    },
    "COD": {
        "columns": ("Smeasure", "adpFm", "meanEm", "MAE"),
        "train": {
            "either": [
                {"folder": COD_TRAIN, "count": 4040, **COD10K, **CAMO},
                [
                    {"folder": f"{COD_TRAIN}/COD10K", "count": 3040, **COD10K},
                    {"folder": f"{COD_TRAIN}/CAMO", "count": 1000, **CAMO},
                ],
                [
                    {"folder": "COD10K*/Train", "count": 3040, **COD10K},
                    {"folder": "CAMO*", "images": "{images}/Train", "count": 1000, **CAMO},
                ],
            ]
        },
        "test": {
            "CHAMELEON": {
                "either": [
                    {"folder": "TestDataset/CHAMELEON", "count": 76},
                    {"folder": "CHAMELEON*", "count": 76},
                ]
            },
            "CAMO": {
                "either": [
                    {"folder": "TestDataset/CAMO", "count": 250, **CAMO},
                    {"folder": "CAMO", "count": 250, **CAMO},
                    {"folder": "CAMO*", "images": "{images}/Test", "count": 250, **CAMO},
                ]
            },
            "COD10K": {
                "either": [
                    {"folder": "TestDataset/COD10K", "count": 2026, **COD10K},
                    {"folder": "COD10K", "count": 2026, **COD10K},
                    {"folder": "COD10K*/Test", "count": 2026, **COD10K},
                ]
            },
            "NC4K": {"either": [{"folder": "TestDataset/NC4K", "count": 4121}, {"folder": "NC4K", "count": 4121}]},
        },
    },
    "MAS3K": {"columns": MARINE, "train": halves("train", 1769), "test": {"MAS3K": halves("test", 1141)}},
    "RMAS": {"columns": MARINE, "train": halves("train", 2514), "test": {"RMAS": halves("test", 500)}},
    "EORSSD": {"columns": REMOTE, "train": halves("train", 1400), "test": {"EORSSD": halves("test", 600)}},
    "ORSI-4199": {"columns": REMOTE, "train": halves("train", 2000), "test": {"ORSI-4199": halves("test", 2199)}},
}


@dataclass(frozen=True)
class Place:
    """A folder of pictures and one of masks, as patterns, and what is known of them."""

    folder: str = "."  # below which both are
    images: str = "{images}"
    masks: str = "{masks}"
    count: int | None = None  # pictures in the published archive
    leave_out: str | None = None  # pattern of the stems that do not count
    surplus_masks: bool = False  # masks without a picture belong to the archive and are no mistake

    def __post_init__(self) -> None:
        for field in fields(self):
            if not isinstance(getattr(self, field.name), get_args(field.type) or field.type):
                raise TypeError(f"{field.name}: {getattr(self, field.name)!r} is no {field.type}")

    def example(self) -> str:
        """What fits, in words: the first of each alternative."""
        words = []
        for pattern in (self.images, self.masks):
            parts = Path(self.folder, pattern.format(images="Image", masks="Mask")).parts
            words.append("/".join(part.split("|")[0].replace("[-_]", "-") for part in parts))
        return " with ".join(words)


Layout = tuple[Place, ...]  # places that are joined


@dataclass(frozen=True)
class Benchmark:
    """What is trained on, what is tested on, and the columns of its table."""

    name: str
    columns: tuple[str, ...]  # of metrics.METRICS
    train: tuple[Layout, ...]  # of which one is there
    test: dict[str, tuple[Layout, ...]]
    together: dict[str, tuple[str, ...]]  # rows over several test sets
    from_paper: bool  # whether figures are published for it


class Found(NamedTuple):
    """One place of a split, on disk."""

    split: str
    images: Path
    masks: Path
    pairs: list[tuple[Path, Path]]  # (picture, mask)
    count: int | None  # pictures in the published archive
    left_out: str  # what was, in words

    def __str__(self) -> str:
        """A line for the user: what was found and what is known of the archive."""
        expected = "" if self.count is None else f" of {self.count:,}"
        warning = "  WARNING: another number than expected" if self.is_incomplete() else ""
        return (
            f"{self.split}: {len(self.pairs):,}{expected} pairs in {files.shown(self.images)}{self.left_out}{warning}"
        )

    def is_incomplete(self) -> bool:
        return self.count not in (None, len(self.pairs))


def is_benchmark(text: str) -> bool:
    """Whether a command's first argument is a benchmark, which `load` takes, and not a folder of pictures.

    A folder with the name of a benchmark is meant only where it is written as a path: `./COD` or `COD/`.
    """
    return bool(built_in(text)) or Path(text).suffix.lower() in DESCRIPTIONS or not Path(text).is_dir()


def built_in(name: str) -> str | None:
    """The name in BENCHMARKS, which may be given in any case and without its hyphen."""
    return next((own for own in BENCHMARKS if name.lower() in (own.lower(), own.lower().replace("-", ""))), None)


def load(name: str) -> Benchmark:
    """The benchmark of that name, in any case, or in the YAML file `name`. Raises ValueError or OSError."""
    if own := built_in(name):
        return parse(own, BENCHMARKS[own], from_paper=True)
    path, shown = Path(name), files.shown(name)
    if path.suffix.lower() not in DESCRIPTIONS:
        raise ValueError(f"no benchmark (and no folder) is called {shown}: give {', '.join(BENCHMARKS)} or a YAML file")
    try:
        return parse(files.shown(path.stem), yaml.safe_load(path.read_text("utf-8")))
    except OSError as error:
        raise OSError(f"{shown}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, AttributeError, KeyError, ValueError) as error:
        reason = files.shown(" ".join(str(error).split()))
        raise ValueError(f"{shown}: describes no benchmark, see the example in the README: {reason}") from error


def parse(name: str, content: dict[str, Any], from_paper: bool = False) -> Benchmark:
    """A benchmark from its description. Raises an error of many kinds where it is not one."""
    if unknown := content.keys() - {"columns", "train", "test", "together"}:
        raise ValueError(f"it has {', '.join(sorted(unknown))}, and only columns, train, test and together are known")
    columns = content.get("columns", METRICS)
    if not columns or isinstance(columns, str) or not set(METRICS) >= set(columns):
        raise ValueError(f"columns: {columns} is no list of some of {', '.join(METRICS)}")
    test = {files.shown(key): layouts(split) for key, split in content.get("test", {}).items()}
    if wrong := [key for key in test if "/" in key or key.startswith(".")]:
        raise ValueError(f"test: {wrong[0]} cannot be the name of a folder")
    together = {
        files.shown(key): tuple(files.shown(one) for one in sets) for key, sets in content.get("together", {}).items()
    }
    for key, sets in together.items():
        if key in test or not sets or not test.keys() >= set(sets):
            raise ValueError(f"together: {key} must have a name of its own and a list of test sets")
    train = layouts(content["train"]) if "train" in content else ()
    return Benchmark(name, tuple(columns), train, test, together, from_paper)


def layouts(split: dict[str, Any] | list[dict[str, Any]]) -> tuple[Layout, ...]:
    """The alternative layouts of a split. Raises TypeError where it is none."""
    either = split["either"] if isinstance(split, dict) and "either" in split else [split]
    either = [one if isinstance(one, list) else [one] for one in either]
    if not either or not all(one and all(isinstance(place, dict) for place in one) for one in either):
        raise TypeError("a split is a place such as {folder: test}, or a list of places")
    return tuple(tuple(Place(**place) for place in one) for one in either)


def published(benchmark: Benchmark, row: str) -> dict[str, dict[str, float]]:
    """The published figures of a row: method -> metric -> value; empty in a benchmark of one's own."""
    if not benchmark.from_paper:
        return {}
    results = json.loads(Path(__file__).with_name("published.json").read_text())["results"]
    return results[row]


def find_train(benchmark: Benchmark, root: str | Path) -> list[Found]:
    """The places to train on. Raises OSError or ValueError that says what was looked for and what is there."""
    if not benchmark.train:
        raise ValueError(f"{benchmark.name}: has no training split")
    return find(f"{benchmark.name} training", benchmark.train, root)


def find_test(benchmark: Benchmark, root: str | Path, sets: Sequence[str] = ()) -> dict[str, list[Found]]:
    """The places of each test set, or of those in `sets`. Raises as `find_train` does."""
    if not benchmark.test:
        raise ValueError(f"{benchmark.name}: has no test set")
    wanted = {name.casefold() for name in sets} or {name.casefold() for name in benchmark.test}
    if unknown := wanted - {name.casefold() for name in benchmark.test}:
        raise ValueError(
            f"{benchmark.name} has no test set {files.shown(min(unknown))}; there are {', '.join(benchmark.test)}"
        )
    found = {name: find(name, split, root) for name, split in benchmark.test.items() if name.casefold() in wanted}
    for name, places in found.items():
        counts = Counter(image.stem for place in places for image, _ in place.pairs)
        if doubled := [stem for stem, count in counts.items() if count > 1]:
            raise ValueError(f"{name}: several of its folders have pictures named {files.listing(doubled)}; rename")
    return found


def find(split: str, alternatives: Sequence[Layout], root: str | Path) -> list[Found]:
    """The places of the one layout that is there, read. Raises as `locate` and `read` do."""
    return [read(split, *place) for place in locate(split, alternatives, root)]


def locate(split: str, alternatives: Sequence[Layout], root: str | Path) -> list[tuple[Place, Path, Path]]:
    """(place, its folder of pictures, of masks) for the one layout that is there, as near to the root as any.

    The folders' files are not looked at. Raises OSError where there is no root, ValueError where the split is missing
    or may be in several places.
    """
    root = Path(root)
    if not root.is_dir():
        raise NotADirectoryError(
            f"{files.shown(root)}: {'is not a folder' if root.exists() else 'there is no such folder'}"
        )
    levels = [[root]]
    for _ in range(DEPTH):
        levels.append([folder for base in levels[-1] for folder in subfolders(base)])
    there = []  # (how far down, layout, for each of its places the folders that fit)
    for layout in alternatives:
        nearest = [matches(place, levels) for place in layout]
        if all(folders for _, folders in nearest):
            there.append((max(depth for depth, _ in nearest), layout, [folders for _, folders in nearest]))
    if not there:
        raise missing(split, alternatives, root)
    least = min(depth for depth, _, _ in there)
    hits = {tuple(chosen): layout for depth, layout, each in there if depth == least for chosen in product(*each)}
    if len(hits) > 1:
        raise ambiguous(split, list(dict.fromkeys(place for chosen in hits for place in chosen)))
    ((chosen, layout),) = hits.items()
    return [(place, *folders) for place, folders in zip(layout, chosen, strict=True)]


def matches(place: Place, levels: Sequence[Sequence[Path]]) -> tuple[int, list[tuple[Path, Path]]]:
    """The (pictures, masks) folders that fit a place, on the nearest level of folders with any, and its number."""
    for depth, bases in enumerate(levels):
        found = [
            (images, masks)
            for base in bases
            for parent in glob(base, place.folder)
            for images in glob(parent, place.images)
            for masks in glob(parent, place.masks)
        ]
        if found:
            return depth, found
    return len(levels), []


def glob(base: Path, pattern: str) -> list[Path]:
    """The folders below `base` that fit a pattern with alternatives, without regard to case."""
    found = [base]
    for part in Path(pattern).parts:
        choices = [choice.lower() for alternative in part.split("|") for choice in spelled(alternative)]
        found = [
            folder for one in found for folder in subfolders(one)
            if any(fnmatchcase(folder.name.lower(), choice) for choice in choices)
        ]  # fmt: skip
    return found


def spelled(pattern: str) -> list[str]:
    """The pattern with {images} or {masks} replaced by each of the usual names."""
    for word, names in USUAL.items():
        if word in pattern:
            return [pattern.replace(word, name) for name in names]
    return [pattern]


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder by name, without hidden ones and those that macOS puts into archives."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except PermissionError:
        return []
    return [folder / name for name in sorted(names) if not name.startswith((".", "__MACOSX"))]


def tree(root: Path) -> list[Path]:
    """The folders below `root`, nearest first, one further down than where layouts may begin."""
    found, level = [], [root]
    for _ in range(DEPTH + 1):
        level = [folder for one in level for folder in subfolders(one)]
        found += level
    return found


def ambiguous(split: str, places: Sequence[tuple[Path, Path]]) -> ValueError:
    """The error for a split that may be here or there."""
    there = "; ".join(files.shown(f"{images} with {masks}") for images, masks in places)
    return ValueError(f"{split}: may be in several places; name a root that holds one of them only: {there}")


def missing(split: str, alternatives: Sequence[Layout], root: Path) -> ValueError:
    """The error for a split that is not there: what was looked for, and what is there."""
    looked = "; ".join(dict.fromkeys(" and ".join(place.example() for place in layout) for layout in alternatives))
    there = [str(folder.relative_to(root)) for folder in tree(root)]
    return ValueError(
        f"{split}: not found in {files.shown(root)} or up to {DEPTH} folders further down. Looked for {looked} (in any "
        f"case; Image may be {', '.join(USUAL['{images}'])}, and Mask {', '.join(USUAL['{masks}'])}). "
        f"There: {files.listing(there) or 'no folder'}"
    )


def read(split: str, place: Place, images: Path, masks: Path) -> Found:
    """The pairs of a place. Raises OSError or ValueError that lists files without a partner."""
    left, right, left_out = belonging(place, files.find(images), files.find(masks))
    return Found(split, images, masks, files.match(left, right, f"{images} and {masks}"), place.count, left_out)


def belonging(
    place: Place, left: dict[str, Path], right: dict[str, Path]
) -> tuple[dict[str, Path], dict[str, Path], str]:
    """Of the pictures and masks in a place's folders, by stem, those that count, and in words what is left out."""
    words = []
    if place.leave_out:
        others = [stem for stem in left if fnmatchcase(stem, place.leave_out)]
        left, right = (
            {stem: path for stem, path in side.items() if not fnmatchcase(stem, place.leave_out)}
            for side in (left, right)
        )
        words += [files.count(len(others), "picture") + f" named {place.leave_out}"] if others else []
    if place.surplus_masks:
        surplus = [stem for stem in right if stem not in left]
        right = {stem: path for stem, path in right.items() if stem in left}
        words += [files.count(len(surplus), "mask") + " without a picture"] if surplus else []
    return left, right, f", left out: {', '.join(words)}" if words else ""
