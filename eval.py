"""Scores prediction maps against their ground truth: data sets or a whole benchmark, one or several methods.

    python eval.py --dataset_name DIS-VD DIS-TE1 --pred_path maps/DIS-VD maps/DIS-TE1 --gt_path DIS-VD/gt DIS-TE1/gt
    python eval.py --benchmark COD /data/COD --pred_path runs/COD/predictions --save_path runs/COD/results
    python eval.py --benchmark COD /data/COD --pred_path ours=runs/COD/predictions SINet=maps/SINet FEDER=maps/FEDER
    python eval.py --from results ours=runs/COD/results --metrics Smeasure MAE --save_path paper

Maps and masks are paired by name. A benchmark's maps are in a folder per test set; the paper's scores are shown beside
them. The first of several methods is compared with the others. Needs no GPU and no torch; uses all cores. Writes
tables, curves, examples and report.html to the folder --save_path, see docs/benchmarks.md. --from makes all of them
anew from folders of results, without scoring.
"""

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple

from evaluation import benchmarks, compare, kept, methods, metrics, results, scoring, tables
from evaluation.benchmarks import Benchmark
from evaluation.methods import Training
from evaluation.results import THIS_RUN, About, Evaluation, ImageFiles, Note
from unext import cli, files, output, pairing
from unext.errors import InputError
from unext.images import configure_reading
from unext.pairing import File, MaskNames
from unext.workers import cores

OF_MAPS = ("benchmark", "dataset_name", "pred_path", "gt_path", "image_path", "map_suffix", "map_prefix")
OF_MAPS += ("mask_suffix", "mask_prefix", "allow_missing", "resize")  # options of no use to --from


class Dataset(NamedTuple):
    """A data set with the maps of each method; files by the image's name."""

    name: str
    images: dict[str, File]  # for the page; some may be missing
    masks: dict[str, File]
    maps: dict[str, dict[str, File]]  # by training of a method; may be empty
    notes: list[Note] = []  # about its files


def find_trainings(args: argparse.Namespace) -> dict[str, Training]:
    """The trainings of methods that --pred_path names; of plain folders there is one."""
    if args.benchmark:
        return methods.find(args.pred_path, map_names(args))
    return {THIS_RUN: Training(Path(", ".join(args.pred_path)), map_names(args), About(THIS_RUN))}


def find_datasets(args: argparse.Namespace) -> tuple[Benchmark, list[Dataset]]:
    """The data sets that the arguments name, and their benchmark."""
    if not args.pred_path:
        raise InputError("give --pred_path, the folders of maps, or --from, folders of results")
    if args.benchmark:
        if args.dataset_name or args.gt_path or args.image_path:
            raise InputError("--benchmark knows names, ground truth and images: leave out the options that name them")
        benchmark = benchmarks.load(args.benchmark[0])
        return benchmark, datasets_of_benchmark(args, benchmark)
    if methods.is_file(args.pred_path):
        raise InputError("--pred_path: a file of methods belongs to --benchmark")
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
        maps = maps_by_image(map_names(args), maps, masks, ground_truth)
        if image_folder:
            images, _ = pairing.tell_apart(pairing.images_by_name(image_folder), ground_truth, names)
        datasets.append(Dataset(name, images, masks, {THIS_RUN: maps}))
    return datasets


def datasets_of_benchmark(args: argparse.Namespace, benchmark: Benchmark) -> list[Dataset]:
    """The test sets of a benchmark; prints where they are."""
    pairing.names_given(args, args.gt_path)
    trainings, test_sets = find_trainings(args), benchmarks.find_test(benchmark, args.benchmark[1], args.sets)
    print(*(split for splits in test_sets.values() for split in splits), sep="\n")
    datasets = []
    for name, splits in test_sets.items():
        images = {pairing.name_of(image): image for split in splits for image, _ in split.pairs}
        masks = {pairing.name_of(image): mask for split in splits for image, mask in split.pairs}
        maps = {}
        for key, (pred_path, names, _) in trainings.items():
            folder = map_folder(pred_path, name, is_single=len(test_sets) == 1)
            if folder is None and not args.allow_missing:
                remedy = "write them with test.py, choose with --sets, or score what is there with --allow_missing"
                raise InputError(f"{name}: there is no folder of that name with maps in {pred_path}; {remedy}")
            is_missing = folder is None or (args.allow_missing and not pairing.images_in(folder))
            maps[key] = {} if is_missing else maps_by_image(names, pairing.images_by_name(folder), masks)
        notes = [Note(str(split)) for split in splits if split.is_incomplete()]
        datasets.append(Dataset(name, images, masks, maps, notes))
    return datasets


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


def map_names(args: argparse.Namespace) -> MaskNames:
    return MaskNames(args.map_prefix, args.map_suffix)


