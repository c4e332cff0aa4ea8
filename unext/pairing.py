"""Lists the images and masks of folders, and pairs them by name. Free of torch."""

import argparse
import hashlib
import os
import shlex
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from unext.errors import InputError
from unext.files import count, listing, require_folder
from unext.images import GET_HEIF, HEIC, extensions
from unext.masks import MASK_PROBLEMS

ANNOTATIONS = (".json", ".txt", ".xml", ".csv")
UNMENTIONED = ("thumbs.db", "desktop.ini", "settings.json")  # files that programs add, test.py among them


class File(NamedTuple):
    """A path in a third of a Path's memory, as files share their folder and suffix: a data set may have a million."""

    parent: Path
    stem: str
    suffix: str  # with its dot

    @property
    def name(self) -> str:
        return self.stem + self.suffix

    def __fspath__(self) -> str:
        return str(self.parent / self.name)

    __str__ = __fspath__


Files = dict[str, File]  # by name
Pair = tuple[File, File]  # image, mask


class MaskNames(NamedTuple):
    """What precedes and follows an image's name in the name of its mask, or map."""

    prefix: str = ""
    suffix: str = ""

    def image_of(self, mask: str) -> str | None:
        """The name of a mask's image; None for a name that no mask has."""
        folder, slash, mask = mask.rpartition("/")
        prefix, suffix = (unicodedata.normalize("NFC", text) for text in self)
        fits = mask.startswith(prefix) and mask.endswith(suffix) and len(mask) > len(prefix + suffix)
        return folder + slash + mask[len(prefix) : len(mask) - len(suffix)] if fits else None

    def by_image(self, masks: Mapping[str, File]) -> Files:
        """The masks by the image's name, without files that have other names."""
        return {image: file for name, file in masks.items() if (image := self.image_of(name)) is not None}

    def options(self, kind: str = "mask") -> str:
        """These names as command-line options, for messages."""
        return " ".join(f"--{kind}_{key}={shlex.quote(text)}" for key, text in self._asdict().items() if text)


SAME = MaskNames()


def names_given(args: argparse.Namespace, mask_folders: object) -> MaskNames:
    """The names that --mask_prefix and --mask_suffix describe. Raises InputError if no folder of masks is given."""
    names = MaskNames(args.mask_prefix, args.mask_suffix)
    if names != SAME and not mask_folders:
        remedy = "for a benchmark, put mask_prefix or mask_suffix in its YAML file"
        raise InputError(f"{names.options()}: no folder of masks is given; {remedy}")
    return names


def entries(folder: str | Path) -> Iterator[tuple[str, str, bool]]:
    """(stem, extension, whether it is a broken link) of each file in a folder, without hidden ones. Raises OSError."""
    with os.scandir(require_folder(folder)) as scanned:
        for entry in scanned:
            is_link = entry.is_symlink()
            if not entry.name.startswith(".") and not (os.path.isdir(entry.path) if is_link else entry.is_dir()):
                yield *os.path.splitext(entry.name), is_link and not os.path.exists(entry.path)


def is_image(extension: str) -> bool:
    return extension.lower() in extensions()


def images_in(folder: str | Path) -> list[File]:
    """The images of a folder, by their extensions, sorted. Raises OSError if it cannot be listed."""
    folder = Path(folder)
    images = [
        File(folder, stem, sys.intern(extension))
        for stem, extension, is_broken in entries(folder)
        if is_image(extension) and not is_broken
    ]
    return sorted(images, key=lambda image: (name_of(image), image.suffix))


