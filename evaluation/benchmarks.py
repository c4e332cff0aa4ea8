"""The paper's benchmarks: their splits, where the archives keep them, and the columns of the paper's tables.

benchmarks.yaml describes them, in the format of a user's YAML file (docs/benchmarks.md). A split is a place, a list of
places that are joined, or `either:` with a list of alternative layouts, of which the one that exists is used. Folders
are patterns, matched regardless of case in the user's root or up to two folders further down: `|` separates
alternatives, `*`, `?` and `[]` work as in file names, `{images}` and `{masks}` stand for the usual names.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from evaluation.metrics import METRICS, NINE
from unext import files, pairing
from unext.errors import InputError
from unext.pairing import File, MaskNames, Pair

ALIASES = {
    "{images}": ("im", "ims", "img", "imgs", "image", "images"),
    "{masks}": ("gt", "gts", "gt_object", "mask", "masks", "label", "labels"),
}
DEPTH = 2  # a layout may start up to so many folders below the root
YAML_SUFFIXES = (".yaml", ".yml")  # of files that describe a benchmark
KEYS = ("columns", "train", "val", "test", "together", "groups")  # of such a file


class TextLoader(yaml.BaseLoader):
    """Reads every scalar as text, so that names such as no, 0012 and 1.10 stay what they are; refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        keys = [key.value for key, _ in node.value]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise InputError(f"{repeated[0]} occurs twice")
        return super().construct_mapping(node, deep)


BUILT_IN = yaml.load(Path(__file__).with_name("benchmarks.yaml").read_text("utf-8"), TextLoader)  # benchmarks by name
NAMES = f"{', '.join(BUILT_IN)} or a YAML file"
HELP = f"{NAMES}, and the folder of its archive"  # of the option --benchmark
OURS = "SAM2-UNeXT"  # this network's rows in published.json


@dataclass(frozen=True)
class Place:
    """A folder of images and a folder of masks, as patterns, and what is known about them."""

    folder: str = "."  # that contains these folders
    images: str = "{images}"
    masks: str = "{masks}"
    count: int | None = None  # of pairs in the published archive
    leave_out: str | None = None  # pattern of the stems that do not count
    surplus_masks: bool = False  # the archive may contain masks without images
    mask_prefix: str = ""  # of masks called gt_NAME.png: gt_
    mask_suffix: str = ""  # of masks called NAME_mask.png: _mask

    def mask_names(self) -> MaskNames:
        return MaskNames(self.mask_prefix, self.mask_suffix)

    def __str__(self) -> str:
        return f"{Path(self.folder, self.images)} with {Path(self.folder, self.masks)}"


Layout = tuple[Place, ...]  # places that are joined


@dataclass(frozen=True)
class Benchmark:
    """The training split, the sets to validate and to test on, and the columns of the table."""

    name: str
    columns: tuple[str, ...]  # of metrics.METRICS
    train: tuple[Layout, ...] = ()  # the alternatives
    val: dict[str, tuple[Layout, ...]] = field(default_factory=dict)
    test: dict[str, tuple[Layout, ...]] = field(default_factory=dict)
    together: dict[str, tuple[str, ...]] = field(default_factory=dict)  # rows over several test sets
    groups: dict[str, str] = field(default_factory=dict)  # regular expressions of an image's group, by kind of group
    from_paper: bool = False  # whether the paper has scores for it


class SplitFolder(NamedTuple):
    """A place of a split, on the disk."""

    split: str
    images: Path
    masks: Path
    pairs: list[Pair]  # (image, mask)
    count: int | None  # of pairs in the published archive
    left_out: str  # for a message

    def __str__(self) -> str:
        """A line for the user: the number of pairs, and that of the published archive."""
        expected = len(self.pairs) if self.count is None else self.count
        of = "" if self.count is None else f"{len(self.pairs):,} of "
        warning = "  WARNING: not the expected number" if self.is_incomplete() else ""
        return f"{self.split}: {of}{files.count(expected, 'pair')} in {self.images}{self.left_out}{warning}"

    def is_incomplete(self) -> bool:
        return self.count not in (None, len(self.pairs))


def built_in(name: str) -> str | None:
    """The name in benchmarks.yaml; `name` may have any case and lack the hyphen."""
    return next((known for known in BUILT_IN if name.lower() in (known.lower(), known.lower().replace("-", ""))), None)