def maps_by_image(
    names: MaskNames, maps: dict[str, File], masks: dict[str, File], ground_truth: Iterable[str] = ()
) -> dict[str, File]:
    """The maps of a folder by the image's name. If none has such prefix and suffix, names are used unchanged.

    Raises InputError if no map has a mask, and a prefix or suffix would pair them; its message gives the option.
    `ground_truth` are the names of all files in the folder of masks.
    """
    maps = names.by_image(maps) or maps
    if maps.keys() & masks.keys():
        return maps
    if hint := pairing.names_hint(masks, maps, "map") or pairing.names_hint(maps, ground_truth):
        folder = next(iter(maps.values())).parent
        raise InputError(f"no map in {folder} has the name of a ground truth{hint}")
    return maps


def images_to_score(datasets: Sequence[Dataset], allow_missing: bool) -> tuple[list[ImageFiles], list[Note]]:
    """The images for which every method that covers the data set has a map, and notes about the others."""
    images, notes, problems = [], [], []
    for dataset in datasets:
        masks, scored = dataset.masks, {}
        notes += dataset.notes
        for method, maps in dataset.maps.items():
            sides = (("ground truth", masks, "map", maps), ("map", maps, "ground truth", masks))
            for noun, side, partner, partners in sides:
                if alone := [file.name for name, file in side.items() if name not in partners]:
                    line = f"{len(alone):,} of {files.count(len(side), noun)} without a {partner}"
                    notes.append(Note(f"{line}, left out", dataset.name, method))
                    problems.append(f"{results.label(method, dataset.name)}: {line}: {files.listing(alone)}")
            if maps.keys() & masks.keys():
                scored[method] = maps
            else:
                notes.append(Note("not scored", dataset.name, method))
        with_any_map = [name for name in dict.fromkeys(chain(*scored.values())) if name in masks]
        with_all_maps = [name for name in with_any_map if all(name in maps for maps in scored.values())]
        if left_out := len(with_any_map) - len(with_all_maps):
            notes.append(
                Note(f"{files.count(left_out, 'image')} left out because some method has no map", dataset.name)
            )
        for name in with_all_maps:
            paths = dataset.images.get(name), masks[name], {method: maps[name] for method, maps in scored.items()}
            images.append(ImageFiles(dataset.name, files.printable(name), *paths))
    if problems and not allow_missing:
        raise InputError("; ".join([*problems, "--allow_missing scores the rest"]))
    for method in datasets[0].maps:
        if not any(method in image.maps for image in images):
            raise InputError(f"{method}: no image has a map of this method and of all others")
    notes += unread_notes(images, datasets[0].maps)
    return images, notes


def unread_notes(images: Sequence[ImageFiles], methods: Iterable[str]) -> list[Note]:
    """Notes about files in the folders of ground truth and maps that are not images."""
    folders = {"": {image.mask.parent: None for image in images}}
    for method in methods:
        folders[method] = {image.maps[method].parent: None for image in images if method in image.maps}
    return [Note(f"left out: {line}", "", method) for method in folders if (line := pairing.left_out(folders[method]))]


def origin(folder: Path, maps: Iterable[File]) -> str:
    """The folder of a method's maps and how they were made, from settings.json beside them."""
    values: dict[str, dict[object, None]] = {}
    for parent in dict.fromkeys(path.parent for path in maps):
        for key, value in output.read_settings(parent).items():
            if key not in ("versions", "images"):
                values.setdefault(key, {})[str(value)] = None
    return files.printable(", ".join([f"maps in {folder}", *(f"{key} {' / '.join(values[key])}" for key in values)]))


def scored(args: argparse.Namespace) -> Evaluation:
    """The scores of all maps that the arguments name; the columns are to be chosen."""
    trainings = find_trainings(args)
    benchmark, datasets = find_datasets(args)
    images, notes = images_to_score(datasets, args.allow_missing)
    results.positions(images, args.examples)  # an error now rather than after scoring
    prepare_output(args)
    names = [name for name in metrics.METRICS if name in (*metrics.COMMON, *columns_of(args, benchmark))]
    scores, means, warnings = scoring.evaluate(images, args.engine, args.resize, names, args.workers)
    maps = {key: [image.maps[key] for image in images if key in image.maps] for key in trainings}
    origins = {key: origin(trainings[key].folder, maps[key]) for key in trainings}
    about = {key: training.about for key, training in trainings.items()}
    means = {key: means[key] for key in trainings}
    return Evaluation(benchmark, tuple(trainings), (), (), scores, means, (), [*notes, *warnings], origins, about)


def from_results(args: argparse.Namespace) -> Evaluation:
    """The scores in the folders of --from."""
    given = [f"--{name}" for name in OF_MAPS if getattr(args, name)]
    if given:
        raise InputError(f"--from reads no map: leave out {', '.join(given)}")
    evaluation = kept.load(args.from_results)
    if args.sets:
        evaluation = kept.of_sets(evaluation, args.sets)
    if args.methods:
        evaluation = kept.chosen(evaluation, args.methods)
    if args.sets or args.methods:  # what is left out would be lost
        inputs = [Path(methods.name_and_folder(text)[1], kept.NAME) for text in args.from_results]
        files.require_not_input(args.save_path / kept.NAME, inputs)
    results.positions(evaluation.images, args.examples)
    if missing := {*columns_of(args, evaluation.benchmark)} - {*evaluation.scored()}:
        remedy = "score the maps again with --metrics"
        raise InputError(f"--from: not scored with {', '.join(sorted(missing))}; {remedy}")
    prepare_output(args)
    return evaluation


