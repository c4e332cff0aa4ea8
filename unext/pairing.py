"""Finds images and masks, and pairs them by name. Free of torch, which keeps its users small."""

import argparse
import os
import shlex
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import cache
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from unext.errors import InputError
from unext.files import count, listing, require_folder
from unext.images import GET_HEIF, extensions
from unext.masks import MASK_PROBLEMS

HEIC = (".heic", ".heif")
ANNOTATIONS = (".json", ".txt", ".xml", ".csv")
UNMENTIONED = ("thumbs.db", "desktop.ini", "settings.json")  # files that programs add, this one's too


class File(NamedTuple):
    """A path in a third of a Path's memory, of which there may be a million: most of its parts are shared."""

    parent: Path
    stem: str
    suffix: str  # with its dot

    @property
    def name(self) -> str:
        return self.stem + self.suffix

    def __fspath__(self) -> str:
        return str(self.parent / self.name)

    __str__ = __fspath__


class MaskNames(NamedTuple):
    """What the names of masks, or of maps, have before and behind those of their images."""

    prefix: str = ""
    suffix: str = ""

    def image_of(self, mask: str) -> str | None:
        """The name of a mask's image; None for a name that no mask has."""
        folder, slash, mask = mask.rpartition("/")
        before, behind = (unicodedata.normalize("NFC", part) for part in self)
        fits = mask.startswith(before) and mask.endswith(behind) and len(mask) > len(before + behind)
        return folder + slash + mask[len(before) : len(mask) - len(behind)] if fits else None

    def by_image(self, masks: Mapping[str, File]) -> dict[str, File]:
        """The masks by the image's name, without files that are called otherwise."""
        return {image: file for name, file in masks.items() if (image := self.image_of(name)) is not None}

    def options(self, kind: str = "mask") -> str:
        """How the commands are told."""
        return " ".join(f"--{kind}_{key}={shlex.quote(part)}" for key, part in self._asdict().items() if part)

    def entries(self) -> str:
        """How a YAML file says it."""
        return ", ".join(f"mask_{key}: {part!r}" for key, part in self._asdict().items() if part)


SAME = MaskNames()
Pair = tuple[File, File]  # image, mask


def names_given(args: argparse.Namespace, mask_folders: object) -> MaskNames:
    """What --mask_prefix and --mask_suffix say. Raises InputError if no folder of masks is given."""
    names = MaskNames(args.mask_prefix, args.mask_suffix)
    if names != SAME and not mask_folders:
        raise InputError(f"{names.options()}: no folder of masks is given; a benchmark's YAML file says it itself")
    return names


class Listing(NamedTuple):
    """What is in a folder, sorted, except hidden files."""

    images: list[File]  # by their extension
    broken: list[str]  # links that lead nowhere, as those of git-annex do until the file is fetched
    others: list[str]


def entries(folder: str | Path) -> Iterator[tuple[str, str, bool]]:
    """Of each file in a folder, except hidden ones: stem, extension, whether it is a broken link. Raises OSError."""
    with os.scandir(require_folder(folder)) as found:
        for entry in found:
            is_link = entry.is_symlink()
            if not entry.name.startswith(".") and not (os.path.isdir(entry.path) if is_link else entry.is_dir()):
                yield *os.path.splitext(entry.name), is_link and not os.path.exists(entry.path)


def is_image(extension: str) -> bool:
    return extension.lower() in extensions()


def scan(folder: str | Path) -> Listing:
    """What is in a folder. Raises OSError if it cannot be listed."""
    folder, found = Path(folder), Listing([], [], [])
    for stem, extension, is_broken in entries(folder):
        if is_broken:
            found.broken.append(stem + extension)
        elif is_image(extension):
            found.images.append(File(folder, stem, sys.intern(extension)))
        else:
            found.others.append(stem + extension)
    found.images.sort(key=attrgetter("suffix"))
    found.images.sort(key=name_of)
    return found._replace(broken=sorted(found.broken), others=sorted(found.others))


def has_images(folder: str | Path) -> bool:
    """Whether an image is directly in a folder. Raises OSError if it cannot be listed."""
    return any(is_image(extension) and not is_broken for _, extension, is_broken in entries(folder))


def left_out(folders: Iterable[str | Path]) -> str:
    """What is in these folders beside images, in words; empty if there is nothing."""
    kinds: Counter[str] = Counter()
    broken = 0
    for stem, extension, is_broken in chain.from_iterable(map(entries, dict.fromkeys(folders))):
        if is_broken:
            broken += 1
        elif not is_image(extension) and (stem + extension).lower() not in UNMENTIONED:
            kinds[extension or stem] += 1
    words = [
        f"{number:,} {kind}" + (f" ({GET_HEIF})" if kind.lower() in HEIC else "")
        for kind, number in sorted(kinds.items())
    ]
    return listing(words + ([count(broken, "broken link")] if broken else []))


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder by name, except hidden ones and those that macOS adds to archives."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except PermissionError:
        return []
    return [folder / name for name in sorted(names) if not name.startswith((".", "__MACOSX"))]


