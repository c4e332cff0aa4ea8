"""test.py: cutouts and composites, their options, and what a continued run notices."""

import json
import shutil

import cv2
import numpy as np
from conftest import failure, read_maps, save_image
from conftest import predict_arguments as arguments
from PIL import Image

import test as script
from unext import cutout

PHOTO = cv2.resize(np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8), (60, 40))


def predict_disc(monkeypatch, scale=1.0):
    """Has the network find a disc with a soft edge, times `scale`, in every image: its probability for 40 x 60."""
    y, x = np.mgrid[:40, :60]
    probability = scale * np.clip((15 - np.hypot(y - 20, x - 25)) / 8, 0, 1)

    def maps(logits, size, stretched=True, for_cutout=False):
        grey = (probability * 255).astype(np.uint8)
        return script.Maps(grey, grey if for_cutout else None)

    monkeypatch.setattr(script, "grey_maps", maps)
    return probability


def read(path):
    return np.array(Image.open(path))


def test_a_cutout_has_the_probability_with_its_ends_cut_and_the_pixels_of_the_model(
    micro_model, micro_checkpoint, toy, tmp_path
):
    image = toy / "test/Image/toy_0001.jpg"
    script.main(arguments(micro_checkpoint, image, tmp_path / "a", "--save", "cutout"))
    script.main(arguments(micro_checkpoint, image, tmp_path / "b", "--save", "map,cutout", "--no_stretch"))
    ours, same = (read(tmp_path / name / "cutout/toy_0001.png") for name in "ab")
    probability = read_maps(tmp_path / "b")["toy_0001.png"] / 255
    assert np.abs(ours[..., 3] - 255 * np.clip((probability - 0.05) / 0.9, 0, 1)).max() <= 0.5
    assert np.array_equal(ours, same)
    cut = micro_model.cutout(Image.open(image))
    assert cut.mode == "RGBA" and np.array_equal(ours, np.array(cut))
    assert np.array_equal(ours, np.array(micro_model.cutout(read(image))))


def test_a_composite_is_the_cutout_on_the_background(micro_checkpoint, tmp_path, monkeypatch):
    predict_disc(monkeypatch)
    image, ground = save_image(tmp_path / "in/a.png", PHOTO), save_image(tmp_path / "g.png", PHOTO[::-1, ::-1].copy())
    for name in ("white", "#FF8000", ground):
        folder = tmp_path / f"out{len(str(name))}"
        more = ("--save", "cutout,composite", "--background", name)
        script.main(arguments(micro_checkpoint, image, folder, *more))
        cut = Image.open(folder / "cutout/a.png")
        expected = np.array(cutout.on_background(cut, cutout.background(str(name))), int)
        composite = read(folder / "composite/a.jpg")
        assert composite.shape == (40, 60, 3) and np.abs(composite - expected).mean() < 3  # JPEG


def test_crop_leaves_the_object_and_a_margin(micro_checkpoint, tmp_path, monkeypatch):
    inside = predict_disc(monkeypatch) > 0.5
    (top, bottom), (left, right) = ((rows.min(), rows.max() + 1) for rows in np.nonzero(inside))
    image = save_image(tmp_path / "in/a.png", PHOTO)
    words = ("--save", "map,cutout,composite", "--background", "white")
    script.main(arguments(micro_checkpoint, image, tmp_path / "whole", *words))
    script.main(arguments(micro_checkpoint, image, tmp_path / "tight", *words, "--crop"))
    script.main(arguments(micro_checkpoint, image, tmp_path / "loose", *words, "--crop", 0.2))
    whole = read(tmp_path / "whole/cutout/a.png")
    assert np.array_equal(read(tmp_path / "tight/cutout/a.png"), whole[top:bottom, left:right])
    more = round(0.2 * max(bottom - top, right - left))
    box = np.s_[max(top - more, 0) : bottom + more, max(left - more, 0) : right + more]
    assert np.array_equal(read(tmp_path / "loose/cutout/a.png"), whole[box])
    assert read(tmp_path / "loose/composite/a.jpg").shape[:2] == whole[box].shape[:2]
    assert read_maps(tmp_path / "tight")["a.png"].shape == (40, 60)


