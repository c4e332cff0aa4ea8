"""eval.py with several methods: what it writes agrees with runs of one, and is what a paper needs."""

import json
import re
import shutil

import cv2
import numpy as np
import pytest
from conftest import eval_arguments, failure, save_image
from PIL import Image
from test_eval_benchmark import FILES, read_csv

import eval as script
from tools import toy_dataset
from unext import output

METHODS = ("blur", "noise", "shift")
DESCRIPTION = """
test: {easy: {folder: easy}, hard: {folder: hard}}
together: {both: [easy, hard]}
groups: {kind: "^([a-z]+)_"}
"""
pytestmark = pytest.mark.usefixtures("without_figures")


def write_methods(folder):
    """Writes two data sets of four images, the maps of METHODS, and the benchmark's description."""
    (folder / "sets.yaml").write_text(DESCRIPTION)
    for i, name in enumerate(("fish_000", "crab_001", "plant_002", "fish_003")):
        for dataset, noise in (("easy", 5), ("hard", 150)):
            mask = toy_dataset.blob(np.random.default_rng(i + noise), 60, 80) * np.uint8(255)
            if i % 3 == 0:  # a small object, too
                mask = np.pad(mask[::6, ::6], ((0, 50), (0, 66)))
            noisy = np.clip(mask + np.random.default_rng(i).normal(0, noise, mask.shape), 0, 255).astype(np.uint8)
            maps = {"blur": cv2.GaussianBlur(mask, (0, 0), 3), "noise": noisy, "shift": np.roll(mask, 5, axis=1)}
            save_image(folder / f"data/{dataset}/gt/{name}.png", mask)
            save_image(folder / f"data/{dataset}/im/{name}.jpg", np.dstack([mask] * 3))
            for method, pixels in maps.items():
                save_image(folder / f"maps/{method}/{dataset}/{name}.png", pixels)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_methods(tmp_path_factory.mktemp("methods"))


def arguments(root, methods, *more):
    options = ["--benchmark", root / "sets.yaml", root / "data", "--save_path", root / "results", "--workers", 1]
    return eval_arguments(*options, "--pred_path", *(f"{method}={root}/maps/{method}" for method in methods), *more)


def run(root, methods, save_path, *more):
    script.main(arguments(root, methods, "--save_path", save_path, *more))
    return json.loads((save_path / "results.json").read_text())


@pytest.fixture
def copy(root, tmp_path):
    """A copy of these files, to be changed."""
    return shutil.copytree(root, tmp_path / "copy")


@pytest.fixture(scope="module")
def results(root):
    run(root, METHODS, root / "results")
    return root / "results"


@pytest.fixture(scope="module")
def scores(results):
    return json.loads((results / "results.json").read_text())


def test_the_figures_are_those_of_single_runs_to_the_last_digit(root, scores, tmp_path):
    assert list(scores) == list(METHODS) and list(scores["blur"]) == ["easy", "hard", "both"]
    for method in METHODS:
        assert scores[method] == run(root, [method], tmp_path / method)
        assert read_csv(tmp_path / method / "results.csv")[0]["method"] == method


def test_all_files_are_written_and_name_the_methods(results, scores):
    examples = {f"examples.{kind}" for kind in ("png", "pdf")}
    assert {path.name for path in results.iterdir()} == FILES | {"comparison.csv"} | examples
    for row in read_csv(results / "results.csv"):
        assert float(row["maxFm"]) == scores[row["method"]][row["dataset"]]["maxFm"]
    images = read_csv(results / "per_image.csv")
    assert len(images) == 3 * 8 and {row["method"] for row in images} == set(METHODS)
    kinds = {(row["kind"], row["group"]) for row in read_csv(results / "groups.csv")}
    assert {("kind", "fish"), ("kind", "crab"), ("object size", "over 10 %")} <= kinds
    assert all(Image.open(path).width > 600 for path in results.glob("*.png"))
    assert all(path.read_bytes().startswith(b"%PDF") for path in results.glob("*.pdf"))
    curves = np.load(results / "curves.npz")
    assert curves["methods"].tolist() == list(METHODS) and curves["datasets"].tolist() == ["easy", "hard", "both"]
    assert [curve.max() for curve in curves["Fm"][2]] == [scores[method]["both"]["maxFm"] for method in METHODS]
    assert curves["precision"].shape == curves["Em"].shape == (3, 3, 256)


def test_the_comparison_has_the_differences_of_the_table(results, scores):
    lines = read_csv(results / "comparison.csv")
    assert len(lines) == 2 * 3 * 9
    for line in lines:
        method, dataset, metric = line["method"], line["dataset"], line["metric"]
        difference = scores["blur"][dataset][metric] - scores[method][dataset][metric]
        assert float(line["difference"]) == pytest.approx(difference, abs=1e-15)
        assert float(line["low"]) <= float(line["high"]) and line["p"] == line["p_holm"] == ""  # too few images