def tree(folder: Path, skip: Callable[[Path], bool]) -> Iterator[Path]:
    """The folder and all below it, without links and without those to skip and all below them."""
    yield folder
    for one in subfolders(folder):
        if not one.is_symlink() and not skip(one):
            yield from tree(one, skip)


def name_of(path: File) -> str:
    """By which a file is paired: its name without extension, in the form NFC (macOS keeps accents apart)."""
    return unicodedata.normalize("NFC", path.stem)


def find(folder: str | Path) -> dict[str, File]:
    """The images in `folder` by name, sorted.

    Raises OSError if it cannot be listed or an image is a broken link, InputError for no image or two of one name.
    """
    found = scan(folder)
    broken = [name for name in found.broken if is_image(os.path.splitext(name)[1])]
    if broken:
        raise OSError(f"{folder}: broken links; fetch the files, or remove the links: {listing(broken)}")
    if not found.images:
        raise InputError(no_images(folder))
    return by_name(found.images)


def no_images(folder: str | Path) -> str:
    """A message about a folder without images, which says what is there instead."""
    others = left_out([folder])
    hint = "; how to make masks of annotations: docs/input.md" if any(one in others for one in ANNOTATIONS) else ""
    return f"{folder}: has no images" + (f", only files that are not read: {others}{hint}" if others else "")


def by_name(images: Iterable[File]) -> dict[str, File]:
    """The files of a folder by name. Raises InputError if two have the same."""
    found: dict[str, File] = {}
    repeated = [f"{found[name_of(file)].name} and {file.name}" for file in images if not add(found, "", file)]
    if repeated:
        where = next(iter(found.values())).parent
        raise InputError(f"{where}: files that differ only in their extension, keep one of each: {listing(repeated)}")
    return found


def gather(
    paths: Iterable[str | Path], recursive: bool = False, skip: Callable[[Path], bool] = lambda folder: False,
    with_extension: bool = False,
) -> dict[str, File]:  # fmt: skip
    """The images in `paths`, folders and single files, by name; if `recursive`, those in `tree` as "folder/name".

    Broken links are left out. Raises OSError if a folder cannot be listed, InputError if it has no image or images have
    the same name; `with_extension` lets these, and their Files' stems, keep their extension: x.JPG and x.png.
    """
    found: dict[str, File] = {}
    repeated: list[tuple[str, File]] = []
    for path in map(Path, paths):
        if path.is_file():
            groups = {path.parent: [File(path.parent, *os.path.splitext(path.name))]}
        else:
            folders = tree(require_folder(path), skip) if recursive else [path]
            groups = {folder: scan(folder).images for folder in folders}
        if not any(groups.values()):
            deeper = 0 if recursive else images_below(path, skip)
            hint = f"; {count(deeper, 'image')} in sub-folders, which --recursive reads" if deeper else ""
            raise InputError(no_images(path) + hint)
        for folder, images in groups.items():
            below = "" if folder in (path, path.parent) else f"{folder.relative_to(path).as_posix()}/"
            repeated += [(below, image) for image in images if not add(found, below, image)]
    if with_extension:
        names = {below + name_of(image): below for below, image in repeated}
        firsts = [(below, found.pop(name)) for name, below in names.items()]
        whole = [(below, File(image.parent, image.name, "")) for below, image in firsts + repeated]
        repeated = [(below, image) for below, image in whole if not add(found, below, image)]
    if repeated:
        clashes = listing(f"{found[below + name_of(image)]} and {image}" for below, image in repeated)
        raise InputError(f"{clashes}: have the same name; keep one of them, or write them to different folders")
    return found


def add(images: dict[str, File], below: str, image: File) -> bool:
    """Adds an image of a sub-folder by its name; False if another image has it."""
    other = images.setdefault(below + name_of(image), image)
    return other is image or os.path.samefile(other, image)


def images_below(folder: Path, skip: Callable[[Path], bool] = lambda folder: False) -> int:
    """The number of images in the sub-folders of a folder, see `tree`."""
    found = chain.from_iterable(entries(one) for one in tree(folder, skip) if one != folder)
    return sum(is_image(extension) and not is_broken for _, extension, is_broken in found)


