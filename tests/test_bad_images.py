"""Images and masks of every kind, and files that are none: converted correctly, or named with the reason."""

import os
import shutil
import warnings

import cv2
import numpy as np
import pytest
import recipe
from conftest import failure, predict_arguments, read_maps, save_image
from conftest import train_arguments as arguments
from PIL import Image

import dataset
import eval as evaluation
import test as script
import train
from tools import check_dataset
from unext import imaging, pairing

PHOTO = recipe.photo("bad", 40, 60, 0)
RAMP = np.tile(np.linspace(0, 255, 60).round().astype(np.uint8), (40, 1))
TURN = Image.Exif()
TURN[0x0112] = 6  # a quarter turn
BOMB = b"P5 20000 20000 255 "  # its header is all of it


def findings_of(path, is_mask=False):
    return check_dataset.inspect(path, is_mask).kinds


def write(path, content):
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name, save",
    [
        ("l.png", lambda path: Image.fromarray(RAMP).save(path)),
        ("palette.png", lambda path: Image.fromarray(RAMP).convert("P").save(path)),
        ("la.png", lambda path: Image.fromarray(RAMP).convert("LA").save(path)),
        ("colour.tif", lambda path: Image.fromarray(np.dstack([RAMP] * 3)).save(path)),
        ("16.png", lambda path: Image.fromarray(RAMP * np.uint16(257)).save(path)),
        ("16.tif", lambda path: Image.fromarray(RAMP * np.uint16(257)).save(path)),
        ("16.pgm", lambda path: cv2.imwrite(str(path), RAMP * np.uint16(257))),
        ("16_colour.png", lambda path: cv2.imwrite(str(path), np.dstack([RAMP * np.uint16(257)] * 3))),
        ("8_in_16.png", lambda path: Image.fromarray(RAMP.astype(np.uint16)).save(path)),
        ("32.tif", lambda path: Image.fromarray(RAMP.astype(np.int32)).save(path)),
        ("float.tif", lambda path: Image.fromarray((RAMP / 255).astype(np.float32)).save(path)),
        ("float_255.tif", lambda path: Image.fromarray(RAMP.astype(np.float32)).save(path)),
    ],
)
def test_grey_images_and_masks_of_any_bit_depth_are_scaled_to_8_bits(name, save, tmp_path):
    save(tmp_path / name)
    assert np.array_equal(np.array(imaging.read_image(tmp_path / name)), np.dstack([RAMP] * 3))
    assert np.array_equal(np.array(imaging.read_mask(tmp_path / name)), RAMP)
    deep = Image.open(tmp_path / name).mode.startswith(imaging.DEEP)
    assert ("16 bits or floats" in findings_of(tmp_path / name)) == deep
    assert "mask not binary" in findings_of(tmp_path / name, is_mask=True)  # as it is read


@pytest.mark.parametrize("values", [[np.nan, 1], [-1, 1], [0, np.inf], [0, 70000]])
def test_floats_outside_the_grey_range_are_named(values, tmp_path):
    save_image(tmp_path / "x.tif", np.tile(np.array(values, np.float32), (4, 1)))
    for read in (imaging.read_image, imaging.read_mask):
        with pytest.raises(OSError, match=r"x\.tif: cannot be read as an image: its values from .*; save it as 8 bits"):
            read(tmp_path / "x.tif")
    assert "values from" in findings_of(tmp_path / "x.tif")["unreadable"]


@pytest.mark.parametrize(
    "name, options",
    [
        ("palette.png", {"mode": "P"}),
        ("transparent.png", {"mode": "P", "transparency": 0}),
        ("rgba.png", {"mode": "RGBA"}),
        ("cmyk.jpg", {"mode": "CMYK", "quality": 100}),
        ("moving.gif", {"save_all": True, "append_images": [Image.new("RGB", (60, 40))]}),
        ("two.mpo", {"save_all": True, "append_images": [Image.new("RGB", (60, 40))], "quality": 100}),
        ("turned.png", {"exif": TURN}),
        ("photo.webp", {"lossless": True}),
        ("photo.jp2", {}),
    ],
)
def test_any_colour_mode_is_read_as_its_first_frame_without_transparency(name, options, tmp_path):
    mode = options.pop("mode", "RGB")
    Image.fromarray(PHOTO).convert(mode).save(tmp_path / name, **options)
    read = np.array(imaging.read_image(tmp_path / name))
    assert read.shape == PHOTO.shape  # not turned
    tolerance = 30 if mode == "P" or name.endswith("gif") else 20  # a palette and JPEG change noise
    assert np.abs(read.astype(int) - PHOTO).mean() < tolerance
    assert imaging.read_size(tmp_path / name) == PHOTO.shape[:2]


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("zero.jpg", b"", "it is empty"),
        ("text.jpg", b"no image", "its format is not known to Pillow"),
        ("bomb.pgm", BOMB, "could be decompression bomb"),
        ("cut.jpg", None, "truncated"),
        ("program.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "its format is not known"),
    ],
)
def test_files_that_are_not_images_are_named_with_the_reason(name, content, reason, tmp_path):
    path = tmp_path / name
    if content is None:
        content = save_image(path, PHOTO).read_bytes()[:-300]
    path.write_bytes(content)
    for read in (imaging.read_image, imaging.read_mask):
        with pytest.raises(OSError, match=f"^{path}: cannot be read as an image: [^\n]*{reason}"):
            read(path)
    assert reason in "".join(findings_of(path).values())


