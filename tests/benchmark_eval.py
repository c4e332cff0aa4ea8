"""For maintainers: times metrics.score against pysodmetrics, in memory, in one thread.

    python tests/benchmark_eval.py

Prints medians and ratios of alternating turns.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluation import metrics
from unext import cli

Figures = dict[str, dict[str, float]]

SIZES = ((1024, 1024), (2200, 3000))  # height, width


def interleaved(repeats: int, **functions: Callable[[], object]) -> dict[str, float]:
    """The median seconds of each function, called in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


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


def main(args: argparse.Namespace) -> None:
    with cli.one_line_errors():
        results = benchmark_scores(args.repeats)
    for name, figures in results.items():
        print(name + ": " + ", ".join(f"{label} {value:.4g}" for label, value in figures.items()))


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--repeats", type=cli.number(), default=5, help="timed turns, whose median is reported")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
