"""Tables for people."""

import numpy as np
from PIL import Image

import report

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


def test_plain_results_are_one_aligned_line_a_data_set():
    lines = report.text(report.rows(RESULTS, dict.fromkeys(RESULTS, {})), COLUMNS).splitlines()
    assert lines[0].split() == ["dataset", "images", "Smeasure", "MAE"]
    assert lines[2].split() == ["CAMO", "250", "0.910", "0.034"]
    assert lines[3].split() == ["a_b", "&", "c", "4,121", "1.000", "0.000"]
    assert len({len(line) for line in lines}) == 1


def test_published_figures_the_difference_and_the_strongest_peer_stand_below():
    rows = report.rows(RESULTS, PUBLISHED)
    assert [(row.dataset, row.method) for row in rows] == [
        ("CAMO", "this run"),
        ("CAMO", "SAM2-UNeXT, paper"),
        ("CAMO", "difference"),
        ("CAMO", "stronger, paper"),
        ("a_b & c", "this run"),
    ]
    assert [rows[2].cell(column) for column in COLUMNS] == ["+0.007", "-0.002"]
    lines = report.text(rows, COLUMNS).splitlines()
    assert lines[4].split() == ["difference", "+0.007", "-0.002"] and len({len(line) for line in lines}) == 1


def test_markdown_has_a_cell_for_every_column():
    lines = report.to_markdown(report.rows(RESULTS, PUBLISHED), COLUMNS, ["3 left out"]).splitlines()
    assert {line.count("|") for line in lines[:7]} == {6}
    assert lines[-1] == "3 left out"


def test_latex_escapes_names_and_has_the_columns_it_declares():
    tex = report.to_latex(report.rows(RESULTS, PUBLISHED), COLUMNS)
    assert "\\begin{tabular}{llrrr}" in tex and "a\\_b \\& c" in tex and "$+0.007$" in tex
    rows = [line for line in tex.splitlines() if line.endswith(" \\\\")]
    assert {line.replace("\\&", "").count("&") for line in rows} == {4}
    assert tex.count("\\midrule") == 2 and tex.count("rule") == 4


def test_the_error_picture_is_red_where_the_map_sees_too_much_and_blue_where_it_misses():
    truth = Image.fromarray(np.array([[255, 255, 0, 0]], np.uint8))
    prediction = Image.fromarray(np.array([[255, 0, 255, 0]], np.uint8))
    found, missed, too_much, ground = np.array(report.error_picture(prediction, truth))[0].tolist()
    assert found == [205, 205, 205] and ground == [255, 255, 255]
    assert missed[2] > 200 > missed[0] and too_much[0] > 200 > too_much[2]
