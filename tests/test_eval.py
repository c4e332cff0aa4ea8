"""eval.py: scores of data sets do not depend on the worker processes, and bad input is named."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import recipe
from conftest import ROOT, eval_arguments, failure, golden, save_image
from test_eval_benchmark import TABLES

import eval as script
from evaluation import metrics, plots
from unext import workers

CASES = recipe.metric_cases(0)
SIZES = [(97, 131), (64, 64), (80, 90)]
pytestmark = pytest.mark.usefixtures("without_figures")
SOFT_EDGED = [cv2.circle(np.zeros(size, np.uint8), (40, 30), 20, 255, -1, cv2.LINE_AA) for size in SIZES]


def write_pairs(folder, cases):
    for name, (prediction, mask) in cases.items():
        save_image(folder / "maps" / f"{name}.png", prediction)
        save_image(folder / "masks" / f"{name}.png", mask)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), CASES)


@pytest.fixture
def two(tmp_path):
    return write_pairs(tmp_path / "two", {name: CASES[name] for name in ("case0", "perfect")})


def arguments(folder, *more):
    options = ["--dataset_name", "set", "--pred_path", folder / "maps", "--gt_path", folder / "masks", "--workers", 1]
    return eval_arguments(*options, "--save_path", folder / "results", *more)


def refusal(capsys, *args):
    """The line with which eval.py refuses these arguments."""
    status, line = failure(script.main, arguments(*args), capsys)
    assert status == 2
    return line


def run(folder, output, *more):
    script.main(arguments(folder, "--json", output, *more))
    return json.loads(output.read_text())["set"]


def test_figures_are_those_of_the_original_for_every_engine_and_number_of_workers(pairs, tmp_path):
    single, two_workers = (run(pairs, tmp_path / f"{n}.json", "--workers", n) for n in (1, 2))
    assert single == two_workers
    for figures in (single, run(pairs, tmp_path / "scores.json", "--engine", "pysodmetrics")):
        assert figures.pop("images") == 12
        assert figures == pytest.approx(golden("metrics.json")["all"], abs=1e-6)


def test_several_data_sets_make_one_table_and_one_file(pairs, two, tmp_path, capsys):
    args = arguments(pairs, "--json", tmp_path / "scores.json", "--dataset_name", "all twelve", "two")
    args.pred_path, args.gt_path = ([f"{pairs}/{kind}", f"{two}/{kind}/"] for kind in ("maps", "masks"))
    script.main(args)
    results = json.loads((tmp_path / "scores.json").read_text())
    assert list(results) == ["all twelve", "two"] and results["two"]["images"] == 2
    expected = [metrics.score(*CASES[name]).MAE for name in ("case0", "perfect")]
    assert results["two"]["MAE"] == pytest.approx(np.mean(expected), rel=1e-12)
    first, second = capsys.readouterr().out.splitlines()[2:4]
    assert first.startswith("all twelve  ") and f"{results['two']['Smeasure']:.3f}" in second


def test_chosen_metrics_are_the_columns_and_are_added_to_the_nine(two, tmp_path, capsys):
    figures = run(two, tmp_path / "scores.json", "--metrics", "HCE", "Smeasure", "BER")
    assert list(figures) == ["images", *metrics.NINE, "BER", "HCE"]
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["dataset", "images", "HCE", "Smeasure", "BER"]
    assert table[2].split()[2] == f"{figures['HCE']:.0f}"
    for name in ("results.csv", "per_image.csv"):
        heading = (two / "results" / name).read_text().splitlines()[0].split(",")
        assert heading[-11:] == list(figures)[1:]


def test_input_that_needs_mending_is_one_line_and_status_2(pairs, tmp_path, capsys):
    twice = ("--pred_path", *[f"{pairs}/maps"] * 2)
    (tmp_path / "a.npy").write_bytes(b"")
    for args, message in (
        ([tmp_path / "none"], "none/masks: there is no such folder"),
        ([pairs, "--pred_path", tmp_path], ": has no images, only files that are not read: 1 .npy"),
        ([pairs, "--json", tmp_path], "is a folder or a device; name a file"),
        ([pairs, "--json", os.devnull], "is a folder or a device; name a file"),
        ([pairs, "--json", "/proc/scores.json"], "/proc: nothing can be written there"),
        ([pairs, *twice], "one of each per data set"),
        ([pairs, *twice, "--dataset_name", "x", "x", "--gt_path", *[f"{pairs}/masks"] * 2], "only once"),
    ):
        assert message in refusal(capsys, *args)


def test_an_unreadable_map_is_named_and_nothing_written(two, tmp_path, capsys):
    path = two / "maps/perfect.png"
    path.write_bytes(path.read_bytes()[:100])
    assert "perfect.png: cannot be read" in refusal(capsys, two, "--json", tmp_path / "scores.json")
    assert not (tmp_path / "scores.json").exists() and not any((two / "results").iterdir())


def test_files_without_a_partner_are_listed_or_left_out_if_allowed(tmp_path, capsys):
    folder = write_pairs(tmp_path, CASES)
    (folder / "maps" / "case1.png").unlink()
    (folder / "masks" / "case2.png").unlink()
    lines = ["set: 1 of 11 ground truths without a map", "set: 1 of 11 maps without a ground truth"]
    problems = f"{lines[0]}: case1.png; {lines[1]}: case2.png; --allow_missing scores the rest"
    assert refusal(capsys, folder).endswith(problems)
    assert run(folder, tmp_path / "scores.json", "--allow_missing")["images"] == 10
    assert {f"{line}, left out" for line in lines} <= {*capsys.readouterr().out.splitlines()}


def test_maps_of_another_size_are_resized_if_allowed(tmp_path, capsys):
    prediction, mask = CASES["case0"]
    folder = write_pairs(tmp_path, {"x": (prediction, mask), "y": (prediction[::2, ::2], mask)})
    line = "set: 1 map of another (height, width): y.png (49, 66) instead of (97, 131)"
    assert line in refusal(capsys, folder)
    figures = run(folder, tmp_path / "scores.json", "--resize")
    assert figures["images"] == 2 and "1 map resized" in capsys.readouterr().out
    assert figures["MAE"] == pytest.approx(metrics.score(prediction, mask).MAE, abs=0.02)


BINARY = np.uint8([0] * 128 + [255] * 128)  # by grey level


@pytest.mark.parametrize(
    "odd, warning",
    [
        (lambda grey, mask: (grey, mask), ""),
        (lambda grey, mask: (BINARY[grey], mask), ""),
        (lambda grey, mask: (BINARY[grey], grey), "are binary and the ground truth is grey: swapped?"),
        (lambda grey, mask: (cv2.applyColorMap(grey, cv2.COLORMAP_JET), mask), "are in colour: read as greyscale"),
        (lambda grey, mask: (cv2.applyColorMap(BINARY[grey], cv2.COLORMAP_JET), mask), "are in colour: read as grey"),
        (lambda grey, mask: (0 * grey, mask), "are constant: they have one grey level, though there is an object"),
        (lambda grey, mask: (~BINARY[grey], mask), "score higher inverted: their MAE is above 0.5"),
    ],
)
def test_a_line_says_what_is_odd_about_most_maps(odd, warning, tmp_path, capsys):
    soft = [cv2.GaussianBlur(mask, (0, 0), 4) for mask in SOFT_EDGED]
    cases = {f"{i}": odd(*pair) for i, pair in enumerate(zip(soft, SOFT_EDGED, strict=True))}
    cases["sound"] = soft[0], SOFT_EDGED[0]
    run(write_pairs(tmp_path, cases), tmp_path / "scores.json")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(lines) == bool(warning)
    for line in lines:
        assert line.startswith(f"warning: set: 3 of 4 maps {warning}")
        assert line in (tmp_path / "results/results.md").read_text()


def test_ground_truths_without_an_object_are_counted_and_their_black_maps_are_no_fault(tmp_path, capsys):
    perfect = {f"{i}": (mask, mask) for i, mask in enumerate(SOFT_EDGED[:1] + [np.zeros((9, 9), np.uint8)] * 2)}
    assert run(write_pairs(tmp_path, perfect), tmp_path / "scores.json")["mIoU"] < 0.4
    [_, _, _, note, _] = capsys.readouterr().out.splitlines()
    assert note == "set: 2 of 3 ground truths without an object, where Dice, IoU and F-measures are 0 by definition"
    assert note in (tmp_path / "results/report.html").read_text()


@pytest.mark.parametrize("name, option", [("{}_sal.png", "--map_suffix=_sal"), ("map-{}.png", "--map_prefix=map-")])
def test_maps_of_other_names_are_paired_with_the_option_that_the_message_gives(name, option, two, tmp_path, capsys):
    expected = run(two, tmp_path / "a.json")
    for path in [*(two / "maps").iterdir()]:
        path.rename(path.with_name(name.format(path.stem)))
    hint = f"/maps has the name of a ground truth; give {option}"
    assert refusal(capsys, two, "--allow_missing").endswith(hint)
    assert run(two, tmp_path / "b.json", option) == expected


def test_the_tables_are_written_whatever_becomes_of_the_plots(two, tmp_path, monkeypatch, capsys):
    def fail(evaluation):
        raise OSError("no writable cache directory")

    monkeypatch.setattr(plots, "values_of_curves", fail)
    status, line = failure(script.main, arguments(two, "--json", tmp_path / "scores.json"), capsys)
    assert status == 1 and line.endswith("no writable cache directory")
    assert {path.name for path in (two / "results").iterdir()} == TABLES
    assert (tmp_path / "scores.json").read_bytes() == (two / "results/results.json").read_bytes()


def test_one_worker_is_this_process_and_more_name_dev_shm_if_it_is_missing(two, tmp_path, monkeypatch, capsys):
    def fail(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(workers, "ProcessPoolExecutor", fail)
    message = "worker processes cannot start without /dev/shm: Read-only file system; --workers 1 does without them"
    assert refusal(capsys, two, "--workers", "2").endswith(message)
    assert run(two, tmp_path / "scores.json", "--workers", "1")["images"] == 2


def workers_of(process):
    """The process ids of the workers, without multiprocessing's resource tracker."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def leaves_interrupts(worker):
    """Whether a worker ignores Ctrl-C, as it does before its first pair."""
    [ignored] = re.findall(r"SigIgn:\s*(\w+)", Path(f"/proc/{worker}/status").read_text())
    return bool(int(ignored, 16) & 1 << signal.SIGINT - 1)


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()