def left_out(folders: Iterable[str | Path]) -> str:
    """The files in these folders that are no images, counted by extension; empty if there are none."""
    kinds: Counter[str] = Counter()
    for stem, extension, is_broken in chain.from_iterable(map(entries, dict.fromkeys(folders))):
        if is_broken:
            kinds["broken link(s)"] += 1
        elif not is_image(extension) and (stem + extension).lower() not in UNMENTIONED:
            kinds[extension or stem] += 1
    remedies = {kind: f" ({GET_HEIF})" for kind in kinds if kind.lower() in HEIC}
    return listing(f"{number:,} {kind}{remedies.get(kind, '')}" for kind, number in sorted(kinds.items()))


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder by name, without hidden and unreadable ones and those that macOS adds to archives."""
    with os.scandir(folder) as scanned:
        names = [entry.name for entry in scanned if entry.is_dir() and os.access(entry, os.R_OK)]
    return [folder / name for name in sorted(names) if not name.startswith((".", "__MACOSX"))]


def tree(folder: Path, skip: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """The folder and all below it, without links to folders, and without the folders to skip and all below them."""
    yield folder
    for subfolder in subfolders(folder):
        if not subfolder.is_symlink() and not (skip and skip(subfolder)):
            yield from tree(subfolder, skip)


def name_of(path: File) -> str:
    """The name by which a file is paired: without extension, in the form NFC (macOS stores accents apart)."""
    return unicodedata.normalize("NFC", path.stem)


def images_below(folder: Path, skip: Callable[[Path], bool] | None = None) -> int:
    """The number of images in the sub-folders of a folder, see `tree`."""
    return sum(len(images_in(subfolder)) for subfolder in tree(folder, skip) if subfolder != folder)


def no_images(folder: Path, skip: Callable[[Path], bool] | None = None) -> str:
    """A message about a folder without images: what there is instead."""
    line = f"{folder}: has no images"
    if others := left_out([folder]):
        line += f", only files that are not read: {others}"
    if any(kind in others for kind in ANNOTATIONS):
        line += "; how to make masks of annotations: docs/data.md"
    if deeper := images_below(folder, skip):
        line += f"; {count(deeper, 'image')} in sub-folders: name these (test.py --recursive reads them)"
    return line


def gather(
    paths: Iterable[str | Path], recursive: bool = False, skip: Callable[[Path], bool] | None = None,
    keep_extensions: bool = False,
) -> Files:  # fmt: skip
    """The images in `paths`, folders and single files, by name, without broken links.

    `recursive` adds those of the sub-folders, as "folder/name"; `skip` says which of these to leave out.
    `keep_extensions` tells images of the same name apart: x.JPG and x.png, in the stems of their Files too. Raises
    InputError for two of the same name otherwise, and for a folder without images.
    """
    listed: list[tuple[str, File]] = []
    for path in map(Path, paths):
        if path.is_file():
            listings = {path.parent: [File(path.parent, *os.path.splitext(path.name))]}
        else:
            folders = tree(path, skip) if recursive else [path]
            listings = {folder: images_in(folder) for folder in folders}
        if not any(listings.values()):
            raise InputError(no_images(path, skip))
        for folder, images in listings.items():
            below = "" if folder in (path, path.parent) else f"{folder.relative_to(path).as_posix()}/"
            listed += [(below + name_of(image), image) for image in images]
    number = Counter(name for name, _ in listed)
    gathered: Files = {}
    clashes = []
    for name, image in listed:
        if keep_extensions and number[name] > 1:
            name, image = name + image.suffix, File(image.parent, image.name, "")
        if (other := gathered.setdefault(name, image)) is not image:
            clashes.append(f"{other} and {image}")
    if clashes:
        raise InputError(f"{listing(clashes)}: have the same name; keep one of them, or write to different folders")
    return gathered


def images_by_name(folder: str | Path) -> Files:
    """The images of a folder by name, sorted. Raises as `gather`, and OSError for broken links to images."""
    broken = [stem + extension for stem, extension, broken in entries(folder) if broken and is_image(extension)]
    if broken:
        raise OSError(f"{folder}: broken links; fetch the files, or remove the links: {listing(sorted(broken))}")
    return gather([folder])


def pair(
    image_folders: Sequence[str | Path], mask_folders: Sequence[str | Path], skip_unpaired: bool = False,
    names: MaskNames = SAME,
) -> list[Pair]:  # fmt: skip
    """The files of the same name in the i-th folder of each list. Raises InputError for any without a partner."""
    if len(image_folders) != len(mask_folders):
        number = f"{len(image_folders)} folder(s) of images but {len(mask_folders)} of masks"
        raise InputError(f"{number}: give as many of masks, in the same order")
    remedy = "add the missing files or ignore these with --skip_unpaired"
    pairs: list[Pair] = []
    for image_folder, mask_folder in zip(image_folders, mask_folders, strict=True):
        images, masks = images_and_masks(image_folder, mask_folder, names)
        pairs += match(images, masks, f"{image_folder} and {mask_folder}", skip_unpaired, remedy)
    return pairs


def images_and_masks(image_folder: str | Path, mask_folder: str | Path, names: MaskNames) -> tuple[Files, Files]:
    """The images and masks of two folders, or of one, by the image's name. Raises InputError if there is no pair."""
    listed = images_by_name(image_folder), images_by_name(mask_folder)
    images, masks = tell_apart(*listed, names)
    if not images.keys() & masks.keys():
        first = " and ".join(next(iter(files.values())).name if files else "nothing" for files in (images, masks))
        problem = f"no image in {image_folder} has the name of a mask in {mask_folder} (for example {first})"
        raise InputError(problem + names_hint(*listed))
    return images, masks


