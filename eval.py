"""Scores prediction maps against their ground truth with nine metrics, for data sets or a whole benchmark.

    python eval.py --dataset_name DIS-VD DIS-TE1 --pred_path maps/DIS-VD maps/DIS-TE1 --gt_path DIS-VD/gt DIS-TE1/gt
    python eval.py --benchmark COD /data/COD --pred_path runs/COD/predictions --save_path runs/COD/results

Maps and masks are paired by name. A benchmark's maps are in one folder per test set; its figures are shown beside the
published ones. All cores work on it, without a GPU and without torch. The folder --save_path gets results.json, .csv,
.md and .tex, per_image.csv, curves.png and report.html.
"""

import argparse
import os
import re
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from evaluation import benchmarks, metrics, report
from unext import cli, files, imaging, output, pairing
from unext.workers import in_processes

ENGINES = {"fast": metrics.score, "pysodmetrics": metrics.score_with_pysodmetrics}


class Dataset(NamedTuple):
    """What is scored under one name."""

    name: str
    maps: dict[str, Path]  # by the image's name
    masks: dict[str, Path]
    images: dict[str, Path]  # for the page; some may be missing

    def pairs(self) -> list[tuple[str, Path, Path]]:
        """(name, prediction map, ground truth) for the names that have both."""
        return [(name, path, self.masks[name]) for name, path in self.maps.items() if name in self.masks]


def score_files(pair: tuple[Path, Path], engine: str, resize: bool) -> tuple[metrics.PairScores, str]:
    """The scores of one (prediction map, ground truth), and what is wrong with the latter: of MASK_PROBLEMS."""
    cv2.setNumThreads(1)  # in each worker; together they use all cores
    prediction = imaging.read_mask(pair[0])
    mask, problem = imaging.read_and_check_mask(pair[1])
    if resize and prediction.size != mask.size:
        prediction = prediction.resize(mask.size, Image.Resampling.BILINEAR)
    return ENGINES[engine](np.array(prediction), np.array(mask)), problem


def find_datasets(args: argparse.Namespace) -> tuple[benchmarks.Benchmark, list[Dataset], list[str]]:
    """The benchmark, its data sets and notes about them. Raises ValueError or OSError that names the remedy."""
    if args.benchmark and (args.dataset_name or args.gt_path or args.image_path):
        raise ValueError("--benchmark knows names, ground truth and images: leave out the options that name them")
    if not args.benchmark:
        if args.sets or not args.gt_path:
            raise ValueError("--sets belongs to --benchmark" if args.sets else "give --benchmark, or --gt_path")
        nameless = benchmarks.Benchmark("", tuple(metrics.METRICS), (), {}, {}, from_paper=False)
        return nameless, find_own_datasets(args), []
    pairing.names_given(args, args.gt_path)
    name, root = args.benchmark
    benchmark = benchmarks.load(name)
    if len(args.pred_path) > 1:
        raise ValueError("--pred_path: with --benchmark, give one folder that contains those of the test sets")
    found = benchmarks.find_test(benchmark, root, args.sets)
    splits = [split for splits in found.values() for split in splits]
    print(*splits, sep="\n")
    notes = [f"{one.split}: {len(one.pairs):,} pairs instead of {one.count:,}" for one in splits if one.is_incomplete()]
    return benchmark, find_benchmark_datasets(found, Path(args.pred_path[0]), args.allow_missing), notes


def find_own_datasets(args: argparse.Namespace) -> list[Dataset]:
    """The data sets of plain folders. Raises ValueError or OSError that names the remedy."""
    labels, image_paths = args.dataset_name, args.image_path
    if not len(labels) == len(args.pred_path) == len(args.gt_path) or len(image_paths) not in (0, len(labels)):
        raise ValueError(
            "--dataset_name, --pred_path, --gt_path, --image_path: give one of each per data set, in the same order "
            "(--image_path may be left out)"
        )
    if len(set(labels)) < len(labels):
        raise ValueError("--dataset_name: each name may occur only once")
    names = pairing.names_given(args, args.gt_path)
    datasets = []
    for i, (label, pred_path, gt_path) in enumerate(zip(labels, args.pred_path, args.gt_path, strict=True)):
        pairing.require_apart(pred_path, gt_path, names)
        found, ground_truth = pairing.find(pred_path), pairing.find(gt_path)
        maps, masks = pairing.tell_apart(found, ground_truth, names)
        if not maps.keys() & masks.keys() and (hint := pairing.names_hint(found, ground_truth)):
            raise ValueError(f"no map in {pred_path} has the name of a ground truth in {gt_path}{hint}")
        images = {}
        if image_paths:
            pairing.require_apart(image_paths[i], gt_path, names)
            images, _ = pairing.tell_apart(pairing.find(image_paths[i]), ground_truth, names)
        datasets.append(Dataset(label, maps, masks, images))
    return datasets


