"""Checks a data set: decodes every image and mask and reports what would break or spoil training and scoring.

    python tools/check_dataset.py COD data/COD              all splits of a benchmark, training and test
    python tools/check_dataset.py mine.yaml data/mine       the same for a benchmark of your own
    python tools/check_dataset.py data/images data/masks    two folders

An error stops a run or silently spoils it, a warning deserves a look, a note is good to know. The table names the
first files of each finding; --json writes all. Exit status: 0 without errors, 1 with errors, 2 if nothing was checked.
"""

import argparse
import hashlib
import json
import sys
import textwrap
from collections import defaultdict
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
from unext.images import FAR, TURNS, allow_pixels, changes_colours, decoded, is_deep, opened, orientation, set_white
from unext.masks import LOSSY, MASK_PROBLEMS, OBJECT, TOLERANCE, alpha_of, mask_of, mask_problem
from unext.pairing import File
from unext.workers import cores, in_processes, progress_bar

ERRORS_FOUND = 1  # exit status
WIDTH = 112  # of the table, in characters
SOFT = 0.05  # share of grey pixels up to which they are soft edges
PLAIN = ("1", "L", "P", "RGB")  # modes without surprises

SEVERITIES = ("error", "warning", "note")
ROTATED = "rotated by EXIF"
NOT_FOUND = "split not found or ambiguous"
KINDS: dict[str, tuple[str, str]] = {  # finding -> severity, remedy
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
        return files.printable(
            f"{self.path.parent.name}/{self.path.name}" + (f" ({self.detail})" if self.detail else "")
        )


class Inspection(NamedTuple):
    """The content of a file, if it can be read."""

    size: tuple[int, int] | None = None  # (width, height)
    kinds: dict[str, str] = {}  # finding -> detail
    digest: bytes | None = None  # of an image's pixels


class Survey(NamedTuple):
    """What there is to check, and what the file names alone reveal."""

    splits: list[benchmarks.SplitFolder]
    jobs: list[Job]
    findings: list[Finding]


def survey_benchmark(everything: Survey, name: str, root: str) -> str:
    """Adds all splits of a benchmark; returns the name of the training split. Raises OSError or InputError."""
    benchmark = benchmarks.load(name)
    training = f"{benchmark.name} training"
    splits = ({training: benchmark.train} if benchmark.train else {}) | benchmark.test
    for split, alternatives in splits.items():
        try:
            for place, images, masks in benchmarks.locate(split, alternatives, root):
                survey(everything, split, place, images, masks)
        except (InputError, PermissionError) as error:
            everything.findings.append(Finding(split, NOT_FOUND, Path(root), str(error).removeprefix(f"{split}: ")))
    if not everything.splits:
        reasons = [f"{finding.split}: {finding.detail}" for finding in everything.findings] or ["it has none"]
        raise InputError(f"{name}: none of its splits exists; {reasons[0]}")
    return training


def survey(everything: Survey, split: str, place: benchmarks.Place, images: Path, masks: Path) -> None:
    """Adds the files of a place. Raises OSError if a folder cannot be listed, InputError if both are one."""

    def add(kind: str, path: File | Path, detail: str = "") -> None:
        everything.findings.append(Finding(split, kind, path, detail))

    names = place.mask_names()
    pairing.require_apart(images, masks, names)
    sides: list[dict[str, File]] = [{}, {}]
    repeated: list[Job] = []
    for folder, side in dict(zip((images, masks), sides, strict=True)).items():
        found = pairing.scan(folder)
        for path in found.images:
            if (other := side.setdefault(pairing.name_of(path), path)) is not path:
                add("two files of one name", path, f"beside {other.name}")
                repeated.append(Job(split, path, None) if folder == images else Job(split, None, path))
        for kind, listed in (("broken link", found.broken), ("not an image by its extension", found.others)):
            for name in listed:
                add(kind, folder / name)
    if images == masks:
        sides[0] = sides[1]
    left, right, left_out = benchmarks.belonging(place, *pairing.tell_apart(*sides, names))
    pairs = pairing.match(left, right, str(images), skip=True)
    everything.splits.append(benchmarks.SplitFolder(split, images, masks, pairs, place.count, left_out))
    everything.jobs.extend(Job(split, image, mask) for image, mask in pairs)
    for path in (path for name, path in left.items() if name not in right):
        add("image without mask", path)
        everything.jobs.append(Job(split, path, None))
    for path in (path for name, path in right.items() if name not in left):
        add("mask without image", path)
        everything.jobs.append(Job(split, None, path))
    everything.jobs.extend(repeated)
    if not pairs:
        first = " and ".join(next(iter(side.values())).name if side else "nothing" for side in (left, right))
        detail = f"with {masks}: for example {first}{pairing.names_hint(*sides)}"
        empty = [folder for folder, side in zip((images, masks), sides, strict=True) if not side]
        add("no pair", images, "; ".join(map(pairing.no_images, empty)) or detail)
    elif place.count not in (None, len(pairs)):
        add("not the published number", images, f"{len(pairs):,} of {place.count:,} pairs")


def examine(job: Job) -> tuple[list[Finding], bytes | None]:
    """Decodes the files of a job: what is wrong with them, and a digest of the image's pixels."""
    image = inspect(job.image, is_mask=False) if job.image else Inspection()
    mask = inspect(job.mask, is_mask=True) if job.mask else Inspection()
    if image.size and mask.size and image.size != mask.size:
        detail = f"{mask.size[1]} x {mask.size[0]}, image {image.size[1]} x {image.size[0]}"
        if ROTATED in image.kinds and image.size == mask.size[::-1]:
            detail += ", as if rotated by EXIF"
        mask.kinds["mask of another size"] = detail
    found = [(path, one.kinds) for path, one in ((job.image, image), (job.mask, mask)) if path]
    return [Finding(job.split, kind, path, kinds[kind]) for path, kinds in found for kind in kinds], image.digest


def inspect(path: File, is_mask: bool) -> Inspection:
    """Decodes a file as training does, and finds what is unusual about it."""
    try:
        with opened(path) as image:
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # in MPO, the second is a preview
            kinds = {"animated or several pages": f"{frames}"} if frames > 1 else {}
            if deep := is_deep(image):
                kinds["16 bits or floats"] = f"mode {image.mode}"
            flat = decoded(image, is_mask)
            if FAR in flat.info:
                kinds[FAR] = flat.info[FAR]
            if (turned := orientation(image)) in TURNS:
                kinds[ROTATED] = f"orientation {turned}"
            if alpha_of(flat):
                kinds["mask in the alpha channel" if is_mask else "transparent pixels"] = f"mode {image.mode}"
            elif not deep and image.mode not in PLAIN:
                kinds["unusual colour mode"] = f"mode {image.mode}"
            if is_mask:
                return Inspection(image.size, kinds | mask_kinds(image, mask_of(flat)))
            if profile := image.info.get("icc_profile"):
                kinds |= {"colours of a profile": ""} if changes_colours(profile) else {}
            return Inspection(image.size, kinds, fingerprint(flat.convert("RGB")))
    except OSError as error:
        return Inspection(kinds={"unreadable": str(error).partition(": cannot be read as an image: ")[2]})


def mask_kinds(image: Image.Image, mask: Image.Image) -> dict[str, str]:
    """What is wrong with the values of an opened mask, of which `mask_of` made `mask`: finding -> detail."""
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
    """A digest of the pixels, the same for every lossless format."""
    return hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).digest()


