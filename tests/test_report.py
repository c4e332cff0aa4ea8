"""evaluation/{tables,figures,report}.py: tables, curves and the page."""

import io
import re
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from evaluation import metrics, plots, report, tables
from evaluation.results import Evaluation, ImageScores

RESULTS = {
    "CAMO": {"images": 250, "Smeasure": 0.9104, "MAE": 0.03449},
    "a_b & c": {"images": 4121, "Smeasure": 1, "MAE": 0},
}
PUBLISHED = {
    "CAMO": {
        "weak": {"Smeasure": 0.7, "MAE": 0.01},
        "strong": {"Smeasure": 0.9, "MAE": 0.05},
        "stronger": {"Smeasure": 0.9, "MAE": 0.04},
        "SAM2-UNeXT": {"Smeasure": 0.903, "MAE": 0.036},
    },
    "a_b & c": {},
}
COLUMNS = ("Smeasure", "MAE")


def test_plain_results_are_one_aligned_line_per_data_set():
    lines = tables.text(tables.rows(RESULTS, dict.fromkeys(RESULTS, {})), COLUMNS).splitlines()
    assert lines[0].split() == ["dataset", "images", "Smeasure", "MAE"]
    assert lines[2].split() == ["CAMO", "250", "0.910", "0.034"]
    assert lines[3].split() == ["a_b", "&", "c", "4,121", "1.000", "0.000"]
    assert len({len(line) for line in lines}) == 1


def test_published_figures_difference_and_strongest_peer_follow_each_row():
    rows = tables.rows(RESULTS, PUBLISHED)
    assert [(row.dataset, row.method) for row in rows] == [
        ("CAMO", "this run"),
        ("CAMO", "SAM2-UNeXT, paper"),
        ("CAMO", "difference"),
        ("CAMO", "stronger, paper"),
        ("a_b & c", "this run"),
    ]
    assert [rows[2].cell(column) for column in COLUMNS] == ["+0.007", "-0.002"]
    lines = tables.text(rows, COLUMNS).splitlines()
    assert lines[4].split() == ["difference", "+0.007", "-0.002"] and len({len(line) for line in lines}) == 1


def test_markdown_has_a_cell_for_every_column():
    lines = tables.to_markdown(tables.rows(RESULTS, PUBLISHED), COLUMNS, ["3 left out"]).splitlines()
    assert {line.count("|") for line in lines[:7]} == {6}
    assert lines[-1] == "3 left out"


def test_latex_escapes_names_and_has_the_columns_it_declares():
    tex = tables.to_latex(tables.rows(RESULTS, PUBLISHED), COLUMNS)
    assert "\\begin{tabular}{llrrr}" in tex and "a\\_b \\& c" in tex and "$+0.007$" in tex
    rows = [line for line in tex.splitlines() if line.endswith(" \\\\")]
    assert {line.replace("\\&", "").count("&") for line in rows} == {4}
    assert tex.count("\\midrule") == 2 and tex.count("rule") == 4


def test_the_error_image_is_red_for_false_positives_and_blue_for_misses():
    ground_truth = Image.fromarray(np.array([[255, 255, 0, 0]], np.uint8))
    prediction = Image.fromarray(np.array([[255, 0, 255, 0]], np.uint8))
    found, missed, too_much, ground = np.array(plots.error_image(prediction, ground_truth))[0].tolist()
    assert found == [205, 205, 205] and ground == [255, 255, 255]
    assert missed[2] > 200 > missed[0] and too_much[0] > 200 > too_much[2]


def test_a_large_map_in_the_alpha_channel_is_shown_as_it_is_scored(tmp_path):
    disc = cv2.circle(np.zeros((450, 600), np.uint8), (300, 200), 120, 255, -1)
    alpha = Image.fromarray(cv2.GaussianBlur(disc, (0, 0), 20))
    coloured = Image.new("RGB", alpha.size, (200, 120, 40))
    coloured.putalpha(alpha)
    coloured.save(tmp_path / "coloured.png")
    alpha.save(tmp_path / "grey.png")
    first, second = (plots.thumbnail(tmp_path / f"{name}.png", "L") for name in ("coloured", "grey"))
    assert first.size == (plots.THUMBNAIL, 240) and first.tobytes() == second.tobytes()


def scored(count=0, results=None, published=None):
    """An Evaluation of one method: `count` images of rising S-measure, and the results of data sets."""
    images = []
    for i in range(count):
        figures = {"this run": dict.fromkeys(metrics.METRICS, 0.5) | {"Smeasure": i / count}}
        path = Path(f"{i:02}.png")
        images.append(ImageScores("set", path.stem, None, path, 0.5, {"this run": path}, figures, {}))
    rows = {name: (name,) for name in results or {}}
    return Evaluation(("this run",), COLUMNS, rows, {}, images, COLUMNS, published or {}, {})


def page_of(results=None, count=0):
    lines = tables.rows(results or {}, PUBLISHED)
    return report.page("title", scored(count, results), lines, [], [], [], []).decode()


def test_the_twelve_worst_and_six_best_images_are_shown(monkeypatch):
    monkeypatch.setattr(report, "card", lambda one: {"name": one.name, "dataset": "", "methods": [], "panels": []})
    for count, worst, best in ((40, 12, 6), (20, 7, 3), (12, 4, 2), (5, 4, 1), (1, 1, 0)):
        shown = re.findall(r'<div class="name">(\d+)</div>', page_of(count=count))
        assert shown == [f"{i:02}" for i in (*range(worst), *range(count - 1, count - 1 - best, -1))]


def test_arrows_and_colours_show_what_is_better():
    page = page_of(RESULTS)
    assert re.search(r"Smeasure\s*↑", page) and re.search(r"MAE\s*↓", page)
    assert '<td class="good">+0.007</td>' in page and '<td class="good">-0.002</td>' in page
    page = page_of({"CAMO": RESULTS["CAMO"] | {"Smeasure": 0.8, "MAE": 0.1}})
    assert '<td class="bad">-0.103</td>' in page and '<td class="bad">+0.064</td>' in page


def test_the_curves_plot_precision_over_recall():
    """A map of high precision and low recall draws its line at the upper left."""
    falling = np.linspace(0.3, 0, 256)
    scores = metrics.PairScores(0, 0, 0, 0, 0, np.full(256, 0.9), falling, falling, falling, falling, falling)
    pixels = np.array(Image.open(io.BytesIO(plots.curves({"set": scores}))).convert("RGB")).astype(int)
    pixels = pixels[:, : pixels.shape[1] // 2]  # the left panel
    y, x = np.nonzero((pixels[..., 2] > 150) & (pixels[..., 0] < 60))  # the first colour of matplotlib's cycle, blue
    long = y[np.argmax(np.bincount(y)[y])]
    assert long < 0.3 * len(pixels) and x[y == long].max() < 0.45 * pixels.shape[1]
