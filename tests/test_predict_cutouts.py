"""test.py: cutouts and composites, their options, and what a continued run notices."""

import json
import shutil

import cv2
import numpy as np
import pytest
from conftest import predict, save_image
from PIL import Image
from test_predict_options import refusal

import test as script
from unext.cutout import composite, load_background
from unext.output import Prediction

PHOTO = cv2.resize(np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8), (60, 40))
Y, X = np.mgrid[:40, :60]
DISC = np.clip((15 - np.hypot(Y - 20, X - 25)) / 8, 0, 1).astype(np.float32)  # with a soft edge


def predict_map(monkeypatch, probability):
    """Has the network predict this probability for every image."""
    grey = (probability * 255).astype(np.uint8)
    monkeypatch.setattr(
        script, "make_prediction", lambda _, sample, *__: Prediction(grey, np.array(probability), sample.image)
    )


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """An image of a disc."""
    predict_map(monkeypatch, DISC)
    return save_image(tmp_path / "in/a.png", PHOTO)


def read(path):
    return np.array(Image.open(path))


def test_the_alpha_of_a_cutout_is_the_probability_with_its_ends_cut(micro_model, micro_checkpoint, toy, tmp_path):
    image = toy / "test/Image/toy_0001.jpg"
    predict(micro_checkpoint, image, tmp_path / "a", "--save", "cutout")
    maps = predict(micro_checkpoint, image, tmp_path / "b", "--save", "map,cutout", "--no_stretch")
    ours, same = (read(tmp_path / name / "cutout/toy_0001.png") for name in "ab")
    probability = maps["toy_0001.png"] / 255
    assert np.abs(ours[..., 3] - 255 * np.clip((probability - 0.05) / 0.9, 0, 1)).max() <= 0.5
    assert np.array_equal(ours, same)
    cutout = micro_model.cutout(Image.open(image))
    assert cutout.mode == "RGBA" and np.array_equal(ours, np.array(cutout))
    assert np.array_equal(ours, np.array(micro_model.cutout(read(image))))


def test_a_composite_is_the_cutout_on_the_background(micro_checkpoint, photo, tmp_path):
    image = save_image(tmp_path / "background.png", PHOTO[::-1, ::-1].copy())
    for i, name in enumerate(("white", "#FF8000", str(image))):
        predict(micro_checkpoint, photo, tmp_path / f"{i}", "--save", "cutout,composite", "--background", name)
        expected = np.array(composite(Image.open(tmp_path / f"{i}/cutout/a.png"), load_background(name)), int)
        written = read(tmp_path / f"{i}/composite/a.jpg")
        assert written.shape == (40, 60, 3) and np.abs(written - expected).mean() < 3  # JPEG


def test_crop_leaves_the_object_and_a_margin(micro_checkpoint, photo, tmp_path):
    (top, bottom), (left, right) = ((rows.min(), rows.max() + 1) for rows in np.nonzero(DISC > 0.5))
    more = ("--save", "map,cutout,composite", "--background", "white")
    predict(micro_checkpoint, photo, tmp_path / "whole", *more)
    maps = predict(micro_checkpoint, photo, tmp_path / "tight", *more, "--crop")
    predict(micro_checkpoint, photo, tmp_path / "loose", *more, "--crop", 0.2)
    whole = read(tmp_path / "whole/cutout/a.png")
    assert np.array_equal(read(tmp_path / "tight/cutout/a.png"), whole[top:bottom, left:right])
    more = round(0.2 * max(bottom - top, right - left))
    box = np.s_[max(top - more, 0) : bottom + more, max(left - more, 0) : right + more]
    assert np.array_equal(read(tmp_path / "loose/cutout/a.png"), whole[box])
    assert read(tmp_path / "loose/composite/a.jpg").shape[:2] == whole[box].shape[:2]
    assert maps["a.png"].shape == (40, 60)


def test_an_image_without_an_object_is_not_cropped_and_named(micro_checkpoint, photo, tmp_path, monkeypatch, capsys):
    predict_map(monkeypatch, 0.4 * DISC)
    predict(micro_checkpoint, photo, tmp_path / "out", "--save", "cutout", "--crop")
    assert read(tmp_path / "out/cutout/a.png").shape == (40, 60, 4)
    assert f"{photo}: has no object, so it is not cropped" in capsys.readouterr().out


def test_webp_has_the_same_alpha_and_almost_the_same_colours(micro_checkpoint, photo, tmp_path):
    for form in ("png", "webp"):
        predict(micro_checkpoint, photo, tmp_path / form, "--save", "cutout", "--format", form)
        assert [path.name for path in (tmp_path / form / "cutout").glob("a.*")] == [f"a.{form}"]
    png, webp = (read(tmp_path / form / "cutout" / f"a.{form}") for form in ("png", "webp"))
    assert np.array_equal(png[..., 3], webp[..., 3])
    assert np.abs(png.astype(int) - webp)[png[..., 3] == 255].mean() < 6


def test_a_continued_run_notices_other_backgrounds_formats_and_crops(micro_checkpoint, photo, tmp_path, capsys):
    out = tmp_path / "out"
    red, blue = (save_image(tmp_path / f"{i}.png", np.full((4, 4, 3), i, np.uint8)) for i in (1, 2))
    more = ("--save", "map,cutout,composite", "--background", red, "--crop")
    predict(micro_checkpoint, photo, out, *more)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.*g")}
    predict(micro_checkpoint, photo, out, *more, "--background", shutil.copy(red, tmp_path / "same.png"))
    assert "1 of 1 exist and are kept" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*.*g")} and len(times) == 3
    for other, name in (
        (("--background", blue), "composite: was made with another background"),
        (("--background", "red"), "composite: was made with another background"),
        (("--crop", 0.5), "cutout: was made with another crop"),
        (("--format", "webp"), "cutout: was made with another format"),
    ):
        assert f"{out}/{name}, see settings.json" in refusal(capsys, micro_checkpoint, photo, out, *more, *other)
    predict(micro_checkpoint, photo, out)  # no map depends on them
    settings = {kind: json.loads((out / kind / "settings.json").read_text()) for kind in ("cutout", "composite")}
    assert settings["cutout"]["crop"] == 0 and settings["cutout"]["format"] == "png"
    assert settings["composite"]["background"].startswith("sha256:")