def pair(
    image_folders: Sequence[str | Path], mask_folders: Sequence[str | Path], skip_unpaired: bool = False,
    names: MaskNames = SAME,
) -> list[Pair]:  # fmt: skip
    """The (image, mask) files of the same name in the i-th folder of either, joined.

    Raises InputError for different numbers of folders, for files without a partner (unless `skip_unpaired`) or if there
    is no pair; and what `find_both` raises.
    """
    remedy = "add the missing files or ignore these with --skip_unpaired"
    if len(image_folders) != len(mask_folders):
        number = f"{len(image_folders)} folder(s) of images but {len(mask_folders)} of masks"
        raise InputError(f"{number}: give one of masks for each of images, in the same order")
    pairs: list[Pair] = []
    for image_folder, mask_folder in zip(image_folders, mask_folders, strict=True):
        images, masks = find_both(image_folder, mask_folder, names)
        pairs += match(images, masks, f"{image_folder} and {mask_folder}", skip_unpaired, remedy)
    return pairs


def find_both(
    image_folder: str | Path, mask_folder: str | Path, names: MaskNames = SAME
) -> tuple[dict[str, File], dict[str, File]]:
    """The images and the masks by the image's name. Both may be in one folder if `names` tells them apart.

    Raises InputError if it does not, or if none has a partner; and what `find` raises.
    """
    require_apart(image_folder, mask_folder, names)
    both = find(image_folder), find(mask_folder)
    images, masks = tell_apart(*both, names)
    if not images.keys() & masks.keys():
        first = " and ".join(next(iter(side.values())).name if side else "nothing" for side in (images, masks))
        raise InputError(
            f"no image in {image_folder} has the name of a mask in {mask_folder} (for example {first})"
            + names_hint(*both)
        )
    return images, masks


def require_apart(image_folder: str | Path, mask_folder: str | Path, names: MaskNames = SAME) -> None:
    """Raises InputError if both are one folder and `names` does not tell images and masks apart."""
    if names == SAME and Path(image_folder).resolve() == Path(mask_folder).resolve():
        every = {name_of(file) for file in scan(image_folder).images}
        hint = names_hint(every, every) or "; move the masks to a folder of their own, or give --mask_suffix"
        raise InputError(f"{image_folder}: is given as the folder of both images and masks{hint}")


def tell_apart(
    images: dict[str, File], masks: dict[str, File], names: MaskNames
) -> tuple[dict[str, File], dict[str, File]]:
    """The files of a folder of images and of one of masks, which may be the same, by the image's name."""
    if names == SAME:
        return images, masks
    resolved = cache(Path.resolve)
    images = {
        name: path for name, path in images.items()
        if name not in masks or names.image_of(name) is None
        or resolved(masks[name].parent) != resolved(path.parent)
    }  # fmt: skip
    return images, names.by_image(masks)


def names_hint(images: Iterable[str], masks: Iterable[str], kind: str = "mask") -> str:
    """The end of a message: which options would pair the files of these names, if there are such."""
    if not (guess := guess_names({*images}, {*masks})):
        return ""
    in_yaml = f" (in a benchmark's YAML file: {guess.entries()})" if kind == "mask" else ""
    return f"; give {guess.options(kind)}{in_yaml}"


def guess_names(images: Set[str], masks: Set[str]) -> MaskNames | None:
    """What the names of all masks have beside those of their images, if there is such; both may be the same set."""
    longest = max(masks, key=len, default="")  # in one set, an image's name is shorter than its mask's
    for part in sorted(images, key=len, reverse=True):
        if part and part in longest and part != longest:
            names = MaskNames(*longest.split(part, 1))
            named = {names.image_of(mask) for mask in masks} - {None}
            others = {mask for mask in masks if names.image_of(mask) is None}
            if named == others if images == masks else not others and named <= images:
                return names
    return None


def match(
    images: dict[str, File], masks: dict[str, File], where: str, skip: bool = False, remedy: str = "add what is missing"
) -> list[Pair]:
    """The pairs of the same name. Raises InputError, about `where`, if a file has no partner, unless `skip`."""
    problems = []
    for wanted, side, other in (("mask", images, masks), ("image", masks, images)):
        if alone := [path.name for name, path in side.items() if name not in other]:
            problems.append(f"without their {wanted}: {listing(alone)}")
    if problems and not skip:
        raise InputError(f"{where} do not match; {'; '.join(problems)}; {remedy}")
    return [(path, masks[name]) for name, path in images.items() if name in masks]


def mask_warnings(problems: Mapping[File, str]) -> list[str]:
    """Lines about masks that were looked at, by their problems: keys of MASK_PROBLEMS, or empty."""
    return [
        f"{len(found):,} of {count(len(problems), 'mask')}: {problem}: {remedy} ({listing(found)})"
        for problem, remedy in MASK_PROBLEMS.items()
        if (found := sorted(path.name for path, one in problems.items() if one == problem))
    ]
