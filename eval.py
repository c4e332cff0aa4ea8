"""Scores prediction maps against their ground truth, for data sets or a whole benchmark, one method or several.

    python eval.py --dataset_name DIS-VD DIS-TE1 --pred_path maps/DIS-VD maps/DIS-TE1 --gt_path DIS-VD/gt DIS-TE1/gt
    python eval.py --benchmark COD /data/COD --pred_path runs/COD/predictions --save_path runs/COD/results
    python eval.py --benchmark COD /data/COD --pred_path ours=runs/COD/predictions SINet=maps/SINet FEDER=maps/FEDER

Maps and masks are paired by name. A benchmark's maps are in one folder per test set; its figures are shown beside the
published ones. Of several methods the first is compared with the others. All cores work on it, without a GPU and
without torch. The folder --save_path gets results.json, .csv, .md and .tex, per_image.csv, groups.csv, curves and
report.html; with several methods also comparison.csv and examples (docs/benchmarks.md).
"""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from evaluation import benchmarks, compare, metrics, report, results, scoring, tables
from evaluation.results import Task
from unext import cli, files, output, pairing
from unext.errors import InputError
from unext.images import allow_pixels, set_white
from unext.pairing import File
from unext.workers import cores


class Dataset(NamedTuple):
    """What is scored under one name, of one method."""

    name: str
    maps: dict[str, File]  # by the image's name
    masks: dict[str, File]
    images: dict[str, File]  # for the page; some may be missing

    def is_empty(self) -> bool:
        """Whether no map has a ground truth."""
        return not any(name in self.masks for name in self.maps)


def find_methods(args: argparse.Namespace) -> tuple[benchmarks.Benchmark, dict[str, list[Dataset]], list[str]]:
    """The benchmark, the data sets of each method, and notes. Raises InputError or OSError that names the remedy."""
    if args.benchmark and (args.dataset_name or args.gt_path or args.image_path):
        raise InputError("--benchmark knows names, ground truth and images: leave out the options that name them")
    if not args.benchmark:
        if args.sets or not args.gt_path:
            raise InputError("--sets belongs to --benchmark" if args.sets else "give --benchmark, or --gt_path")
        nameless = benchmarks.Benchmark("", metrics.NINE, (), {}, {}, {}, from_paper=False)
        return nameless, {tables.THIS_RUN: find_own_datasets(args)}, []
    pairing.names_given(args, args.gt_path)
    name, root = args.benchmark
    benchmark, folders = benchmarks.load(name), method_folders(args.pred_path)
    found = benchmarks.find_test(benchmark, root, args.sets)
    splits = [split for splits in found.values() for split in splits]
    print(*splits, sep="\n")
    notes = [str(split) for split in splits if split.is_incomplete()]
    methods = {method: find_benchmark_datasets(args, found, folder) for method, folder in folders.items()}
    return benchmark, methods, notes


def method_folders(words: Sequence[str]) -> dict[str, Path]:
    """The folders of --pred_path, each NAME=DIR or DIR, by method. Raises InputError for two of one name."""
    folders: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or not name or Path(word).is_dir():
            name, folder = tables.THIS_RUN if len(words) == 1 else Path(word).resolve().name, word
        if not folder:
            raise InputError(f"--pred_path: {word or 'an empty word'} names no folder")
        if files.printable(name) in folders:
            raise InputError(f"--pred_path: two methods are called {name}; name them, as in ours={folder}")
        folders[files.printable(name)] = Path(folder)
    return folders