def prepare_output(args: argparse.Namespace) -> None:
    files.check_output_file("--json", args.json)
    files.output_folder(args.save_path)


def columns_of(args: argparse.Namespace, benchmark: Benchmark) -> tuple[str, ...]:
    """The metrics in the tables."""
    return tuple(metrics.METRICS if "all" in args.metrics else dict.fromkeys(args.metrics)) or benchmark.columns


def main(args: argparse.Namespace) -> None:
    with cli.one_line_errors("fewer --workers need less") as command:
        from evaluation import plots, report  # not at the top: workers import this file, and need no matplotlib

        configure_reading(args.max_pixels, args.white)
        style = plots.Style(args.figure_width, plots.read_sheet(args.style) if args.style else {})
        evaluation = from_results(args) if args.from_results else scored(args)
        command.started()  # nothing has been written so far, whatever was wrong with a file
        report.save(args.save_path, {kept.NAME: kept.content(evaluation)})
        evaluation = results.by_method(evaluation)
        columns = columns_of(args, evaluation.benchmark)
        names = tuple(name for name in metrics.METRICS if name in metrics.NINE or name in columns)
        evaluation = replace(evaluation, columns=columns, metrics=names)
        evaluation = replace(evaluation, differences=compare.differences(evaluation))
        examples = [evaluation.images[i] for i in results.positions(evaluation.images, args.examples)]
        table = tables.table(evaluation)
        print(tables.text(table), *tables.legend(evaluation, "*", "+"), *evaluation.lines(), sep="\n")
        report.write(args.save_path, evaluation, table, examples, style, args.json)
        print(f"{args.save_path} has the tables, the curves and {args.save_path}/report.html, a page with examples")


def metric(text: str) -> str:
    """An argument type: the name of a metric, in any case."""
    return next((name for name in metrics.METRICS if name.casefold() == text.casefold()), text)


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--benchmark", nargs=2, metavar=("NAME", "ROOT"), help=benchmarks.HELP)
    sets = "only these test sets of the benchmark, or of --from"
    data.add_argument("--sets", nargs="+", default=[], metavar="SET", help=sets)
    data.add_argument("--dataset_name", nargs="+", default=[], type=files.printable, metavar="NAME", help="in tables")
    maps = (
        "folders of prediction maps, for each data set; with --benchmark for each method, DIR or NAME=DIR, or a YAML "
    )
    maps += "file of methods; the same NAME twice is two trainings"
    data.add_argument("--pred_path", nargs="+", default=[], metavar="DIR", help=maps)
    data.add_argument("--gt_path", nargs="+", default=[], metavar="DIR", help="folders of ground truth")
    data.add_argument("--image_path", nargs="+", default=[], metavar="DIR", help="folders of images, for the page")
    data.add_argument("--map_suffix", default="", help="of maps called NAME_sal.png: _sal")
    data.add_argument("--map_prefix", default="", help="of maps called sal_NAME.png: sal_")
    cli.add_reading(data)
    data.add_argument("--allow_missing", action="store_true", help="ignore maps and ground truth without a partner")
    data.add_argument("--resize", action="store_true", help="resize maps to the size of their ground truth")

    again = parser.add_argument_group("results that were scored before")
    folders = "make tables and figures of these folders of results, DIR or NAME=DIR, without scoring"
    again.add_argument("--from", dest="from_results", nargs="+", default=[], metavar="RESULTS", help=folders)
    chosen = "with --from: the methods in the tables, in this order, as NAME or NEW=NAME, or a YAML file of methods"
    again.add_argument("--methods", nargs="+", default=[], metavar="METHOD", help=chosen)

    writing = parser.add_argument_group("output")
    writing.add_argument("--save_path", type=cli.path, default="results", metavar="DIR", help="for tables and page")
    names = [*metrics.METRICS, "all"]
    columns = f"columns of the tables, of {', '.join(names)}; default: the benchmark's, or the nine"
    writing.add_argument("--metrics", nargs="+", default=[], type=metric, choices=names, metavar="METRIC", help=columns)
    examples = "images in examples.png, as NAME or SET/NAME; default: those in which several methods differ most"
    writing.add_argument("--examples", nargs="+", default=[], metavar="NAME", help=examples)
    writing.add_argument("--figure_width", type=cli.number(float, 1, 40), default=7.16, help="of figures, in inches")
    sheet = "style sheet of Matplotlib for the figures, a file or the name of one of its own"
    writing.add_argument("--style", metavar="FILE", help=sheet)
    writing.add_argument("--json", type=cli.path, metavar="FILE", help="write the unrounded figures there too")

    run = parser.add_argument_group("run")
    run.add_argument("--engine", choices=[*scoring.ENGINES], default="fast", help="same scores, pysodmetrics slower")
    run.add_argument("--workers", type=cli.number(), default=cores(), help="processes")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
