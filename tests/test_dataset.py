"""dataset.py: the transforms equal the original's; order and augmentation are reproducible."""

import numpy as np
import PIL
import pytest
import recipe
import torch
from conftest import golden, save_image
from PIL import Image
from torchvision.transforms import v2

import dataset
from dataset import STD, SegmentationDataset, image_tensor, mask_tensor

FLIPS = ([], [1], [2], [1, 2])  # axes of a tensor (C, H, W)


@pytest.mark.parametrize("name, height, width", [("a", 300, 451), ("b", 700, 512)])
def test_preprocessing_equals_the_original_bit_for_bit(name, height, width, tmp_path, monkeypatch):
    expected = golden("preprocessing.npz")
    image_path = save_image(tmp_path / "image.png", recipe.photo(name, height, width, 0))
    mask_path = save_image(tmp_path / "mask.png", recipe.ground_truth(name, height, width, 0))
    monkeypatch.setattr(dataset, "AUGMENTATION", v2.Identity())
    image, mask, _ = SegmentationDataset([(image_path, mask_path)], 352)[1, 0]
    # The figures are Pillow 13's. Older versions resize tall images in another order and round a little differently.
    exact = int(PIL.__version__.split(".")[0]) >= 13
    image_tolerance, mask_tolerance = (0, 0) if exact else (1.001 / 255 / min(STD), 10 / 255)
    assert np.abs(image[:, ::5, ::5].numpy() - expected[f"{name}/image"]).max() <= image_tolerance
    assert np.abs(mask[:, ::5, ::5].numpy() - expected[f"{name}/label"]).max() <= mask_tolerance
    assert mask.mean() == pytest.approx(float(expected[f"{name}/label_mean"]), abs=1e-7 if exact else 1e-4)


@pytest.mark.parametrize("sizes", [((40, 61), (40, 61)), ((201, 97), (201, 97)), ((40, 61), (80, 120))])
def test_images_and_masks_are_flipped_alike_as_if_after_resizing_by_seed_epoch_and_index(sizes, tmp_path):
    """A mask of another size too."""
    pair = save_image(tmp_path / "x.png", recipe.photo("x", *sizes[0])), tmp_path / "x_mask.png"
    save_image(pair[1], recipe.ground_truth("x", *sizes[1]))
    unflipped = image_tensor(Image.open(pair[0]), 32), mask_tensor(Image.open(pair[1]), 32)

    def drawn(seed, epoch):
        """How each of 40 copies of the pair is flipped: an index of FLIPS."""
        data, kinds = SegmentationDataset([pair] * 40, 32, seed), []
        for i in range(40):
            image, mask, name = data[epoch, i]
            [kind] = [k for k, axes in enumerate(FLIPS) if torch.equal(image, unflipped[0].flip(axes))]
            assert torch.equal(mask, unflipped[1].flip(FLIPS[kind])) and name == str(pair[0])
            kinds.append(kind)
        return kinds

    state = torch.get_rng_state()
    assert drawn(0, 1) == drawn(0, 1) and {*drawn(0, 1)} == {0, 1, 2, 3}
    assert len({tuple(drawn(seed, epoch)) for seed in (0, 1) for epoch in (1, 2)}) == 4
    assert torch.equal(torch.get_rng_state(), state)  # nothing else is drawn differently


def test_a_random_crop_and_rotation_move_image_and_mask_alike_and_jitter_leaves_the_mask(monkeypatch):
    """As the documentation of v2 has them, a line each."""
    mask = np.zeros((120, 150), np.uint8)
    mask[30:70, 40:120] = 255
    pair = Image.fromarray(np.dstack([mask // 2 + 64] * 3)), Image.fromarray(mask)
    moves = [v2.RandomResizedCrop(96, scale=(0.2, 0.6)), v2.RandomRotation(30)]
    for seed in range(10):
        augmented = []
        for transforms in (moves, [*moves, v2.ColorJitter(0.3, 0.3)]):
            torch.manual_seed(seed)
            monkeypatch.setattr(dataset, "AUGMENTATION", v2.Compose(transforms))
            augmented += map(np.array, dataset.augment(*pair))
        image, mask, jittered, same_mask = augmented
        assert image.shape[:2] == mask.shape == (96, 96) and {*np.unique(mask)} == {0, 255}
        assert ((image[..., 0] > 127) != (mask > 0)).mean() < 0.03
        assert np.array_equal(same_mask, mask) and not np.array_equal(jittered, image)


def epoch_batches(count, batch_size, seed, epoch, *more):
    return list(dataset.epoch_batches(count, batch_size, seed, [epoch], *more))


def test_epochs_follow_each_other_and_a_resumed_epoch_skips_what_it_has_done():
    whole = list(dataset.epoch_batches(10, 4, 0, range(1, 4)))
    assert whole == [batch for epoch in (1, 2, 3) for batch in epoch_batches(10, 4, 0, epoch)]
    assert list(dataset.epoch_batches(10, 4, 0, range(2, 4), 2)) == whole[5:]
    assert list(dataset.epoch_batches(10, 4, 0, range(2, 4), 9)) == whole[6:]


def test_each_epoch_has_another_order_decided_by_the_seed():
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
    shares = [epoch_batches(count, 2, 3, 5, 0, rank, processes) for rank in range(processes)]
    assert len({tuple(len(batch) for batch in share) for share in shares}) == 1  # all take as many steps of equal size
    for i, batch in enumerate(whole):
        together = [key for share in shares for key in share[i]]
        assert set(together) >= set(batch)
        assert len(together) - len(batch) == (-count % processes if i == len(whole) - 1 else 0)
