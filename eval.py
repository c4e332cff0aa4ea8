"""Scores prediction maps against their ground truth: of data sets or a whole benchmark, of a method or several.

    python eval.py --dataset_name DIS-VD DIS-TE1 --pred_path maps/DIS-VD maps/DIS-TE1 --gt_path DIS-VD/gt DIS-TE1/gt
    python eval.py --benchmark COD /data/COD --pred_path runs/COD/predictions --save_path runs/COD/results
    python eval.py --benchmark COD /data/COD --pred_path ours=runs/COD/predictions SINet=maps/SINet FEDER=maps/FEDER

Maps and masks are paired by name. A benchmark's maps are in a folder per test set; its figures are shown beside
published figures. Of several methods the first is compared with the others. Needs no GPU and no torch; uses all cores.
The folder --save_path gets results.json, .csv, .md and .tex, per_image.csv, groups.csv, curves and report.html; with
several methods also comparison.csv and examples (docs/benchmarks.md).
"""

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from evaluation import benchmarks, compare, metrics, report, results, scoring, tables
from evaluation.benchmarks import Benchmark
from evaluation.results import THIS_RUN, Evaluation, ImageFiles
from unext import cli, files, output, pairing
from unext.errors import InputError
from unext.images import configure_reading
from unext.pairing import File, MaskNames
from unext.workers import cores


class Dataset(NamedTuple):
    """A data set with the maps of each method; files by the image's name."""

    name: str
    images: dict[str, File]  # for the page; some may be missing
    masks: dict[str, File]
    maps: dict[str, dict[str, File]]  # by method; may be empty
    notes: list[str] = []  # about its files


def find_datasets(args: argparse.Namespace) -> tuple[Benchmark, list[Dataset]]:
    """The data sets that the arguments name, and their benchmark. Raises InputError or OSError with the remedy."""
    if not args.benchmark:
        if args.sets or not args.gt_path:
            raise InputError("--sets belongs to --benchmark" if args.sets else "give --benchmark, or --gt_path")
        return Benchmark(", ".join(args.dataset_name), metrics.NINE, (), {}, {}, {}, False), datasets_of_folders(args)
    if args.dataset_name or args.gt_path or args.image_path:
        raise InputError("--benchmark knows names, ground truth and images: leave out the options that name them")
    benchmark = benchmarks.load(args.benchmark[0])
    return benchmark, datasets_of_benchmark(args, benchmark, args.benchmark[1])


def datasets_of_folders(args: argparse.Namespace) -> list[Dataset]:
    """The data sets of plain folders. Raises as `find_datasets` does."""
    number = len(args.gt_path)
    if not len(args.dataset_name) == len(args.pred_path) == number or len(args.image_path) not in (0, number):
        raise InputError(
            "--dataset_name, --pred_path, --gt_path, --image_path: give one of each per data set, in the same order "
            "(--image_path may be left out)"
        )
    if len(set(args.dataset_name)) < number:
        raise InputError("--dataset_name: each name may occur only once")
    names = pairing.names_given(args, args.gt_path)
    datasets = []
    folders = zip(args.dataset_name, args.image_path or repeat(None), args.gt_path, args.pred_path, strict=False)
    for name, image_folder, mask_folder, map_folder in folders:
        maps, ground_truth = pairing.images_by_name(map_folder), pairing.images_by_name(mask_folder)
        maps, masks = pairing.tell_apart(maps, ground_truth, names)
        maps, images = maps_by_image(args, maps, masks, ground_truth), {}
        if image_folder:
            images, _ = pairing.tell_apart(pairing.images_by_name(image_folder), ground_truth, names)
        datasets.append(Dataset(name, images, masks, {THIS_RUN: maps}))
    return datasets


def datasets_of_benchmark(args: argparse.Namespace, benchmark: Benchmark, root: str) -> list[Dataset]:
    """The test sets of a benchmark; prints where they are. Raises as `find_datasets` does."""
    pairing.names_given(args, args.gt_path)
    methods = method_folders(args.pred_path)
    test_sets = benchmarks.find_test(benchmark, root, args.sets)
    print(*(split for splits in test_sets.values() for split in splits), sep="\n")
    datasets = []
    for name, splits in test_sets.items():
        pairs = [pair for split in splits for pair in split.pairs]
        images, masks = ({pairing.name_of(pair[0]): pair[side] for pair in pairs} for side in (0, 1))
        maps = {}
        for method, pred_path in methods.items():
            folder = map_folder(pred_path, name, is_single=len(test_sets) == 1)
            if folder is None and not args.allow_missing:
                raise InputError(
                    f"{name}: there is no folder of that name with maps below {pred_path}; write them with "
                    "test.py, choose with --sets, or score what is there with --allow_missing"
                )
            is_missing = folder is None or (args.allow_missing and not pairing.images_in(folder))
            maps[method] = {} if is_missing else maps_by_image(args, pairing.images_by_name(folder), masks)
        notes = [str(split) for split in splits if split.is_incomplete()]
        datasets.append(Dataset(name, images, masks, maps, notes))
    return datasets