def run_name(text: str) -> str:
    """The name that the recipes give the run of a benchmark; empty if `text` is no benchmark."""
    return built_in(text) or (Path(text).stem if Path(text).suffix.lower() in YAML_SUFFIXES else "")


def load(name: str) -> Benchmark:
    """The benchmark called `name` or described by that YAML file. Raises InputError or OSError."""
    if known := built_in(name):
        return parse(known, BUILT_IN[known], from_paper=True)
    path = Path(name)
    if path.suffix.lower() not in YAML_SUFFIXES:
        raise InputError(f"there is no benchmark and no folder called {name}: give {NAMES}")
    try:
        return parse(files.printable(path.stem), yaml.load(path.read_text("utf-8"), TextLoader))
    except OSError as error:
        raise OSError(f"{name}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, re.error, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name}: does not describe a benchmark, see docs/benchmarks.md: {reason}") from error


def parse(name: str, content: dict[str, Any], from_paper: bool = False) -> Benchmark:
    """The benchmark that a file's content describes. Raises as `load` catches."""
    if unknown := content.keys() - set(KEYS):
        raise InputError(f"{min(unknown)} is unknown; known are {', '.join(KEYS)}")
    columns = tuple(content.get("columns", NINE))
    if not columns or not METRICS.keys() >= set(columns):
        raise InputError(f"columns: {columns} is not a list of some of {', '.join(METRICS)}")
    train = layouts(content["train"]) if "train" in content else ()
    val, test = ({key: layouts(split) for key, split in content.get(kind, {}).items()} for kind in ("val", "test"))
    if wrong := [key for key in (*val, *test) if "/" in key or key.startswith(".") or key in val.keys() & test.keys()]:
        raise InputError(f"{wrong[0]} cannot be the name of a folder, or is that of two sets")
    together = {key: tuple(sets) for key, sets in content.get("together", {}).items()}
    for key, sets in together.items():
        if key in test or not sets or not test.keys() >= set(sets):
            raise InputError(f"together: {key} needs a name of its own and a list of test sets")
    groups = content.get("groups", {})
    for kind, pattern in groups.items():
        if not re.compile(pattern).groups:
            raise InputError(f"groups: {kind} needs a regular expression with a group in parentheses, not {pattern}")
    return Benchmark(name, columns, train, val, test, together, groups, from_paper)


def layouts(split: Any) -> tuple[Layout, ...]:
    """The alternative layouts of a split."""
    either = split["either"] if isinstance(split, dict) and "either" in split else [split]
    either = [layout if isinstance(layout, list) else [layout] for layout in either]
    if not all(either):
        raise InputError("a split is a place such as {folder: test}, or a list of places")
    return tuple(tuple(place_of(**place) for place in layout) for layout in either)


def place_of(count: str | None = None, surplus_masks: str = "false", **patterns: str) -> Place:
    """The place that a mapping describes, in which every value is text."""
    if wrong := [value for value in patterns.values() if not isinstance(value, str)]:
        raise InputError(f"{wrong[0]} is not a text")
    return Place(count=count and int(count), surplus_masks={"true": True, "false": False}[surplus_masks], **patterns)


def published(benchmark: Benchmark, row: str) -> dict[str, dict[str, float]]:
    """The published scores of a row: method -> metric -> value; empty if there are none."""
    if not benchmark.from_paper:
        return {}
    return json.loads(Path(__file__).with_name("published.json").read_text())["results"].get(row, {})


def find_train(benchmark: Benchmark, root: str | Path) -> list[SplitFolder]:
    """The places to train on. The error about a missing one says what was expected and what is there."""
    if not benchmark.train:
        raise InputError(f"{benchmark.name}: has no training split")
    return split_folders(f"{benchmark.name} training", benchmark.train, root)