def test_an_image_without_an_object_is_not_cropped_and_named(micro_checkpoint, tmp_path, monkeypatch, capsys):
    predict_disc(monkeypatch, scale=0.4)
    image = save_image(tmp_path / "in/a.png", PHOTO)
    script.main(arguments(micro_checkpoint, image, tmp_path / "out", "--save", "cutout", "--crop"))
    assert read(tmp_path / "out/cutout/a.png").shape == (40, 60, 4)
    assert f"{image}: no object is found, so it is not cropped" in capsys.readouterr().out


def test_webp_has_the_same_alpha_and_almost_the_same_colours(micro_checkpoint, tmp_path, monkeypatch):
    predict_disc(monkeypatch)
    image = save_image(tmp_path / "in/a.png", PHOTO)
    for form in ("png", "webp"):
        more = ("--save", "cutout", "--format", form)
        script.main(arguments(micro_checkpoint, image, tmp_path / form, *more))
        assert [path.name for path in (tmp_path / form / "cutout").glob("a.*")] == [f"a.{form}"]
    png, webp = (read(tmp_path / form / "cutout" / f"a.{form}") for form in ("png", "webp"))
    assert np.array_equal(png[..., 3], webp[..., 3])
    assert np.abs(png.astype(int) - webp)[png[..., 3] == 255].mean() < 6


def test_options_that_do_not_fit_are_one_line_and_status_2(micro_checkpoint, toy, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("no image")
    composite = ("--save", "composite")
    for more, message in (
        (composite, "--save composite needs --background: a colour, such as white or #ff8000, or an image file"),
        (("--save", "cutout", "--background", "white"), "--background belongs to --save composite"),
        (("--crop",), "--crop belongs to --save composite or cutout"),
        ((*composite, "--background", "red", "--format", "webp"), "--format belongs to --save cutout"),
        ((*composite, "--background", "whit"), "--background whit: is neither an opaque colour, such as white or #ff"),
        ((*composite, "--background", "#fff8"), "--background #fff8: is neither an opaque colour, such as white or #"),
        ((*composite, "--background", tmp_path / "text.jpg"), "text.jpg: cannot be read as an image: its format"),
    ):
        status, line = failure(script.main, arguments(micro_checkpoint, toy, tmp_path / "out", *more), capsys)
        assert status == 2 and message in line and not (tmp_path / "out").exists()


def test_a_continued_run_notices_other_backgrounds_formats_and_crops(micro_checkpoint, tmp_path, capsys):
    image, out = save_image(tmp_path / "in/a.png", PHOTO), tmp_path / "out"
    red, blue = (save_image(tmp_path / f"{i}.png", np.full((4, 4, 3), i, np.uint8)) for i in (1, 2))
    more = ("--save", "map,cutout,composite", "--background", red, "--crop")
    script.main(arguments(micro_checkpoint, image, out, *more))
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.*g")}
    shutil.copy(red, tmp_path / "same.png")
    script.main(arguments(micro_checkpoint, image, out, *more, "--background", tmp_path / "same.png"))
    assert "1 of 1 exist and are kept" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*.*g")} and len(times) == 3
    for other, name in (
        (("--background", blue), "composite: was made with another background"),
        (("--background", "red"), "composite: was made with another background"),
        (("--crop", 0.5), "cutout: was made with another crop"),
        (("--format", "webp"), "cutout: was made with another format"),
    ):
        status, line = failure(script.main, arguments(micro_checkpoint, image, out, *more, *other), capsys)
        assert status == 2 and f"{out}/{name}, see settings.json" in line
    script.main(arguments(micro_checkpoint, image, out))  # no map depends on them
    cut, composite = (json.loads((out / kind / "settings.json").read_text()) for kind in ("cutout", "composite"))
    assert cut["crop"] == 0 and cut["format"] == "png" and composite["background"].startswith("sha256:")