def find_benchmark_datasets(
    found: dict[str, list[benchmarks.SplitFolder]], pred_path: Path, allow_missing: bool
) -> list[Dataset]:
    """A benchmark's test sets with their maps below `pred_path`. Raises ValueError or OSError that names the remedy."""
    datasets = []
    for name, splits in found.items():
        folder = find_maps(pred_path, name, alone=len(found) == 1)
        if folder is None and not allow_missing:
            raise ValueError(
                f"{name}: there is no folder of that name with maps below {pred_path}; write them with "
                "test.py, choose with --sets, or score what is there with --allow_missing"
            )
        pairs = [pair for split in splits for pair in split.pairs]
        images, masks = ({pairing.name_of(pair[0]): pair[side] for pair in pairs} for side in (0, 1))
        maps = pairing.find(folder) if folder and pairing.images_in(folder) else {}
        datasets.append(Dataset(name, maps, masks, images))
    return datasets


def find_maps(pred_path: Path, name: str, alone: bool) -> Path | None:
    """The folder with the maps of a test set: the one of its name or, for a single set, `pred_path` itself."""
    files.require_folder(pred_path)
    if (pred_path / name).is_dir():
        return pred_path / name
    plain = re.compile(r"[\W_]")  # DIS-TE1 and dis_te1 are the same
    wanted = plain.sub("", name.casefold())
    hits = [path for path in benchmarks.tree(pred_path) if plain.sub("", path.name.casefold()) == wanted]
    hits = [folder for folder in hits if pairing.images_in(folder)]
    if len(hits) > 1:
        raise ValueError(f"{name}: several folders could hold its maps: {files.listing(hits)}")
    return hits[0] if hits else pred_path if alone else None


def check(datasets: Sequence[Dataset], allow_missing: bool, resize: bool) -> list[str]:
    """What is left out or resized, in words. Raises ValueError that lists the maps that do not fit unless allowed."""
    problems, notes, remedies = [], [], set()
    for dataset, maps, masks, _ in datasets:
        missing = [path.name for stem, path in masks.items() if stem not in maps]
        extra = [path.name for stem, path in maps.items() if stem not in masks]
        for what, listed in (("ground truths without a map", missing), ("maps without a ground truth", extra)):
            if listed and allow_missing:
                total = len(masks) if listed is missing else len(maps)
                notes.append(f"{dataset}: {len(listed):,} of {total:,} {what}, left out")
            elif listed:
                problems.append(f"{dataset}: {len(listed):,} {what}: {files.listing(listed)}")
                remedies.add("--allow_missing scores the rest")
        both = [
            (maps[stem], imaging.read_size(maps[stem]), imaging.read_size(masks[stem])) for stem in maps.keys() & masks
        ]
        wrong = sorted(f"{path.name} {has} instead of {wanted}" for path, has, wanted in both if has != wanted)
        if wrong and resize:
            notes.append(f"{dataset}: {files.count(len(wrong), 'map')} resized to the ground truth")
        elif wrong:
            problems.append(f"{dataset}: {len(wrong):,} maps of another (height, width): {files.listing(wrong)}")
            remedies.add("--resize resizes them")
        if not both and allow_missing:
            notes.append(f"{dataset}: not scored")
    if problems:
        raise ValueError("; ".join([*problems, *sorted(remedies)]))
    if not any(dataset.pairs() for dataset in datasets):
        raise ValueError("no map has the name of a ground truth")
    return notes


