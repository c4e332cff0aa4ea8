"""eval.py on a benchmark: the table, the page and all other files that it writes."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import recipe
from conftest import eval_arguments, failure, save_image

import eval as script
from evaluation import benchmarks

SETS = ("DIS-VD", "DIS-TE1", "DIS-TE2", "DIS-TE3", "DIS-TE4")
FIGURES = {f"{name}.{kind}" for name in ("precision_recall", "f_measure", "e_measure") for kind in ("pdf", "png")}
TABLES = {"groups.csv", "per_image.csv", "results.csv", "results.json", "results.md", "results.tex", "scores.npz"}
pytestmark = pytest.mark.usefixtures("without_figures")
FILES = {"curves.npz", "report.html"} | FIGURES | TABLES


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A miniature DIS5K with maps as the authors' archive may hold them; each set has other pairs."""
    root = tmp_path_factory.mktemp("dis")
    cases = {name: case for name, case in recipe.metric_cases(0).items() if name.startswith("case")}
    for i, name in enumerate(SETS):
        for stem, (prediction, mask) in list(cases.items())[: i + 1]:
            save_image(root / "DIS5K" / name / "im" / f"{stem}.jpg", np.dstack([prediction] * 3))
            save_image(root / "DIS5K" / name / "gt" / f"{stem}.png", mask)
            save_image(root / "maps" / name.lower().replace("-", "_") / f"{stem}.png", prediction)
    return root


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def arguments(root, *more):
    options = ["--benchmark", "dis5k", root / "DIS5K", "--pred_path", root / "maps", "--save_path", root / "results"]
    return eval_arguments(*options, "--workers", 1, *more)


def run(root, save_path, *more):
    """The content of results.json."""
    script.main(arguments(root, "--save_path", save_path, *more))
    return json.loads((save_path / "results.json").read_text())


@pytest.fixture(scope="module")
def results(archive):
    script.main(arguments(archive, "--json", archive / "scores.json"))
    return archive / "results"


def test_all_files_are_written_and_agree(results):
    assert {path.name for path in results.iterdir()} == FILES
    scores, benchmark = json.loads((results / "results.json").read_text()), benchmarks.load("DIS5K")
    assert scores == json.loads((results.parent / "scores.json").read_text())
    assert list(scores) == [*SETS, "DIS-TE(1-4)"]
    rows = {(row["dataset"], row["method"]): row for row in read_csv(results / "results.csv")}
    texts = [(results / name).read_text().replace("$", "") for name in ("report.html", "results.md", "results.tex")]
    for name, figures in scores.items():
        assert {metric: float(rows[name, "this run"][metric]) for metric in figures} == figures
        published = benchmarks.published(benchmark, name)
        for metric in benchmark.columns:
            for method in ("SAM2-UNeXT", "BiRefNet"):
                assert float(rows[name, f"{method}, paper"][metric]) == published[method][metric]
            difference = figures[metric] - published["SAM2-UNeXT"][metric]
            assert float(rows[name, "difference"][metric]) == pytest.approx(difference)
            assert all(f"{figures[metric]:.3f}" in text and f"{difference:+.3f}" in text for text in texts)
    for text in texts:
        assert "meanEm" in text or "E_\\phi" in text
        assert "maxFm" not in text  # no column of this benchmark
        assert "DIS-VD: 1 of 470 pairs" in text  # the archive is incomplete


def test_the_row_of_several_sets_is_the_mean_over_their_images(results):
    together = json.loads((results / "results.json").read_text())["DIS-TE(1-4)"]
    images = [row for row in read_csv(results / "per_image.csv") if row["dataset"] != "DIS-VD"]
    assert together["images"] == len(images) == 2 + 3 + 4 + 5
    for metric in ("Smeasure", "wFmeasure", "meanEm", "MAE"):
        assert together[metric] == pytest.approx(np.mean([float(row[metric]) for row in images]), rel=1e-12)


