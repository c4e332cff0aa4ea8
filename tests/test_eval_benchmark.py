"""eval.py on a benchmark: the table, the page and all other files that it writes."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import recipe
from conftest import failure, save_image

import eval as script
from evaluation import benchmarks, metrics

SETS = ("DIS-VD", "DIS-TE1", "DIS-TE2", "DIS-TE3", "DIS-TE4")
FILES = ["curves.png", "groups.csv", "per_image.csv", "report.html"]
FILES += ["results.csv", "results.json", "results.md", "results.tex"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A miniature DIS5K with maps as the authors' archive may hold them; each set has other pairs."""
    root = tmp_path_factory.mktemp("dis")
    cases = {name: case for name, case in recipe.metric_cases(0).items() if name.startswith("case")}
    for i, name in enumerate(SETS):
        for stem, (prediction, mask) in list(cases.items())[: i + 1]:
            save_image(root / "DIS5K" / name / "im" / f"{stem}.jpg", np.dstack([prediction] * 3))
            save_image(root / "DIS5K" / name / "gt" / f"{stem}.png", mask)
            save_image(root / "download" / "maps" / name.lower().replace("-", "_") / f"{stem}.png", prediction)
    return root


def arguments(root, *more):
    words = ["--benchmark", "dis5k", root / "DIS5K", "--pred_path", root / "download", *more]
    words += [] if "--save_path" in more else ["--save_path", root / "results"]
    return script.get_args_parser().parse_args([str(word) for word in words])


@pytest.fixture(scope="module")
def results(archive):
    script.main(arguments(archive, "--json", archive / "scores.json"))
    return archive / "results"


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_all_files_are_written_and_agree(results):
    assert sorted(path.name for path in results.iterdir()) == FILES
    scores = json.loads((results / "results.json").read_text())
    assert scores == json.loads((results.parent / "scores.json").read_text())
    assert list(scores) == [*SETS, "DIS-TE(1-4)"]
    rows = {(row["dataset"], row["method"]): row for row in read_csv(results / "results.csv")}
    page, markdown, tex = ((results / name).read_text() for name in ("report.html", "results.md", "results.tex"))
    for name, figures in scores.items():
        assert int(rows[name, "this run"]["images"]) == figures["images"]
        for metric in metrics.NINE:
            assert float(rows[name, "this run"][metric]) == figures[metric]
        published = benchmarks.published(benchmarks.load("DIS5K"), name)
        for metric in benchmarks.load("DIS5K").columns:
            assert float(rows[name, "SAM2-UNeXT, paper"][metric]) == published["SAM2-UNeXT"][metric]
            assert float(rows[name, "BiRefNet, paper"][metric]) == published["BiRefNet"][metric]
            difference = figures[metric] - published["SAM2-UNeXT"][metric]
            assert float(rows[name, "difference"][metric]) == pytest.approx(difference)
            for text in (page, markdown, tex):
                assert f"{figures[metric]:.3f}" in text and f"{difference:+.3f}" in text
    for text in (page, markdown, tex):
        assert "meanEm" in text or "E_\\phi" in text
        assert "maxFm" not in text  # no column of this benchmark


def test_the_row_of_several_sets_is_the_mean_over_their_images(results):
    scores = json.loads((results / "results.json").read_text())
    images = [row for row in read_csv(results / "per_image.csv") if row["dataset"] != "DIS-VD"]
    assert scores["DIS-TE(1-4)"]["images"] == len(images) == 2 + 3 + 4 + 5
    for metric in ("Smeasure", "wFmeasure", "meanEm", "MAE"):
        mean = np.mean([float(row[metric]) for row in images])
        assert scores["DIS-TE(1-4)"][metric] == pytest.approx(mean, rel=1e-12)


def test_the_page_shows_the_worst_and_best_images_and_needs_no_other_file(results):
    page = (results / "report.html").read_text()
    shown = re.findall(r'<div class="name">(.*?)</div>', page)
    images = sorted(read_csv(results / "per_image.csv"), key=lambda row: float(row["Smeasure"]))
    assert shown[0] == images[0]["image"]
    assert shown[5] == images[-1]["image"]
    assert len(images) == 15 and len(shown) == 7  # 5 worst and 2 best
    assert page.count("<figcaption>") == 4 * 7
    assert all(url.startswith("data:image/") for url in re.findall(r'src="([^"]*)"', page)) and "http" not in page


def test_a_set_without_maps_is_an_error_unless_allowed_or_not_asked_for(archive, tmp_path, capsys):
    for name in ("dis_te1", "dis_te2"):
        (tmp_path / name).symlink_to(archive / "download" / "maps" / name)
    status, line = failure(script.main, arguments(archive, "--pred_path", tmp_path, "--save_path", tmp_path), capsys)
    assert status == 2 and "DIS-VD: there is no folder of that name" in line and "--allow_missing" in line
    more = ("--pred_path", tmp_path, "--save_path", tmp_path / "results")
    script.main(arguments(archive, *more, "--allow_missing"))
    assert list(json.loads((tmp_path / "results/results.json").read_text())) == ["DIS-TE1", "DIS-TE2"]
    assert "DIS-VD: not scored" in capsys.readouterr().out
    script.main(arguments(archive, *more, "--sets", "DIS-TE2"))
    assert list(json.loads((tmp_path / "results/results.json").read_text())) == ["DIS-TE2"]


