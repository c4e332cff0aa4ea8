"""The torch data set: images and masks as the network takes them. B: batch, S: side of the square."""

import hashlib
import math
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode

from unext import files, pairing
from unext.images import FAR, read_image, read_photo, read_size
from unext.masks import read_and_check_mask, read_mask
from unext.pairing import Pair
from unext.workers import in_order, progress_bar

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels in [0, 1]: red, green, blue
STD = (0.229, 0.224, 0.225)
MASKS_CHECKED = 64  # at the start of training, about


def image_tensor(image: Image.Image, size: int) -> Tensor:
    """An RGB image resized to a square (bilinear, antialiased) and normalised: (3, S, S)."""
    return TF.normalize(TF.to_tensor(TF.resize(image, [size, size], InterpolationMode.BILINEAR)), MEAN, STD)


def mask_tensor(mask: Image.Image, size: int) -> Tensor:
    """A greyscale mask resized to a square (bicubic, antialiased), not binarised: (1, S, S) in [0, 1]."""
    return TF.to_tensor(TF.resize(mask, [size, size], InterpolationMode.BICUBIC))


def augment(image: Image.Image, mask: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A training pair, both flipped left to right, and both top to bottom, with a probability of 0.5 each.

    They have their own sizes here. The original flips after resizing, which gives the same pixels.
    """
    if rng.random() < 0.5:
        image, mask = TF.hflip(image), TF.hflip(mask)
    if rng.random() < 0.5:
        image, mask = TF.vflip(image), TF.vflip(mask)
    return image, mask


class SegmentationDataset(Dataset):
    """Training pairs by (epoch, index): the normalised image (3, S, S), its mask (1, S, S) in [0, 1], its path.

    What `augment` draws depends on (seed, epoch, index) alone: a run can be repeated, and resumed in the middle of an
    epoch, without saving random states.
    """

    def __init__(self, pairs: Sequence[Pair], size: int, seed: int = 0):
        self.pairs = pairs
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, str]:
        epoch, index = key
        image_path, mask_path = self.pairs[index]
        rng = np.random.default_rng([self.seed, epoch, index])
        image, mask = augment(read_image(image_path), read_mask(mask_path), rng)
        return image_tensor(image, self.size), mask_tensor(mask, self.size), str(image_path)


def epoch_batches(
    count: int, batch_size: int, seed: int, epochs: Iterable[int], skip: int = 0, rank: int = 0, processes: int = 1
) -> Iterator[list[tuple[int, int]]]:
    """The batches of process `rank` in these epochs of `count` pairs: lists of keys (epoch, index) of the data set.

    The first `skip` of the first epoch are left out. The order depends on (seed, epoch) alone. The i-th batches of all
    processes together are the i-th batch of a single process with `processes` times the batch size, except that up to
    `processes` - 1 pairs are repeated to give all processes the same number.
    """
    for epoch in epochs:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        own = order[torch.arange(rank, math.ceil(count / processes) * processes, processes) % count]
        for start in range(skip * batch_size, len(own), batch_size):
            yield [(epoch, index) for index in own[start : start + batch_size].tolist()]
        skip = 0


def load(
    dataset: SegmentationDataset, batches: Iterable[list[tuple[int, int]]], workers: int, per_step: int, pin: bool
) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """The batches with these keys: images (B, 3, S, S), masks (B, 1, S, S), paths. A step takes `per_step` of them."""
    options = {}
    if workers:  # they read ahead, far enough for the next step while this one is computed
        ahead = max(2, math.ceil(2 * per_step / workers))
        options = {"prefetch_factor": ahead, "worker_init_fn": obey_parent_alone}
    return iter(DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin, **options))


def obey_parent_alone(worker: int) -> None:
    """Leaves signals to the process group to the parent, which needs its workers to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):
        os.setsid()


def check_files(pairs: Sequence[Pair], workers: int) -> str:
    """Opens every header and decodes some pairs; prints warnings. Raises OSError that lists the unreadable files.

    Returns a fingerprint of the pairs: their number, and a hash of their names and sizes in bytes. It stays the same if
    the data moves to another disk.
    """
    sampled = {mask for _, mask in pairs[:: max(1, len(pairs) // MASKS_CHECKED)]}
    failed, wrong, far = [], [], []
    problems = {}
    digest = hashlib.sha256()

    def check(pair: Pair) -> str:
        """The pair's names and sizes in bytes."""
        image, mask = pair
        try:
            size, wanted = read_size(mask), read_size(image)
            if size != wanted:
                wrong.append(f"{mask.name} {size} instead of {wanted}")
            if mask in sampled:
                problems[mask] = read_and_check_mask(mask)[1]
                if text := read_photo(image, as_shown=False).info.get(FAR):
                    far.append(f"{image}: {text}; --white N says another value")
            return "".join(f"{pairing.name_of(file)}{file.suffix} {os.path.getsize(file)}\n" for file in pair)
        except OSError as error:
            failed.append(str(error))
            return ""

    with ThreadPoolExecutor(max(1, workers)) as pool:
        checked = in_order(pool, check, pairs, ahead=1000)
        for line in progress_bar(checked, "opening files", len(pairs), unit="pair", delay=2, leave=False):
            digest.update(os.fsencode(line))
    if failed:
        raise OSError("; ".join(sorted(failed)))
    if far:
        print(f"warning: {files.printable(min(far))}")
    for line in pairing.mask_warnings(problems):
        print(f"warning: {line}; tools/check_dataset.py checks all masks")
    if wrong:
        number = files.count(len(wrong), "mask")
        print(f"warning: {number} of another (height, width) than the image: {files.listing(sorted(wrong))}")
    return f"{files.count(len(pairs), 'pair')} (names and sizes: {digest.hexdigest()[:12]})"
