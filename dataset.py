"""The torch data set: pictures and masks as the network takes them. H, W, S: height, width, side of the square."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode

import files

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels in [0, 1], red, green, blue
STD = (0.229, 0.224, 0.225)


def image_tensor(picture: Image.Image, size: int, flips: tuple[bool, bool] = (False, False)) -> Tensor:
    """An RGB picture resized to a square (bilinear, antialiased), flipped and normalised: (3, S, S)."""
    picture = flip(TF.resize(picture, [size, size], InterpolationMode.BILINEAR), flips)
    return TF.normalize(TF.to_tensor(picture), MEAN, STD)


def mask_tensor(mask: Image.Image, size: int, flips: tuple[bool, bool] = (False, False)) -> Tensor:
    """A greyscale mask resized to a square (bicubic, antialiased) and flipped, not binarised: (1, S, S) in [0, 1]."""
    return TF.to_tensor(flip(TF.resize(mask, [size, size], InterpolationMode.BICUBIC), flips))


def flip(picture: Image.Image, flips: tuple[bool, bool]) -> Image.Image:
    """Mirrored left to right where the first flag is set, top to bottom where the second is."""
    horizontal, vertical = flips
    picture = TF.hflip(picture) if horizontal else picture
    return TF.vflip(picture) if vertical else picture


class SegmentationDataset(Dataset):
    """Pairs of picture and mask for training, by (epoch, index): image (3, S, S) normalised, mask (1, S, S) in [0, 1]
    and the picture's path.

    Each pair is flipped either way with probability one half, drawn from (seed, epoch, index) alone: a run can be
    repeated, and resumed in the middle, without saving random states.
    """

    def __init__(self, pairs: Sequence[tuple[Path, Path]], size: int, seed: int = 0):
        self.pairs = pairs
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pairs)

    def flips(self, epoch: int, index: int) -> tuple[bool, bool]:
        """Whether pair `index` is flipped (horizontally, vertically) in the epoch."""
        horizontal, vertical = np.random.default_rng([self.seed, epoch, index]).random(2) < 0.5
        return bool(horizontal), bool(vertical)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, Tensor, str]:
        epoch, index = place
        image_path, mask_path = self.pairs[index]
        flips = self.flips(epoch, index)
        image = image_tensor(files.read_image(image_path), self.size, flips)
        return image, mask_tensor(files.read_mask(mask_path), self.size, flips), str(image_path)


def epoch_batches(
    count: int, batch_size: int, seed: int, epoch: int, rank: int = 0, processes: int = 1
) -> list[list[tuple[int, int]]]:
    """The batches of process `rank` in one pass over `count` pairs: lists of (epoch, index) for `SegmentationDataset`.

    The order depends on (seed, epoch) alone. The i-th batches of all processes together are the i-th batch of one
    process with a `processes` times as large one; only that up to `processes` - 1 pairs come twice, so that all have
    the same number.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    order += [order[i % count] for i in range(-count % processes)]
    own = [(epoch, index) for index in order[rank::processes]]
    return [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
