"""dataset.py: the transforms equal the original's, and order and flips are reproducible."""

import numpy as np
import PIL
import pytest
import recipe
import torch
from conftest import golden, save_image
from PIL import Image

from dataset import STD, SegmentationDataset, epoch_batches, image_tensor, mask_tensor


@pytest.mark.parametrize("name, height, width", [("a", 300, 451), ("b", 700, 512)])
def test_preprocessing_equals_the_original_bit_for_bit(name, height, width, tmp_path):
    expected = golden("preprocessing.npz")
    image_path = save_image(tmp_path / "image.png", recipe.photo(name, height, width, 0))
    mask_path = save_image(tmp_path / "mask.png", recipe.ground_truth(name, height, width, 0))
    dataset = SegmentationDataset([(image_path, mask_path)], 352)
    dataset.flips = lambda epoch, index: (False, False)
    image, mask, _ = dataset[1, 0]
    # The figures are Pillow 13's. Older versions resize tall images in another order and round a little differently.
    exact = int(PIL.__version__.split(".")[0]) >= 13
    image_tolerance, mask_tolerance = (0, 0) if exact else (1.001 / 255 / min(STD), 10 / 255)
    assert np.abs(image[:, ::5, ::5].numpy() - expected[f"{name}/image"]).max() <= image_tolerance
    assert np.abs(mask[:, ::5, ::5].numpy() - expected[f"{name}/label"]).max() <= mask_tolerance
    assert mask.mean() == pytest.approx(float(expected[f"{name}/label_mean"]), abs=1e-7 if exact else 1e-4)


def test_masks_are_not_binarised():
    mask = mask_tensor(Image.fromarray(recipe.ground_truth("soft", 300, 400)), 64)
    assert mask.shape == (1, 64, 64) and mask.min() == 0 and mask.max() == 1
    assert ((mask > 0) & (mask < 1)).any()


@pytest.mark.parametrize("flips, axes", [((True, False), [2]), ((False, True), [1]), ((True, True), [1, 2])])
def test_images_and_masks_are_flipped_alike(flips, axes):
    picture = Image.fromarray(recipe.photo("flip", 40, 60))
    mask = Image.fromarray(recipe.ground_truth("flip", 40, 60))
    assert torch.equal(image_tensor(picture, 32, flips), image_tensor(picture, 32).flip(axes))
    assert torch.equal(mask_tensor(mask, 32, flips), mask_tensor(mask, 32).flip(axes))


def test_flips_depend_only_on_seed_epoch_and_index():
    def drawn(seed, epoch):
        dataset = SegmentationDataset([], 32, seed)
        return [dataset.flips(epoch, i) for i in range(400)]

    assert drawn(0, 1) == drawn(0, 1)
    assert len({tuple(drawn(seed, epoch)) for seed in (0, 1) for epoch in (1, 2)}) == 4
    for share in np.mean(drawn(3, 7), axis=0):
        assert 0.4 < share < 0.6
    assert len(set(drawn(0, 1))) == 4


def test_items_are_flipped_as_drawn(toy):
    image, mask = toy / "train/Image/toy_0000.jpg", toy / "train/Mask/toy_0000.png"
    dataset = SegmentationDataset([(image, mask)] * 8, 64, seed=1)
    assert len(dataset) == 8
    for i in range(8):
        flips = dataset.flips(2, i)
        drawn_image, drawn_mask, name = dataset[2, i]
        assert torch.equal(drawn_image, image_tensor(Image.open(image), 64, flips))
        assert torch.equal(drawn_mask, mask_tensor(Image.open(mask), 64, flips))
        assert name == str(image)


def test_each_epoch_has_its_own_order_decided_by_the_seed():
    def order(seed, epoch):
        batches = epoch_batches(10, 4, seed, epoch)
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert {drawn for batch in batches for drawn, _ in batch} == {epoch}
        return [index for batch in batches for _, index in batch]

    assert order(0, 1) == order(0, 1) and sorted(order(0, 1)) == list(range(10))
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (1, 2)}) == 4


@pytest.mark.parametrize("count, processes", [(12, 2), (11, 2), (13, 4), (2, 5)])
def test_processes_share_the_batches_of_one(count, processes):
    whole = epoch_batches(count, 2 * processes, seed=3, epoch=5)
    parts = [epoch_batches(count, 2, 3, 5, rank, processes) for rank in range(processes)]
    assert len({tuple(len(batch) for batch in part) for part in parts}) == 1  # all take as many steps of equal size
    for i, batch in enumerate(whole):
        together = [place for part in parts for place in part[i]]
        assert set(together) >= set(batch)
        assert len(together) - len(batch) == (-count % processes if i == len(whole) - 1 else 0)
