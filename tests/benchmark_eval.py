"""For maintainers: times the evaluation against pysodmetrics.

    python tests/benchmark_eval.py                 pysodmetrics against metrics.score, in memory, one thread each
    python tests/benchmark_eval.py --files 60      also eval.py on that many files of 2200 x 3000: workers, memory
    python tests/benchmark_eval.py --methods 100   also eval.py with five methods on two data sets of that many images,
                                                   against five runs with one and against pysodmetrics
    python tests/benchmark_eval.py --pairs 2000    also how often the test of a difference is wrong, and right

Prints medians and ratios of alternating turns.
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
from functools import partial
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluation import compare, metrics
from unext import cli

Figures = dict[str, dict[str, float]]

SIZES = ((1024, 1024), (2200, 3000))  # height, width
PHOTO = (900, 1200)  # of the images that the five methods are scored on
SETS = {"easy": 5, "hard": 25}  # the data sets of the methods and the standard deviation of their maps' noise
METHODS = ("blur", "noise", "erosion", "dilation", "shift")
DISTINCT = 6  # pairs of which the others are links
EVAL = [sys.executable, str(ROOT / "eval.py")]


def interleaved(repeats: int, **functions: Callable[[], object]) -> dict[str, float]:
    """The median seconds of each function, called in turns, after a turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def generate_pair(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A soft, noisy prediction map and its ground truth, an object with thin lines as in DIS5K: uint8 (H, W) each."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    centre = (int(width * rng.uniform(0.4, 0.6)), int(height * rng.uniform(0.4, 0.6)))
    cv2.ellipse(mask, centre, (width // 4, height // 4), rng.uniform(0, 180), 0, 360, 255, -1)
    for _ in range(25):
        end = (int(rng.integers(width)), int(rng.integers(height)))
        cv2.line(mask, centre, end, int(rng.choice([0, 255])), int(rng.integers(3, 12)))
    soft = cv2.GaussianBlur(mask, (0, 0), 5).astype(np.int16)
    return np.clip(soft + rng.integers(-15, 16, mask.shape), 0, 255).astype(np.uint8), mask


def benchmark_scores(repeats: int) -> Figures:
    """The library against `metrics.score` on a pair of each size, one thread each."""
    cv2.setNumThreads(1)
    results = {}
    for height, width in SIZES:
        pair = generate_pair(height, width, seed=0)
        functions = {
            "pysodmetrics": partial(metrics.score_with_pysodmetrics, *pair),
            "fast": partial(metrics.score, *pair),
        }
        library, ours = (function().figures() for function in functions.values())
        seconds = interleaved(repeats, **functions)
        figures = {f"{name} s": median for name, median in seconds.items()}
        figures["ratio"] = seconds["pysodmetrics"] / seconds["fast"]
        figures["largest difference"] = max(abs(library[name] - ours[name]) for name in library)
        results[f"{height} x {width}"] = figures
    return results


def maps_of_methods(mask: np.ndarray, noise: float, seed: int) -> dict[str, np.ndarray]:
    """The maps of METHODS: the ground truth, changed in five ways, blurred, and with noise."""
    rng = np.random.default_rng(seed)
    side = 2 * max(1, mask.shape[0] // 150) + 1  # of the neighbourhood of a change, pixels
    kernel = np.ones((side, side), np.uint8)
    noisy = np.where(rng.random(mask.shape) < noise / 400, 255 - mask, mask)
    changed = (mask, noisy, cv2.erode(mask, kernel), cv2.dilate(mask, kernel), np.roll(mask, (side, side), (0, 1)))
    maps = {}
    for name, binary in zip(METHODS, changed, strict=True):
        soft = cv2.GaussianBlur(binary, (0, 0), side * 2 if name == "blur" else 1.5).astype(np.int16)
        grain = rng.normal(0, noise * rng.uniform(0, 2), [length // 4 + 1 for length in mask.shape])
        soft = soft + cv2.resize(grain, mask.shape[::-1], interpolation=cv2.INTER_CUBIC)  # smooth, like a network's
        maps[name] = np.clip(soft, 0, 255).astype(np.uint8)
    return maps


def write_methods(root: Path, images: int, size: tuple[int, int] = PHOTO) -> None:
    """Writes two data sets, maps of METHODS in maps/<method>/<data set>, and five.yaml."""
    for number, (name, noise) in enumerate(SETS.items()):
        for i in range(images):
            seed = 1000 * number + i
            mask = generate_pair(*size, seed)[1]
            if i % 3 == 0:  # a small object, too
                small = cv2.resize(mask, None, fx=0.15, fy=0.15, interpolation=cv2.INTER_NEAREST)
                mask = cv2.copyMakeBorder(small, 0, size[0] - len(small), 0, size[1] - small.shape[1], 0, value=0)
            stem, maps = f"{name}/{{}}/{('fish', 'crab', 'plant')[i % 3]}_{i:03}", maps_of_methods(mask, noise, seed)
            photo = cv2.applyColorMap(cv2.GaussianBlur(maps["blur"], (0, 0), 3), cv2.COLORMAP_OCEAN)
            written = {f"data/{stem.format('gt')}.png": mask, f"data/{stem.format('im')}.jpg": photo}
            written |= {f"maps/{method}/{stem.format('.')}.png": pixels for method, pixels in maps.items()}
            for path, pixels in written.items():
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(root / path), pixels)
    description = {"test": {name: {"folder": name} for name in SETS}, "together": {"both": list(SETS)}}
    description["groups"] = {"kind": "^([a-z]+)_"}
    (root / "five.yaml").write_text(json.dumps(description))  # JSON is YAML


def eval_options(root: Path, methods: Sequence[str], results: str) -> list[str]:
    """Options of eval.py for the files of `write_methods`."""
    folders = [f"{method}={root}/maps/{method}" for method in methods]
    options = ["--benchmark", f"{root}/five.yaml", f"{root}/data", "--pred_path", *folders]
    return [*options, "--save_path", f"{root}/{results}"]


def benchmark_methods(root: Path, images: int, repeats: int) -> Figures:
    """Five methods in one run against five runs with one, and against the library; the scores must agree."""
    write_methods(root, images)

    def run(methods: Sequence[str], results: str, *more: str) -> dict:
        subprocess.run([*EVAL, *eval_options(root, methods, results), *more], check=True, capture_output=True)
        return json.loads((root / results / "results.json").read_text())

    def run_singly() -> dict:
        return {name: run([name], f"results_{name}") for name in METHODS}

    def score_with_library() -> None:
        for path in sorted((root / "maps").glob("*/*/*.png")):
            paths = (path, root / "data" / path.parent.name / "gt" / path.name)
            metrics.score_with_pysodmetrics(*(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in paths))

    seconds = interleaved(repeats, together=lambda: run(METHODS, "results"), singly=run_singly)
    start = time.perf_counter()
    score_with_library()
    library = time.perf_counter() - start
    together, checked = run(METHODS, "results"), run(METHODS, "library", "--engine", "pysodmetrics")
    differences = [
        abs(score - checked[method][row][name])
        for method, of_rows in together.items() for row, scores in of_rows.items() for name, score in scores.items()
    ]  # fmt: skip
    return {
        f"eval.py, five methods, {len(SETS)} x {images} images": {
            "together s": seconds["together"],
            "five runs s": seconds["singly"],
            "ratio": seconds["together"] / seconds["singly"],
            "pysodmetrics in one process s": library,
            "equal to the five runs": float(together == run_singly()),
            "largest difference to pysodmetrics": max(differences),
        }
    }


def rates(images: int, pairs: int, difference: float = 0.0) -> tuple[float, float]:
    """How often p < 0.05 for that many pairs of methods, with the test of eval.py and with the bootstrap alone.

    The scores of an image depend on how hard it is, like S-measures; the methods differ by `difference` on average.
    """
    rng = np.random.default_rng(images)
    hardness = rng.beta(5, 1.5, (images, 1))
    ours, other = (hardness ** rng.lognormal(0, 0.3, (images, pairs)) for _ in range(2))
    differences = ours - other + difference  # (images, pairs)
    chunks = [weights @ differences for weights in compare.resample_weights(images, compare.RESAMPLES)]
    resampled = np.concatenate(chunks).T
    means = differences.mean(axis=0)
    p = [compare.p_value(mean, values, images) for mean, values in zip(means, resampled, strict=True)]
    share = np.minimum(np.mean(resampled <= 0, axis=1), np.mean(resampled >= 0, axis=1)) * 2
    return float(np.mean(np.array(p) < 0.05)), float(np.mean(share < 0.05))


def benchmark_chance(pairs: int) -> Figures:
    """The rates of p < 0.05 without a difference and with one."""
    results = {}
    for images in (20, 60, 250, 2000):
        without, alone = rates(images, pairs)
        figures = {"p < 0.05 without a difference": without, "the same, bootstrap alone": alone}
        figures["with a difference of 0.03"] = rates(images, pairs, 0.03)[0]
        results[f"{pairs} pairs of methods on {images} images"] = figures
    return results


def peak_memory(command: list[str]) -> float:
    """Runs a command; the peak, in megabytes, of the largest of its processes."""
    watch = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    watch += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"  # kB on Linux
    # Through a small process: a new process starts with the size of its parent, which would count.
    output = subprocess.run([sys.executable, "-c", watch, *command], check=True, capture_output=True, text=True).stdout
    return int(output) / 1024


def benchmark_files(root: Path, files: int, repeats: int) -> Figures:
    """eval.py, the whole command, on files of the largest size: one worker against two, and peak memory."""
    for i in range(files):
        pair = generate_pair(*SIZES[-1], i) if i < DISTINCT else (None, None)
        for name, pixels in zip(("maps", "masks"), pair, strict=True):
            path = root / name / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            if pixels is None:
                os.link(path.with_name(f"{i % DISTINCT}.png"), path)
            else:
                cv2.imwrite(str(path), pixels)

    def run(workers: int) -> float:
        options = f"--dataset_name set --pred_path {root}/maps --gt_path {root}/masks --save_path {root}/results"
        return peak_memory([*EVAL, *options.split(), "--workers", str(workers)])

    peak = run(2)
    seconds = interleaved(repeats, single=lambda: run(1), two=lambda: run(2))
    figures = {"1 worker s": seconds["single"], "2 workers s": seconds["two"]}
    figures |= {"ratio": seconds["single"] / seconds["two"], "peak MB a worker": peak}
    return {f"eval.py, {files} files": figures}


def main(args: argparse.Namespace) -> None:
    with cli.one_line_errors():
        results = benchmark_scores(args.repeats)
        for benchmark, number in ((benchmark_files, args.files), (benchmark_methods, args.methods)):
            with tempfile.TemporaryDirectory() as folder:
                results |= benchmark(Path(folder), number, args.repeats) if number else {}
        results |= benchmark_chance(args.pairs) if args.pairs else {}
    for name, figures in results.items():
        print(name + ": " + ", ".join(f"{label} {value:.4g}" for label, value in figures.items()))


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--files", type=cli.number(minimum=0), default=0, help="for eval.py; 0 leaves it out")
    parser.add_argument("--methods", type=cli.number(minimum=0), default=0, help="images of each set; 0 leaves it out")
    parser.add_argument("--pairs", type=cli.number(minimum=0), default=0, help="of methods; 0 leaves it out")
    parser.add_argument("--repeats", type=cli.number(), default=5, help="timed turns, whose median is reported")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
