"""Checks a data set: decodes every image and mask and reports what would stop or spoil training and scoring.

    python tools/check_dataset.py COD data/COD              all splits of a benchmark, training and test
    python tools/check_dataset.py mine.yaml data/mine       the same for a benchmark of your own
    python tools/check_dataset.py data/images data/masks    two folders

An error stops a run or silently spoils it, a warning deserves a look, a note is for information. The table names the
first files of each finding; --json writes all. Exit status: 0 without errors, 1 with errors, 2 if nothing was checked.
"""

import argparse
import hashlib
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation import benchmarks
from unext import cli, files, pairing
from unext.errors import InputError
from unext.images import FAR, TURNS, changes_colours, configure_reading, decoded, is_deep, opened, orientation
from unext.masks import LOSSY, MASK_PROBLEMS, OBJECT, TOLERANCE, alpha_of, mask_of, mask_problem
from unext.pairing import File
from unext.workers import cores, in_processes, progress_bar

ERRORS_FOUND = 1  # exit status
WIDTH = 112  # of the table, in characters
SOFT = 0.05  # share of grey pixels up to which they are soft edges
PLAIN = ("1", "L", "P", "RGB")  # modes that need no conversion of colours

SEVERITIES = ("error", "warning", "note")
ROTATED = "rotated by EXIF"
KINDS: dict[str, tuple[str, str]] = {  # of findings -> severity, remedy
    kind: (severity, remedy or MASK_PROBLEMS[kind])
    for kind, (severity, remedy) in yaml.safe_load(Path(__file__).with_name("findings.yaml").read_text("utf-8")).items()
}


class Job(NamedTuple):
    """A pair, or a file without a partner."""

    split: str
    image: File | None
    mask: File | None


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


class Survey(NamedTuple):
    """The files to check, and what their names alone reveal."""

    splits: list[benchmarks.SplitFolder]
    jobs: list[Job]
    findings: list[Finding]


def survey_benchmark(survey: Survey, name: str, root: str) -> str:
    """Adds all splits of a benchmark; returns the name of the training split. Raises OSError or InputError."""
    benchmark = benchmarks.load(name)
    training = f"{benchmark.name} training"
    for split, layouts in {training: benchmark.train, **benchmark.test}.items():
        try:
            for place, image_folder, mask_folder in benchmarks.locate(split, layouts, root) if layouts else ():
                survey_folders(survey, split, place, image_folder, mask_folder)
        except (InputError, PermissionError) as error:
            reason = str(error).removeprefix(f"{split}: ")
            survey.findings.append(Finding(split, "split not found or ambiguous", Path(root), reason))
    if not survey.splits:
        reasons = [f"{finding.split}: {finding.detail}" for finding in survey.findings] or ["it has none"]
        raise InputError(f"{name}: none of its splits exists; {reasons[0]}")
    return training


def survey_folders(survey: Survey, split: str, place: benchmarks.Place, image_folder: Path, mask_folder: Path) -> None:
    """Adds the files of a place. Raises OSError if a folder cannot be listed, InputError if they are the same."""

    def add(kind: str, path: File | Path, detail: str = "") -> None:
        survey.findings.append(Finding(split, kind, path, detail))

    listed: dict[Path, dict[str, File]] = {image_folder: {}, mask_folder: {}}
    for folder, by_name in listed.items():
        for path in pairing.images_in(folder):
            if (other := by_name.setdefault(pairing.name_of(path), path)) is not path:
                add("two files of one name", path, f"beside {other.name}")
        for stem, extension, is_broken in sorted(pairing.entries(folder)):
            if is_broken or not pairing.is_image(extension):
                add("broken link" if is_broken else "not an image by its extension", folder / (stem + extension))
    sides = listed[image_folder], listed[mask_folder]
    images, masks = pairing.tell_apart(*sides, place.mask_names())
    images, masks, left_out = benchmarks.belonging(place, images, masks)
    pairs = pairing.match(images, masks, str(image_folder), skip=True)
    survey.splits.append(benchmarks.SplitFolder(split, image_folder, mask_folder, pairs, place.count, left_out))
    for name in images | masks:
        survey.jobs.append(Job(split, images.get(name), masks.get(name)))
        if name not in masks:
            add("image without mask", images[name])
        if name not in images:
            add("mask without image", masks[name])
    if not pairs:
        first = " and ".join(next(iter(side.values())).name if side else "nothing" for side in (images, masks))
        empty = [pairing.no_images(folder) for folder, by_name in listed.items() if not by_name]
        hint = f"with {mask_folder}: for example {first}{pairing.names_hint(*sides)}"
        add("no pair", image_folder, "; ".join(empty) or hint)
    elif place.count not in (None, len(pairs)):
        add("not the published number", image_folder, f"{len(pairs):,} of {files.count(place.count, 'pair')}")


