"""Checks a data set: decodes every image and mask and reports what would stop or spoil training and scoring.

    python tools/check_dataset.py COD data/COD              all splits of a benchmark, training and test
    python tools/check_dataset.py mine.yaml data/mine       the same for a benchmark of your own
    python tools/check_dataset.py data/images data/masks    two folders

An error stops a run or silently spoils it, a warning deserves a look, a note is for information. Prints the first files
of each finding; --json writes all. Exit status: 0 without errors, 1 with errors, 2 if nothing was checked.
"""

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation import benchmarks
from unext import cli, files, pairing
from unext.errors import InputError
from unext.images import FAR, TURNS, changes_colours, configure_reading, decoded, is_deep, opened, orientation, why
from unext.masks import LOSSY, MASK_PROBLEMS, OBJECT, TOLERANCE, alpha_of, mask_of, mask_problem
from unext.pairing import File
from unext.workers import cores, in_processes, progress_bar

SOFT = 0.05  # largest share of grey pixels that still counts as soft edges
PLAIN = ("1", "L", "P", "RGB")  # modes that need no conversion of colours
ROLES = ("training", "validation", "test")  # of splits; no image may be in two of them

Job = tuple[str, File | None, File | None]  # split, image and mask, of which one may be missing

SEVERITIES = ("error", "warning", "note")
ROTATED = "rotated by EXIF"
KINDS: dict[str, tuple[str, str]] = {  # of findings -> severity, remedy
    kind: (severity, remedy or MASK_PROBLEMS[kind])
    for kind, (severity, remedy) in yaml.safe_load(Path(__file__).with_name("findings.yaml").read_text("utf-8")).items()
}


class Finding(NamedTuple):
    split: str
    kind: str  # of KINDS
    path: File | Path
    detail: str = ""

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return files.printable(f"{self.path.parent.name}/{self.path.name}{detail}")


class Inspection(NamedTuple):
    """The content of a file, if it can be read."""

    size: tuple[int, int] | None = None  # (width, height)
    kinds: dict[str, str] = {}  # of findings -> detail
    digest: bytes | None = None  # of an image's pixels


def places_of(name: str, root: str, findings: list[Finding]) -> list[tuple[str, benchmarks.Place, Path, Path]]:
    """(split, place, folder of images, of masks) of a benchmark's splits; adds findings about missing ones."""
    benchmark = benchmarks.load(name)
    places = []
    validation = {f"{split} validation": layouts for split, layouts in benchmark.val.items()}
    for split, layouts in {f"{benchmark.name} training": benchmark.train, **validation, **benchmark.test}.items():
        try:
            places += [(split, *place) for place in benchmarks.locate(split, layouts, root)] if layouts else []
        except InputError as error:
            findings.append(Finding(split, "split not found or ambiguous", Path(root), str(error)))
    if not places:
        raise InputError(f"{name}: has none of its splits there; {findings[0].detail if findings else 'name some'}")
    return places


def survey(
    split: str, place: benchmarks.Place, image_folder: Path, mask_folder: Path, findings: list[Finding]
) -> tuple[benchmarks.SplitFolder, list[Job]]:
    """The pairs of a place, and the files to decode; adds the findings that need only the names of files."""
    listed: dict[Path, dict[str, File]] = {image_folder: {}, mask_folder: {}}
    for folder, by_name in listed.items():
        for path in pairing.images_in(folder):
            if (other := by_name.setdefault(pairing.name_of(path), path)) is not path:
                findings.append(Finding(split, "two files of one name", path, f"beside {other.name}"))
        for stem, extension, is_broken in sorted(pairing.entries(folder)):
            if is_broken or not pairing.is_image(extension):
                kind = "broken link" if is_broken else "not an image by its extension"
                findings.append(Finding(split, kind, folder / (stem + extension)))
    sides = listed[image_folder], listed[mask_folder]
    images, masks = pairing.tell_apart(*sides, place.mask_names())
    images, masks, left_out = benchmarks.files_of_place(place, images, masks)
    for kind, side, partners in (("image without mask", images, masks), ("mask without image", masks, images)):
        findings += [Finding(split, kind, path) for name, path in side.items() if name not in partners]
    pairs = pairing.match(images, masks, str(image_folder), skip=True)
    folder = benchmarks.SplitFolder(split, image_folder, mask_folder, pairs, place.count, left_out)
    if not pairs:
        empty = [pairing.no_images(folder) for folder, by_name in listed.items() if not by_name]
        detail = "; ".join(empty) or f"with {mask_folder}{pairing.names_hint(*sides)}"
        findings.append(Finding(split, "no pair", image_folder, detail))
    elif folder.is_incomplete():
        detail = f"{len(pairs):,} of {files.count(place.count, 'pair')}"
        findings.append(Finding(split, "not the published number", image_folder, detail))
    return folder, [(split, images.get(name), masks.get(name)) for name in images | masks]


