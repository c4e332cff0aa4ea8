"""evaluation/metrics.py: metrics that agree with the original's and with pysodmetrics."""

import warnings

import cv2
import numpy as np
import py_sod_metrics as sod
import pytest
import recipe
from conftest import SUIM8, golden
from hypothesis import given
from hypothesis import strategies as st

from evaluation import library, metrics
from unext import pairing
from unext.masks import read_mask

CURVES = ("precision", "recall", "Fm", "Em", "IoU", "Dice")
ENGINES = [metrics.score, metrics.score_with_pysodmetrics]
# The library's classes for metrics of the map at threshold 0.5.
AT_HALF = {"IoU": sod.IOUHandler, "Dice": sod.DICEHandler, "BER": sod.BERHandler}
AT_HALF |= {"specificity": sod.SpecificityHandler, "precision": sod.PrecisionHandler, "recall": sod.RecallHandler}


def assert_agrees_with_pysodmetrics(prediction, mask):
    ours = metrics.score(prediction, mask, AT_HALF)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, about an empty quadrant
        theirs = metrics.score_with_pysodmetrics(prediction, mask)
    options = {"with_dynamic": False, "with_adaptive": False, "with_binary": True}
    at_half = sod.FmeasureV2({name: handler(**options) for name, handler in AT_HALF.items()})
    expected = theirs.figures((*metrics.NINE, "maxEm", "adpEm"))
    expected |= {name: value["binary"] for name, value in library.results(at_half, prediction, mask).items()}
    for name, value in expected.items():
        if name == "Smeasure" and np.isnan(value):  # the library's flaw: an empty quadrant
            row, column = metrics.split_at_centroid((mask > 128).astype(np.uint8))
            assert (row == mask.shape[0] or column == mask.shape[1]) and 0 <= ours.Smeasure <= 1
        else:
            assert ours.figure(name) == pytest.approx(value, abs=1e-6), name
    for name in CURVES:
        assert np.allclose(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-9), name


@pytest.mark.parametrize("engine", ENGINES)
def test_every_pair_has_the_scores_of_the_original(engine):
    for name, pair in recipe.metric_cases(0).items():
        assert engine(*pair).figures() == pytest.approx(golden("metrics.json")["each"][name], abs=1e-6), name