def method_folders(texts: Sequence[str]) -> dict[str, Path]:
    """The folders of --pred_path, each NAME=DIR or DIR, by method. Raises InputError for a repeated name."""
    folders: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or not name or Path(text).is_dir():
            name, folder = THIS_RUN if len(texts) == 1 else Path(text).resolve().name, text
        name = files.printable(name)
        if not folder:
            raise InputError(f"--pred_path: {text or 'an empty text'} names no folder")
        if name in folders:
            raise InputError(f"--pred_path: two methods are called {name}; name them, as in ours={folder}")
        folders[name] = Path(folder)
    return folders


def map_folder(pred_path: Path, name: str, is_single: bool) -> Path | None:
    """The folder with the maps of a test set: that of its name or, for a single set, `pred_path` itself."""
    files.require_folder(pred_path)
    if (pred_path / name).is_dir():
        return pred_path / name
    plain = re.compile(r"[\W_]")  # DIS-TE1 and dis_te1 are the same
    wanted = plain.sub("", name.casefold())
    folders = [path for path in benchmarks.tree(pred_path) if plain.sub("", path.name.casefold()) == wanted]
    folders = [folder for folder in folders if pairing.images_in(folder)] or folders[:1]
    if len(folders) > 1:
        raise InputError(f"{name}: several folders could hold its maps: {files.listing(folders)}")
    return folders[0] if folders else pred_path if is_single else None


def maps_by_image(
    args: argparse.Namespace, maps: dict[str, File], masks: dict[str, File], ground_truth: Iterable[str] = ()
) -> dict[str, File]:
    """A folder's maps by the image's name; without any that has --map_suffix they keep their names.

    Raises InputError if another option would pair them with `masks`, or with all files of `ground_truth`.
    """
    maps = MaskNames(args.map_prefix, args.map_suffix).by_image(maps) or maps
    if maps.keys() & masks.keys():
        return maps
    if hint := pairing.names_hint(masks, maps, "map") or pairing.names_hint(maps, ground_truth):
        folder = next(iter(maps.values())).parent
        raise InputError(f"no map in {folder} has the name of a ground truth{hint}")
    return maps


def images_to_score(datasets: Sequence[Dataset], allow_missing: bool) -> tuple[list[ImageFiles], list[str]]:
    """The images of which every method has a map, if it has any of the data set, and notes about the others.

    Raises InputError that lists the maps and ground truths without a partner, and for a method without any image.
    """
    images, notes, problems = [], [], []
    for dataset in datasets:
        masks, scored = dataset.masks, {}
        notes += dataset.notes
        for method, maps in dataset.maps.items():
            label = results.label(method, dataset.name)
            sides = (("ground truth", masks, "map", maps), ("map", maps, "ground truth", masks))
            for noun, side, partner, partners in sides:
                if alone := [file.name for name, file in side.items() if name not in partners]:
                    line = f"{label}: {len(alone):,} of {files.count(len(side), noun)} without a {partner}"
                    notes.append(f"{line}, left out")
                    problems.append(f"{line}: {files.listing(alone)}")
            if maps.keys() & masks.keys():
                scored[method] = maps
            else:
                notes.append(f"{label}: not scored")
        every = masks.keys() & {name for maps in scored.values() for name in maps}
        first, *others = scored.values() if scored else [{}]
        common = [name for name in first if name in masks and all(name in maps for maps in others)]
        if len(common) < len(every):
            number = files.count(len(every) - len(common), "image")
            notes.append(f"{dataset.name}: {number} left out, of which not every method has a map")
        for name in common:
            paths = {method: maps[name] for method, maps in scored.items()}
            image = dataset.images.get(name)
            images.append(ImageFiles(dataset.name, files.printable(name), image, masks[name], paths))
    if problems and not allow_missing:
        raise InputError("; ".join([*problems, "--allow_missing scores the rest"]))
    for method in datasets[0].maps:
        if not any(method in image.maps for image in images):
            all_others = " and of all others" if len(datasets[0].maps) > 1 else ""
            raise InputError(f"{method}: no ground truth has a map of this method{all_others}")
    return images, notes


