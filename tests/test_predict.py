"""test.py: its maps are those of the original, whatever batches and threads."""

import shutil
import threading

import numpy as np
import pytest
import recipe
import torch
from conftest import GOLDEN, SUIM8, failure, read_maps, save_image
from conftest import predict_arguments as arguments
from PIL import Image

import test as script
from SAM2UNeXT import SAM2UNeXT

SUIM8_NAMES = ["d_r_47_", "w_r_147_"] if SUIM8.is_dir() else []


@pytest.fixture(scope="module")
def full_maps(_empty_full_model, tmp_path_factory):
    """Maps of the full network, written by test.py from a checkpoint such as the original's train script saves."""
    folder = tmp_path_factory.mktemp("full")
    for name, height, width in (("a", 300, 451), ("b", 700, 512)):
        save_image(folder / "images" / f"{name}.png", recipe.photo(name, height, width, 0))
        save_image(folder / "masks" / f"{name}.png", recipe.ground_truth(name, height, width, 0))
    for name in SUIM8_NAMES:
        shutil.copy(SUIM8 / "images" / f"{name}.jpg", folder / "images")
        shutil.copy(SUIM8 / "masks" / f"{name}.png", folder / "masks")
    torch.save(recipe.fill(_empty_full_model, 0).state_dict(), folder / "SAM2-UNeXT-20.pth")
    try:
        more = ("--test_gt_path", folder / "masks", "--device", "cpu")
        script.main(arguments(folder / "SAM2-UNeXT-20.pth", folder / "images", folder / "maps", *more))
    finally:
        (folder / "SAM2-UNeXT-20.pth").unlink()
    return folder / "maps"


@pytest.mark.slow
@pytest.mark.parametrize("name, original", [("a", GOLDEN), ("b", GOLDEN), *((name, SUIM8) for name in SUIM8_NAMES)])
def test_maps_are_those_of_the_original(name, original, full_maps):
    folders = (full_maps, original / "predictions")
    ours, theirs = (np.array(Image.open(folder / f"{name}.png"), int) for folder in folders)
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1


def test_a_map_is_the_stretched_prediction(micro_model, micro_checkpoint, toy, tmp_path):
    script.main(arguments(micro_checkpoint, toy / "test/Image", tmp_path / "maps"))
    maps = read_maps(tmp_path / "maps")
    assert list(maps) == [f"toy_{i:04}.png" for i in range(4)]
    for name, written in maps.items():
        image = Image.open(toy / "test/Image" / name.replace("png", "jpg"))
        probability = micro_model.predict(image)
        low, high = probability.min(), probability.max()
        expected = ((probability - low) / (high - low) * 255).astype(int)
        assert written.dtype == np.uint8 and written.shape == (image.height, image.width)
        assert np.abs(written - expected).max() <= 1
        assert written.min() == 0 and written.max() >= 254


def test_maps_have_the_size_of_the_ground_truth_if_there_is_one(micro_checkpoint, toy, tmp_path, capsys):
    save_image(tmp_path / "masks" / "toy_0001.png", np.zeros((33, 55), np.uint8))
    save_image(tmp_path / "masks" / "surplus.png", np.zeros((5, 5), np.uint8))
    script.main(
        arguments(micro_checkpoint, toy / "test/Image", tmp_path / "maps", "--test_gt_path", tmp_path / "masks")
    )
    maps = read_maps(tmp_path / "maps")
    assert maps["toy_0001.png"].shape == (33, 55)
    assert maps["toy_0000.png"].shape == np.array(Image.open(toy / "test/Mask/toy_0000.png")).shape
    assert "3 images without ground truth" in capsys.readouterr().out


def test_batches_and_threads_change_nothing(micro_checkpoint, toy, tmp_path):
    script.main(arguments(micro_checkpoint, toy / "train/Image", tmp_path / "one", "--workers", 1))
    script.main(arguments(micro_checkpoint, toy / "train/Image", tmp_path / "four", "--batch_size", 4, "--workers", 3))
    one, four = read_maps(tmp_path / "one"), read_maps(tmp_path / "four")
    assert one.keys() == four.keys() and len(one) == 6
    for name in one:
        assert np.abs(one[name].astype(int) - four[name]).max() <= 1


def test_the_network_gets_its_next_batch_before_the_maps_of_the_last_one_are_written(
    micro_checkpoint, toy, tmp_path, monkeypatch
):
    predict_batch, write, batches, second = script.predict_batch, script.write, [], threading.Event()

    def predict_and_tell(*words):
        batches.append(words)
        if len(batches) == 2:
            second.set()
        return predict_batch(*words)

    def write_late(*words):
        assert second.wait(60)
        write(*words)

    monkeypatch.setattr(script, "predict_batch", predict_and_tell)
    monkeypatch.setattr(script, "write", write_late)
    script.main(arguments(micro_checkpoint, toy / "train/Image", tmp_path, "--batch_size", 4, "--workers", 1))
    assert len(batches) == 2 and len(read_maps(tmp_path)) == 6


def test_the_size_is_that_of_the_training_unless_given(micro_checkpoint, toy, tmp_path, monkeypatch):
    seen = []
    forward = SAM2UNeXT.forward
    monkeypatch.setattr(SAM2UNeXT, "forward", lambda self, x: seen.append(tuple(x.shape)) or forward(self, x))
    script.main(arguments(micro_checkpoint, toy / "test/Image", tmp_path / "one"))
    script.main(arguments(micro_checkpoint, toy / "test/Image", tmp_path / "two", "--size", 96, "--batch_size", 3))
    assert seen == [(1, 3, 64, 64)] * 4 + [(3, 3, 96, 96), (1, 3, 96, 96)]


def test_a_constant_map_is_written_as_black():
    assert not script.stretch(torch.full((3, 4), 0.7)).any()


def test_fractions_of_a_grey_level_are_cut_off():
    assert script.stretch(torch.tensor([[0, 0.5, 1]])).tolist() == [[0, 127, 255]]


def test_input_that_needs_mending_is_one_line_and_status_2(micro_checkpoint, toy, tmp_path, capsys):
    images = toy / "test/Image"
    save_image(tmp_path / "gt" / "other.png", np.zeros((5, 5), np.uint8))
    for args, message in (
        (arguments(tmp_path / "none.pth", images, tmp_path), "none.pth: there is no such file"),
        (arguments(micro_checkpoint, tmp_path / "none", tmp_path), "none: there is no such folder"),
        (arguments(micro_checkpoint, images, tmp_path, "--test_gt_path", tmp_path / "x"), "x: there is no such folder"),
        (arguments(micro_checkpoint, images, micro_checkpoint), "nothing can be written there"),
        (arguments(micro_checkpoint, images, tmp_path, "--test_gt_path", tmp_path / "gt"), "no ground truth in"),
    ):
        status, line = failure(script.main, args, capsys)
        assert status == 2 and message in line


def test_maps_are_never_written_over_their_input(micro_checkpoint, toy, tmp_path, capsys):
    shutil.copytree(toy / "test/Mask", tmp_path / "images")
    (tmp_path / "link").symlink_to(tmp_path / "images")
    before = read_maps(tmp_path / "images")
    for args in (
        arguments(micro_checkpoint, tmp_path / "images", tmp_path / "link"),
        arguments(micro_checkpoint, toy / "test/Image", tmp_path / "images", "--test_gt_path", tmp_path / "images"),
    ):
        status, line = failure(script.main, args, capsys)
        assert status == 2 and "has images or ground truth; name another folder" in line
    assert all(np.array_equal(before[name], after) for name, after in read_maps(tmp_path / "images").items())