def test_an_image_above_pillows_limit_is_an_error_and_not_a_warning(tmp_path, monkeypatch):
    save_image(tmp_path / "x.png", PHOTO)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PHOTO.shape[0] * PHOTO.shape[1] - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for read in (imaging.read_image, imaging.read_mask, imaging.read_size):
            with pytest.raises(OSError, match="2,400 pixels exceed Pillow's limit of 2,399"):
                read(tmp_path / "x.png")
        assert "limit" in findings_of(tmp_path / "x.png")["unreadable"]


NAMES = [
    "a b",
    "a#b",
    "a%20b",
    "a?b&c",
    "ünï—日本",
    "new\nline",
    "-dash",
    "Case",
    "case",
    "trailing ",
    "x" * 251,
    "é" * 125,
]
NAMES += [os.fsdecode(b"no\xfftext"), "'quote\"", "<b>", "$HOME", "a.b.c"]


@pytest.fixture(scope="module")
def odd_names(toy, tmp_path_factory):
    """Folders Image and Mask with names that careless programs fail on."""
    folder = tmp_path_factory.mktemp("odd")
    for part, extension in (("Image", ".jpg"), ("Mask", ".png")):
        (folder / part).mkdir()
        for name in NAMES:
            shutil.copy(toy / f"test/{part}/toy_0000{extension}", folder / part / f"{name}{extension}")
    return folder


def test_odd_names_work_in_all_three_programs(odd_names, micro_checkpoint, from_files, tmp_path, capsys):
    images, masks, maps = odd_names / "Image", odd_names / "Mask", tmp_path / "maps"
    script.main(predict_arguments(micro_checkpoint, images, maps, "--test_gt_path", masks, "--batch_size", 6))
    assert sorted(read_maps(maps)) == sorted(f"{name}.png" for name in NAMES)
    words = ["--pred_path", maps, "--gt_path", masks, "--image_path", images, "--dataset_name", "odd"]
    words += ["--save_path", tmp_path / "results", "--workers", 1]
    evaluation.main(evaluation.get_args_parser().parse_args([str(word) for word in words]))
    args = arguments("--epoch 1 --batch_size 6", tmp_path, tmp_path / "run", from_files)
    args.train_image_path, args.train_mask_path = [images], [masks]
    train.main(args)
    assert (tmp_path / "run" / "SAM2-UNeXT-1.pth").exists()
    assert f"{len(NAMES)} pairs" in capsys.readouterr().out