def test_a_metric_may_be_added(monkeypatch):
    added = {
        "mine": metrics.Metric("mine", lambda scores: 0.5),
        "pairs": metrics.Metric("p", of_pair=lambda pair: 0.25),
    }
    monkeypatch.setattr(metrics, "METRICS", added | metrics.METRICS)
    scores = metrics.mean([metrics.score(*pair, ["pairs"]) for pair in recipe.metric_cases(0).values()])
    assert scores.figures() == pytest.approx(golden("metrics.json")["all"], abs=1e-6)
    assert scores.figures(["mine", "MAE", "pairs"]) == {"mine": 0.5, "pairs": 0.25, "MAE": scores.MAE}


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
    levels=st.sampled_from([1, 2, 3, 256]),
    share=st.sampled_from([0.0, 0.001, 0.1, 0.5, 0.99, 1.0]),
    grain=st.sampled_from([1, 4, 30]),
)
def test_random_pairs_agree_with_pysodmetrics(height, width, seed, levels, share, grain):
    rng = np.random.default_rng(seed)
    coarse = rng.random((-(-height // grain), -(-width // grain))) < share
    mask = (coarse.repeat(grain, 0).repeat(grain, 1)[:height, :width] * 255).astype(np.uint8)
    prediction = rng.choice(rng.integers(0, 256, levels), (height, width)).astype(np.uint8)
    if rng.random() < 0.5:
        prediction = np.where(rng.random((height, width)) < 0.8, mask, prediction)
    assert_agrees_with_pysodmetrics(prediction, mask)


NOISE = recipe.photo("noise", 40, 50)[..., 0]
EMPTY, FULL = np.zeros((40, 50), np.uint8), np.full((40, 50), 255, np.uint8)
MASKS = {"empty": EMPTY, "full": FULL, "chequered": np.indices((40, 50)).sum(0).astype(np.uint8) % 2 * 255}
for place in (20, 30), (0, 0), (39, 49):
    MASKS[f"one pixel at {place}"] = np.zeros((40, 50), np.uint8)
    MASKS[f"one pixel at {place}"][place] = 255
MASKS["soft"] = (recipe.uniform("soft truth", (40, 50)).clip(-1, 1) * 127 + 128).astype(np.uint8)


@pytest.mark.parametrize("name", MASKS)
def test_edge_cases_agree_with_pysodmetrics(name):
    mask = MASKS[name]
    for prediction in (NOISE, np.full_like(mask, 100), EMPTY, FULL, mask, 255 - mask):
        assert_agrees_with_pysodmetrics(prediction, mask)


@pytest.mark.parametrize("level, bright, medium, dark", [(60, 2, 6, 21), (90, 3, 9, 23), (30, 1, 6, 22)])
def test_a_level_at_the_adaptive_threshold_is_on_the_side_that_pysodmetrics_takes(level, bright, medium, dark):
    """Twice the mean of such a map is `level`, but for the last bit, which depends on the order of the sum."""
    prediction = np.repeat(np.array([255, level, 0], np.uint8), (bright, medium, dark))[None]
    mask = np.arange(prediction.size)[None] < 5
    assert_agrees_with_pysodmetrics(prediction, mask * np.uint8(255))


@pytest.mark.slow
@pytest.mark.skipif(not SUIM8.is_dir(), reason="the real images are not here")
def test_real_masks_agree_with_pysodmetrics():
    rng = np.random.default_rng(0)
    for path in pairing.images_by_name(SUIM8 / "masks").values():
        mask = np.array(read_mask(path))[::2, ::2]
        blurred = cv2.GaussianBlur(mask, (0, 0), 9)
        noisy = np.clip(blurred.astype(int) + rng.integers(-60, 60, mask.shape), 0, 255).astype(np.uint8)
        shifted = np.roll(blurred, (15, -20), (0, 1))
        binary = (noisy > 100).astype(np.uint8) * 255
        for prediction in (blurred, noisy, 255 - blurred, shifted, binary):
            assert_agrees_with_pysodmetrics(prediction, mask)


def test_among_equally_near_foreground_pixels_scipys_choice_is_used():
    """Between two foreground columns with different errors, each choice of the nearest leads to another score."""
    mask = np.zeros((30, 31), np.uint8)
    mask[5:25, [10, 14, 18]] = mask[[4, 8, 26], 3:28] = 255
    prediction = np.where(mask == 255, np.linspace(60, 255, 31).astype(np.uint8)[None], 10).astype(np.uint8)
    assert_agrees_with_pysodmetrics(prediction, mask)
    mirrored = metrics.score(prediction[:, ::-1].copy(), mask[:, ::-1].copy()).wFmeasure
    assert abs(mirrored - metrics.score(prediction, mask).wFmeasure) > 1e-5


def test_parts_and_a_ground_truth_prepared_for_several_maps_change_nothing(monkeypatch):
    prediction, mask = recipe.metric_cases(0)["case2"]
    whole, prepared = metrics.score(prediction, mask), metrics.prepare(mask)
    metrics.score(255 - prediction, prepared)
    assert metrics.score(prediction, prepared).figures() == whole.figures()
    monkeypatch.setattr(metrics, "HISTOGRAM_PIXELS", 700)
    parts = metrics.score(prediction, mask)
    for name in metrics.FIELDS:
        assert np.array_equal(getattr(whole, name), getattr(parts, name))


@pytest.mark.parametrize("name", ["case0", "case3", "perfect"])
def test_the_slow_metrics_are_those_of_the_librarys_classes(name, monkeypatch):
    if not hasattr(np, "trapz"):  # since numpy 2.4, which the library does not know
        monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)
    prediction, mask = recipe.metric_cases(0)[name]
    iou = sod.MSIoU(with_dynamic=False, with_adaptive=False, with_binary=True)
    f_measure = sod.SizeInvarianceFmeasureV2({"F": sod.FmeasureHandler(with_dynamic=True, with_adaptive=False)})
    expected = {
        "HCE": library.results(sod.HumanCorrectionEffortMeasure(), prediction, mask)["hce"],
        "MSIoU": library.results(iou, prediction, mask)["binary"],
        "siFm": library.results(f_measure, prediction, mask)["F"]["dynamic"][0].mean(),
        "siMAE": library.results(sod.SizeInvarianceMAE(), prediction, mask)["si_mae"],
    }
    for engine in ENGINES:
        assert engine(prediction, mask, expected).figures(expected) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mask", [EMPTY, FULL])
def test_every_metric_has_a_value_for_an_empty_and_a_full_mask(mask):
    figures = metrics.score(NOISE, mask, metrics.METRICS).figures(metrics.METRICS)
    assert figures.keys() == metrics.METRICS.keys() and np.isfinite([*figures.values()]).all()


def test_the_boundary_iou_is_that_of_the_pixels_near_the_boundaries():
    mask = recipe.metric_cases(0)["case0"][1]
    prediction = np.roll(mask, 3, axis=1) // 3
    width = round(0.02 * np.hypot(*mask.shape))
    near = []
    low, high = prediction.min(), prediction.max()
    for binary in ((prediction - float(low)) / (high - low) > 0.5, mask > 128):
        outside = np.pad(~binary, width, constant_values=True)
        windows = np.lib.stride_tricks.sliding_window_view(outside, (2 * width + 1, 2 * width + 1))
        near.append(binary & windows.any(axis=(2, 3)))
    expected = (near[0] & near[1]).sum() / (near[0] | near[1]).sum()
    assert 0.01 < expected < 0.99
    assert metrics.score(prediction, mask, ["BIoU"]).figure("BIoU") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_arrays_of_other_types_or_shapes_are_refused(engine):
    grey = np.zeros((4, 5), np.uint8)
    with pytest.raises(ValueError, match=r"map is \(4, 5\), its ground truth \(5, 4\)"):
        engine(grey, grey.T)
    for wrong in (grey / 255, np.zeros((4, 5, 3), np.uint8), np.zeros((0, 5), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            engine(wrong, wrong)