def find_own_datasets(args: argparse.Namespace) -> list[Dataset]:
    """The data sets of plain folders. Raises InputError or OSError that names the remedy."""
    labels, image_paths = args.dataset_name, args.image_path
    if not len(labels) == len(args.pred_path) == len(args.gt_path) or len(image_paths) not in (0, len(labels)):
        raise InputError(
            "--dataset_name, --pred_path, --gt_path, --image_path: give one of each per data set, in the same order "
            "(--image_path may be left out)"
        )
    if len(set(labels)) < len(labels):
        raise InputError("--dataset_name: each name may occur only once")
    names = pairing.names_given(args, args.gt_path)
    datasets = []
    for i, (label, pred_path, gt_path) in enumerate(zip(labels, args.pred_path, args.gt_path, strict=True)):
        pairing.require_apart(pred_path, gt_path, names)
        maps, ground_truth = pairing.find(pred_path), pairing.find(gt_path)
        maps, masks = pairing.tell_apart(maps, ground_truth, names)
        maps = maps_by_image(args, maps, masks, ground_truth)
        images = {}
        if image_paths:
            pairing.require_apart(image_paths[i], gt_path, names)
            images, _ = pairing.tell_apart(pairing.find(image_paths[i]), ground_truth, names)
        datasets.append(Dataset(label, maps, masks, images))
    return datasets


def find_benchmark_datasets(
    args: argparse.Namespace, found: dict[str, list[benchmarks.SplitFolder]], pred_path: Path
) -> list[Dataset]:
    """A benchmark's test sets with their maps below `pred_path`. Raises InputError or OSError that names the remedy."""
    datasets = []
    for name, splits in found.items():
        folder = find_maps(pred_path, name, alone=len(found) == 1)
        if folder is None and not args.allow_missing:
            raise InputError(
                f"{name}: there is no folder of that name with maps below {pred_path}; write them with "
                "test.py, choose with --sets, or score what is there with --allow_missing"
            )
        pairs = [pair for split in splits for pair in split.pairs]
        images, masks = ({pairing.name_of(pair[0]): pair[side] for pair in pairs} for side in (0, 1))
        missing = folder is None or (args.allow_missing and not pairing.has_images(folder))
        maps = {} if missing else maps_by_image(args, pairing.find(folder), masks)
        datasets.append(Dataset(name, maps, masks, images))
    return datasets


def maps_by_image(
    args: argparse.Namespace, maps: dict[str, File], masks: dict[str, File], ground_truth: Iterable[str] = ()
) -> dict[str, File]:
    """A folder's maps by the image's name; if none is called as --map_suffix says, they keep their names.

    Raises InputError if another option would pair them with `masks`, or with all files of `ground_truth`.
    """
    maps = pairing.MaskNames(args.map_prefix, args.map_suffix).by_image(maps) or maps
    if maps.keys() & masks.keys():
        return maps
    if hint := pairing.names_hint(masks, maps, "map") or pairing.names_hint(maps, ground_truth):
        folder = next(iter(maps.values())).parent
        raise InputError(f"no map in {folder} has the name of a ground truth{hint}")
    return maps


def find_maps(pred_path: Path, name: str, alone: bool) -> Path | None:
    """The folder with the maps of a test set: the one of its name or, for a single set, `pred_path` itself."""
    files.require_folder(pred_path)
    if (pred_path / name).is_dir():
        return pred_path / name
    plain = re.compile(r"[\W_]")  # DIS-TE1 and dis_te1 are the same
    wanted = plain.sub("", name.casefold())
    hits = [path for path in benchmarks.tree(pred_path) if plain.sub("", path.name.casefold()) == wanted]
    hits = [folder for folder in hits if pairing.has_images(folder)] or hits[:1]
    if len(hits) > 1:
        raise InputError(f"{name}: several folders could hold its maps: {files.listing(hits)}")
    return hits[0] if hits else pred_path if alone else None


def check(datasets: Sequence[Dataset], allow_missing: bool) -> list[str]:
    """What is left out, in words. Raises InputError that lists the maps and ground truths without a partner."""
    problems, notes = [], []
    for dataset in datasets:
        name, maps, masks, _ = dataset
        for noun, partner, side, other in (("ground truth", "map", masks, maps), ("map", "ground truth", maps, masks)):
            alone = [file.name for key, file in side.items() if key not in other]
            if alone and allow_missing:
                notes.append(f"{name}: {len(alone):,} of {files.count(len(side), noun)} without a {partner}, left out")
            elif alone:
                problems.append(f"{name}: {files.count(len(alone), noun)} without a {partner}: {files.listing(alone)}")
        if dataset.is_empty() and allow_missing:
            notes.append(f"{name}: not scored")
    if problems:
        raise InputError("; ".join([*problems, "--allow_missing scores the rest"]))
    if all(dataset.is_empty() for dataset in datasets):
        raise InputError("no map has the name of a ground truth")
    return notes


