"""Odd names and sizes, damaged files and wrong masks in the three commands: read, or named with the reason."""

import os
import shutil

import cv2
import numpy as np
import pytest
from conftest import PHOTO, contents, eval_arguments, failure, findings_of, predict, read_maps, save_image
from conftest import train_arguments as arguments
from PIL import Image

import eval as evaluation
import train
from dataset import check_files
from unext import files, pairing
from unext.masks import MASK_PROBLEMS

BOMB = b"P5 20000 20000 255 "  # its header is all of it
NAMES = ["a b", "a#b", "a%20b", "a?b&c", "ünï—日本", "new\nline", "-dash", "Case", "case", "trailing ", "x" * 251,
         "é" * 125, os.fsdecode(b"no\xfftext"), "'quote\"", "<b>", "$HOME", "a.b.c",
         "a\nb\x1b[31m\u2028\u202e é\udcff"]  # fmt: skip


def test_odd_names_work_in_all_three_programs(toy, micro_checkpoint, from_files, tmp_path, capsys):
    images, masks, maps = (tmp_path / name for name in ("images", "masks", "maps"))
    for folder, file in ((images, "Image/toy_0000.jpg"), (masks, "Mask/toy_0000.png")):
        folder.mkdir()
        for name in NAMES:
            shutil.copy(toy / "test" / file, folder / f"{name}{file[-4:]}")
    predicted = predict(micro_checkpoint, images, maps, "--test_gt_path", masks, "--batch_size", 6)
    assert sorted(predicted) == sorted(f"{name}.png" for name in NAMES)
    options = ["--pred_path", maps, "--gt_path", masks, "--image_path", images, "--dataset_name", "odd"]
    evaluation.main(eval_arguments(*options, "--save_path", tmp_path / "results", "--workers", 1))
    args = arguments("--epoch 1 --batch_size 6", tmp_path, tmp_path / "run", from_files)
    args.train_image_path, args.train_mask_path = [images], [masks]
    train.main(args)
    assert (tmp_path / "run" / "SAM2-UNeXT-1.pth").exists()
    assert f"{len(NAMES)} pairs" in capsys.readouterr().out
    (masks / f"{NAMES[-1]}.png").rename(masks / f"{NAMES[-1]}2.png")
    status, line = failure(train.main, args, capsys)
    assert status == 2 and line.isprintable() and files.printable(f"{NAMES[-1]}2.png") in line


@pytest.mark.parametrize("height, width", [(1, 1), (1, 5000), (5000, 1)])
def test_maps_of_extreme_sizes_have_the_size_of_the_image(height, width, micro_checkpoint, tmp_path):
    save_image(tmp_path / "in" / "x.png", np.zeros((height, width, 3), np.uint8))
    maps = predict(micro_checkpoint, tmp_path / "in", tmp_path / "maps", "--save", "map,overlay,cutout")
    assert maps["x.png"].shape == (height, width)


def test_prediction_skips_and_lists_files_that_are_not_images(micro_checkpoint, tmp_path, capsys):
    images = tmp_path / "in"
    save_image(images / "good.png", PHOTO)
    damaged = {"cut.png": save_image(images / "cut.png", PHOTO).read_bytes()[:-900], "zero.jpg": b"", "text.jpg": b"hi"}
    damaged |= {"bomb.pgm": BOMB, "new\nline.jpg": b"\xff\xd8"}
    for name, content in damaged.items():
        (images / name).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        predict(micro_checkpoint, images, tmp_path / "maps", "--batch_size", 2)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert stop.value.code == 1 and list(read_maps(tmp_path / "maps")) == ["good.png"]
    for name in damaged:
        start = f"/{name}: cannot be read as an image: ".replace("\n", "\\n")
        assert len([line for line in lines if start in line]) == 1
    assert lines[-1].endswith("5 of 6 images failed; all others are done")


@pytest.fixture
def folder(toy, tmp_path):
    """A copy of the training data to damage."""
    return shutil.copytree(toy / "train", tmp_path / "train")


def test_training_names_all_unreadable_files_before_it_starts(folder, from_files, tmp_path, capsys):
    (folder / "Image/toy_0001.jpg").write_bytes(b"")
    (folder / "Image/toy_0004.jpg").write_bytes(b"no image")
    mask = folder / "Mask/toy_0002.png"
    mask.write_bytes(mask.read_bytes()[:-200])  # noticed since some masks are decoded
    args = arguments("--epoch 1 --batch_size 6", tmp_path, tmp_path / "run", from_files)
    status, line = failure(train.main, args, capsys)
    assert status == 2 and not contents(tmp_path / "run")
    assert "toy_0001.jpg: cannot be read as an image: it is empty" in line
    assert "toy_0004.jpg: cannot be read as an image: its format is not known" in line
    assert "toy_0002.png: cannot be read as an image: " in line


CHANGES = [  # of the six masks of the toy data: change, warning
    (lambda mask: mask // 255, "0/1 mask: reads as black; make the object 255"),
    (lambda mask: mask // 255 * 100, "mask too dark: no pixel is above 128"),
    (lambda mask: np.where(mask, 1, cv2.dilate(mask, np.ones((7, 7)))), "mask of labels: has small labels and one br"),
    (lambda mask: np.dstack([mask * 0, mask, mask * 0]), "mask in colour: is read as greyscale"),
    (lambda mask: mask * 0, None),
    (lambda mask: cv2.GaussianBlur(mask, (9, 9), 0), None),
]


def test_masks_with_wrong_values_cause_warnings(folder, tmp_path, without_figures, capsys):
    for i, (change, told) in enumerate(CHANGES):
        path = folder / f"Mask/toy_{i:04}.png"
        mask = np.where(np.array(Image.open(path)) > 128, 255, 0).astype(np.uint8)
        save_image(path, change(mask).astype(np.uint8))
        assert findings_of(path, is_mask=True).keys() & MASK_PROBLEMS == ({told.split(":")[0]} if told else set())
    check_files(pairing.pair([folder / "Image"], [folder / "Mask"]), workers=2)
    trained = capsys.readouterr().out
    shutil.copytree(folder / "Mask", tmp_path / "maps")
    options = ["--pred_path", tmp_path / "maps", "--gt_path", folder / "Mask", "--dataset_name", "set", "--workers", 1]
    evaluation.main(eval_arguments(*options, "--save_path", tmp_path / "results"))
    scored = capsys.readouterr().out
    for text, start in ((trained, "warning: "), (scored, "warning: set: ")):
        lines = [line for line in text.splitlines() if f"{start}1 of 6 masks: " in line]
        assert len(lines) == 4
        for i, (_, told) in enumerate(CHANGES[:4]):
            assert [line for line in lines if told in line and f"(toy_{i:04}.png)" in line]


def test_a_mask_of_another_size_causes_a_warning(folder, capsys):
    height, width = np.array(Image.open(folder / "Mask/toy_0003.png")).shape
    save_image(folder / "Mask/toy_0003.png", np.full((30, 50), 255, np.uint8))
    check_files(pairing.pair([folder / "Image"], [folder / "Mask"]), workers=1)
    assert f"toy_0003.png (30, 50) instead of ({height}, {width})" in capsys.readouterr().out