def examine(job: Job) -> tuple[list[Finding], bytes | None]:
    """The findings about the files of a job, which are decoded, and a digest of the image's pixels."""
    split, image_path, mask_path = job
    image = inspect(image_path, is_mask=False) if image_path else Inspection()
    mask = inspect(mask_path, is_mask=True) if mask_path else Inspection()
    if image.size and mask.size and image.size != mask.size:
        detail = f"{mask.size[1]} x {mask.size[0]}, image {image.size[1]} x {image.size[0]}"
        if ROTATED in image.kinds and image.size == mask.size[::-1]:
            detail += ", as if rotated by EXIF"
        mask.kinds["mask of another size"] = detail
    findings = [
        Finding(split, kind, path, detail)
        for path, inspection in ((image_path, image), (mask_path, mask))
        for kind, detail in inspection.kinds.items()
    ]
    return findings, image.digest


def inspect(path: File, is_mask: bool) -> Inspection:
    """The findings about a file, which is decoded as in training."""
    try:
        with opened(path) as image:
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # in MPO, the second is a preview
            kinds = {"animated or several pages": f"{frames}"} if frames > 1 else {}
            mode, deep = f"mode {image.mode}", is_deep(image)
            if deep:
                kinds["16 bits or floats"] = mode
            eight_bits = decoded(image, is_mask)
            if FAR in eight_bits.info:
                kinds[FAR] = eight_bits.info[FAR]
            if (turn := orientation(image)) in TURNS:
                kinds[ROTATED] = f"orientation {turn}"
            if alpha_of(eight_bits):
                kinds["mask in the alpha channel" if is_mask else "transparent pixels"] = mode
            elif not deep and image.mode not in PLAIN:
                kinds["unusual colour mode"] = mode
            if is_mask:
                return Inspection(image.size, kinds | mask_kinds(image, mask_of(eight_bits)))
            if changes_colours(image.info.get("icc_profile", b"")):
                kinds["colours of a profile"] = ""
            pixels = f"{image.size}".encode() + eight_bits.convert("RGB").tobytes()
            return Inspection(image.size, kinds, hashlib.blake2b(pixels, digest_size=16).digest())
    except OSError as error:
        return Inspection(kinds={"unreadable": why(path, error.__cause__)})


def mask_kinds(image: Image.Image, mask: Image.Image) -> dict[str, str]:
    """The findings about the values of an opened mask, which `mask_of` read as `mask`, with details."""
    counts = mask.histogram()
    levels = [level for level, count in enumerate(counts) if count]
    if levels[-1] <= (TOLERANCE if image.format in LOSSY else 0):
        return {"empty mask": ""}
    kinds = {}
    if problem := mask_problem(image, mask):
        kinds[problem] = f"mode {image.mode}, {len(levels)} levels up to {levels[-1]}"
    if levels[-1] <= OBJECT:
        return kinds
    if levels[0] > OBJECT:
        kinds["full mask"] = ""
    if grey := sum(counts[TOLERANCE + 1 : 255 - TOLERANCE]) / sum(counts):
        kinds["mask not binary" if grey > SOFT else "mask with soft edges"] = f"{grey:.1%} grey"
    return kinds


