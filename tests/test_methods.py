"""evaluation/methods.py: a file of methods, several trainings of a method, and what tables say of methods."""

import json

import numpy as np
import pytest
from conftest import eval_arguments, failure
from test_compare import evaluation, random_scores
from test_eval_benchmark import read_csv
from test_eval_methods import write_methods

import eval as script
from evaluation import compare, fonts, metrics, results, tables
from evaluation.results import About

pytestmark = pytest.mark.usefixtures("without_figures")
FILE = """
ours: {folder: [maps/blur, maps/noise], name: Ours & all, cite: us2025, year: 2025}
maps/shift: {cite: "\\\\citep[v2]{a}", venue: CVPR, suffix: _sal}
名字: maps/blur
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Maps of three methods, those of "shift" called NAME_sal.png, and methods.yaml."""
    folder = write_methods(tmp_path_factory.mktemp("methods"))
    for path in (folder / "maps/shift").glob("*/*.png"):
        path.rename(path.with_stem(f"{path.stem}_sal"))
    (folder / "methods.yaml").write_text(FILE)
    return folder


def run(root, save_path, *methods):
    options = ["--benchmark", root / "sets.yaml", root / "data", "--workers", 1, "--save_path", save_path]
    script.main(eval_arguments(*options, "--pred_path", *methods))
    return json.loads((save_path / "results.json").read_text())


def test_a_file_gives_order_names_citations_columns_and_the_names_of_maps(root, tmp_path):
    scores = run(root, tmp_path, root / "methods.yaml")
    assert list(scores) == ["Ours & all", "maps/shift", "名字"]
    assert scores["名字"] == run(root, tmp_path / "a", f"{root}/maps/blur")
    lines = (tmp_path / "results.tex").read_text().splitlines()
    assert lines[1] == "% needs XeLaTeX or LuaLaTeX and \\usepackage{fontspec}, for 名字"
    rows = [line.removesuffix(" \\\\").split(" & ")[:3] for line in lines if line.endswith(" \\\\")][1:]
    assert [row[0].split("~") for row in (rows[0], rows[1], rows[3])] == [
        ["method"], ["maps/shift", "\\citep[v2]{a}"], ["Ours \\& all", "\\cite{us2025}"]
    ]  # fmt: skip
    assert [row[1:] for row in rows] == [["venue", "year"], ["CVPR", ""], ["", ""], ["", "2025"]]


def test_several_trainings_are_shown_as_mean_and_deviation(root, tmp_path):
    names = ("blur", "noise")
    single = [run(root, tmp_path / name, f"ours={root}/maps/{name}") for name in names]
    scores = run(root, tmp_path / "all", *(f"ours={root}/maps/{name}" for name in names), f"other={root}/maps/blur")
    for row, figures in scores["ours"].items():
        assert figures["trainings"] == 2 and figures["images"] == single[0][row]["images"]
        for metric in metrics.NINE:
            values = [of_rows[row][metric] for of_rows in single]
            assert figures[metric] == pytest.approx(np.mean(values), abs=1e-15)
            assert figures["std"][metric] == pytest.approx(np.std(values, ddof=1), abs=1e-15)
    assert "std" not in scores["other"]["easy"]
    line = next(line for line in (tmp_path / "all/results.md").read_text().splitlines() if line.startswith("| ours"))
    assert line.count(" ± ") == 3 * 9
    images = [read_csv(tmp_path / name / "per_image.csv")[0] for name in (*names, "all")]
    assert float(images[2]["maxFm"]) == pytest.approx(np.mean([float(row["maxFm"]) for row in images[:2]]))
    options = [f"ours={tmp_path / name}" for name in names] + [tmp_path / "all"]
    script.main(eval_arguments("--save_path", tmp_path / "again", "--from", *options[:2]))
    assert json.loads((tmp_path / "again/results.json").read_text()) == scores["ours"]


def test_the_comparison_is_of_the_mean_over_trainings():
    scored = evaluation({"a": random_scores(25, 1), "b": random_scores(25, 2), "other": random_scores(25, 3)})
    about = {"a": About("ours"), "b": About("ours")}
    together = results.by_method(results.replace(scored, about=about))
    assert together.methods == ("ours", "other")
    for line in compare.differences(together):
        values = [scored.means[key]["set"].figure(line.metric) for key in scored.methods]
        assert line.difference == pytest.approx((values[0] + values[1]) / 2 - values[2], abs=1e-12)
    resampled = compare.resample(together.images, "ours", ["other"], ["maxFm"], 40)["other", "maxFm"]
    single = [compare.resample(scored.images, key, ["other"], ["maxFm"], 40)["other", "maxFm"] for key in ("a", "b")]
    assert resampled == pytest.approx(np.mean(single, axis=0), abs=1e-6)


@pytest.mark.parametrize(
    "content, message",
    [
        ("a: {folder: x, colour: red}", "a: colour is unknown; known are folder, name, cite"),
        ("a: {folder: []}", "a: folder is not a text"),
        ("a: x\na: y", "a occurs twice"),
        ("a: x\nb: {name: a}", "two methods are called a"),
        ("- a", "does not describe methods, see docs/benchmarks.md"),
        ("{}", "it has no methods"),
        ("a: maps/none", "maps/none: there is no such folder"),
    ],
)
def test_a_file_that_needs_mending_is_one_line(content, message, root, tmp_path, capsys):
    (root / "wrong.yaml").write_text(content)
    options = ["--benchmark", root / "sets.yaml", root / "data", "--save_path", tmp_path]
    status, line = failure(script.main, eval_arguments(*options, "--pred_path", root / "wrong.yaml"), capsys)
    assert status == 2 and message in line


def test_names_beyond_latin_are_set_in_a_font_of_the_system_if_it_has_one(monkeypatch):
    assert fonts.letters(["SINet é", "U²-Net", "名字", "字"], fonts.LATIN) == "名字"
    for family, name in (("Noto", "{\\fontspec{Noto}名字\\_1}"), (None, "名字\\_1")):
        monkeypatch.setattr(fonts, "family_for", lambda letters, family=family: family)
        assert tables.latex_text("名字_1") == name and tables.latex_text("é_1") == "é\\_1"


def test_metrics_are_known_in_any_case(capsys):
    assert eval_arguments("--metrics", "smeasure", "MAXFM", "all").metrics == ["Smeasure", "maxFm", "all"]
    with pytest.raises(SystemExit):
        eval_arguments("--metrics", "none")
