"""evaluation/compare.py: whether a difference is more than chance, and where methods fail."""

from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from evaluation import compare, metrics, results, tables

COLUMNS = ("Smeasure", "maxFm", "MAE")


def scores_of(smeasure, curve, mae):
    return metrics.PairScores(smeasure, 0, 0, 0, mae, *[curve] * 6)


def evaluation(scores, columns=COLUMNS, names=None):
    """An Evaluation of one data set from each method's scores of the images."""
    names = names or [f"{i}" for i in range(len(next(iter(scores.values()))))]
    images = []
    for i, name in enumerate(names):
        own = {method: of_images[i] for method, of_images in scores.items()}
        figures = {method: one.figures() for method, one in own.items()}
        curves = {method: one.curves(metrics.NINE) for method, one in own.items()}
        path = Path(f"{name}.png")
        share = (0.001, 0.05, 0.5)[i % 3]
        images.append(results.ImageScores("set", name, None, path, share, dict.fromkeys(scores, path), figures, curves))
    means = {method: {"set": metrics.mean(of_images)} for method, of_images in scores.items()}
    published = {"set": {"old": {"Smeasure": 0.4}}}
    return results.Evaluation(tuple(scores), columns, {"set": ("set",)}, means, images, metrics.NINE, published, {})


def random_scores(images, seed, better=0.0):
    rng = np.random.default_rng(seed)
    return [scores_of(rng.normal(0.5 + better, 0.1), rng.random(256), rng.random()) for _ in range(images)]


def test_the_interval_is_that_of_scipy():
    first, other = random_scores(30, 1), random_scores(30, 2)
    found = {one.metric: one for one in compare.differences(evaluation({"ours": first, "theirs": other}))}
    for metric in ("Smeasure", "MAE"):
        difference = [getattr(a, metric) - getattr(b, metric) for a, b in zip(first, other, strict=True)]
        rng = np.random.default_rng(compare.SEED)
        options = {"n_resamples": compare.RESAMPLES, "method": "percentile", "random_state": rng}
        expected = scipy.stats.bootstrap((difference,), np.mean, **options)
        assert found[metric].difference == pytest.approx(np.mean(difference), abs=1e-12)
        assert (found[metric].low, found[metric].high) == pytest.approx(tuple(expected.confidence_interval), abs=1e-9)
        rarer = min((expected.bootstrap_distribution <= 0).sum(), (expected.bootstrap_distribution >= 0).sum())
        assert found[metric].p == pytest.approx(2 * (rarer + 1) / (compare.RESAMPLES + 1))


def test_a_maximum_is_that_of_the_mean_curve_of_each_resample(monkeypatch):
    monkeypatch.setattr(compare, "CHUNK", 100)  # a few resamples at a time
    first, other = random_scores(9, 3), random_scores(9, 4)
    scored = evaluation({"ours": first, "theirs": other})
    drawn = compare.resampled(scored.images, "ours", ["theirs"], ["maxFm"], 50)
    rng = np.random.default_rng(compare.SEED)
    for i in range(50):
        chosen = rng.integers(9, size=9)
        ours, theirs = (np.mean([scores[one].Fm for one in chosen], axis=0).max() for scores in (first, other))
        assert drawn["theirs", "maxFm"][i] == pytest.approx(ours - theirs, abs=1e-12)
    [found] = [one for one in compare.differences(scored) if one.metric == "maxFm"]
    table = scored.results()
    assert found.difference == table["ours"]["set"]["maxFm"] - table["theirs"]["set"]["maxFm"]


def test_between_equal_methods_with_noise_p_is_uniform():
    values = np.random.default_rng(5).normal(size=(200, 40))  # differences of 40 images, 200 times
    weights = np.concatenate(list(compare.resamples(40, 2000)))
    found = [compare.interval_and_p(weights @ one)[2] for one in values]
    assert scipy.stats.kstest(found, "uniform").pvalue > 0.05
    assert 0.02 < np.mean(np.array(found) < 0.05) < 0.09


def test_a_real_difference_is_found_and_a_chance_one_is_not():
    ours = random_scores(60, 1, better=0.1)
    scores = {"ours": ours, "worse": random_scores(60, 2), "same": ours}
    found = {one[1:3]: one for one in compare.differences(evaluation(scores))}
    assert found["worse", "Smeasure"].is_beyond_chance() and found["worse", "Smeasure"].low > 0
    assert not found["worse", "MAE"].is_beyond_chance()
    assert found["same", "Smeasure"][4:] == (0, 0, 0, 1, 1)


@pytest.mark.parametrize("images, least", [(1, 1), (4, 1 / 8), (8, 1 / 128)])
def test_few_images_prove_nothing(images, least):
    scores = {"ours": random_scores(images, 1, better=5), "worse": random_scores(images, 2)}
    found = {one.metric: one for one in compare.differences(evaluation(scores))}
    assert found["Smeasure"].p == least and found["Smeasure"].is_beyond_chance() == (images == 8)


def test_many_comparisons_get_as_many_resamples_as_holms_correction_needs():
    scores = {"ours": random_scores(20, 1, better=0.5)} | {f"{i}": random_scores(20, i) for i in range(9)}
    found = compare.differences(evaluation(scores, columns=metrics.NINE))
    assert len(found) == 81
    assert all(one.is_beyond_chance() for one in found if one.metric == "Smeasure")


def test_holms_correction_is_that_of_the_definition():
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([0.5, 0.9]) == [1, 1] and compare.holm([]) == []


def test_the_best_and_the_second_are_marked_by_unrounded_figures_and_equal_ones_share_the_mark():
    curve = np.zeros(256)
    scores = {"a": 0.50004, "b": 0.50001, "c": 0.50004, "d": 0.4}
    scored = evaluation({name: [scores_of(value, curve, value)] for name, value in scores.items()}, ("Smeasure", "MAE"))
    compared = [one for one in compare.differences(scored) if one.method == "d"]
    rows = tables.rows_of_methods(scored, [one._replace(p_holm=0.01) for one in compared])
    assert [row.method for row in rows] == ["a", "b", "c", "d", "old, paper"]
    marks = [{column: "".join(row.marks[column]) for column in ("Smeasure", "MAE")} for row in rows[:4]]
    best, second = {"Smeasure": "best", "MAE": ""}, {"Smeasure": "second", "MAE": "second"}
    assert marks == [best, second, best, {"Smeasure": "", "MAE": "best"}] and not rows[4].marks


def test_groups_are_by_size_of_the_object_and_by_what_the_patterns_find():
    names = ["COD10K-CAM-1-Aquatic-3-Crab-32", "COD10K-CAM-2-Terrestrial-23-Cat-1506", "x"]
    names += ["COD10K-CAM-1-Aquatic-9-Fish-1"]
    scored = evaluation({"ours": random_scores(4, 1)}, names=names)
    patterns = {"super-class": "^COD10K-CAM-[0-9]+-([^-]+)-", "nothing": "(none)"}
    found = compare.groups(scored.images, patterns)
    assert [(one.kind, one.name, len(one.images)) for one in found] == [
        ("object size", "under 1 %", 2),
        ("object size", "1 to 10 %", 1),
        ("object size", "over 10 %", 1),
        ("super-class", "Aquatic", 2),
        ("super-class", "Terrestrial", 1),
    ]
    every = compare.Group("set", "", "", list(scored.images)).figures("ours", metrics.NINE)
    assert every == pytest.approx(scored.means["ours"]["set"].figures(), abs=1e-12)
