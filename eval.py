"""Scores prediction maps against their ground truth: data sets or a whole benchmark, one or several methods.

    python eval.py --dataset_name DIS-VD DIS-TE1 --pred_path maps/DIS-VD maps/DIS-TE1 --gt_path DIS-VD/gt DIS-TE1/gt
    python eval.py --benchmark COD /data/COD --pred_path runs/COD/predictions --save_path runs/COD/results
    python eval.py --benchmark COD /data/COD --pred_path ours=runs/COD/predictions SINet=maps/SINet FEDER=maps/FEDER

Maps and masks are paired by name. A benchmark's maps are in a folder per test set; the paper's scores are shown beside
them. The first of several methods is compared with the others. Needs no GPU and no torch; uses all cores. Writes
tables, curves, examples and report.html to the folder --save_path, see docs/benchmarks.md.
"""

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple

from evaluation import benchmarks, compare, metrics, results, scoring, tables
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
    """The data sets that the arguments name, and their benchmark."""
    if args.benchmark:
        if args.dataset_name or args.gt_path or args.image_path:
            raise InputError("--benchmark knows names, ground truth and images: leave out the options that name them")
        benchmark = benchmarks.load(args.benchmark[0])
        return benchmark, datasets_of_benchmark(args, benchmark, args.benchmark[1])
    if args.sets or not args.gt_path:
        raise InputError("--sets belongs to --benchmark" if args.sets else "give --benchmark, or --gt_path")
    return Benchmark(", ".join(args.dataset_name), metrics.NINE), datasets_of_folders(args)


def datasets_of_folders(args: argparse.Namespace) -> list[Dataset]:
    """The data sets of plain folders."""
    number = len(args.gt_path)
    if not len(args.dataset_name) == len(args.pred_path) == number or len(args.image_path) not in (0, number):
        raise InputError("--dataset_name, --pred_path, --gt_path and, if given, --image_path: one of each per data set")
    if len(set(args.dataset_name)) < number:
        raise InputError("--dataset_name: each name may occur only once")
    names = pairing.names_given(args, args.gt_path)
    datasets = []
    folders = zip(args.dataset_name, args.image_path or repeat(None), args.gt_path, args.pred_path, strict=False)
    for name, image_folder, mask_folder, map_folder in folders:
        ground_truth, images = pairing.images_by_name(mask_folder), {}
        maps, masks = pairing.tell_apart(pairing.images_by_name(map_folder), ground_truth, names)
        maps = maps_by_image(args, maps, masks, ground_truth)
        if image_folder:
            images, _ = pairing.tell_apart(pairing.images_by_name(image_folder), ground_truth, names)
        datasets.append(Dataset(name, images, masks, {THIS_RUN: maps}))
    return datasets


def datasets_of_benchmark(args: argparse.Namespace, benchmark: Benchmark, root: str) -> list[Dataset]:
    """The test sets of a benchmark; prints where they are."""
    pairing.names_given(args, args.gt_path)
    methods = method_folders(args.pred_path)
    test_sets = benchmarks.find_test(benchmark, root, args.sets)
    print(*(split for splits in test_sets.values() for split in splits), sep="\n")
    datasets = []
    for name, splits in test_sets.items():
        images = {pairing.name_of(image): image for split in splits for image, _ in split.pairs}
        masks = {pairing.name_of(image): mask for split in splits for image, mask in split.pairs}
        maps = {}
        for method, pred_path in methods.items():
            folder = map_folder(pred_path, name, is_single=len(test_sets) == 1)
            if folder is None and not args.allow_missing:
                remedy = "write them with test.py, choose with --sets, or score what is there with --allow_missing"
                raise InputError(f"{name}: there is no folder of that name with maps in {pred_path}; {remedy}")
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
        if name in folders:
            raise InputError(f"--pred_path: two methods are called {name}; name them, as in ours={folder}")
        folders[name] = Path(folder)
    return folders


def map_folder(pred_path: Path, name: str, is_single: bool) -> Path | None:
    """The folder with the maps of a test set: that of its name or, for a single set, `pred_path` itself."""

    def plain(text: str) -> str:
        return re.sub(r"[\W_]", "", text.casefold())

    folders = pairing.subfolders(files.require_folder(pred_path))
    exact = [folder for folder in folders if folder.name == name]
    similar = exact or [folder for folder in folders if plain(folder.name) == plain(name)]  # dis_te1 for DIS-TE1
    if len(similar) > 1:
        raise InputError(f"{name}: several folders could hold its maps: {files.listing(similar)}")
    return similar[0] if similar else pred_path if is_single else None


def maps_by_image(
    args: argparse.Namespace, maps: dict[str, File], masks: dict[str, File], ground_truth: Iterable[str] = ()
) -> dict[str, File]:
    """The maps of a folder by the image's name. If none has --map_prefix and --map_suffix, names are used unchanged.

    Raises InputError if no map has a mask, but would have one with another option: its message gives the option.
    `ground_truth` are the names of all files in the folder of masks.
    """
    maps = MaskNames(args.map_prefix, args.map_suffix).by_image(maps) or maps
    if maps.keys() & masks.keys():
        return maps
    if hint := pairing.names_hint(masks, maps, "map") or pairing.names_hint(maps, ground_truth):
        folder = next(iter(maps.values())).parent
        raise InputError(f"no map in {folder} has the name of a ground truth{hint}")
    return maps