def tasks_in_common(methods: dict[str, list[Dataset]]) -> tuple[list[Task], list[str]]:
    """The images that are scored, those of which every method has a map, if it has any of the data set; and notes.

    Raises InputError for a method without any.
    """
    tasks, notes = [], []
    for same in zip(*methods.values(), strict=True):  # one data set of each method
        own = {method: dataset for method, dataset in zip(methods, same, strict=True) if not dataset.is_empty()}
        if not own:
            continue
        name, maps, masks, images = next(iter(own.values()))
        common = [key for key in maps if key in masks and all(key in dataset.maps for dataset in own.values())]
        every = {key for dataset in own.values() for key in dataset.maps if key in masks}
        if len(common) < len(every):
            number = files.count(len(every) - len(common), "image")
            notes.append(f"{name}: {number} left out, of which not every method has a map")
        having = tuple(own)
        for key in common:
            of_methods = tuple(dataset.maps[key] for dataset in own.values())
            tasks.append(Task(name, files.printable(key), images.get(key), masks[key], having, of_methods))
    for method in methods:
        if not any(method in task.methods for task in tasks):
            raise InputError(f"{method}: there is no image of which this method and all others have a map")
    return tasks, notes


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
    with cli.one_line_errors("fewer --workers need less") as command:
        allow_pixels(args.max_pixels)
        set_white(args.white)
        benchmark, methods, notes = find_methods(args)
        labelled = [
            one._replace(name=f"{method}, {one.name}") if len(methods) > 1 else one
            for method, datasets in methods.items() for one in datasets
        ]  # fmt: skip
        notes += check(labelled, args.allow_missing)
        tasks, not_common = tasks_in_common(methods)
        notes += not_common
        if others := pairing.left_out(path.parent for task in tasks for path in (task.mask, *task.maps)):
            notes.append(f"left out: {others}")
        results.find(tasks, args.examples)  # all of them are there
        files.check_output_file("--json", args.json)
        files.output_folder(args.save_path)

        asked = metrics.METRICS if "all" in args.metrics else args.metrics
        columns = tuple(dict.fromkeys(asked)) or benchmark.columns
        names = tuple(name for name in metrics.METRICS if name in metrics.NINE or name in columns)
        images, means, more = scoring.evaluate(tasks, args.engine, args.resize, names, args.workers)
        command.started()  # nothing has been written so far, whatever was wrong with a file
        rows = {task.dataset: (task.dataset,) for task in tasks}
        rows |= {name: sets for name, sets in benchmark.together.items() if rows.keys() >= set(sets)}
        scored = results.Evaluation(
            methods=tuple(methods),
            columns=columns,
            rows=rows,
            means={method: results.of_rows(means[method], rows) for method in methods},
            images=images,
            metrics=names,
            published={name: benchmarks.published(benchmark, name) for name in rows},
            groups=benchmark.groups,
        )
        compared = compare.differences(scored)
        legend = [tables.legend(scored.methods[0], "*", "+")] if scored.several() else []
        print(tables.text(tables.lines(scored, compared), columns), *legend, *notes, *more, sep="\n")
        notes = [*notes, *more, f"Maps: {', '.join(args.pred_path)}", *made_by(labelled)]
        notes = [files.printable(note) for note in notes]
        title, examples = benchmark.name or ", ".join(rows), results.find(images, args.examples)
        report.write(args.save_path, title, scored, compared, notes, examples, args.json)
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
        help="folders of prediction maps, one per data set; with --benchmark one per method, DIR or NAME=DIR",
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