def test_the_page_shows_images_and_curves_and_needs_no_other_file(results):
    page = (results / "report.html").read_text()
    assert page.count("<figcaption>") == 4 * 15 and page.count('src="data:image/png') == 3
    assert all(url.startswith("data:image/") for url in re.findall(r'src="([^"]*)"', page)) and "http" not in page


def test_a_set_without_maps_is_an_error_unless_allowed_or_not_asked_for(archive, tmp_path, capsys):
    shutil.copytree(archive / "maps/dis_te1", tmp_path / "dis_te1")
    (tmp_path / "dis_te2").mkdir()
    more = ("--pred_path", tmp_path)
    for sets, message in (
        (["DIS-TE1", "DIS-VD"], "DIS-VD: there is no folder of that name"),
        (["DIS-TE1", "DIS-TE2"], "dis_te2: has no images"),
    ):
        status, line = failure(script.main, arguments(archive, *more, "--sets", *sets), capsys)
        assert status == 2 and message in line
    assert list(run(archive, tmp_path / "out", *more, "--sets", "DIS-TE1")) == ["DIS-TE1"]
    assert list(run(archive, tmp_path / "out", *more, "--allow_missing")) == ["DIS-TE1"]
    assert "DIS-VD: not scored" in capsys.readouterr().out


def test_a_benchmark_that_is_added_to_the_yaml_file_needs_no_published_scores(archive, tmp_path, monkeypatch):
    monkeypatch.setitem(benchmarks.BUILT_IN, "my_set", {"test": {"mine": {"folder": "DIS-TE4"}}})
    maps = archive / "maps/dis_te4"  # of a single set: in the folder itself
    run(archive, tmp_path, "--benchmark", "My_Set", archive / "DIS5K", "--pred_path", maps)
    assert [(row["dataset"], row["method"]) for row in read_csv(tmp_path / "results.csv")] == [("mine", "this run")]


def test_plain_folders_have_no_published_rows_and_show_images_if_named(archive, tmp_path):
    options = ["--dataset_name", "mine", "--pred_path", archive / "maps/dis_te4", "--save_path", tmp_path]
    options += ["--gt_path", archive / "DIS5K/DIS-TE4/gt"]
    shutil.copytree(archive / "DIS5K/DIS-TE4/im", tmp_path / "im")
    (tmp_path / "im/case0.jpg").unlink()
    for more, panels in (([], 3 * 5), (["--image_path", tmp_path / "im"], 4 * 5 - 1)):
        script.main(eval_arguments(*options, *more))
        page = (tmp_path / "report.html").read_text()
        assert page.count("<figcaption>") == panels and ", paper" not in page
        assert [row["method"] for row in read_csv(tmp_path / "results.csv")] == ["this run"]
        assert {path.name for path in tmp_path.iterdir()} == FILES - FIGURES | {"im"}


def test_conflicting_options_are_errors(archive, capsys):
    plain = ["--dataset_name", "x", "--pred_path", archive]
    for args, message in (
        (arguments(archive, "--gt_path", archive), "--benchmark knows names, ground truth and images"),
        (arguments(archive, "--pred_path", archive, archive), "two methods are called"),
        (arguments(archive, "--examples", "DIS-VD/case9"), "no image that is scored is called DIS-VD/case9"),
        (eval_arguments(*plain, "--gt_path", archive, "--sets", "x"), "--sets belongs to --benchmark"),
        (eval_arguments(*plain), "give --benchmark, or --gt_path"),
    ):
        status, line = failure(script.main, args, capsys)
        assert status == 2 and message in line


def test_maps_are_in_a_folder_of_the_sets_name_exactly_or_but_for_case_and_punctuation(tmp_path):
    for name in ("a/easy", "a/EASY_", "b/ЛЕГКО", "b/ТРУДНО"):
        (tmp_path / name).mkdir(parents=True)
    assert script.map_folder(tmp_path / "a", "easy", is_single=False) == tmp_path / "a/easy"
    assert script.map_folder(tmp_path / "b", "легко", is_single=False) == tmp_path / "b/ЛЕГКО"
    with pytest.raises(ValueError, match="Easy: several folders"):
        script.map_folder(tmp_path / "a", "Easy", is_single=False)