def images_to_score(datasets: Sequence[Dataset], allow_missing: bool) -> tuple[list[ImageFiles], list[str]]:
    """The images for which every method that covers the data set has a map, and notes about the others."""
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
        with_any_map = [name for name in dict.fromkeys(chain(*scored.values())) if name in masks]
        with_all_maps = [name for name in with_any_map if all(name in maps for maps in scored.values())]
        if left_out := len(with_any_map) - len(with_all_maps):
            notes.append(f"{dataset.name}: {files.count(left_out, 'image')} left out because some method has no map")
        for name in with_all_maps:
            paths = dataset.images.get(name), masks[name], {method: maps[name] for method, maps in scored.items()}
            images.append(ImageFiles(dataset.name, files.printable(name), *paths))
    if problems and not allow_missing:
        raise InputError("; ".join([*problems, "--allow_missing scores the rest"]))
    for method in datasets[0].maps:
        if not any(method in image.maps for image in images):
            raise InputError(f"{method}: no image has a map of this method and of all others")
    return images, notes


def settings_notes(datasets: Sequence[Dataset]) -> list[str]:
    """How the maps were made, from settings.json beside them."""
    notes = []
    for dataset in datasets:
        for method, maps in dataset.maps.items():
            if maps and (settings := output.read_settings(next(iter(maps.values())).parent)):
                values = [f"{key} {value}" for key, value in settings.items() if key not in ("versions", "images")]
                notes.append(f"{results.label(method, dataset.name)}: maps of {', '.join(values)}")
    return notes


def main(args: argparse.Namespace) -> None:
    with cli.one_line_errors("fewer --workers need less") as command:
        from evaluation import report  # not at the top: workers import this file, and need no matplotlib

        configure_reading(args.max_pixels, args.white)
        benchmark, datasets = find_datasets(args)
        images, notes = images_to_score(datasets, args.allow_missing)
        if ignored := pairing.left_out(path.parent for image in images for path in (image.mask, *image.maps.values())):
            notes.append(f"left out: {ignored}")
        examples = results.positions(images, args.examples)
        files.check_output_file("--json", args.json)
        files.output_folder(args.save_path)

        columns = tuple(metrics.METRICS if "all" in args.metrics else dict.fromkeys(args.metrics)) or benchmark.columns
        names = tuple(name for name in metrics.METRICS if name in metrics.NINE or name in columns)
        scores, means, warnings = scoring.evaluate(images, args.engine, args.resize, names, args.workers)
        command.started()  # nothing has been written so far, whatever was wrong with a file
        evaluation = Evaluation(benchmark, tuple(datasets[0].maps), columns, names, scores, means)
        evaluation = replace(evaluation, differences=compare.differences(evaluation))
        table, notes = tables.table(evaluation), [*notes, *warnings]
        legend = [tables.legend(evaluation.methods[0], "*", "+")] if evaluation.has_several() else []
        print(tables.text(table), *legend, *notes, sep="\n")
        notes += [f"Maps: {', '.join(args.pred_path)}", *settings_notes(datasets)]
        notes = [files.printable(note) for note in notes]
        report.write(args.save_path, evaluation, table, notes, [scores[i] for i in examples], args.json)
        print(f"{args.save_path} has the tables, the curves and {args.save_path}/report.html, a page with examples")


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--benchmark", nargs=2, metavar=("NAME", "ROOT"), help=benchmarks.HELP)
    data.add_argument("--sets", nargs="+", default=[], metavar="SET", help="only these test sets of the benchmark")
    data.add_argument("--dataset_name", nargs="+", default=[], type=files.printable, metavar="NAME", help="in tables")
    maps = "folders of prediction maps, for each data set; with --benchmark for each method, DIR or NAME=DIR"
    data.add_argument("--pred_path", required=True, nargs="+", metavar="DIR", help=maps)
    data.add_argument("--gt_path", nargs="+", default=[], metavar="DIR", help="folders of ground truth")
    data.add_argument("--image_path", nargs="+", default=[], metavar="DIR", help="folders of images, for the page")
    data.add_argument("--map_suffix", default="", help="of maps called NAME_sal.png: _sal")
    data.add_argument("--map_prefix", default="", help="of maps called sal_NAME.png: sal_")
    cli.add_reading(data)
    data.add_argument("--allow_missing", action="store_true", help="ignore maps and ground truth without a partner")
    data.add_argument("--resize", action="store_true", help="resize maps to the size of their ground truth")

    writing = parser.add_argument_group("output")
    writing.add_argument("--save_path", type=cli.path, default="results", metavar="DIR", help="for tables and page")
    names = [*metrics.METRICS, "all"]
    columns = f"columns of the tables, of {', '.join(names)}; default: the benchmark's, or the nine"
    writing.add_argument("--metrics", nargs="+", default=[], choices=names, metavar="METRIC", help=columns)
    examples = "images in examples.png, as NAME or SET/NAME; default: those in which several methods differ most"
    writing.add_argument("--examples", nargs="+", default=[], metavar="NAME", help=examples)
    writing.add_argument("--json", type=cli.path, metavar="FILE", help="write the unrounded figures there too")

    run = parser.add_argument_group("run")
    run.add_argument("--engine", choices=[*scoring.ENGINES], default="fast", help="same scores, pysodmetrics slower")
    run.add_argument("--workers", type=cli.number(), default=cores(), help="processes")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
