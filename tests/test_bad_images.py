"""Images and masks of every kind, and files that are none: converted correctly, or named with the reason."""

import os
import shutil

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
from evaluation import results, scoring
from tools import check_dataset
from unext import pairing
from unext.images import read_image, read_size
from unext.masks import MASK_PROBLEMS, read_mask

PHOTO = recipe.photo("bad", 40, 60, 0)
BOMB = b"P5 20000 20000 255 "  # its header is all of it


def findings_of(path, is_mask=False):
    return check_dataset.inspect(path, is_mask).kinds


def write(path, content):
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("zero.jpg", b"", "it is empty"),
        ("text.jpg", b"no image", "its format is not known to Pillow"),
        ("bomb.pgm", BOMB, "it could be a decompression bomb"),
        ("cut.jpg", None, "truncated"),
        ("program.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "its format is not known"),
    ],
)
def test_files_that_are_not_images_are_named_with_the_reason(name, content, reason, tmp_path):
    path = tmp_path / name
    if content is None:
        content = save_image(path, PHOTO).read_bytes()[:-300]
    path.write_bytes(content)
    for read in (read_image, read_mask):
        with pytest.raises(OSError, match=f"^{path}: cannot be read as an image: [^\n]*{reason}"):
            read(path)
    assert reason in "".join(findings_of(path).values())


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
    assert lines[-1].endswith("5 of 6 images failed; all others are done")


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


def made_void(mask):
    """Object 1 with a border of 255, as PASCAL VOC has it."""
    return np.where(mask, 1, cv2.dilate(mask, np.ones((7, 7)))).astype(np.uint8)


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda mask: mask // 255, "0/1 mask: reads as black; make the object 255"),
        (lambda mask: mask // 255 * 100, "mask too dark: no pixel is above 128"),
        (made_void, "mask of labels: has small labels and one bright level"),
        (lambda mask: np.dstack([mask * 0, mask, mask * 0]), "mask in colour: is read as greyscale"),
        (lambda mask: mask * 0, None),
        (lambda mask: mask, None),
        (lambda mask: cv2.GaussianBlur(mask, (9, 9), 0), None),
    ],
)
def test_masks_with_wrong_values_cause_a_warning(change, told, pairs, tmp_path, capsys):
    folder, _ = pairs
    path = folder / "Mask" / "toy_0003.png"
    mask = np.array(Image.open(path))
    save_image(path, change(np.where(mask > 128, 255, 0).astype(np.uint8)))
    dataset.check_files(pairing.pair([folder / "Image"], [folder / "Mask"]), workers=2)
    trained = capsys.readouterr().out
    shutil.copytree(folder / "Mask", tmp_path / "maps")
    words = ["--pred_path", tmp_path / "maps", "--gt_path", folder / "Mask", "--dataset_name", "set", "--workers", 1]
    words += ["--save_path", tmp_path / "results"]
    evaluation.main(evaluation.get_args_parser().parse_args([str(word) for word in words]))
    scored = capsys.readouterr().out
    if told:
        assert f"warning: 1 of 6 masks: {told}" in trained and f"warning: set: 1 of 6 masks: {told}" in scored
        assert "(toy_0003.png)" in trained and "(toy_0003.png)" in scored
    else:
        assert "warning" not in trained + scored
    found = findings_of(path, is_mask=True).keys() & MASK_PROBLEMS
    assert found == ({told.split(":")[0]} if told else set())


@pytest.mark.parametrize("white, kind", [(0, "empty mask"), (255, "full mask")])
def test_constant_masks_are_scored_as_they_are_and_check_dataset_warns(white, kind, tmp_path):
    path = save_image(tmp_path / "x.png", np.full((40, 60), white, np.uint8))
    files = results.ImageFiles("set", "x", None, path, {"this run": path})
    [(scores, *map_problems)], share, problem = scoring.score_files(files, "fast", resize=False, names=())
    assert not problem and map_problems == ["", ""] and share == white / 255
    assert scores.figures()["Smeasure"] == pytest.approx(1)
    assert findings_of(path, is_mask=True) == {kind: ""}


def test_a_mask_of_another_size_causes_a_warning(pairs, from_files, capsys):
    folder, args = pairs
    mask = folder / "Mask" / "toy_0003.png"
    height, width = read_size(mask)
    save_image(mask, np.full((30, 50), 255, np.uint8))
    train.main(args(from_files))
    printed = capsys.readouterr().out
    assert f"toy_0003.png (30, 50) instead of ({height}, {width})" in printed