def evaluate(
    datasets: Sequence[Dataset], engine: str, resize: bool, workers: int
) -> tuple[dict[str, metrics.PairScores], list[report.ImageScores], list[str]]:
    """The mean scores of each data set, the figures of each image, and warnings; with one progress bar."""
    every = [pair[1:] for dataset in datasets for pair in dataset.pairs()]
    means, images, warnings = {}, [], []
    function = partial(score_files, engine=engine, resize=resize)
    with (
        closing(in_processes(function, every, workers)) as results,
        tqdm(total=len(every), unit="img", desc="scoring") as bar,
    ):
        for dataset in datasets:
            scores, problems = [], {}
            for (name, path, mask), (one, problem) in zip(dataset.pairs(), results, strict=False):
                bar.update()
                scores.append(one)
                images.append(report.ImageScores(dataset.name, dataset.images.get(name), mask, path, one.figures()))
                problems[mask] = problem
            if scores:
                means[dataset.name] = metrics.mean(scores)
            warnings += [f"warning: {dataset.name}: {line}" for line in pairing.mask_warnings(problems)]
    return means, images, warnings


def made_by(datasets: Sequence[Dataset]) -> list[str]:
    """What settings.json beside the maps of each data set says, in words."""
    notes = []
    for dataset in datasets:
        folder = next(iter(dataset.maps.values())).parent if dataset.maps else None
        if settings := folder and output.read_settings(folder):
            words = ", ".join(
                f"{name} {value}" for name, value in settings.items() if name not in ("versions", "images")
            )
            notes.append(f"{dataset.name}: maps of {words}")
    return notes


def main(args: argparse.Namespace) -> None:
    with cli.one_line_errors() as command:
        imaging.allow_pixels(args.max_pixels)
        benchmark, datasets, notes = find_datasets(args)
        notes += check(datasets, args.allow_missing, args.resize)
        if others := pairing.left_out(path.parent for one in datasets for pair in one.pairs() for path in pair[1:]):
            notes.append(f"left out: {others}")
        files.check_output_file("--json", args.json)
        files.output_folder(args.save_path)

        command.started()
        means, images, warnings = evaluate(datasets, args.engine, args.resize, args.workers)
        counts = {dataset.name: len(dataset.pairs()) for dataset in datasets}
        for name, sets in benchmark.together.items():
            if all(one in means for one in sets):
                means[name] = metrics.mean([means[one] for one in sets], [counts[one] for one in sets])
                counts[name] = sum(counts[one] for one in sets)
        results = {name: {"images": counts[name]} | mean.figures() for name, mean in means.items()}
        lines = report.rows(results, {name: benchmarks.published(benchmark, name) for name in results})
        print(report.text(lines, benchmark.columns), *notes, *warnings, sep="\n")
        notes = [*notes, *warnings, f"Maps: {', '.join(args.pred_path)}", *made_by(datasets)]
        title = benchmark.name or ", ".join(results)
        notes = [files.printable(note) for note in notes]
        report.write(args.save_path, title, benchmark.columns, lines, results, means, images, notes)
        if args.json:
            with files.replacing(args.json) as file:
                file.write(report.to_json(results))
        print(f"{args.save_path} has the tables, the curves and {args.save_path}/report.html, a page with examples")


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--benchmark", nargs=2, metavar=("NAME", "ROOT"), help=benchmarks.HELP)
    data.add_argument("--sets", nargs="+", default=[], metavar="SET", help="only these test sets of the benchmark")
    data.add_argument(
        "--dataset_name", nargs="+", default=[], type=files.printable, metavar="NAME", help="for the table"
    )
    data.add_argument("--pred_path", required=True, nargs="+", metavar="DIR", help="folders of prediction maps")
    data.add_argument("--gt_path", nargs="+", default=[], metavar="DIR", help="folders of ground truth")
    data.add_argument("--image_path", nargs="+", default=[], metavar="DIR", help="folders of images, for the page")
    cli.add_reading(data)
    data.add_argument("--allow_missing", action="store_true", help="ignore maps and ground truth without a partner")
    data.add_argument("--resize", action="store_true", help="resize maps to the size of their ground truth")

    writing = parser.add_argument_group("output")
    writing.add_argument("--save_path", type=cli.path, default="results", metavar="DIR", help="for tables and page")
    writing.add_argument("--json", type=cli.path, metavar="FILE", help="write the unrounded figures there too")

    run = parser.add_argument_group("run")
    run.add_argument("--engine", choices=list(ENGINES), default="fast", help="the same figures; the library is slow")
    run.add_argument("--workers", type=cli.number(), default=os.cpu_count(), help="processes")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
