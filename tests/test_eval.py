"""eval.py: scores of data sets do not depend on the worker processes, and bad input is named."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import recipe
from conftest import ROOT, failure, golden, save_image

import eval as script
from evaluation import metrics, plots
from unext import workers

CASES = recipe.metric_cases(0)
SIZES = [(97, 131), (64, 64), (80, 90)]
SOFT_EDGED = [cv2.circle(np.zeros(size, np.uint8), (40, 30), 20, 255, -1, cv2.LINE_AA) for size in SIZES]


def write_pairs(folder, cases):
    for name, (prediction, truth) in cases.items():
        save_image(folder / "maps" / f"{name}.png", prediction)
        save_image(folder / "masks" / f"{name}.png", truth)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), CASES)


def arguments(folder, *more):
    words = ["--dataset_name", "set", "--pred_path", folder / "maps", "--gt_path", folder / "masks", *more]
    words += [] if "--save_path" in more else ["--save_path", folder / "results"]
    return script.get_args_parser().parse_args([str(word) for word in words])


def run(folder, output, *more):
    script.main(arguments(folder, "--json", output, *more))
    return json.loads(output.read_text())["set"]


@pytest.mark.parametrize("engine", ["fast", "pysodmetrics"])
def test_figures_are_those_of_the_original(engine, pairs, tmp_path):
    figures = run(pairs, tmp_path / "scores.json", "--engine", engine)
    assert figures.pop("images") == 12
    assert figures == pytest.approx(golden("metrics.json")["all"], abs=1e-6)


def test_results_do_not_depend_on_the_number_of_workers(pairs, tmp_path):
    one, three = (run(pairs, tmp_path / f"{n}.json", "--workers", n) for n in (1, 3))
    assert one == three


def test_several_data_sets_make_one_table_and_one_file(pairs, tmp_path, capsys):
    other = write_pairs(tmp_path / "other", {name: CASES[name] for name in ("case0", "perfect")})
    args = arguments(pairs, "--json", tmp_path / "scores.json")
    args.dataset_name, args.pred_path, args.gt_path = (
        ["all twelve", "two"],
        [str(pairs / "maps"), str(other / "maps") + "/"],
        [str(pairs / "masks"), str(other / "masks")],
    )
    script.main(args)
    results = json.loads((tmp_path / "scores.json").read_text())
    assert list(results) == ["all twelve", "two"]
    assert results["two"]["images"] == 2
    expected = [metrics.score(*CASES[name]).MAE for name in ("case0", "perfect")]
    assert results["two"]["MAE"] == pytest.approx(np.mean(expected), rel=1e-12)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["dataset", "images", *metrics.NINE]
    assert [line.split("  ")[0].strip() for line in lines[2:4]] == ["all twelve", "two"]
    assert f"{results['two']['Smeasure']:.3f}" in lines[3]


def test_chosen_metrics_are_the_columns_and_are_added_to_the_nine(pairs, tmp_path, capsys):
    more = ("--save_path", tmp_path, "--metrics", "HCE", "Smeasure", "BER")
    figures = run(pairs, tmp_path / "scores.json", *more)
    assert list(figures) == ["images", *metrics.NINE, "BER", "HCE"]
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["dataset", "images", "HCE", "Smeasure", "BER"]
    assert table[2].split()[2] == f"{figures['HCE']:.0f}"
    for name in ("results.csv", "per_image.csv"):
        heading = (tmp_path / name).read_text().splitlines()[0].split(",")
        assert heading[-11:] == list(figures)[1:]


def test_input_that_needs_mending_is_one_line_and_status_2(pairs, tmp_path, capsys):
    several = arguments(pairs)
    several.pred_path = [str(pairs / "maps")] * 2
    twice = arguments(pairs)
    twice.dataset_name, twice.pred_path, twice.gt_path = ["set"] * 2, several.pred_path, [str(pairs / "masks")] * 2
    for args, message in (
        (arguments(tmp_path / "none"), "none/maps: there is no such folder"),
        (arguments(pairs, "--json", tmp_path), "is a folder; name a file"),
        (arguments(pairs, "--json", "/proc/scores.json"), "/proc: nothing can be written there"),
        (several, "one of each per data set"),
        (twice, "only once"),
    ):
        status, line = failure(script.main, args, capsys)
        assert status == 2 and message in line


def test_an_unreadable_map_is_named_and_nothing_written(tmp_path, capsys):
    folder = write_pairs(tmp_path, {name: CASES[name] for name in ("case0", "case1")})
    content = (folder / "maps" / "case1.png").read_bytes()
    (folder / "maps" / "case1.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit) as stop:
        script.main(arguments(folder, "--json", tmp_path / "scores.json"))
    assert stop.value.code == 2
    assert "case1.png: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "scores.json").exists()


def test_files_without_a_partner_are_listed_or_left_out_if_allowed(tmp_path, capsys):
    folder = write_pairs(tmp_path, CASES)
    (folder / "maps" / "case1.png").unlink()
    (folder / "masks" / "case2.png").unlink()
    status, line = failure(script.main, arguments(folder), capsys)
    assert status == 2 and line.endswith(
        "set: 1 ground truth without a map: case1.png; set: 1 map without a ground truth: case2.png; "
        "--allow_missing scores the rest"
    )
    figures = run(folder, tmp_path / "scores.json", "--allow_missing")
    assert figures["images"] == 10
    printed = capsys.readouterr().out
    assert "set: 1 of 11 ground truths without a map, left out" in printed
    assert "set: 1 of 11 maps without a ground truth, left out" in printed


def test_maps_of_another_size_are_resized_if_allowed(tmp_path, capsys):
    prediction, truth = CASES["case0"]
    folder = write_pairs(tmp_path, {"x": (prediction, truth), "y": (prediction[::2, ::2], truth)})
    status, line = failure(script.main, arguments(folder), capsys)
    assert status == 2 and "set: 1 map of another (height, width): y.png (49, 66) instead of (97, 131)" in line
    figures = run(folder, tmp_path / "scores.json", "--resize")
    assert figures["images"] == 2 and "1 map resized" in capsys.readouterr().out
    assert figures["MAE"] == pytest.approx(metrics.score(prediction, truth).MAE, abs=0.02)


BINARY = np.uint8([0] * 128 + [255] * 128)  # by grey level


@pytest.mark.parametrize(
    "odd, warning",
    [
        (lambda one, truth: (one, truth), ""),
        (lambda one, truth: (BINARY[one], truth), ""),
        (lambda one, truth: (BINARY[one], one), "are binary and the ground truth is grey: swapped?"),
        (lambda one, truth: (cv2.applyColorMap(one, cv2.COLORMAP_JET), truth), "are in colour: read as greyscale"),
        (lambda one, truth: (cv2.applyColorMap(BINARY[one], cv2.COLORMAP_JET), truth), "are in colour: read as grey"),
        (lambda one, truth: (0 * one, truth), "are constant: they have one grey level, though there is an object"),
        (lambda one, truth: (~BINARY[one], truth), "score higher inverted: their MAE is above 0.5"),
    ],
)
def test_a_line_says_what_is_odd_about_most_maps(odd, warning, tmp_path, capsys):
    soft = [cv2.GaussianBlur(mask, (0, 0), 4) for mask in SOFT_EDGED]
    cases = {f"{i}": odd(*pair) for i, pair in enumerate(zip(soft, SOFT_EDGED, strict=True))}
    cases["sound"] = soft[0], SOFT_EDGED[0]
    run(write_pairs(tmp_path, cases), tmp_path / "scores.json", "--workers", "1")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(lines) == bool(warning)
    if warning:
        assert lines[0].startswith(f"warning: set: 3 of 4 maps {warning}")
        assert lines[0] in (tmp_path / "results/results.md").read_text()


def test_ground_truths_without_an_object_are_counted_and_their_black_maps_are_no_fault(tmp_path, capsys):
    perfect = {f"{i}": (mask, mask) for i, mask in enumerate(SOFT_EDGED[:1] + [np.zeros((9, 9), np.uint8)] * 2)}
    assert run(write_pairs(tmp_path, perfect), tmp_path / "scores.json")["mIoU"] < 0.4
    [_, _, _, note, _] = capsys.readouterr().out.splitlines()
    told = "set: 2 of 3 ground truths without an object, where Dice, IoU and F-measures are 0 by definition"
    assert note == told and told in (tmp_path / "results/report.html").read_text()


@pytest.mark.parametrize("name, option", [("{}_sal.png", "--map_suffix=_sal"), ("map-{}.png", "--map_prefix=map-")])
def test_maps_called_otherwise_are_paired_with_the_option_that_the_message_gives(name, option, pairs, tmp_path, capsys):
    for folder in ("maps", "masks"):
        (tmp_path / folder).mkdir()
        for path in (pairs / folder).iterdir():
            shutil.copy(path, tmp_path / folder / (name.format(path.stem) if folder == "maps" else path.name))
    status, line = failure(script.main, arguments(tmp_path, "--allow_missing"), capsys)
    assert status == 2 and line.endswith(f"/maps has the name of a ground truth; give {option}")
    assert run(tmp_path, tmp_path / "a.json", option) == run(pairs, tmp_path / "b.json")


def test_what_is_in_a_folder_without_images_is_named(pairs, tmp_path, capsys):
    for name in ("maps/a.npy", "maps/b.npy", "masks/a.json", "masks/classes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for maps, masks, told in (
        (tmp_path, pairs, "/maps: has no images, only files that are not read: 2 .npy"),
        (pairs, tmp_path, "not read: 1 .json, 1 .txt; how to make masks of annotations: docs/input.md"),
    ):
        args = arguments(pairs, "--pred_path", maps / "maps", "--gt_path", masks / "masks")
        status, line = failure(script.main, args, capsys)
        assert status == 2 and line.endswith(told)


@pytest.mark.parametrize("error", [OSError("no writable cache directory"), RuntimeError("a bug")])
def test_the_tables_are_written_whatever_becomes_of_the_figures(error, pairs, tmp_path, monkeypatch, capsys):
    def fail(means):
        raise error

    monkeypatch.setattr(plots, "curves", fail)
    args = arguments(pairs, "--save_path", tmp_path / "results", "--json", tmp_path / "scores.json")
    if isinstance(error, OSError):
        status, line = failure(script.main, args, capsys)
        assert status == 1 and line.endswith("no figures and no report.html: no writable cache directory")
    else:
        with pytest.raises(RuntimeError):
            script.main(args)
    tables = {"groups.csv", "per_image.csv", *(f"results.{kind}" for kind in ("csv", "json", "md", "tex"))}
    assert {path.name for path in (tmp_path / "results").iterdir()} == tables
    assert (tmp_path / "scores.json").read_bytes() == (tmp_path / "results/results.json").read_bytes()


def test_one_worker_is_this_process_and_more_name_dev_shm_if_it_is_missing(pairs, tmp_path, monkeypatch, capsys):
    def fail(*words, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(workers, "ProcessPoolExecutor", fail)
    status, line = failure(script.main, arguments(pairs, "--workers", "2"), capsys)
    told = "worker processes cannot start without /dev/shm: Read-only file system; --workers 1 does without them"
    assert status == 2 and line.endswith(told)
    assert run(pairs, tmp_path / "scores.json", "--workers", "1")["images"] == 12


@pytest.mark.parametrize("module", ["eval", "tools.check_dataset", "tests.benchmark_eval"])
def test_it_does_not_import_torch(module):
    code = f"import sys, {module}; assert not {{'torch', 'scipy', 'py_sod_metrics'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.fixture
def long_run(tmp_path):
    """A run of eval.py over many large pairs, in a process group of its own, with its workers at work."""
    truth = np.zeros((1500, 1500), np.uint8)
    truth[200:900, 300:1200] = 255
    write_pairs(tmp_path, {"0": (truth // 2, truth)})
    for i in range(1, 200):
        for folder in ("maps", "masks"):
            os.link(tmp_path / folder / "0.png", tmp_path / folder / f"{i}.png")
    command = [sys.executable, "eval.py", "--workers", "2", "--dataset_name", "set", "--json", tmp_path / "scores.json"]
    command += ["--pred_path", tmp_path / "maps", "--gt_path", tmp_path / "masks"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(workers_of(process)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    yield process
    process.kill()
    process.wait()


def workers_of(process):
    """The process ids of the workers, without multiprocessing's resource tracker."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rsplit(")", 1)[1].split()[1])
            if parent == process.pid and "spawn_main" in (status.parent / "cmdline").read_text():
                found.append(int(status.parent.name))
        except OSError:
            continue
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")


@pytest.mark.slow
@pytest.mark.posix
@needs_proc
def test_a_worker_that_dies_is_an_error_and_not_a_hang(long_run):
    os.kill(workers_of(long_run)[0], signal.SIGKILL)
    _, errors = long_run.communicate(timeout=30)
    assert long_run.returncode == 1
    assert errors.splitlines()[-1] == (
        "eval.py: a worker process died, perhaps for lack of memory; try fewer --workers"
    )


@pytest.mark.slow
@pytest.mark.posix
@needs_proc
@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGKILL", -9)])  # names: Windows has no SIGKILL
def test_an_interrupted_run_ends_at_once_with_its_workers(name, status, long_run, tmp_path):
    workers = workers_of(long_run)
    if name == "SIGINT":
        os.killpg(long_run.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    else:
        long_run.kill()
    assert long_run.wait(timeout=10) == status
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    assert not (tmp_path / "scores.json").exists()
    if name == "SIGINT":
        assert "Traceback" not in long_run.stderr.read()
