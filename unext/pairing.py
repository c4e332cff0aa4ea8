"""Finds images and masks, and pairs them by name. Free of torch, which keeps its users small."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from unext import imaging
from unext.files import listing, require_folder


def images_in(folder: str | Path) -> list[Path]:
    """The images directly in `folder`, sorted, without hidden files. Raises OSError if it cannot be listed."""
    folder = require_folder(folder)
    return [
        path for path in sorted(folder.iterdir())
        if path.suffix.lower() in imaging.extensions() and not path.name.startswith(".") and path.is_file()
    ]  # fmt: skip


def find(folder: str | Path) -> dict[str, Path]:
    """The images in `folder` by stem, sorted. Raises OSError, or ValueError for no image or two of one stem."""
    found: dict[str, Path] = {}
    repeated = []
    for path in images_in(folder):
        if path.stem in found:
            repeated.append(f"{found[path.stem].name} and {path.name}")
        found[path.stem] = path
    if repeated:
        raise ValueError(f"{folder}: files that differ only in their extension, keep one of each: {listing(repeated)}")
    if not found:
        raise ValueError(f"{folder}: has no images")
    return dict(sorted(found.items()))


def gather(paths: Iterable[str | Path]) -> dict[str, Path]:
    """The images in `paths`, folders and single files, by stem. Raises OSError or ValueError as `find` does."""
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        for stem, image in ({path.stem: path} if path.is_file() else find(path)).items():
            if stem in found:
                raise ValueError(f"{found[stem]} and {image}: have the same name; write them to different folders")
            found[stem] = image
    return found


def pair(
    image_folders: Sequence[str | Path], mask_folders: Sequence[str | Path], skip_unpaired: bool = False
) -> list[tuple[Path, Path]]:
    """The (image, mask) files of the same stem in the i-th folder of either, joined.

    Raises ValueError for different numbers of folders, for files without a partner (unless `skip_unpaired`) or if there
    is no pair; and what `find` raises.
    """
    remedy = "add the missing files or ignore these with --skip_unpaired"
    if len(image_folders) != len(mask_folders):
        number = f"{len(image_folders)} folder(s) of images but {len(mask_folders)} of masks"
        raise ValueError(f"{number}: give one of masks for each of images, in the same order")
    pairs: list[tuple[Path, Path]] = []
    for image_folder, mask_folder in zip(image_folders, mask_folders, strict=True):
        images, masks = find(image_folder), find(mask_folder)
        if not images.keys() & masks.keys():
            image, mask = (next(iter(side.values())).name for side in (images, masks))
            example = f"for example {image} and {mask}"
            raise ValueError(f"no image in {image_folder} has the name of a mask in {mask_folder} ({example})")
        pairs += match(images, masks, f"{image_folder} and {mask_folder}", skip_unpaired, remedy)
    return pairs


def match(
    images: dict[str, Path], masks: dict[str, Path], where: str, skip: bool = False, remedy: str = "add what is missing"
) -> list[tuple[Path, Path]]:
    """The pairs of the same stem. Raises ValueError, about `where`, if a file has no partner, unless `skip`."""
    problems = []
    for wanted, side, other in (("mask", images, masks), ("image", masks, images)):
        if alone := [path.name for stem, path in side.items() if stem not in other]:
            problems.append(f"without their {wanted}: {listing(alone)}")
    if problems and not skip:
        raise ValueError(f"{where} do not match; {'; '.join(problems)}; {remedy}")
    return [(path, masks[stem]) for stem, path in images.items() if stem in masks]