@pytest.mark.parametrize("height, width", [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_sizes_are_predicted_at_their_own_size(height, width, micro_checkpoint, tmp_path):
    save_image(tmp_path / "in" / "x.png", np.zeros((height, width, 3), np.uint8))
    script.main(predict_arguments(micro_checkpoint, tmp_path / "in", tmp_path / "maps", "--save", "map,overlay,cutout"))
    assert read_maps(tmp_path / "maps")["x.png"].shape == (height, width)


def test_prediction_skips_and_lists_files_that_are_not_images(micro_checkpoint, tmp_path, capsys):
    images = tmp_path / "in"
    save_image(images / "good.png", PHOTO)
    save_image(images / "cut.png", PHOTO).write_bytes(save_image(images / "cut.png", PHOTO).read_bytes()[:-900])
    for name, content in (("zero.jpg", b""), ("text.jpg", b"hi"), ("bomb.pgm", BOMB), ("new\nline.jpg", b"\xff\xd8")):
        write(images / name, content)
    with pytest.raises(SystemExit) as stop:
        script.main(predict_arguments(micro_checkpoint, images, tmp_path / "maps", "--batch_size", 2))
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert stop.value.code == 1 and list(read_maps(tmp_path / "maps")) == ["good.png"]
    for name in ("cut.png", "zero.jpg", "text.jpg", "bomb.pgm", r"new\nline.jpg"):
        assert len([line for line in lines if f"/{name}: cannot be read as an image: " in line]) == 1
    assert lines[-1].endswith("5 of 6 images could not be read; all others are done")


@pytest.fixture
def pairs(toy, tmp_path):
    """A copy of the data set to damage: its folder, and the arguments of train.py for it."""
    for part in ("Image", "Mask"):
        shutil.copytree(toy / "train" / part, tmp_path / "train" / part)
    return tmp_path / "train", lambda network: arguments(
        "--epoch 1 --batch_size 6", tmp_path, tmp_path / "run", network
    )


def test_training_names_all_unreadable_files_before_it_starts(pairs, from_files, tmp_path, capsys):
    folder, args = pairs
    write(folder / "Image" / "toy_0001.jpg", b"")
    write(folder / "Image" / "toy_0004.jpg", b"no image")
    mask = folder / "Mask" / "toy_0002.png"
    write(mask, mask.read_bytes()[:-200])  # found out as masks are looked at
    status, line = failure(train.main, args(from_files), capsys)
    assert status == 2 and not (tmp_path / "run").exists()
    assert "toy_0001.jpg: cannot be read as an image: it is empty" in line
    assert "toy_0004.jpg: cannot be read as an image: its format is not known" in line
    assert "toy_0002.png: cannot be read as an image: " in line


@pytest.mark.parametrize("white, warned", [(1, True), (100, True), (0, False), (255, False)])
def test_masks_that_read_as_black_cause_a_warning(white, warned, pairs, tmp_path, capsys):
    folder, _ = pairs
    mask = folder / "Mask" / "toy_0003.png"
    save_image(mask, np.where(np.array(Image.open(mask)) > 128, white, 0).astype(np.uint8))
    dataset.check_files(pairing.pair([folder / "Image"], [folder / "Mask"]), workers=2)
    printed = capsys.readouterr().out
    assert ("warning: 1 of 6 masks are black or nearly" in printed and "(toy_0003.png)" in printed) == warned
    words = ["--pred_path", folder / "Mask", "--gt_path", folder / "Mask", "--dataset_name", "set", "--workers", 1]
    words += ["--save_path", tmp_path / "results"]
    evaluation.main(evaluation.get_args_parser().parse_args([str(word) for word in words]))
    printed = capsys.readouterr().out
    assert ("warning: set: 1 of 6 masks are black or nearly" in printed and "(toy_0003.png)" in printed) == warned
    assert ({"0/1 mask", "mask too dark"} & findings_of(mask, is_mask=True).keys() != set()) == warned


@pytest.mark.parametrize("white, kind", [(0, "empty mask"), (255, "full mask")])
def test_constant_masks_are_scored_as_they_are_and_check_dataset_warns(white, kind, tmp_path):
    path = save_image(tmp_path / "x.png", np.full((40, 60), white, np.uint8))
    scores, is_dark = evaluation.score_files((path, path), "fast", resize=False)
    assert not is_dark and scores.figures()["Smeasure"] == pytest.approx(1)
    assert findings_of(path, is_mask=True) == {kind: ""}


def test_a_mask_of_another_size_causes_a_warning(pairs, from_files, capsys):
    folder, args = pairs
    mask = folder / "Mask" / "toy_0003.png"
    height, width = imaging.read_size(mask)
    save_image(mask, np.full((30, 50), 255, np.uint8))
    train.main(args(from_files))
    printed = capsys.readouterr().out
    assert f"toy_0003.png (30, 50) instead of ({height}, {width})" in printed


def test_colour_masks_become_greyscale_and_soft_ones_stay_soft(tmp_path):
    save_image(tmp_path / "colour.png", np.full((4, 6, 3), (255, 255, 0), np.uint8))
    save_image(tmp_path / "soft.png", np.full((4, 6), 90, np.uint8))
    assert imaging.read_mask(tmp_path / "colour.png").getextrema() == (226, 226)
    assert imaging.read_mask(tmp_path / "soft.png").getextrema() == (90, 90)
    assert "mask in colour" in findings_of(tmp_path / "colour.png", is_mask=True)
