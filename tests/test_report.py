"""evaluation/{tables,plots,report}.py: tables, curves and the page."""

import io
import os
import re
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from test_compare import evaluation, scores_of

from evaluation import metrics, plots, report, tables

PUBLISHED = {
    "CAMO": {
        "weak": {"Smeasure": 0.7, "MAE": 0.01},
        "strong": {"Smeasure": 0.9, "MAE": 0.05},
        "stronger": {"Smeasure": 0.9, "MAE": 0.04},
        "SAM2-UNeXT": {"Smeasure": 0.903, "MAE": 0.036},
    },
    "a_b & c": {},
}


def single_run(smeasure=0.9104, mae=0.03449):
    """An Evaluation of two data sets."""
    curve = np.zeros(256)
    scores = {"CAMO": [scores_of(smeasure, curve, mae)] * 2, "a_b & c": [scores_of(1, curve, 0)] * 1024}
    return evaluation({"this run": scores}, ("Smeasure", "MAE"))


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(tables, "published", lambda benchmark, row: PUBLISHED[row])
    return tables.table(single_run())


def test_plain_results_are_one_aligned_line_per_data_set():
    lines = tables.text(tables.table(single_run())).splitlines()
    expected = ["dataset images Smeasure MAE", "-" * len(lines[0]), "CAMO 2 0.910 0.034", "a_b & c 1,024 1.000 0.000"]
    assert [" ".join(line.split()) for line in lines] == expected
    assert len({len(line) for line in lines}) == 1


def test_published_figures_difference_and_strongest_peer_follow_each_row(table):
    lines = tables.text(table).splitlines()
    assert [line[: line.rindex("  ")].split("  ")[0] for line in lines[2:]] == ["CAMO", "", "", "", "a_b & c"]
    methods = ["this run", "SAM2-UNeXT, paper", "difference", "stronger, paper"]
    assert [row.method for row in table.rows()[:4]] == methods
    assert lines[4].split() == ["difference", "+0.007", "-0.002"] and len({len(line) for line in lines}) == 1


def test_markdown_and_latex_have_methods_down_and_data_sets_across(table):
    lines = tables.markdown(table, ["3 left out"]).splitlines()
    heading = "| method | CAMO (2)<br>Smeasure ↑ | CAMO (2)<br>MAE ↓ | a_b & c (1,024)<br>Smeasure ↑ |"
    assert lines[0].startswith(heading)
    assert lines[2:4] == [
        "| this run | 0.910 | 0.034 | 1.000 | 0.000 |",
        "| SAM2-UNeXT, paper | 0.903 | 0.036 | – | – |",
    ]
    assert {line.count("|") for line in lines[:6]} == {6} and lines[-1] == "3 left out"
    assert tables.latex_text("[1] a|b<c*") == "{[}1] a\\textbar{}b\\textless{}c{*}"
    tex = tables.latex(table)
    assert "\\begin{tabular}{lcccc}" in tex and "{a\\_b \\& c (1,024)}" in tex
    assert "difference & +0.007 & $-$0.002 & -- & -- \\\\" in tex
    rows = [line for line in tex.splitlines()[3:] if line.endswith(" \\\\")][1:]
    assert {line.count("&") for line in rows} == {4} and tex.count("\\midrule") == 2


def test_the_error_image_is_red_for_false_positives_and_blue_for_misses():
    mask, prediction = (Image.fromarray(np.array([row], np.uint8)) for row in ([255, 255, 0, 0], [255, 0, 255, 0]))
    hit, missed, too_much, background = np.array(plots.error_image(prediction, mask))[0].tolist()
    assert hit == [205, 205, 205] and background == [255, 255, 255]
    assert missed[2] > 200 > missed[0] and too_much[0] > 200 > too_much[2]


def test_a_large_map_in_the_alpha_channel_is_shown_as_it_is_scored(tmp_path):
    alpha = Image.radial_gradient("L").resize((600, 450))
    coloured = Image.new("RGB", alpha.size, (200, 120, 40))
    coloured.putalpha(alpha)
    coloured.save(tmp_path / "coloured.png")
    alpha.save(tmp_path / "grey.png")
    first, second = (plots.thumbnail(tmp_path / f"{name}.png", "L") for name in ("coloured", "grey"))
    assert first.size == (plots.THUMBNAIL, 240) and first.tobytes() == second.tobytes()


def test_a_file_of_results_is_replaced_by_a_whole_one_or_not_at_all(tmp_path):
    (tmp_path / "results.csv").write_text("from before")
    with mock.patch.object(os, "fsync", side_effect=OSError("the disk is full")), pytest.raises(OSError):
        report.save(tmp_path, {"results.csv": b"new"})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("results.csv", "from before")]


def page(scored):
    return report.page(scored, tables.table(scored), [], [], []).decode()


def test_the_twelve_worst_and_six_best_images_are_shown(monkeypatch):
    monkeypatch.setattr(report, "card", lambda image: {"name": image.name, "dataset": "", "methods": [], "panels": []})
    for count, worst, best in ((40, 12, 6), (15, 12, 3), (12, 12, 0), (1, 1, 0)):
        scored = evaluation({"this run": [scores_of(i / count, np.zeros(256), 0.5) for i in range(count)]})
        shown = re.findall(r'<div class="name">(\d+)</div>', page(scored))
        assert shown == [f"{i:02}" for i in (*range(worst), *range(count - 1, count - 1 - best, -1))]


def test_arrows_and_colours_show_what_is_better(monkeypatch):
    monkeypatch.setattr(report, "sections", lambda evaluation: [])
    monkeypatch.setattr(tables, "published", lambda benchmark, row: PUBLISHED[row])
    better, worse = page(single_run()), page(single_run(smeasure=0.8, mae=0.1))
    assert "Smeasure ↑" in better and "MAE ↓" in better
    assert all(f'<span class="better">{difference}</span>' in better for difference in ("+0.007", "-0.002"))
    assert all(f'<span class="worse">{difference}</span>' in worse for difference in ("-0.103", "+0.064"))


def test_the_curves_plot_precision_over_recall():
    """A map of high precision and low recall draws its line at the upper left."""
    falling = np.linspace(0.3, 0, 256)
    scores = metrics.PairScores(0, 0, 0, 0, 0, np.linspace(0.9, 1, 256), *[falling] * 5)
    other = metrics.PairScores(0, 0, 0, 0, 0, np.linspace(0, 0.1, 256), *[np.linspace(1, 0.3, 256)] * 5)
    files = plots.curves(evaluation({"costs $1": [scores], "other": [other]}), "precision_recall")
    png = files["precision_recall.png"]
    pixels = np.array(Image.open(io.BytesIO(png)).convert("RGB"))
    pixels = pixels[: int(0.8 * len(pixels))]  # without the legend
    y, x = np.nonzero((pixels[..., 0] > 200) & (pixels[..., 2] < 100))  # the first method's orange
    assert y.max() < 0.3 * len(pixels) and x.max() < 0.5 * pixels.shape[1]
