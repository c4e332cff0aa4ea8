"""eval.py with several methods: what it writes agrees with runs of one, and is what a paper needs."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import benchmark_eval
import numpy as np
import pytest
from conftest import ROOT, failure
from PIL import Image

import eval as script
from unext import output

METHODS = ("blur", "noise", "erosion", "dilation", "shift")
FIGURES = ("precision_recall", "f_measure", "e_measure", "examples")
DOCUMENT = r"""\documentclass{article}
\IfFileExists{booktabs.sty}{\usepackage{booktabs}}{\let\toprule\hline\let\midrule\hline\let\bottomrule\hline
  \def\cmidrule(#1)#2{\cline{#2}}}
\begin{document}\input{results.tex}\end{document}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("five")
    benchmark_eval.write_methods(folder, 4, (60, 80))
    return folder


def run(root, methods, save_path, *more):
    command = benchmark_eval.eval_command(root, methods, "", *map(str, more))
    args = script.get_args_parser().parse_args(command[2:])
    args.save_path = save_path
    script.main(args)
    return json.loads((save_path / "results.json").read_text())


@pytest.fixture(scope="module")
def results(root):
    run(root, METHODS, root / "results")
    return root / "results"


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_figures_are_those_of_single_runs_to_the_last_digit(root, results, tmp_path):
    together = json.loads((results / "results.json").read_text())
    assert list(together) == list(METHODS) and list(together["blur"]) == ["easy", "hard", "both"]
    for method in METHODS:
        assert together[method] == run(root, [method], tmp_path / method)
        assert read_csv(tmp_path / method / "results.csv")[0]["method"] == method


def test_the_figures_are_those_of_pysodmetrics(root, results, tmp_path):
    ours = json.loads((results / "results.json").read_text())
    library = run(root, METHODS, tmp_path, "--engine", "pysodmetrics")
    for method in METHODS:
        for row in ("easy", "hard", "both"):
            assert ours[method][row] == pytest.approx(library[method][row], abs=1e-6)


def test_all_files_are_written_and_name_the_methods(results):
    expected = {"comparison.csv", "curves.npz", "groups.csv", "per_image.csv", "report.html"}
    expected |= {f"results.{kind}" for kind in ("csv", "json", "md", "tex")}
    expected |= {f"{name}.{kind}" for name in FIGURES for kind in ("png", "pdf")}
    assert {path.name for path in results.iterdir()} == expected
    scores = json.loads((results / "results.json").read_text())
    for row in read_csv(results / "results.csv"):
        assert float(row["maxFm"]) == scores[row["method"]][row["dataset"]]["maxFm"]
    images = read_csv(results / "per_image.csv")
    assert len(images) == 5 * 8 and {row["method"] for row in images} == set(METHODS)
    kinds = {(row["kind"], row["group"]) for row in read_csv(results / "groups.csv")}
    assert {("kind", "fish"), ("kind", "crab"), ("object size", "over 10 %")} <= kinds
    for name in FIGURES:
        assert Image.open(results / f"{name}.png").width > 600
        assert (results / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_the_comparison_has_the_differences_of_the_table(results):
    scores = json.loads((results / "results.json").read_text())
    lines = read_csv(results / "comparison.csv")
    assert len(lines) == 4 * 3 * 9
    for line in lines:
        method, dataset, metric = line["method"], line["dataset"], line["metric"]
        difference = scores["blur"][dataset][metric] - scores[method][dataset][metric]
        assert float(line["difference"]) == pytest.approx(difference, abs=1e-15)
        assert float(line["low"]) <= float(line["high"]) and 0 < float(line["p"]) <= float(line["p_holm"]) <= 1


def test_the_values_of_the_curves_are_in_a_file(results):
    curves = np.load(results / "curves.npz")
    scores = json.loads((results / "results.json").read_text())
    assert curves["methods"].tolist() == list(METHODS) and curves["datasets"].tolist() == ["easy", "hard", "both"]
    for i, method in enumerate(METHODS):
        assert curves["Fm"][2, i].max() == scores[method]["both"]["maxFm"]
    assert curves["precision"].shape == curves["Em"].shape == (3, 5, 256)


def test_the_latex_table_has_data_sets_side_by_side_and_marks(results):
    lines = (results / "results.tex").read_text().splitlines()
    rows = [line for line in lines if line.endswith(" \\\\")]
    assert rows[0].count("\\multicolumn{9}{c}") == 3 and "{easy (4)}" in rows[0]
    assert "\\cmidrule(lr){2-10} \\cmidrule(lr){11-19} \\cmidrule(lr){20-28}" in lines
    assert [row.split(" & ")[0] for row in rows[1:]] == ["method", *METHODS]
    cells = [row.removesuffix(" \\\\").split(" & ")[1:] for row in rows[2:]]
    for i in range(27):
        column = [row[i] for row in cells]
        assert sum("\\textbf" in cell for cell in column) == 1 == sum("\\underline" in cell for cell in column)
        assert all(re.fullmatch(r"[^\d]*\d\.\d{3}[^\d]*", cell) for cell in column)


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="there is no LaTeX")
def test_the_latex_table_compiles(results, tmp_path):
    shutil.copy(results / "results.tex", tmp_path)
    (tmp_path / "document.tex").write_text(DOCUMENT)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "document.tex"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "document.pdf").stat().st_size > 10_000


def test_published_methods_are_below_a_rule(tmp_path):
    benchmark_eval.write_methods(tmp_path, 3, (40, 60))
    shutil.copytree(tmp_path / "data/easy", tmp_path / "DIS5K/DIS-VD")
    for method in ("blur", "noise"):
        shutil.copytree(tmp_path / "maps" / method / "easy", tmp_path / "own" / method / "DIS-VD")
    folders = [f"{tmp_path}/own/{method}" for method in ("blur", "noise")]  # without names
    words = ["--benchmark", "DIS5K", tmp_path / "DIS5K", "--sets", "DIS-VD", "--pred_path", *folders]
    words += ["--save_path", tmp_path / "out"]
    script.main(script.get_args_parser().parse_args([str(word) for word in words]))
    tex = (tmp_path / "out/results.tex").read_text()
    peer = "BiRefNet, paper & 0.898 & 0.854 & 0.931 & 0.038"
    assert tex.index("noise & ") < tex.rindex("\\midrule") < tex.index(peer)
    assert "| BiRefNet, paper | 0.898 | 0.854 | 0.931 | 0.038 |" in (tmp_path / "out/results.md").read_text()


def test_the_page_switches_between_methods_and_shows_where_the_first_loses(results):
    page = (results / "report.html").read_text()
    for title in ("Is it more than chance?", "Where does it fail?", "Worst 4 of 8 by S-measure of blur"):
        assert f">{title}</h2>" in page
    cards = page.count('<div class="card">')
    assert page.count('type="radio"') == 5 * cards and page.count("<figcaption>") == (2 + 2 * 5) * cards
    images = read_csv(results / "per_image.csv")
    scores = {(row["dataset"], row["image"], row["method"]): float(row["Smeasure"]) for row in images}
    losses = {key[:2]: scores[key[:2] + ("noise",)] - value for key, value in scores.items() if key[2] == "blur"}
    section = page.split("Where blur loses most against noise</h2>")[1]
    name, dataset = re.search(r'class="name">(.*?)</div>\s*<div class="set">(.*?)<', section).groups()
    assert (dataset, name) == max(losses, key=losses.get)


def test_the_examples_are_those_asked_for_else_those_that_differ_most(root, results, tmp_path, capsys):
    run(root, ["blur", "shift"], tmp_path, "--examples", "easy/fish_003", "plant_002")
    shown = [np.array(Image.open(folder / "examples.png")) for folder in (results, tmp_path)]
    assert shown[0].shape[0] > 1.5 * shown[1].shape[0]  # six rows, three rows
    command = benchmark_eval.eval_command(root, ["blur"], "out", "--examples", "hard/none")
    status, line = failure(script.main, script.get_args_parser().parse_args(command[2:]), capsys)
    assert status == 2 and "no image that is scored is called hard/none" in line


def test_one_line_warns_of_the_masks_of_a_set_and_one_of_the_maps_of_a_method(root, tmp_path, capsys):
    shutil.copytree(root, tmp_path / "root")
    mask = tmp_path / "root/data/easy/gt/crab_001.png"
    Image.fromarray(np.array(Image.open(mask)) // 255).save(mask)
    for path in (tmp_path / "root/maps/noise/hard").iterdir():
        Image.fromarray(~np.array(Image.open(path))).save(path)
    run(tmp_path / "root", METHODS, tmp_path / "out")
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")] == [
        "warning: easy: 1 of 4 masks: 0/1 mask: reads as black; make the object 255 (crab_001.png)",
        "warning: noise, hard: 4 of 4 maps score higher inverted: their MAE is above 0.5",
    ]


def test_methods_may_call_their_maps_differently(root, results, tmp_path, capsys):
    for method in ("blur", "shift"):
        shutil.copytree(root / "maps" / method, tmp_path / "maps" / method)
    for path in (tmp_path / "maps/shift").glob("*/*.png"):
        path.rename(path.with_stem(f"{path.stem}_sal"))
    shutil.copytree(root / "data", tmp_path / "data")
    shutil.copy(root / "five.yaml", tmp_path)
    command = benchmark_eval.eval_command(tmp_path, ["blur", "shift"], "out")
    status, line = failure(script.main, script.get_args_parser().parse_args(command[2:]), capsys)
    assert status == 2 and line.endswith("shift/easy has the name of a ground truth; give --map_suffix=_sal")
    scores = run(tmp_path, ["blur", "shift"], tmp_path / "out", "--map_suffix", "_sal")
    every = json.loads((results / "results.json").read_text())
    assert scores == {method: every[method] for method in ("blur", "shift")}


def test_only_images_of_which_every_method_has_a_map_are_scored(root, tmp_path, capsys):
    for method in ("blur", "noise", "shift"):
        shutil.copytree(root / "maps" / method, tmp_path / "maps" / method)
    (tmp_path / "maps/noise/easy/fish_003.png").unlink()
    shutil.rmtree(tmp_path / "maps/shift/hard")
    shutil.copytree(root / "data", tmp_path / "data")
    shutil.copy(root / "five.yaml", tmp_path)
    args = benchmark_eval.eval_command(tmp_path, ["blur", "noise", "shift"], "out")[2:]
    status, line = failure(script.main, script.get_args_parser().parse_args(args), capsys)
    assert status == 2 and "hard: there is no folder of that name" in line
    scores = run(tmp_path, ["blur", "noise", "shift"], tmp_path / "out", "--allow_missing")
    assert [scores[method]["easy"]["images"] for method in scores] == [3, 3, 3]
    assert scores["blur"]["hard"]["images"] == 4 and list(scores["shift"]) == ["easy"]
    printed = capsys.readouterr().out
    assert "noise, easy: 1 of 4 ground truths without a map, left out" in printed
    assert "easy: 1 image left out, of which not every method has a map" in printed


def test_names_in_any_script_are_drawn_without_warnings_and_settings_are_shown(root, tmp_path):
    shutil.copytree(root / "maps/noise", tmp_path / "我们的方法")
    (tmp_path / "我们的方法/easy" / output.SETTINGS).write_text('{"checkpoint": "SAM2-UNeXT-20.pth"}')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words = ["--pred_path", f"{tmp_path}/我们的方法", f"Ref={root}/maps/shift", "--metrics", "MAE", "maxEm"]
        run(root, ["blur"], tmp_path / "out", *words)
    page = (tmp_path / "out/report.html").read_text()
    assert "我们的方法, easy: maps of checkpoint SAM2-UNeXT-20.pth" in page
    assert list(json.loads((tmp_path / "out/results.json").read_text())["Ref"]["easy"])[-1] == "maxEm"


@pytest.mark.posix
def test_the_recipe_takes_several_methods(root, tmp_path):
    folders = " ".join(f"{method}={root}/maps/{method}" for method in ("blur", "shift"))
    command = f"bash {ROOT}/eval.sh {root}/five.yaml {root}/data --pred_path {folders}"
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run(command.split(), cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert list(json.loads((tmp_path / "runs/five/results/results.json").read_text())) == ["blur", "shift"]
