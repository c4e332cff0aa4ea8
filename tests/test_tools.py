"""tools/: the toy data set and the benchmarks."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import MICRO, arguments_of, failure

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
def test_the_benchmark_of_training_compares_all_kinds_with_the_plain_one(graphs, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    figures = figures_of(tmp_path, "train", "--batch_size", 2, "--compile")
    assert list(figures) == ["plain", "fp32", "bf16", "fp32 compiled", "bf16 checkpointed", "bf16 NCHW"]
    assert graphs.graphs == 1
    for kind, row in figures.items():
        assert row["times as fast"] == figures["plain"]["s"] / row["s"] > 0
        assert 100 < row["peak MB"] < 24_000  # of all tests
        assert row["largest difference"] <= (1e-4 if kind.startswith(("plain", "fp32")) else 0.05)
    assert figures["bf16"]["largest difference"] > 0


def test_what_was_measured_is_kept_when_a_measurement_fails(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    measure = benchmark.measure

    def fail_in_the_end(variant, *args):
        if variant == "bf16 NCHW":
            raise ZeroDivisionError
        return measure(variant, *args)

    monkeypatch.setattr(benchmark, "measure", fail_in_the_end)
    with pytest.raises(ZeroDivisionError):
        figures_of(tmp_path, "infer", "--only", "bf16 NCHW", "fp32", "--profile")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == ["plain", "fp32"] and figures["fp32"]["first s"] > 0
    output = capfd.readouterr().out
    assert "fp32, 5 runs:" in output and "aten::addmm" in output and "\nfp32: s " in output
    status, line = failure(benchmark.main, arguments_of(benchmark, "train", "--only", "fp8"), capfd)
    assert status == 2 and "--only 'fp8': there are plain, " in line


def test_the_benchmark_says_after_how_many_runs_compiling_pays():
    def measured(first, *seconds):
        return [benchmark.Measurement(first, [*seconds], 100.0, torch.ones(1))]

    runs = {"plain": measured(1, 4), "bf16": measured(2, 1, 1.25, 3), "bf16 compiled": measured(65, 1, 1)}
    assert benchmark.figures_of("bf16 compiled", runs)["pays after"] == 252  # 63 s at 0.25 s each
    assert "pays after" not in benchmark.figures_of("bf16", runs)
    runs["bf16 compiled"] = measured(65, 2, 2)
    assert "pays after" not in benchmark.figures_of("bf16 compiled", runs)


def test_the_benchmark_of_loading_counts_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "LARGE", (90, 100))
    options = ("--images", 8, "--batch_size", 2, "--size", 64, "--workers", 1, "--json", tmp_path / "figures.json")
    benchmark.main(arguments_of(benchmark, "load", "--device", "cpu", *options))
    assert json.loads((tmp_path / "figures.json").read_text())["1 worker"]["pairs a second"] > 0


def test_the_benchmark_of_test_py_reports_the_share_of_the_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "LARGE", (90, 100))
    options = "--images", 8, "--precision", "fp32", "--save", "map,cutout"
    figures = figures_of(tmp_path, "predict", *options)["test.py"]
    names = ["images a second", "share", "network s", "read s", "write s"]
    assert list(figures) == names and all(value > 0 for value in figures.values())
    args = arguments_of(benchmark, "predict", "--images", 3, "--batch_size", 3)
    status, line = failure(benchmark.main, args, capsys)
    assert status == 2 and "--images 3: give more than the first batch" in line