def find_test(benchmark: Benchmark, root: str | Path, sets: Sequence[str] = ()) -> dict[str, list[SplitFolder]]:
    """The places of each test set or, if given, of those test and validation sets in `sets`. Raises as `find_train`."""
    if not benchmark.test and not sets:
        raise InputError(f"{benchmark.name}: has no test set")
    layouts_of = {name.casefold(): (name, layouts) for name, layouts in (benchmark.test | benchmark.val).items()}
    wanted = {name.casefold() for name in sets or benchmark.test}
    if unknown := wanted - layouts_of.keys():
        known = ", ".join([*benchmark.test, *benchmark.val])
        raise InputError(f"{benchmark.name} has no test set {min(unknown)}; it has {known}")
    chosen = [layouts_of[key] for key in layouts_of if key in wanted]
    test_sets = {name: split_folders(name, layouts, root) for name, layouts in chosen}
    for name, places in test_sets.items():
        counts = Counter(pairing.name_of(image) for place in places for image, _ in place.pairs)
        if repeated := [stem for stem, count in counts.items() if count > 1]:
            raise InputError(f"{name}: several of its folders have images named {files.listing(repeated)}; rename them")
    return test_sets


def split_folders(split: str, alternatives: Sequence[Layout], root: str | Path) -> list[SplitFolder]:
    """The places of the layout that exists, with their pairs."""
    places = []
    for place, images, masks in locate(split, alternatives, root):
        *sides, left_out = files_of_place(place, *pairing.images_and_masks(images, masks, place.mask_names()))
        pairs = pairing.match(*sides, f"{images} and {masks}")
        places.append(SplitFolder(split, images, masks, pairs, place.count, left_out))
    return places


def locate(split: str, alternatives: Sequence[Layout], root: str | Path) -> list[tuple[Place, Path, Path]]:
    """(place, its folder of images, of masks) for the layout that exists closest to the root. Reads no file."""
    root = files.require_folder(root)
    bases: list[Path] = []
    level, hits = [root], {}
    for _ in range(DEPTH + 1):
        bases += level
        for layout in alternatives:
            hits |= dict.fromkeys(product(*(matches(place, bases) for place in layout)), layout)
        if hits:
            break
        level = [folder for parent in level for folder in pairing.subfolders(parent)]
    else:
        expected = "; ".join(" and ".join(map(str, layout)) for layout in alternatives)
        names = ", ".join(f"{alias} are {', '.join(names)}" for alias, names in ALIASES.items())
        raise InputError(
            f"{split}: not found in {root} or up to {DEPTH} folders further down. Looked for {expected} (in any case; "
            f"{names}). There: {files.listing(folder.relative_to(root) for folder in bases[1:]) or 'no folder'}"
        )
    if len(hits) > 1:
        places = files.listing(dict.fromkeys(f"{images} with {masks}" for pairs in hits for images, masks in pairs))
        raise InputError(f"{split}: could be in several places; name a root with only one of them: {places}")
    [(folders, layout)] = hits.items()
    return [(place, *pair) for place, pair in zip(layout, folders, strict=True)]


def matches(place: Place, bases: Sequence[Path]) -> list[tuple[Path, Path]]:
    """The folders of images and of masks that match a place below one of `bases`."""
    parents = [parent for base in bases for parent in glob(base, place.folder)]
    return [pair for parent in parents for pair in product(glob(parent, place.images), glob(parent, place.masks))]


def glob(base: Path, pattern: str) -> list[Path]:
    """The folders below `base` that match a pattern with alternatives, regardless of case."""
    folders = [base]
    for level in Path(pattern.lower()).parts:
        choices = {
            alternative.replace(alias, name)
            for alternative in level.split("|") for alias, names in ALIASES.items() for name in names
        }  # fmt: skip
        folders = [
            folder for parent in folders for folder in pairing.subfolders(parent)
            if any(fnmatchcase(folder.name.lower(), choice) for choice in choices)
        ]  # fmt: skip
    return folders


def files_of_place(
    place: Place, images: dict[str, File], masks: dict[str, File]
) -> tuple[dict[str, File], dict[str, File], str]:
    """The images and masks of a place that count, by name, and the end of a message that says what is left out."""
    left_out = []
    if place.leave_out:
        excluded = {name for name in images.keys() | masks.keys() if fnmatchcase(name, place.leave_out)}
        if number := len(excluded & images.keys()):
            left_out.append(f"{files.count(number, 'image')} named {place.leave_out}")
        images, masks = ({name: side[name] for name in side if name not in excluded} for side in (images, masks))
    if place.surplus_masks:
        if number := len(masks.keys() - images.keys()):
            left_out.append(f"{files.count(number, 'mask')} without an image")
        masks = {name: masks[name] for name in masks if name in images}
    return images, masks, f", left out: {', '.join(left_out)}" if left_out else ""
