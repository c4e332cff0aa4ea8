"""dataset.py: the transforms equal the original's, and order and flips are reproducible."""

import numpy as np
import PIL
import pytest
import recipe
import torch
from conftest import golden, save_image
from PIL import Image

import dataset
from dataset import STD, SegmentationDataset, augment, image_tensor, mask_tensor


@pytest.mark.parametrize("name, height, width", [("a", 300, 451), ("b", 700, 512)])
def test_preprocessing_equals_the_original_bit_for_bit(name, height, width, tmp_path, monkeypatch):
    expected = golden("preprocessing.npz")
    image_path = save_image(tmp_path / "image.png", recipe.photo(name, height, width, 0))
    mask_path = save_image(tmp_path / "mask.png", recipe.ground_truth(name, height, width, 0))
    monkeypatch.setattr(dataset, "augment", lambda image, mask, rng: (image, mask))
    image, mask, _ = SegmentationDataset([(image_path, mask_path)], 352)[1, 0]
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


class Draws:
    """A random generator whose draws are given."""

    def __init__(self, *draws):
        self.random = iter(draws).__next__


@pytest.mark.parametrize("draws, axes", [((0.1, 0.9), [2]), ((0.9, 0.1), [1]), ((0.1, 0.1), [1, 2]), ((0.9, 0.9), [])])
@pytest.mark.parametrize("height, width", [(40, 61), (201, 97)])
def test_images_and_masks_are_flipped_alike_and_as_if_after_resizing(draws, axes, height, width):
    image = Image.fromarray(recipe.photo("flip", height, width))
    mask = Image.fromarray(recipe.ground_truth("flip", height, width))
    flipped_image, flipped_mask = augment(image, mask, Draws(*draws))
    assert torch.equal(image_tensor(flipped_image, 64), image_tensor(image, 64).flip(axes))
    assert torch.equal(mask_tensor(flipped_mask, 64), mask_tensor(mask, 64).flip(axes))


def test_augmentation_depends_only_on_seed_epoch_and_index(toy):
    pair = (toy / "train/Image/toy_0000.jpg", toy / "train/Mask/toy_0000.png")

    def drawn(seed, epoch):
        """How each of 40 copies of one pair is flipped: a number from 0 to 3."""
        data, kinds = SegmentationDataset([pair] * 40, 32, seed), []
        plain = [image_tensor(Image.open(pair[0]), 32), mask_tensor(Image.open(pair[1]), 32)]
        for i in range(40):
            image, mask, name = data[epoch, i]
            [kind] = [k for k, axes in enumerate(([], [1], [2], [1, 2])) if torch.equal(image, plain[0].flip(axes))]
            assert torch.equal(mask, plain[1].flip(([], [1], [2], [1, 2])[kind])) and name == str(pair[0])
            kinds.append(kind)
        return kinds

    assert drawn(0, 1) == drawn(0, 1) and set(drawn(0, 1)) == {0, 1, 2, 3}
    assert len({tuple(drawn(seed, epoch)) for seed in (0, 1) for epoch in (1, 2)}) == 4


def epoch_batches(count, batch_size, seed, epoch, *more):
    return list(dataset.epoch_batches(count, batch_size, seed, [epoch], *more))


def test_epochs_follow_each_other_and_a_resumed_one_skips_what_it_has_done():
    whole = list(dataset.epoch_batches(10, 4, 0, range(1, 4)))
    assert whole == [batch for epoch in (1, 2, 3) for batch in epoch_batches(10, 4, 0, epoch)]
    assert list(dataset.epoch_batches(10, 4, 0, range(2, 4), 2)) == whole[5:]
    assert list(dataset.epoch_batches(10, 4, 0, range(2, 4), 9)) == whole[6:]


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
    parts = [epoch_batches(count, 2, 3, 5, 0, rank, processes) for rank in range(processes)]
    assert len({tuple(len(batch) for batch in part) for part in parts}) == 1  # all take as many steps of equal size
    for i, batch in enumerate(whole):
        together = [place for part in parts for place in part[i]]
        assert set(together) >= set(batch)
        assert len(together) - len(batch) == (-count % processes if i == len(whole) - 1 else 0)
