"""The torch data set: images and masks as the network takes them. B: batch, S: side of the square."""

import ctypes
import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from tqdm import tqdm

from unext import files

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels in [0, 1]: red, green, blue
STD = (0.229, 0.224, 0.225)
PR_SET_PDEATHSIG = 1  # of Linux's prctl
MASKS_CHECKED = 64  # at the start of training, about


def image_tensor(image: Image.Image, size: int, flips: tuple[bool, bool] = (False, False)) -> Tensor:
    """An RGB image resized to a square (bilinear, antialiased), flipped and normalised: (3, S, S)."""
    image = flip(TF.resize(image, [size, size], InterpolationMode.BILINEAR), flips)
    return TF.normalize(TF.to_tensor(image), MEAN, STD)


def mask_tensor(mask: Image.Image, size: int, flips: tuple[bool, bool] = (False, False)) -> Tensor:
    """A greyscale mask resized to a square (bicubic, antialiased) and flipped, not binarised: (1, S, S) in [0, 1]."""
    return TF.to_tensor(flip(TF.resize(mask, [size, size], InterpolationMode.BICUBIC), flips))


def flip(image: Image.Image, flips: tuple[bool, bool]) -> Image.Image:
    """Mirrors left to right if the first flag is set, top to bottom if the second is."""
    horizontal, vertical = flips
    image = TF.hflip(image) if horizontal else image
    return TF.vflip(image) if vertical else image


class SegmentationDataset(Dataset):
    """Training pairs by (epoch, index): the normalised image (3, S, S), its mask (1, S, S) in [0, 1], its path.

    Each pair is flipped horizontally and vertically with probability 0.5 each, drawn from (seed, epoch, index) alone: a
    run can be repeated, and resumed in the middle of an epoch, without saving random states.
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

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, str]:
        epoch, index = key
        image_path, mask_path = self.pairs[index]
        flips = self.flips(epoch, index)
        image = image_tensor(files.read_image(image_path), self.size, flips)
        return image, mask_tensor(files.read_mask(mask_path), self.size, flips), str(image_path)


def epoch_batches(
    count: int, batch_size: int, seed: int, epoch: int, rank: int = 0, processes: int = 1
) -> list[list[tuple[int, int]]]:
    """The batches of process `rank` in one epoch of `count` pairs: lists of (epoch, index) for `SegmentationDataset`.

    The order depends on (seed, epoch) alone. The i-th batches of all processes together are the i-th batch of a single
    process with `processes` times the batch size, except that up to `processes` - 1 pairs are repeated to give all
    processes the same number.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    order += [order[i % count] for i in range(-count % processes)]
    own = [(epoch, index) for index in order[rank::processes]]
    return [own[start : start + batch_size] for start in range(0, len(own), batch_size)]


def load(
    dataset: SegmentationDataset, batches: list[list[tuple[int, int]]], workers: int, batches_per_step: int
) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """The batches of the items with these keys: images (B, 3, S, S), masks (B, 1, S, S), paths."""
    options = {}
    if workers:  # they read ahead, far enough for the next step while this one is computed
        ahead = max(2, math.ceil(2 * batches_per_step / workers))
        options = {"prefetch_factor": ahead, "worker_init_fn": obey_parent_alone}
    pin = torch.cuda.is_available()
    return iter(DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin, **options))


def obey_parent_alone(worker: int) -> None:
    """In a worker, which gets signals to the process group but must finish the step: ends with or by its parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_parent_says, daemon=True).start()


def _end_when_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def check_files(pairs: Sequence[tuple[Path, Path]], workers: int) -> None:
    """Opens every file's header and decodes some masks, so that a run does not end in the middle for a bad file.

    Prints warnings. Raises OSError that lists the unreadable files.
    """
    decoded = {mask for _, mask in pairs[:: max(1, len(pairs) // MASKS_CHECKED)]}
    failed, dark, wrong = [], [], []

    def check(pair: tuple[Path, Path]) -> None:
        image, mask = pair
        try:
            expected, found = files.read_size(image), files.read_size(mask)
            if found != expected:
                wrong.append(f"{mask.name} {found} instead of {expected}")
            if mask in decoded and files.is_dark(files.read_mask(mask)):
                dark.append(mask.name)
        except OSError as error:
            failed.append(str(error))

    with ThreadPoolExecutor(max(1, workers)) as pool:
        list(tqdm(pool.map(check, pairs), "opening files", len(pairs), unit="pair", delay=2, leave=False))
    if failed:
        raise OSError("; ".join(sorted(failed)))
    if dark:
        print(f"warning: {files.dark_masks(sorted(dark), len(decoded))}; tools/check_dataset.py checks all masks")
    if wrong:
        print(
            f"warning: {files.count(len(wrong), 'mask')} of another (height, width) than the image, both resized to "
            f"the network's square: {files.listing(sorted(wrong))}"
        )
