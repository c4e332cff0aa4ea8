"""evaluation/plots.py: figures at the width of print, in the user's style, in a font that has the names."""

import re

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure
from test_compare import evaluation, random_scores

from evaluation import fonts, plots, report, tables
from unext.errors import InputError


def test_the_lines_of_fifty_methods_differ():
    with plots.Style().applied([]):
        cycle = list(rcParams["axes.prop_cycle"])
    assert len({str(style) for style in cycle}) == len(cycle) > 50


@pytest.mark.parametrize("width", [7.16, 3.5])
def test_figures_are_as_wide_as_they_are_printed(width):
    scored = evaluation({"ours": {name: random_scores(1, 1) for name in "abc"}})
    pdf = plots.curves(scored, "f_measure", plots.Style(width))["f_measure.pdf"]
    [box] = re.findall(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+) ?\]", pdf)
    assert float(box[0]) == pytest.approx(72 * width, abs=0.1) and float(box[1]) < 72 * 5


def test_binary_maps_are_a_marker_and_the_first_method_lets_others_through():
    axes, thresholds = Figure().subplots(), np.arange(255)
    with plots.Style().applied([]):
        curve, point = thresholds / 255, np.full(255, 0.7)
        lines = [
            plots.draw(axes, points, i) for i, points in enumerate([(curve, curve), (curve, point), (point, point)])
        ]
    assert [line.get_marker() for line in lines] == ["None", "None", "D"] and lines[2].get_linestyle() == "None"
    assert lines[0].get_alpha() < 1 and lines[0].get_zorder() > lines[1].get_zorder()
    assert len({line.get_color() for line in lines}) == 3 and lines[0].get_linestyle() != lines[1].get_linestyle()


def test_a_style_sheet_replaces_the_settings(tmp_path):
    (tmp_path / "mine.mplstyle").write_text("lines.linewidth: 3\naxes.prop_cycle: cycler('color', ['r', 'k'])\n")
    with plots.Style(3.5, plots.read_sheet(f"{tmp_path}/mine.mplstyle")).applied([]):
        assert rcParams["lines.linewidth"] == 3 and rcParams["font.size"] == 8
        assert plots.draw(Figure().subplots(), (np.arange(9.0), np.arange(9.0)), 3).get_color() == "k"
    with plots.Style(sheet={"text.usetex": True}).applied([]):
        assert not rcParams["text.usetex"]  # names are not escaped for LaTeX
    assert plots.read_sheet("ggplot")["axes.facecolor"]
    with pytest.raises(InputError, match="no style of Matplotlib"):
        plots.read_sheet("none")


@pytest.mark.parametrize("family", ["DejaVu Serif", None])
def test_names_are_drawn_in_a_font_that_has_their_letters_or_a_line_says_that_there_is_none(family, monkeypatch):
    monkeypatch.setattr(fonts, "family_for", lambda letters: family)
    with plots.Style().applied(["U²-Net", "伪装"]) as lacking:
        assert lacking == ("" if family else "伪装") and (family in rcParams["font.family"]) == bool(family)


@pytest.mark.usefixtures("without_figures")
def test_the_line_is_on_the_page_and_the_sets_are_rows_of_its_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fonts, "family_for", lambda letters: None)
    monkeypatch.setattr(report, "sections", lambda evaluation: [])
    scored = evaluation({"伪装": {name: random_scores(2, 1) for name in ("one", "two")}})
    report.write(tmp_path, scored, tables.table(scored), [], plots.Style())
    line = "figures: no font of this system has 伪装; install one, such as Noto Sans CJK"
    page = (tmp_path / "report.html").read_text()
    assert line in page and line in capsys.readouterr().out
    assert re.findall('<th class="over" colspan="4">(.*?)</th>', page) == ["one (2)", "two (2)"]