def duplicates(images: Sequence[tuple[Job, bytes]], training: str) -> Iterator[Finding]:
    """The images that are twice in a split, and the test images that are in training too."""
    first: dict[tuple[str, bytes], File] = {}
    for job, digest in images:  # all of them, before test is compared with training
        earlier = first.setdefault((job.split, digest), job.image)
        if earlier != job.image:
            yield Finding(job.split, "image twice in a split", job.image, f"as {earlier.name}")
    for (split, digest), path in first.items():
        if split != training and (training, digest) in first:
            yield Finding(split, "test image in training", path, f"as {first[training, digest].name}")


def group(findings: Sequence[Finding]) -> dict[str, dict[str, list[Finding]]]:
    """Findings by kind, in the order of KINDS, and by split."""
    grouped: dict[str, dict[str, list[Finding]]] = {kind: defaultdict(list) for kind in KINDS}
    for finding in findings:
        grouped[finding.kind][finding.split].append(finding)
    return {kind: splits for kind, splits in grouped.items() if splits}


def table(findings: Sequence[Finding]) -> str:
    """For people: each kind of finding with its remedy, the number of files in each split and the first of them."""
    width = max(len(finding.split) for finding in findings)
    lines = [f"{'':9}{'split':<{width}}  {'files':>6}  the first of them", "-" * WIDTH]
    for kind, splits in group(findings).items():
        severity, remedy = KINDS[kind]
        lines += textwrap.wrap(f"{severity:<9}{kind}: {remedy}", WIDTH, subsequent_indent=" " * 9)
        for split, found in splits.items():
            start = f"{'':9}{split:<{width}}  {len(found):>6,}  "
            lines += textwrap.wrap(start + files.listing(found), WIDTH, subsequent_indent=" " * len(start))
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    with cli.one_line_errors("fewer --workers need less") as command:
        allow_pixels(args.max_pixels)
        set_white(args.white)
        everything, training = Survey([], [], []), ""
        if benchmarks.is_benchmark(args.first):
            pairing.names_given(args, None)
            training = survey_benchmark(everything, args.first, args.second)
        else:
            place = benchmarks.Place(mask_prefix=args.mask_prefix, mask_suffix=args.mask_suffix)
            survey(everything, Path(args.first).resolve().name, place, Path(args.first), Path(args.second))
        if not everything.jobs:
            raise InputError(f"{files.listing([args.first, args.second])}: have no images")
        files.check_output_file("--json", args.json)

        command.started()
        print(*everything.splits, sep="\n", flush=True)
        findings = list(everything.findings)
        images = []
        with closing(in_processes(examine, everything.jobs, args.workers)) as results:
            bar = progress_bar(results, total=len(everything.jobs), desc="checking", unit="img")
            for job, (wrong, digest) in zip(everything.jobs, bar, strict=True):
                findings += wrong
                if digest:
                    images.append((job, digest))
        findings += duplicates(images, training)
        report(everything.splits, findings, args.json)
        if any(KINDS[finding.kind][0] == "error" for finding in findings):
            raise SystemExit(ERRORS_FOUND)


def report(splits: Sequence[benchmarks.SplitFolder], findings: Sequence[Finding], path: Path | None) -> None:
    """Prints the table and the verdict, and writes everything as JSON."""
    totals = {one: sum(KINDS[finding.kind][0] == one for finding in findings) for one in SEVERITIES}
    pairs = sum(len(split.pairs) for split in splits)
    verdict = "fix the errors" if totals["error"] else "usable, but see the warnings" if totals["warning"] else "sound"
    if findings:
        print(f"\n{table(findings)}")
    counted = ", ".join(files.count(number, severity) for severity, number in totals.items())
    print(f"\n{pairs:,} pairs, {counted}: {verdict}")
    if path:
        content = {"pairs": pairs} | {f"{one}s": count for one, count in totals.items()}
        content["findings"] = [
            {"finding": kind, "severity": KINDS[kind][0], "split": split, "count": len(found)}
            | {"files": [{"file": str(finding.path), "detail": finding.detail} for finding in found]}
            for kind, splits in group(findings).items()
            for split, found in splits.items()
        ]
        with files.replacing(path) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())


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
