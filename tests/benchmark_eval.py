"""For maintainers: times metrics.score against pysodmetrics, in memory, in one thread.

    python tests/benchmark_eval.py

Prints medians, their ratio, and how far the figures are apart.
"""

import argparse
import statistics
import sys
import timeit
from functools import partial
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluation import metrics
from unext import cli

SIZES = ((1024, 1024), (2200, 3000))  # height, width


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


def benchmark(height: int, width: int, repeats: int) -> dict[str, float]:
    """The library against `metrics.score` on a pair: median seconds, their ratio, the largest difference of figures."""
    pair = generate_pair(height, width, seed=0)
    functions = [partial(score, *pair) for score in (metrics.score_with_pysodmetrics, metrics.score)]
    library, ours = (function().figures() for function in functions)
    slow, fast = (statistics.median(timeit.repeat(function, number=1, repeat=repeats)) for function in functions)
    difference = max(abs(library[name] - ours[name]) for name in library)
    return {"pysodmetrics s": slow, "fast s": fast, "ratio": slow / fast, "largest difference": difference}


def main(args: argparse.Namespace) -> None:
    cv2.setNumThreads(1)
    with cli.one_line_errors():
        for height, width in SIZES:
            figures = benchmark(height, width, args.repeats)
            print(f"{height} x {width}: " + ", ".join(f"{label} {value:.4g}" for label, value in figures.items()))


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--repeats", type=cli.number(), default=5, help="timed turns, whose median is reported")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