def duplicates(jobs: Sequence[Job], digests: Sequence[bytes | None]) -> Iterator[Finding]:
    """Findings about images that are twice in a split, or in splits of two roles."""
    first: dict[tuple[str, bytes], File] = {}
    for (split, path, _), digest in zip(jobs, digests, strict=True):
        if digest and (earlier := first.setdefault((split, digest), path)) is not path:
            yield Finding(split, "image twice in a split", path, f"as {earlier.name}")
    seen: dict[tuple[str, bytes], File] = {}  # by role
    for (split, digest), path in first.items():  # the roles in their order
        role = next((role for role in ROLES if split.endswith(f" {role}")), "test")
        for earlier_role in ROLES[: ROLES.index(role)]:
            if earlier := seen.get((earlier_role, digest)):
                yield Finding(split, f"{role} image in {earlier_role}", path, f"as {earlier.name}")
        seen.setdefault((role, digest), path)


def report(pairs: int, findings: Sequence[Finding], path: Path | None) -> int:
    """Prints the findings and the verdict, writes all as JSON to `path`; returns the number of errors."""
    groups = []
    for kind, (severity, remedy) in KINDS.items():
        of_kind = [finding for finding in findings if finding.kind == kind]
        if of_kind:
            print(f"\n{severity}: {kind}: {remedy}")
        for split in dict.fromkeys(finding.split for finding in of_kind):
            group = [finding for finding in of_kind if finding.split == split]
            print(f"  {split}: {files.count(len(group), 'file')}: {files.listing(group)}")
            named = [{"file": str(finding.path), "detail": finding.detail} for finding in group]
            groups.append({"finding": kind, "severity": severity, "split": split, "count": len(group), "files": named})
    totals = Counter(KINDS[finding.kind][0] for finding in findings)
    verdict = "fix the errors" if totals["error"] else "usable, but see the warnings" if totals["warning"] else "sound"
    counts = ", ".join(files.count(totals[severity], severity) for severity in SEVERITIES)
    print(f"\n{files.count(pairs, 'pair')}, {counts}: {verdict}")
    if path:
        content = {"pairs": pairs} | {f"{severity}s": totals[severity] for severity in SEVERITIES}
        files.write_json(path, content | {"findings": groups})
    return totals["error"]


def main(args: argparse.Namespace) -> None:
    with cli.one_line_errors("fewer --workers need less") as command:
        configure_reading(args.max_pixels, args.white)
        findings: list[Finding] = []
        if benchmarks.run_name(args.source) or not Path(args.source).is_dir():  # a folder called COD is ./COD
            pairing.names_given(args, None)
            places = places_of(args.source, args.root, findings)
        else:
            place = benchmarks.Place(mask_prefix=args.mask_prefix, mask_suffix=args.mask_suffix)
            places = [(Path(args.source).resolve().name, place, Path(args.source), Path(args.root))]
        splits, jobs_of_splits = zip(*(survey(*place, findings) for place in places), strict=True)
        jobs = list(chain(*jobs_of_splits))
        if not jobs:
            raise InputError(f"{files.listing([args.source, args.root])}: have no images")
        files.check_output_file("--json", args.json)

        command.started()
        print(*splits, sep="\n", flush=True)
        with closing(in_processes(examine, jobs, args.workers)) as results:
            examined = list(progress_bar(results, total=len(jobs), desc="checking", unit="img"))
        findings += [finding for of_job, _ in examined for finding in of_job]
        findings += duplicates(jobs, [digest for _, digest in examined])
        if report(sum(len(split.pairs) for split in splits), findings, args.json):
            raise SystemExit(cli.NOT_COMPLETED)


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("source", metavar="NAME|IMAGES", help="a benchmark's name or YAML file, or a folder of images")
    parser.add_argument("root", metavar="ROOT|MASKS", help="the benchmark's folder, or the folder of masks")
    cli.add_reading(parser)
    parser.add_argument("--json", type=cli.path, metavar="FILE", help="write all findings there, naming every file")
    parser.add_argument("--workers", type=cli.number(), default=cores(), help="processes")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