def test_the_latex_table_marks_the_best_and_the_second_of_each_column(results):
    rows = [line for line in (results / "results.tex").read_text().splitlines() if line.endswith(" \\\\")]
    assert rows[0].count("\\multicolumn{9}{c}") == 3 and [row.split(" & ")[0] for row in rows[2:]] == [
        *METHODS[1:],
        METHODS[0],
    ]
    for column in zip(*(row.removesuffix(" \\\\").split(" & ")[1:] for row in rows[2:]), strict=True):
        assert sum("\\textbf" in cell for cell in column) == 1 == sum("\\underline" in cell for cell in column)
        assert all(re.fullmatch(r"[^\d]*\d\.\d{3}[^\d]*", cell) for cell in column)


def test_the_page_switches_between_methods_and_shows_where_the_first_loses(results):
    page = (results / "report.html").read_text()
    assert re.findall("<h2>(.*)</h2>", page)[:4] == [
        "Is it more than chance?", "Curves", "Where does it fail?", "Worst 8 of 8 by S-measure of blur"
    ]  # fmt: skip
    cards = page.count('<div class="card">')
    assert page.count('type="radio"') == 3 * cards and page.count("<figcaption>") == (2 + 2 * 3) * cards
    images = read_csv(results / "per_image.csv")
    figures = {(row["dataset"], row["image"], row["method"]): float(row["Smeasure"]) for row in images}
    losses = {key[:2]: figures[key[:2] + ("noise",)] - value for key, value in figures.items() if key[2] == "blur"}
    section = page.split("Where blur loses most against noise</h2>")[1]
    name, dataset = re.search(r'class="name">(.*?)</div>\s*<div class="set">(.*?)<', section).groups()
    assert (dataset, name) == max(losses, key=losses.get)


def test_the_examples_are_those_asked_for_else_those_that_differ_most(root, results, tmp_path):
    run(root, ["blur", "shift"], tmp_path, "--examples", "easy/fish_003", "plant_002")
    shown = [np.array(Image.open(folder / "examples.png")) for folder in (results, tmp_path)]
    assert shown[0].shape[0] > 1.5 * shown[1].shape[0]  # six rows, three rows


def test_a_line_warns_of_the_masks_of_a_set_and_another_of_the_maps_of_a_method(copy, capsys):
    mask = copy / "data/easy/gt/crab_001.png"
    Image.fromarray(np.array(Image.open(mask)) // 255).save(mask)
    for path in (copy / "maps/noise/hard").iterdir():
        Image.fromarray(~np.array(Image.open(path))).save(path)
    run(copy, METHODS, copy / "out")
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")] == [
        "warning: easy: 1 of 4 masks: 0/1 mask: reads as black; make the object 255 (crab_001.png)",
        "warning: noise, hard: 4 of 4 maps score higher inverted: their MAE is above 0.5",
    ]


def test_only_images_of_which_every_method_has_a_map_are_scored(copy, capsys):
    (copy / "maps/noise/easy/fish_003.png").unlink()
    shutil.rmtree(copy / "maps/shift/hard")
    left = run(copy, METHODS, copy / "out", "--allow_missing")
    assert [left[method]["easy"]["images"] for method in left] == [3, 3, 3]
    assert list(left["blur"]) == ["easy", "hard", "both"] and list(left["shift"]) == ["easy"]
    printed = capsys.readouterr().out
    assert "noise, easy: 1 of 4 ground truths without a map, left out" in printed
    assert "easy: 1 image left out because some method has no map" in printed
    shutil.rmtree(copy / "maps/shift/easy")
    status, line = failure(script.main, arguments(copy, METHODS, "--allow_missing"), capsys)
    assert status == 2 and line.endswith("shift: no image has a map of this method and of all others")


def test_methods_are_named_after_their_folders_and_the_settings_of_their_maps_are_shown(copy):
    (copy / "maps/noise/easy" / output.SETTINGS).write_text('{"checkpoint": "SAM2-UNeXT-20.pth"}')
    options = ["--pred_path", f"{copy}/maps/noise", f"Ref={copy}/maps/shift", "--metrics", "MAE", "maxEm"]
    scores = run(copy, ["blur"], copy / "out", *options)
    assert list(scores) == ["noise", "Ref"] and list(scores["Ref"]["easy"])[-1] == "maxEm"
    assert f"noise: maps in {copy}/maps/noise, checkpoint SAM2-UNeXT-20.pth" in (copy / "out/report.html").read_text()
