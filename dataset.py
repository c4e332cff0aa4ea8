"""The torch data set: pictures and masks as the network takes them. H, W, S: height, width, side of the square."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
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
    """Pairs of picture and mask for training: item i is (image (3, S, S) normalised, mask (1, S, S) in [0, 1]).

    Each pair is flipped either way with probability one half, drawn from (seed, epoch, i) alone: a run can be
    repeated, and resumed in the middle, without saving random states. Set `epoch` before each pass.
    """

    def __init__(self, pairs: Sequence[tuple[Path, Path]], size: int, seed: int = 0):
        self.pairs = pairs
        self.size = size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def flips(self, index: int) -> tuple[bool, bool]:
        """Whether pair `index` is flipped (horizontally, vertically) in the present epoch."""
        horizontal, vertical = np.random.default_rng([self.seed, self.epoch, index]).random(2) < 0.5
        return bool(horizontal), bool(vertical)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image_path, mask_path = self.pairs[index]
        flips = self.flips(index)
        image = image_tensor(files.read_image(image_path), self.size, flips)
        return image, mask_tensor(files.read_mask(mask_path), self.size, flips)
