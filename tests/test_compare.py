"""evaluation/compare.py: whether a difference is more than chance, and where methods fail."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from evaluation import benchmarks, compare, metrics, results, tables

COLUMNS = ("Smeasure", "maxFm", "MAE")
NO_BENCHMARK = benchmarks.Benchmark("title", metrics.NINE)


def scores_of(smeasure, curve, mae):
    return metrics.PairScores(smeasure, 0, 0, 0, mae, *[curve] * 6)


def evaluation(scores, columns=COLUMNS, names=None):
    """An Evaluation from {method: [scores of an image]} of the data set "set", or {method: {data set: [...]}}."""
    scores = {method: of_sets if isinstance(of_sets, dict) else {"set": of_sets} for method, of_sets in scores.items()}
    means = {method: {dataset: metrics.Mean() for dataset in of_sets} for method, of_sets in scores.items()}
    images = []
    for dataset, of_images in next(iter(scores.values())).items():
        for i in range(len(of_images)):
            of_methods = {method: of_sets[dataset][i] for method, of_sets in scores.items()}
            for method, pair_scores in of_methods.items():
                means[method][dataset].add(pair_scores)
            figures = {method: pair_scores.figures() for method, pair_scores in of_methods.items()}
            curves = {method: pair_scores.curves(metrics.NINE) for method, pair_scores in of_methods.items()}
            name, share = names[i] if names else f"{i:02}", (0.001, 0.05, 0.5)[i % 3]
            paths = dict.fromkeys(scores, Path("map.png"))
            images.append(results.ImageScores(dataset, name, None, Path("mask.png"), paths, share, figures, curves))
    return results.Evaluation(NO_BENCHMARK, tuple(scores), columns, metrics.NINE, images, means)


def random_scores(images, seed, better=0.0):
    rng = np.random.default_rng(seed)
    return [scores_of(rng.normal(0.5 + better, 0.1), rng.random(256), rng.random()) for _ in range(images)]


def compared(scores, columns=COLUMNS):
    """The differences by (method, metric)."""
    return {line[1:3]: line for line in compare.differences(evaluation(scores, columns))}


def test_the_interval_is_that_of_scipy():
    first, other = random_scores(30, 1), random_scores(30, 2)
    lines = compared({"ours": first, "theirs": other})
    for metric in ("Smeasure", "MAE"):
        difference = [getattr(a, metric) - getattr(b, metric) for a, b in zip(first, other, strict=True)]
        rng = np.random.default_rng(compare.SEED)
        options = {"n_resamples": compare.RESAMPLES, "method": "percentile", "random_state": rng}
        expected = scipy.stats.bootstrap((difference,), np.mean, **options)
        line = lines["theirs", metric]
        assert line.difference == pytest.approx(np.mean(difference), abs=1e-12)
        assert (line.low, line.high) == pytest.approx(tuple(expected.confidence_interval), abs=1e-9)
        rarer = min((expected.bootstrap_distribution <= 0).sum(), (expected.bootstrap_distribution >= 0).sum())
        tail = 2 * scipy.stats.t.sf(abs(line.difference) / expected.bootstrap_distribution.std(), 29)
        assert line.p == pytest.approx(max(2 * rarer / compare.RESAMPLES, tail))


def test_a_maximum_is_that_of_the_mean_curve_of_each_resample(monkeypatch):
    monkeypatch.setattr(compare, "CHUNK", 100)  # a few resamples at a time
    first, other = random_scores(9, 3), random_scores(9, 4)
    images = evaluation({"ours": first, "theirs": other}).images
    values = compare.resample(images, "ours", ["theirs"], ["maxFm"], 50)["theirs", "maxFm"]
    rng = np.random.default_rng(compare.SEED)
    for value in values:
        chosen = rng.integers(9, size=9)
        ours, theirs = (np.mean([scores[i].Fm for i in chosen], axis=0).max() for scores in (first, other))
        assert value == pytest.approx(ours - theirs, abs=1e-6)


def test_a_real_difference_is_noticed_and_a_chance_one_is_not():
    ours = random_scores(60, 1, better=0.1)
    lines = compared({"ours": ours, "worse": random_scores(60, 2), "same": ours})
    assert lines["worse", "Smeasure"].verdict() == "better" and lines["worse", "Smeasure"].low > 0
    assert lines["worse", "MAE"].verdict() == "unclear"
    assert lines["same", "Smeasure"][4:] == (0, 0, 0, 1, 1)


def test_with_fewer_than_20_images_there_is_an_interval_and_no_p_and_a_line_says_why():
    scored = evaluation({"ours": random_scores(19, 1, better=5), "worse": random_scores(19, 2)})
    lines = compare.differences(scored)
    assert {(line.p, line.p_holm, line.verdict()) for line in lines} == {(None, None, "")} and lines[0].low > 4
    legend = tables.legend(replace(scored, differences=lines), "*", "+")
    assert legend[1:] == ["set: no ~, since 19 images are too few to test differences (at least 20)"]


def test_many_comparisons_leave_a_clear_difference_clear():
    scores = {"ours": random_scores(20, 1, better=0.5)} | {f"{i}": random_scores(20, i) for i in range(9)}
    lines = compared(scores, columns=metrics.NINE)
    assert len(lines) == 81
    clear = [line.p_holm for line in lines.values() if line.metric == "Smeasure"]
    assert {*map(tables.p_text, clear)} == {"<0.001"} and min(clear) >= compare.SMALLEST_P
    assert [line.p_holm for line in lines.values()] == compare.holm([line.p for line in lines.values()])


def test_holms_correction_is_that_of_the_definition():
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([0.5, 0.9]) == [1, 1] and compare.holm([]) == []


def test_the_best_and_the_second_are_marked_by_printed_figures_and_equal_ones_share_the_mark(monkeypatch):
    curve, scores = np.zeros(256), {"a": 0.50004, "b": 0.4986, "c": 0.50001, "d": 0.4}
    scored = evaluation({name: [scores_of(value, curve, value)] for name, value in scores.items()}, ("Smeasure", "MAE"))
    lines = [line._replace(p_holm=0.01 if line.method != "d" else 1) for line in compare.differences(scored)]
    monkeypatch.setattr(tables, "published", lambda benchmark, row: {"old": {"Smeasure": 0.4}})
    rows = tables.table(replace(scored, differences=lines)).rows()
    assert [row.method for row in rows] == ["a", "b", "c", "d", "old, paper"]
    assert [tuple(row.cell(column).marks for column in ("Smeasure", "MAE")) for row in rows] == [
        ("best", ""), ("second", "second"), ("best", ""), (" unclear", "best unclear"), ("", ""),
    ]  # fmt: skip


def test_groups_are_by_size_of_the_object_and_by_what_the_patterns_match():
    scored = evaluation({"ours": random_scores(4, 1)}, names=["fish-1", "cat-2", "x", "fish-3"])
    groups = compare.groups(scored.images, {"class": "^([a-z]+)-", "nothing": "(none)"})
    sizes = [("object size", name, images) for name, images in (("under 1 %", 2), ("1 to 10 %", 1), ("over 10 %", 1))]
    classes = [("class", "cat", 1), ("class", "fish", 2)]
    assert [(group.kind, group.name, len(group.images)) for group in groups] == sizes + classes
    figures = compare.Group("set", "", "", list(scored.images)).figures("ours", metrics.NINE)
    assert figures == pytest.approx({n: scored.means["ours"]["set"].figure(n) for n in metrics.NINE}, abs=1e-6)
