"""Scores prediction maps against their ground truth with nine metrics, for one data set or several.

    python eval.py --dataset_name DIS-VD DIS-TE1 --pred_path maps/DIS-VD maps/DIS-TE1 \\
        --gt_path DIS-VD/gt DIS-TE1/gt --json scores.json

Maps and masks are paired by name. The work is spread over all cores, without a GPU and without torch.
"""

import argparse
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

import cli
import files
import metrics
import report

ENGINES = {"fast": metrics.score, "pysodmetrics": metrics.score_with_pysodmetrics}


def score_files(pair: tuple[Path, Path], engine: str) -> metrics.PairScores:
    """The scores of one (prediction map, ground truth). Raises OSError or ValueError that names the file."""
    prediction, ground_truth = (np.array(files.read_mask(path)) for path in pair)
    return ENGINES[engine](prediction, ground_truth)


def start_worker() -> None:
    """In each worker process: one thread, Ctrl-C left to the parent, and no life after it."""
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=die_with_parent, daemon=True).start()


def die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def score_all(pairs: Sequence[tuple[Path, Path]], engine: str, workers: int, bar: tqdm) -> Iterator[metrics.PairScores]:
    """The scores of each pair, in order, computed by worker processes that read the files themselves.

    Raises OSError or ValueError that names the file, or that says that a worker died.
    """
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=start_worker)
    try:
        for scores in cli.in_order(pool, partial(score_files, engine=engine), pairs, ahead=4 * workers):
            bar.update()
            yield scores
    except BrokenProcessPool as error:
        raise OSError("a worker process died, perhaps for lack of memory; try fewer --workers") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():  # none is needed any more, whatever it is at
            process.terminate()


def find_pairs(names: list[str], pred_paths: list[str], gt_paths: list[str]) -> dict[str, list[tuple[Path, Path]]]:
    """The (prediction map, ground truth) pairs of each data set. Raises ValueError or OSError with the mend."""
    if not len(names) == len(pred_paths) == len(gt_paths):
        raise ValueError(
            f"{len(names)} --dataset_name, {len(pred_paths)} --pred_path and {len(gt_paths)} --gt_path: "
            "give one of each for every data set, in the same order"
        )
    if len(set(names)) < len(names):
        raise ValueError("--dataset_name: each name may occur only once")
    pairs = {
        name: files.pair([pred], [gt], names=("prediction map", "ground truth"))
        for name, pred, gt in zip(names, pred_paths, gt_paths, strict=True)
    }
    for name in names:
        sizes = ((pred, files.read_size(pred), files.read_size(gt)) for pred, gt in pairs[name])
        wrong = [f"{pred.name} {has} instead of {wanted}" for pred, has, wanted in sizes if has != wanted]
        if wrong:
            raise ValueError(f"{name}: maps of another (height, width) than their ground truth: {files.listing(wrong)}")
    return pairs


def evaluate(datasets: dict[str, list[tuple[Path, Path]]], engine: str, workers: int) -> dict[str, metrics.PairScores]:
    """The mean scores of each data set, under one progress bar."""
    every = [pair for pairs in datasets.values() for pair in pairs]
    with (
        tqdm(total=len(every), unit="img", desc="scoring") as bar,
        closing(score_all(every, engine, min(workers, len(every)), bar)) as scores,
    ):
        return {name: metrics.mean(islice(scores, len(pairs))) for name, pairs in datasets.items()}


def main(args: argparse.Namespace) -> None:
    with cli.exit_on_error(cli.NOTHING_STARTED):
        datasets = find_pairs(args.dataset_name, args.pred_path, args.gt_path)
        if args.json and args.json.is_dir():
            raise IsADirectoryError(f"--json {args.json}: is a folder; name a file")
        if args.json:
            files.output_folder(args.json.parent)
    with cli.exit_on_error(cli.NOT_COMPLETED):
        scores = evaluate(datasets, args.engine, args.workers)
        results = {name: {"images": len(datasets[name])} | scores[name].figures() for name in datasets}
        print(report.table(results, metrics.METRICS))
        if args.json:
            with files.replacing(args.json) as file:
                file.write((json.dumps(results, indent=1) + "\n").encode())


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--dataset_name", required=True, nargs="+", metavar="NAME", help="names for the table")
    parser.add_argument("--pred_path", required=True, nargs="+", metavar="DIR", help="folders of prediction maps")
    parser.add_argument("--gt_path", required=True, nargs="+", metavar="DIR", help="folders of ground truth")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the unrounded figures there too")
    parser.add_argument("--engine", choices=list(ENGINES), default="fast", help="the same figures; the library is slow")
    parser.add_argument("--workers", type=cli.number(), default=os.cpu_count(), help="processes")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