def test_a_single_set_may_have_its_maps_in_the_folder_itself(archive, tmp_path):
    maps = archive / "download" / "maps" / "dis_te4"
    script.main(arguments(archive, "--pred_path", maps, "--save_path", tmp_path, "--sets", "DIS-TE4"))
    assert json.loads((tmp_path / "results.json").read_text())["DIS-TE4"]["images"] == 5


def test_a_benchmark_that_is_added_to_the_yaml_file_needs_no_published_figures(archive, tmp_path, monkeypatch):
    monkeypatch.setitem(benchmarks.PAPER, "my_set", {"test": {"mine": {"folder": "DIS-TE4"}}})
    words = ["--benchmark", "My_Set", archive / "DIS5K", "--pred_path", archive / "download/maps/dis_te4"]
    script.main(script.get_args_parser().parse_args([str(word) for word in (*words, "--save_path", tmp_path)]))
    assert [(row["dataset"], row["method"]) for row in read_csv(tmp_path / "results.csv")] == [("mine", "this run")]


def test_plain_folders_have_no_published_rows_and_show_images_if_named(archive, tmp_path):
    words = ["--dataset_name", "mine", "--pred_path", archive / "download/maps/dis_te4", "--save_path", tmp_path]
    words += ["--gt_path", archive / "DIS5K/DIS-TE4/gt"]
    for more, panels in (([], 3), (["--image_path", archive / "DIS5K/DIS-TE4/im"], 4)):
        script.main(script.get_args_parser().parse_args([str(word) for word in words + more]))
        page = (tmp_path / "report.html").read_text()
        assert page.count("<figcaption>") == panels * 5 and ", paper" not in page
        assert [row["method"] for row in read_csv(tmp_path / "results.csv")] == ["this run"]


def test_conflicting_options_are_errors(archive, capsys):
    plain = ["--dataset_name", "x", "--pred_path", str(archive), "--gt_path", str(archive)]
    for args, message in (
        (arguments(archive, "--gt_path", archive), "--benchmark knows names, ground truth and images"),
        (arguments(archive, "--pred_path", archive, archive), "two methods are called"),
        (arguments(archive, "--pred_path", "ours="), "--pred_path: ours= names no folder"),
        (arguments(archive, "--examples", "case9"), "no image that is scored is called case9"),
        (script.get_args_parser().parse_args([*plain, "--sets", "x"]), "--sets belongs to --benchmark"),
        (script.get_args_parser().parse_args(plain[:4]), "give --benchmark, or --gt_path"),
    ):
        status, line = failure(script.main, args, capsys)
        assert status == 2 and message in line


def test_an_incomplete_archive_is_noted_in_what_is_written(results):
    for name in ("results.md", "report.html", "results.tex"):
        assert "DIS-VD: 1 of 470 pairs" in (results / name).read_text()


def test_an_empty_folder_of_maps_is_a_set_without_maps(archive, tmp_path, capsys):
    shutil.copytree(archive / "download" / "maps" / "dis_te1", tmp_path / "maps" / "DIS-TE1")
    (tmp_path / "maps" / "dis_te2").mkdir()
    more = ("--pred_path", tmp_path / "maps", "--save_path", tmp_path, "--sets", "DIS-TE1", "DIS-TE2")
    script.main(arguments(archive, *more, "--allow_missing"))
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["DIS-TE1"]
    (tmp_path / "maps" / "dis_te2" / "x.npy").write_bytes(b"")
    status, line = failure(script.main, arguments(archive, *more), capsys)
    assert status == 2 and line.endswith("dis_te2: has no images, only files that are not read: 1 .npy")


def test_maps_are_found_by_the_exact_name_first_and_only_where_there_are_any(tmp_path):
    for name in ("a/CAMO/CAMO", "b/easy", "b/EASY_"):
        save_image(tmp_path / name / "x.png", np.zeros((4, 4), np.uint8))
    assert script.find_maps(tmp_path / "a", "Camo", alone=False) == tmp_path / "a/CAMO/CAMO"
    assert script.find_maps(tmp_path / "b", "easy", alone=False) == tmp_path / "b/easy"
    with pytest.raises(ValueError, match="Easy: several folders"):
        script.find_maps(tmp_path / "b", "Easy", alone=False)
    for name in ("легко", "трудно"):
        save_image(tmp_path / "c" / name.upper() / "x.png", np.zeros((4, 4), np.uint8))
    assert script.find_maps(tmp_path / "c", "легко", alone=False).name == "ЛЕГКО"


def test_an_unreadable_image_is_left_out_of_the_page_and_nothing_is_lost(archive, tmp_path):
    shutil.copytree(archive / "DIS5K/DIS-TE4/im", tmp_path / "im")
    (tmp_path / "im" / "case0.jpg").write_bytes(b"\xff\xd8 no more")
    maps, masks = archive / "download/maps/dis_te4", archive / "DIS5K/DIS-TE4/gt"
    words = f"--dataset_name mine --pred_path {maps} --gt_path {masks} --image_path {tmp_path}/im"
    script.main(script.get_args_parser().parse_args(f"{words} --save_path {tmp_path}/out".split()))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert (tmp_path / "out/report.html").read_text().count("<figcaption>") == 4 * 5 - 1
