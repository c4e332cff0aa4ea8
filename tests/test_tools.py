"""tools/: the toy data set and the benchmarks."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import MICRO, arguments_of

from evaluation import metrics
from tools import benchmark, toy_dataset
from unext import pairing


def test_the_seed_decides_the_files(toy, tmp_path):
    for seed in ("0", "1"):
        toy_dataset.main(arguments_of(toy_dataset, tmp_path / seed, "--train", 1, "--test", 1, "--seed", seed))
    name = "test/Image/toy_0000.jpg"
    assert (tmp_path / "0" / name).read_bytes() == (toy / name).read_bytes()
    assert (tmp_path / "1" / name).read_bytes() != (toy / name).read_bytes()
    assert len(pairing.pair([toy / "test/Mask"], [toy / "test/Blob"])) == 4  # a baseline for each test image


def test_neither_colour_nor_contrast_nor_position_reveals_the_blob():
    samples = [toy_dataset.sample(np.random.default_rng([0, 1, i])) for i in range(40)]
    for image, mask in samples[:10]:
        blob, ground = image[mask == 255].astype(float), image[mask == 0].astype(float)
        assert np.abs(blob.mean(0) - ground.mean(0)).max() < 1
        assert np.abs(blob.std(0) / ground.std(0) - 1).max() < 0.05
    masks = [mask for _, mask in samples]
    centres = np.array([np.argwhere(mask).mean(0) / mask.shape for mask in masks])
    assert (centres.std(0) > 0.12).all()
    scores = {
        sigma: np.mean([metrics.score(toy_dataset.centred_blob(*mask.shape, sigma), mask).Smeasure for mask in masks])
        for sigma in (toy_dataset.CENTRED_SIGMA, 0.1, 0.15, 0.2, 0.25, 0.3)
    }
    assert max(scores.values()) < scores[toy_dataset.CENTRED_SIGMA] + 0.01  # no centred blob is a better baseline


def figures_of(tmp_path, command, *options):
    network = [text for name, value in MICRO.items() for text in (f"--{name}", value)]
    options = [*network, "--device", "cpu", "--repeats", 1, "--json", tmp_path / "figures.json", *options]
    benchmark.main(arguments_of(benchmark, command, *options))
    return json.loads((tmp_path / "figures.json").read_text())


@pytest.mark.slow
def test_the_benchmark_of_training_compares_all_kinds_with_the_plain_one(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    figures = figures_of(tmp_path, "train", "--batch_size", 2)
    assert list(figures) == ["plain", "fp32", "bf16", "bf16 NCHW", "bf16 checkpointed"]
    for kind, row in figures.items():
        assert row["times as fast"] == figures["plain"]["s"] / row["s"] > 0
        assert 100 < row["peak MB"] < 24_000  # of all tests
        assert row["largest difference"] <= (1e-4 if kind in ("plain", "fp32") else 0.05)
    assert figures["bf16"]["largest difference"] > 0


def test_the_benchmark_of_test_py_reports_the_share_of_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "LARGE", (90, 100))
    options = "--images", 8, "--precision", "fp32", "--save", "map,cutout"
    figures = figures_of(tmp_path, "predict", *options)["test.py"]
    assert figures["share"] > 0 and figures["images a second"] > 0