def tell_apart(images: Files, masks: Files, names: MaskNames) -> tuple[Files, Files]:
    """The images that are no masks, and the masks by the image's name; InputError if `names` cannot separate them."""
    mask_folders = {folder.resolve() for folder in {mask.parent for mask in masks.values()}}
    shared = {folder for folder in {image.parent for image in images.values()} if folder.resolve() in mask_folders}
    if names == SAME and shared:
        hint = names_hint(images, masks) or "; move the masks to another folder, or give --mask_suffix"
        raise InputError(f"{min(shared)}: is given as the folder of both images and masks{hint}")
    if names == SAME:
        return images, masks
    images = {name: file for name, file in images.items() if file.parent not in shared or not names.image_of(name)}
    return images, names.by_image(masks)


def names_hint(images: Iterable[str], masks: Iterable[str], kind: str = "mask") -> str:
    """The options that would pair these names, as the end of a message; empty if there are none.

    Images and masks may be the same names, those of one folder.
    """
    images, masks = {*images}, {*masks}
    longest = max(masks, key=len, default="")  # in one folder, a mask's name is longer than its image's
    stems = [stem for stem in images if stem and stem in longest and stem != longest]
    for stem in sorted(stems, key=len, reverse=True):
        names = MaskNames(*longest.split(stem, 1))
        named = {mask for mask in masks if names.image_of(mask) is not None}
        partners = {names.image_of(mask) for mask in named}
        # In one folder, the other files must be the images.
        if partners == masks - named if images == masks else named == masks and partners <= images:
            return f"; give {names.options(kind)}"
    return ""


def match(
    images: Files, masks: Files, where: str, skip: bool = False, remedy: str = "add what is missing"
) -> list[Pair]:
    """The pairs of the same name. Raises InputError, about `where`, if a file has no partner, unless `skip`."""
    problems = []
    for wanted, files, partners in (("mask", images, masks), ("image", masks, images)):
        if alone := [path.name for name, path in files.items() if name not in partners]:
            problems.append(f"without their {wanted}: {listing(alone)}")
    if problems and not skip:
        raise InputError(f"{where} do not match; {'; '.join(problems)}; {remedy}")
    return [(path, masks[name]) for name, path in images.items() if name in masks]


def hold_out(pairs: Sequence[Pair], share: float) -> tuple[list[Pair], list[Pair]]:
    """Divides the pairs: those to train on, and about `share` of them, chosen by a hash of the image's name.

    An image is on the same side in every run, whatever other images there are. Raises InputError if a side is empty.
    """
    sides: tuple[list[Pair], list[Pair]] = [], []
    for pair in pairs:
        digest = hashlib.sha256(os.fsencode(name_of(pair[0]))).digest()
        sides[int.from_bytes(digest[:4], "big") < share * 2**32].append(pair)
    if not all(sides):
        number = f"{len(sides[0])} pairs to train on, {len(sides[1])} to validate on"
        raise InputError(f"--val_share {share:g}: leaves {number}; give another share")
    return sides


def mask_warnings(problems: Mapping[File, str]) -> list[str]:
    """A line for each problem, a key of MASK_PROBLEMS, that some of the masks have."""
    return [
        f"{len(names):,} of {count(len(problems), 'mask')}: {problem}: {remedy} ({listing(names)})"
        for problem, remedy in MASK_PROBLEMS.items()
        if (names := sorted(path.name for path in problems if problems[path] == problem))
    ]