@pytest.fixture
def long_run(tmp_path):
    """A run of eval.py over many large pairs, in a new process group, with its workers at work."""
    mask = np.zeros((1500, 1500), np.uint8)
    mask[200:900, 300:1200] = 255
    write_pairs(tmp_path, {"0": (mask // 2, mask)})
    for i in range(1, 200):
        for folder in ("maps", "masks"):
            os.link(tmp_path / folder / "0.png", tmp_path / folder / f"{i}.png")
    command = [sys.executable, "eval.py", "--workers", "2", "--dataset_name", "set", "--json", tmp_path / "scores.json"]
    command += ["--pred_path", tmp_path / "maps", "--gt_path", tmp_path / "masks"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_until(lambda: [leaves_interrupts(worker) for worker in workers_of(process)] == [True, True], seconds=60)
        yield process
        process.kill()


@pytest.mark.slow
@pytest.mark.posix
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads processes in /proc")
@pytest.mark.parametrize(
    "target, name, status, message",  # names: Windows has no SIGKILL
    [
        ("worker", "SIGKILL", 1, "a worker process died, perhaps for lack of memory; try fewer --workers"),
        ("group", "SIGINT", 130, "interrupted"),  # as Ctrl-C in a terminal does
        ("main", "SIGKILL", -9, ""),
    ],
)
def test_a_run_that_is_interrupted_ends_at_once_with_its_workers(target, name, status, message, long_run, tmp_path):
    ids = workers_of(long_run)
    kill = os.killpg if target == "group" else os.kill
    kill(ids[0] if target == "worker" else long_run.pid, getattr(signal, name))
    assert long_run.wait(timeout=30) == status
    wait_until(lambda: not any(Path(f"/proc/{number}").exists() for number in ids), seconds=10)
    assert not (tmp_path / "scores.json").exists()
    errors = long_run.stderr.read()
    assert "Traceback" not in errors and (not message or errors.splitlines()[-1] == f"eval.py: {message}")