def settings_notes(datasets: Sequence[Dataset]) -> list[str]:
    """How the maps were made, from settings.json beside them."""
    notes = []
    for dataset in datasets:
        for method, maps in dataset.maps.items():
            settings = output.read_settings(next(iter(maps.values())).parent) if maps else {}
            text = ", ".join(f"{key} {value}" for key, value in settings.items() if key not in ("versions", "images"))
            notes += [f"{results.label(method, dataset.name)}: maps of {text}"] if settings else []
    return notes


def main(args: argparse.Namespace) -> None:
    with cli.one_line_errors("fewer --workers need less") as command:
        configure_reading(args.max_pixels, args.white)
        benchmark, datasets = find_datasets(args)
        images, notes = images_to_score(datasets, args.allow_missing)
        if ignored := pairing.left_out(path.parent for image in images for path in (image.mask, *image.maps.values())):
            notes.append(f"left out: {ignored}")
        results.named(images, args.examples)  # an unknown name is an error before anything is scored
        files.check_output_file("--json", args.json)
        files.output_folder(args.save_path)

        columns = tuple(metrics.METRICS if "all" in args.metrics else dict.fromkeys(args.metrics)) or benchmark.columns
        names = tuple(name for name in metrics.METRICS if name in metrics.NINE or name in columns)
        scores, means, more = scoring.evaluate(images, args.engine, args.resize, names, args.workers)
        command.started()  # nothing has been written so far, whatever was wrong with a file
        evaluation = Evaluation(benchmark, tuple(datasets[0].maps), columns, names, scores, means)
        evaluation = replace(evaluation, differences=compare.differences(evaluation))
        table = tables.table(evaluation)
        legend = [tables.legend(evaluation.methods[0], "*", "+")] if evaluation.has_several() else []
        print(tables.text(table), *legend, *notes, *more, sep="\n")
        notes = [*notes, *more, f"Maps: {', '.join(args.pred_path)}", *settings_notes(datasets)]
        notes, examples = [files.printable(note) for note in notes], results.named(scores, args.examples)
        report.write(args.save_path, evaluation, table, notes, examples, args.json)
        print(f"{args.save_path} has the tables, the curves and {args.save_path}/report.html, a page with examples")


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--benchmark", nargs=2, metavar=("NAME", "ROOT"), help=benchmarks.HELP)
    data.add_argument("--sets", nargs="+", default=[], metavar="SET", help="only these test sets of the benchmark")
    data.add_argument(
        "--dataset_name", nargs="+", default=[], type=files.printable, metavar="NAME", help="for the table"
    )
    data.add_argument(
        "--pred_path", required=True, nargs="+", metavar="DIR",
        help="folders of prediction maps, for each data set; with --benchmark for each method, DIR or NAME=DIR",
    )  # fmt: skip
    data.add_argument("--gt_path", nargs="+", default=[], metavar="DIR", help="folders of ground truth")
    data.add_argument("--image_path", nargs="+", default=[], metavar="DIR", help="folders of images, for the page")
    data.add_argument("--map_suffix", default="", help="of maps called NAME_sal.png: _sal")
    data.add_argument("--map_prefix", default="", help="of maps called sal_NAME.png: sal_")
    cli.add_reading(data)
    data.add_argument("--allow_missing", action="store_true", help="ignore maps and ground truth without a partner")
    data.add_argument("--resize", action="store_true", help="resize maps to the size of their ground truth")

    writing = parser.add_argument_group("output")
    writing.add_argument("--save_path", type=cli.path, default="results", metavar="DIR", help="for tables and page")
    writing.add_argument(
        "--metrics", nargs="+", default=[], choices=[*metrics.METRICS, "all"], metavar="METRIC",
        help=f"columns of the tables, of {', '.join(metrics.METRICS)} or all; default: the benchmark's, or the nine",
    )  # fmt: skip
    writing.add_argument(
        "--examples", nargs="+", default=[], metavar="NAME",
        help="images in examples.png, as NAME or SET/NAME; default: those in which several methods differ most",
    )  # fmt: skip
    writing.add_argument("--json", type=cli.path, metavar="FILE", help="write the unrounded figures there too")

    run = parser.add_argument_group("run")
    run.add_argument(
        "--engine", choices=[*scoring.ENGINES], default="fast", help="the same figures; the library is slow"
    )
    run.add_argument("--workers", type=cli.number(), default=cores(), help="processes")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
