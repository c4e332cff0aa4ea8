"""For maintainers: times the evaluation against pysodmetrics.

    python tests/benchmark_eval.py                 pysodmetrics against metrics.score, in memory, one thread each
    python tests/benchmark_eval.py --files 60      also eval.py on that many files of 2200 x 3000: workers, memory
    python tests/benchmark_eval.py --methods 100   also eval.py with five methods on two data sets of that many images,
                                                   against five runs with one and against pysodmetrics

Prints medians and ratios of alternating turns. --keep FOLDER leaves the methods' data and results there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluation import metrics
from unext import cli

Figures = dict[str, dict[str, float]]

SIZES = ((1024, 1024), (2200, 3000))  # height, width
PHOTO = (900, 1200)  # of the images that the five methods are scored on
SETS = {"easy": 5, "hard": 25}  # the data sets of the methods and the standard deviation of their maps' noise
DISTINCT = 6  # pairs of which the others are copies


def interleaved(repeats: int, **ways: Callable[[], object]) -> dict[str, float]:
    """The median seconds of each way of doing a thing, in alternation, after one turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def generate_pair(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A soft, noisy prediction map and its ground truth, an object with thin parts as in DIS5K: uint8 (H, W) each."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((height, width), np.uint8)
    centre = (int(width * rng.uniform(0.4, 0.6)), int(height * rng.uniform(0.4, 0.6)))
    cv2.ellipse(truth, centre, (width // 4, height // 4), rng.uniform(0, 180), 0, 360, 255, -1)
    for _ in range(25):
        end = (int(rng.integers(width)), int(rng.integers(height)))
        cv2.line(truth, centre, end, int(rng.choice([0, 255])), int(rng.integers(3, 12)))
    soft = cv2.GaussianBlur(truth, (0, 0), 5).astype(np.int16)
    return np.clip(soft + rng.integers(-15, 16, truth.shape), 0, 255).astype(np.uint8), truth


def benchmark_scores(repeats: int) -> Figures:
    """The library against `metrics.score` on one pair of each size, one thread each."""
    cv2.setNumThreads(1)
    results = {}
    for height, width in SIZES:
        pair = generate_pair(height, width, seed=0)
        library, ours = metrics.score_with_pysodmetrics(*pair).figures(), metrics.score(*pair).figures()
        seconds = interleaved(
            repeats,
            pysodmetrics=lambda pair=pair: metrics.score_with_pysodmetrics(*pair),
            fast=lambda pair=pair: metrics.score(*pair),
        )
        results[f"{height} x {width}"] = {
            "pysodmetrics s": seconds["pysodmetrics"],
            "fast s": seconds["fast"],
            "ratio": seconds["pysodmetrics"] / seconds["fast"],
            "largest difference": max(abs(library[name] - ours[name]) for name in library),
        }
    return results


def methods_of(truth: np.ndarray, noise: float, seed: int) -> dict[str, np.ndarray]:
    """What five methods predict: the ground truth, changed in five ways and blurred, with noise."""
    rng = np.random.default_rng(seed)
    side = 2 * max(1, truth.shape[0] // 150) + 1  # of the neighbourhood of a change, pixels
    kernel = np.ones((side, side), np.uint8)
    noisy = np.where(rng.random(truth.shape) < noise / 400, 255 - truth, truth)
    changed = {
        "blur": truth,
        "noise": noisy,
        "erosion": cv2.erode(truth, kernel),
        "dilation": cv2.dilate(truth, kernel),
    }
    changed["shift"] = np.roll(truth, (side, side), (0, 1))
    maps = {}
    for name, binary in changed.items():
        soft = cv2.GaussianBlur(binary, (0, 0), side * 2 if name == "blur" else 1.5).astype(np.int16)
        grain = rng.normal(0, noise * rng.uniform(0, 2), [length // 4 + 1 for length in truth.shape])
        soft = soft + cv2.resize(grain, truth.shape[::-1], interpolation=cv2.INTER_CUBIC)  # smooth, like a network's
        maps[name] = np.clip(soft, 0, 255).astype(np.uint8)
    return maps


def write_methods(root: Path, images: int, size: tuple[int, int] = PHOTO) -> Path:
    """Writes two data sets, with maps of five methods in maps/<method>/<data set>; returns the YAML file."""
    for number, (name, noise) in enumerate(SETS.items()):
        for i in range(images):
            seed = 1000 * number + i
            truth = generate_pair(*size, seed)[1]
            if i % 3 == 0:  # a small object, too
                small = cv2.resize(truth, None, fx=0.15, fy=0.15, interpolation=cv2.INTER_NEAREST)
                truth = np.zeros_like(truth)
                truth[: len(small), : small.shape[1]] = small
            maps = methods_of(truth, noise, seed)
            image = cv2.applyColorMap(cv2.GaussianBlur(maps["blur"], (0, 0), 3), cv2.COLORMAP_OCEAN)
            kind = ("fish", "crab", "plant")[i % 3]
            written = {root / "data" / name / "im" / f"{kind}_{i:03}.jpg": image}
            written[root / "data" / name / "gt" / f"{kind}_{i:03}.png"] = truth
            written |= {root / "maps" / method / name / f"{kind}_{i:03}.png": one for method, one in maps.items()}
            for path, pixels in written.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), pixels)
    description = {"test": {name: {"folder": name} for name in SETS}, "together": {"both": list(SETS)}}
    description["groups"] = {"kind": "^([a-z]+)_"}
    (root / "five.yaml").write_text(json.dumps(description))  # JSON is YAML
    return root / "five.yaml"


def eval_command(root: Path, methods: Sequence[str], results: str, *more: str) -> list[str]:
    """eval.py on what `write_methods` wrote."""
    folders = [f"{method}={root}/maps/{method}" for method in methods]
    words = ["--benchmark", f"{root}/five.yaml", f"{root}/data", "--pred_path", *folders]
    return [sys.executable, str(ROOT / "eval.py"), *words, "--save_path", f"{root}/{results}", *more]


def score_with_library(root: Path) -> None:
    """All pairs with pysodmetrics, called directly, as a script that somebody writes for it does."""
    for path in sorted((root / "maps").glob("*/*/*.png")):
        mask = root / "data" / path.parent.name / "gt" / path.name
        metrics.score_with_pysodmetrics(*(cv2.imread(str(one), cv2.IMREAD_GRAYSCALE) for one in (path, mask)))


def benchmark_methods(root: Path, images: int, repeats: int) -> Figures:
    """Five methods in one run against five runs with one, and against the library; the figures must agree."""
    write_methods(root, images)
    names = list(methods_of(np.zeros((8, 8), np.uint8), 0, 0))

    def run(methods: Sequence[str], results: str, *more: str) -> None:
        subprocess.run(eval_command(root, methods, results, *more), check=True, capture_output=True)

    def singly() -> None:
        for name in names:
            run([name], f"results_{name}")

    seconds = interleaved(repeats, together=lambda: run(names, "results"), singly=singly)
    start = time.perf_counter()
    score_with_library(root)
    library = time.perf_counter() - start
    run(names, "results_library", "--engine", "pysodmetrics")
    together, checked = (
        json.loads((root / path / "results.json").read_text()) for path in ("results", "results_library")
    )
    alone = {name: json.loads((root / f"results_{name}" / "results.json").read_text()) for name in names}
    return {
        f"eval.py, five methods, {len(SETS)} x {images} images": {
            "together s": seconds["together"],
            "five runs s": seconds["singly"],
            "ratio": seconds["together"] / seconds["singly"],
            "pysodmetrics in one process s": library,
            "equal to the five runs": float(together == alone),
            "largest difference to pysodmetrics": max(
                abs(figure - checked[method][row][name])
                for method, of_rows in together.items() for row, figures in of_rows.items()
                for name, figure in figures.items()
            ),
        }
    }  # fmt: skip


def peak_memory(command: list[str]) -> float:
    """Runs a command; the peak, in megabytes, of the largest of its processes."""
    watch = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    watch += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"  # kB on Linux
    # Through a small process: a new one starts with the size of its parent, which would count.
    output = subprocess.run([sys.executable, "-c", watch, *command], check=True, capture_output=True, text=True).stdout
    return int(output) / 1024


def benchmark_files(files: int, repeats: int) -> Figures:
    """eval.py, the whole command, on files of the largest size: one worker against two, and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("maps", "masks"):
            (root / name).mkdir()
        for i in range(files):
            pair = generate_pair(*SIZES[-1], i) if i < DISTINCT else (None, None)
            for name, array in zip(("maps", "masks"), pair, strict=True):
                if array is None:
                    os.link(root / name / f"{i % DISTINCT}.png", root / name / f"{i}.png")
                else:
                    cv2.imwrite(str(root / name / f"{i}.png"), array)

        def run(workers: int) -> float:
            words = f"--dataset_name set --pred_path {root}/maps --gt_path {root}/masks --workers {workers}"
            return peak_memory(
                [sys.executable, str(ROOT / "eval.py"), *words.split(), "--save_path", f"{root}/results"]
            )

        peak = run(2)
        seconds = interleaved(repeats, one=lambda: run(1), two=lambda: run(2))
    return {
        f"eval.py, {files} files": {
            "1 worker s": seconds["one"],
            "2 workers s": seconds["two"],
            "ratio": seconds["one"] / seconds["two"],
            "peak MB a worker": peak,
        }
    }


def main(args: argparse.Namespace) -> None:
    with cli.one_line_errors():
        results = benchmark_scores(args.repeats) | (benchmark_files(args.files, args.repeats) if args.files else {})
        if args.methods:
            with tempfile.TemporaryDirectory() as folder:
                results |= benchmark_methods(args.keep or Path(folder), args.methods, args.repeats)
    for name, figures in results.items():
        print(name + ": " + ", ".join(f"{label} {value:.4g}" for label, value in figures.items()))


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--files", type=cli.number(minimum=0), default=0, help="for eval.py; 0 leaves it out")
    parser.add_argument("--methods", type=cli.number(minimum=0), default=0, help="images of each set; 0 leaves it out")
    parser.add_argument("--keep", type=cli.path, metavar="FOLDER", help="where --methods writes; default: nowhere")
    parser.add_argument("--repeats", type=cli.number(), default=5, help="timed turns, whose median is reported")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