def examine(job: Job) -> tuple[list[Finding], bytes | None]:
    """The findings about the files of a job, which are decoded, and a digest of the image's pixels."""
    image = inspect(job.image, is_mask=False) if job.image else Inspection()
    mask = inspect(job.mask, is_mask=True) if job.mask else Inspection()
    if image.size and mask.size and image.size != mask.size:
        detail = f"{mask.size[1]} x {mask.size[0]}, image {image.size[1]} x {image.size[0]}"
        if ROTATED in image.kinds and image.size == mask.size[::-1]:
            detail += ", as if rotated by EXIF"
        mask.kinds["mask of another size"] = detail
    kinds = [(job.image, *item) for item in image.kinds.items()] + [(job.mask, *item) for item in mask.kinds.items()]
    return [Finding(job.split, kind, path, detail) for path, kind, detail in kinds], image.digest


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
            return Inspection(image.size, kinds, fingerprint(eight_bits.convert("RGB")))
    except OSError as error:
        return Inspection(kinds={"unreadable": str(error).partition(": cannot be read as an image: ")[2]})


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


def fingerprint(image: Image.Image) -> bytes:
    """A hash of the pixels, the same for every lossless format."""
    return hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).digest()


def duplicates(digests: Sequence[tuple[Job, bytes]], training: str) -> Iterator[Finding]:
    """Findings about images that are twice in a split, and test images that are in training too."""
    first: dict[tuple[str, bytes], File] = {}
    for job, digest in digests:  # all of them, before test is compared with training
        earlier = first.setdefault((job.split, digest), job.image)
        if earlier != job.image:
            yield Finding(job.split, "image twice in a split", job.image, f"as {earlier.name}")
    for (split, digest), path in first.items():
        if split != training and (training, digest) in first:
            yield Finding(split, "test image in training", path, f"as {first[training, digest].name}")


def table(groups: dict[tuple[str, str], list[Finding]]) -> str:
    """Each kind of finding with its remedy, the number of files in each split and the first of them, as text."""
    width = max(len(split) for _, split in groups)
    lines, last = [f"{'':9}{'split':<{width}}  {'files':>6}  the first of them", "-" * WIDTH], ""
    for (kind, split), findings in groups.items():
        if kind != last:
            severity, remedy = KINDS[kind]
            lines += textwrap.wrap(f"{severity:<9}{kind}: {remedy}", WIDTH, subsequent_indent=" " * 9)
        start = f"{'':9}{split:<{width}}  {len(findings):>6,}  "
        lines += textwrap.wrap(start + files.listing(findings), WIDTH, subsequent_indent=" " * len(start))
        last = kind
    return "\n".join(lines)


def report(pairs: int, findings: Sequence[Finding], path: Path | None) -> dict[str, int]:
    """Prints the table and the verdict, writes everything as JSON; returns the number of findings by severity."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in sorted(findings, key=lambda finding: [*KINDS].index(finding.kind)):
        groups.setdefault((finding.kind, finding.split), []).append(finding)
    severities = [KINDS[finding.kind][0] for finding in findings]
    totals = {severity: severities.count(severity) for severity in SEVERITIES}
    verdict = "fix the errors" if totals["error"] else "usable, but see the warnings" if totals["warning"] else "sound"
    if findings:
        print(f"\n{table(groups)}")
    counts = ", ".join(files.count(number, severity) for severity, number in totals.items())
    print(f"\n{files.count(pairs, 'pair')}, {counts}: {verdict}")
    if path:
        content = {"pairs": pairs, **{f"{severity}s": number for severity, number in totals.items()}}
        content["findings"] = [
            {"finding": kind, "severity": KINDS[kind][0], "split": split, "count": len(group)}
            | {"files": [{"file": str(finding.path), "detail": finding.detail} for finding in group]}
            for (kind, split), group in groups.items()
        ]
        with files.replacing(path) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())
    return totals


def main(args: argparse.Namespace) -> None:
    with cli.one_line_errors("fewer --workers need less") as command:
        configure_reading(args.max_pixels, args.white)
        survey, training = Survey([], [], []), ""
        if benchmarks.is_benchmark(args.first):
            pairing.names_given(args, None)
            training = survey_benchmark(survey, args.first, args.second)
        else:
            place = benchmarks.Place(mask_prefix=args.mask_prefix, mask_suffix=args.mask_suffix)
            survey_folders(survey, Path(args.first).resolve().name, place, Path(args.first), Path(args.second))
        if not survey.jobs:
            raise InputError(f"{files.listing([args.first, args.second])}: have no images")
        files.check_output_file("--json", args.json)

        command.started()
        print(*survey.splits, sep="\n", flush=True)
        findings, digests = list(survey.findings), []
        with closing(in_processes(examine, survey.jobs, args.workers)) as results:
            bar = progress_bar(results, total=len(survey.jobs), desc="checking", unit="img")
            for job, (of_job, digest) in zip(survey.jobs, bar, strict=True):
                findings += of_job
                if digest:
                    digests.append((job, digest))
        findings += duplicates(digests, training)
        if report(sum(len(split.pairs) for split in survey.splits), findings, args.json)["error"]:
            raise SystemExit(ERRORS_FOUND)


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("first", metavar="NAME|IMAGES", help="a benchmark's name or YAML file, or a folder of images")
    parser.add_argument("second", metavar="ROOT|MASKS", help="the benchmark's folder, or the folder of masks")
    cli.add_reading(parser)
    parser.add_argument("--json", type=cli.path, metavar="FILE", help="write all findings there, naming every file")
    parser.add_argument("--workers", type=cli.number(), default=cores(), help="processes")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
