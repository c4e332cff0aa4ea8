"""eval.py: scores of data sets do not depend on the worker processes, and bad input is named."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import recipe
from conftest import ROOT, failure, golden, save_image

import eval as script
from evaluation import metrics


def write_pairs(folder, cases):
    for name, (prediction, truth) in cases.items():
        save_image(folder / "maps" / f"{name}.png", prediction)
        save_image(folder / "masks" / f"{name}.png", truth)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), recipe.metric_cases(0))


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
    cases = recipe.metric_cases(0)
    other = write_pairs(tmp_path / "other", {name: cases[name] for name in ("case0", "perfect")})
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
    expected = [metrics.score(*cases[name]).MAE for name in ("case0", "perfect")]
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
    cases = recipe.metric_cases(0)
    short = write_pairs(tmp_path / "short", {"case0": cases["case0"], "case1": cases["case1"]})
    (short / "maps" / "case1.png").unlink()
    wrong = write_pairs(tmp_path / "wrong", {"x": (cases["case0"][0], cases["case1"][1])})
    several = arguments(pairs)
    several.pred_path = [str(pairs / "maps")] * 2
    twice = arguments(pairs)
    twice.dataset_name, twice.pred_path, twice.gt_path = ["set"] * 2, several.pred_path, [str(pairs / "masks")] * 2
    for args, message in (
        (arguments(short), "1 ground truths without a map: case1.png; --allow_missing scores the rest"),
        (arguments(wrong), "x.png (97, 131) instead of (240, 320); --resize resizes them"),
        (arguments(tmp_path / "none"), "none/maps: there is no such folder"),
        (arguments(pairs, "--json", tmp_path), "is a folder; name a file"),
        (arguments(pairs, "--json", "/proc/scores.json"), "/proc: nothing can be written there"),
        (several, "one of each per data set"),
        (twice, "only once"),
    ):
        status, line = failure(script.main, args, capsys)
        assert status == 2 and message in line


def test_an_unreadable_map_is_named_and_nothing_written(tmp_path, capsys):
    folder = write_pairs(tmp_path, {name: recipe.metric_cases(0)[name] for name in ("case0", "case1")})
    content = (folder / "maps" / "case1.png").read_bytes()
    (folder / "maps" / "case1.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit) as stop:
        script.main(arguments(folder, "--json", tmp_path / "scores.json"))
    assert stop.value.code == 2
    assert "case1.png: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "scores.json").exists()


def test_files_without_a_partner_are_listed_or_left_out_if_allowed(tmp_path, capsys):
    folder = write_pairs(tmp_path, recipe.metric_cases(0))
    (folder / "maps" / "case1.png").unlink()
    (folder / "masks" / "case2.png").unlink()
    status, line = failure(script.main, arguments(folder), capsys)
    assert status == 2 and "without a map: case1.png" in line and "without a ground truth: case2.png" in line
    figures = run(folder, tmp_path / "scores.json", "--allow_missing")
    assert figures["images"] == 10
    printed = capsys.readouterr().out
    assert "set: 1 of 11 ground truths without a map, left out" in printed
    assert "set: 1 of 11 maps without a ground truth, left out" in printed


def test_maps_of_another_size_are_resized_if_allowed(tmp_path, capsys):
    prediction, truth = recipe.metric_cases(0)["case0"]
    folder = write_pairs(tmp_path, {"x": (prediction, truth), "y": (prediction[::2, ::2], truth)})
    status, line = failure(script.main, arguments(folder), capsys)
    assert status == 2 and "set: 1 maps of another (height, width): y.png (49, 66) instead of (97, 131)" in line
    figures = run(folder, tmp_path / "scores.json", "--resize")
    assert figures["images"] == 2 and "1 map resized" in capsys.readouterr().out
    assert figures["MAE"] == pytest.approx(metrics.score(prediction, truth).MAE, abs=0.02)


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
