"""test.py: its maps are those of the original, whatever batches and threads."""

import shutil
import threading

import numpy as np
import pytest
import recipe
import torch
from conftest import GOLDEN, SUIM8, close, close_maps, fill_once, predict, save_image
from PIL import Image

import test as script
from SAM2UNeXT import SAM2UNeXT
from unext import checkpoint, device

SUIM8_NAMES = ["d_r_47_", "w_r_147_"] if SUIM8.is_dir() else []


@pytest.fixture(scope="module")
def full_maps(_empty_full_model, tmp_path_factory):
    """Maps that test.py writes with the full network."""
    folder = tmp_path_factory.mktemp("full")
    for name, height, width in (("a", 300, 451), ("b", 700, 512)):
        save_image(folder / "images" / f"{name}.png", recipe.photo(name, height, width, 0))
        save_image(folder / "masks" / f"{name}.png", recipe.ground_truth(name, height, width, 0))
    for name in SUIM8_NAMES:
        shutil.copy(SUIM8 / "images" / f"{name}.jpg", folder / "images")
        shutil.copy(SUIM8 / "masks" / f"{name}.png", folder / "masks")
    model = fill_once(_empty_full_model, 0)
    more = ("--test_gt_path", folder / "masks", "--device", "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SAM2UNeXT, "from_checkpoint", lambda *paths, **options: model)
        patch.setattr(checkpoint, "trained_fingerprint", lambda model: "")
        return predict("SAM2-UNeXT-20.pth", folder / "images", folder, *more)


@pytest.mark.slow
@pytest.mark.parametrize("name, original", [("a", GOLDEN), ("b", GOLDEN), *((name, SUIM8) for name in SUIM8_NAMES)])
def test_maps_are_those_of_the_original(name, original, full_maps):
    assert close(full_maps[f"{name}.png"], np.array(Image.open(original / f"predictions/{name}.png")))


def test_a_map_is_the_stretched_prediction(micro_model, micro_checkpoint, toy, tmp_path):
    maps = predict(micro_checkpoint, toy / "test/Image", tmp_path)
    assert list(maps) == [f"toy_{i:04}.png" for i in range(4)]
    for name, written in maps.items():
        image = Image.open(toy / "test/Image" / name.replace("png", "jpg"))
        probability = micro_model.predict(image)
        low, high = probability.min(), probability.max()
        assert probability.shape == (image.height, image.width) and written.dtype == np.uint8
        assert close(written, ((probability - low) / (high - low) * 255).astype(int))
        assert written.min() == 0 and written.max() >= 254


def test_a_stretched_map_cuts_off_fractions_and_is_black_if_constant():
    assert script.stretch(torch.tensor([[0, 0.5, 1]])).tolist() == [[0, 127, 255]]
    assert not script.stretch(torch.full((3, 4), 0.7)).any()


def test_flip_averages_with_the_mirrored_image(micro_model, micro_checkpoint, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    save_image(tmp_path / "in" / "a.png", image)
    save_image(tmp_path / "in" / "mirrored.png", image[:, ::-1])
    maps = predict(micro_checkpoint, tmp_path / "in", tmp_path / "out", "--flip", "--no_stretch")
    expected = (micro_model.predict(image) + micro_model.predict(image[:, ::-1].copy())[:, ::-1]) / 2
    assert np.abs(maps["a.png"] - expected * 255).max() <= 1.01
    assert close(maps["a.png"], maps["mirrored.png"][:, ::-1])


def test_maps_and_masks_have_the_size_of_the_ground_truth_if_there_is_one(micro_checkpoint, toy, tmp_path, capsys):
    save_image(tmp_path / "masks" / "toy_0001.png", np.zeros((33, 55), np.uint8))
    save_image(tmp_path / "masks" / "surplus.png", np.zeros((5, 5), np.uint8))
    more = ("--test_gt_path", tmp_path / "masks", "--save", "map,mask,overlay,cutout")
    maps = predict(micro_checkpoint, toy / "test/Image", tmp_path / "out", *more)
    assert "3 images without ground truth" in capsys.readouterr().out
    assert maps["toy_0001.png"].shape == (33, 55)
    assert maps["toy_0000.png"].shape == np.array(Image.open(toy / "test/Mask/toy_0000.png")).shape
    sizes = {
        kind: Image.open(next((tmp_path / "out" / kind).glob("toy_0001.*"))).size
        for kind in ("mask", "overlay", "cutout")
    }
    size = Image.open(toy / "test/Image/toy_0001.jpg").size
    assert sizes == {"mask": (55, 33), "overlay": size, "cutout": size}


def test_batches_overlap_and_have_the_maps_of_single_images(micro_checkpoint, toy, tmp_path, monkeypatch):
    """The network gets its next batch before the maps of the last one are written."""
    single = predict(micro_checkpoint, toy / "train/Image", tmp_path / "single", "--workers", 3)
    predict_batch, finish, both = script.predict_batch, script.finish, threading.Barrier(2, timeout=60)

    def predict_and_wait(model, batch, *args):
        if len(batch) == 2:  # the second of two batches
            both.wait()
        return predict_batch(model, batch, *args)

    def finish_late(logits, sample, args):
        if sample.task.image.stem == "toy_0000":
            both.wait()
        return finish(logits, sample, args)

    monkeypatch.setattr(script, "predict_batch", predict_and_wait)
    monkeypatch.setattr(script, "finish", finish_late)
    more = ("--batch_size", 4, "--workers", 1)
    assert close_maps(predict(micro_checkpoint, toy / "train/Image", tmp_path / "batches", *more), single)
    assert len(single) == 6


def test_the_size_is_that_of_the_training_unless_given(micro_checkpoint, toy, tmp_path, monkeypatch):
    shapes = []
    forward = SAM2UNeXT.forward
    monkeypatch.setattr(SAM2UNeXT, "forward", lambda self, x: shapes.append(tuple(x.shape)) or forward(self, x))
    predict(micro_checkpoint, toy / "test/Image", tmp_path / "trained")
    predict(micro_checkpoint, toy / "test/Image", tmp_path / "given", "--size", 96, "--batch_size", 3)
    assert shapes == [(1, 3, 64, 64)] * 4 + [(3, 3, 96, 96), (1, 3, 96, 96)]


def test_a_compiled_network_gets_whole_batches(micro_checkpoint, toy, tmp_path, monkeypatch):
    shapes = []
    monkeypatch.setattr(device, "compile_module", lambda model: model.register_forward_pre_hook(
        lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    )  # fmt: skip
    plain = predict(micro_checkpoint, toy / "test/Image", tmp_path / "plain", "--batch_size", 3)
    compiled = predict(micro_checkpoint, toy / "test/Image", tmp_path / "compiled", "--batch_size", 3, "--compile")
    assert shapes == [(3, 3, 64, 64)] * 2  # of four images
    assert close_maps(compiled, plain) and len(plain) == 4


def test_exif_rotation_is_applied_unless_there_is_ground_truth(micro_model, micro_checkpoint, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png", exif=exif)
    save_image(tmp_path / "gt" / "a.png", pixels[..., 0])
    for more, shown in (((), np.rot90(pixels, -1)), (("--test_gt_path", tmp_path / "gt"), pixels)):
        grey = predict(micro_checkpoint, tmp_path / "in", tmp_path / f"maps{len(more)}", *more)["a.png"]
        assert close(grey, script.stretch(torch.from_numpy(micro_model.predict(shown.copy()))).numpy())
