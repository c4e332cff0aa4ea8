"""The torch data set: images and masks as tensors for the network. B: batch, S: side of the square."""

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
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from unext import files, pairing
from unext.images import FAR, read_image, read_photo, read_size
from unext.masks import read_and_check_mask, read_mask
from unext.pairing import Pair
from unext.workers import in_order, progress_bar

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels in [0, 1]: red, green, blue
STD = (0.229, 0.224, 0.225)
MASKS_CHECKED = 64  # about as many masks are decoded before training
# Applied before the resize. Add transforms of torchvision.transforms.v2: geometric ones, such as
# v2.RandomResizedCrop(1024, scale=(0.5, 1)), change image and mask alike; v2.ColorJitter(0.3, 0.3) the image alone.
AUGMENTATION = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()])


def image_tensor(image: Image.Image, size: int) -> Tensor:
    """An RGB image resized to a square (bilinear, antialiased) and normalised: (3, S, S)."""
    return TF.normalize(TF.to_tensor(TF.resize(image, [size, size], InterpolationMode.BILINEAR)), MEAN, STD)


def mask_tensor(mask: Image.Image, size: int) -> Tensor:
    """A greyscale mask resized to a square (bicubic, antialiased), not binarised: (1, S, S) in [0, 1]."""
    return TF.to_tensor(TF.resize(mask, [size, size], InterpolationMode.BICUBIC))


def augment(image: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
    """A training pair after AUGMENTATION, with random numbers of torch's default generator.

    Flipping before the resize equals flipping after it, as the original does. Crops need a mask of the image's size.
    """
    image, mask = AUGMENTATION(tv_tensors.Image(image), tv_tensors.Mask(mask))
    return Image.fromarray(image.permute(1, 2, 0).numpy()), Image.fromarray(mask[0].numpy())


class SegmentationDataset(Dataset):
    """Training pairs by (epoch, index): the normalised image (3, S, S), its mask (1, S, S) in [0, 1], its path.

    The augmentation depends on (seed, epoch, index) alone, so runs are repeated and resumed without random states.
    """

    def __init__(self, pairs: Sequence[Pair], size: int, seed: int = 0):
        self.pairs, self.size, self.seed = pairs, size, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, str]:
        epoch, index = key
        image_path, mask_path = self.pairs[index]
        seed = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1).item()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed the GPUs too
            image, mask = augment(read_image(image_path), read_mask(mask_path))
        return image_tensor(image, self.size), mask_tensor(mask, self.size), str(image_path)


def epoch_batches(
    count: int, batch_size: int, seed: int, epochs: Iterable[int], skip: int = 0, rank: int = 0, processes: int = 1
) -> Iterator[list[tuple[int, int]]]:
    """The batches of process `rank` in these epochs of `count` pairs, as lists of the data set's keys (epoch, index).

    Skips the first `skip` batches of the first epoch. The order depends on (seed, epoch) alone. Concatenating the i-th
    batch of every process gives the i-th batch of one process with `processes` times the batch size; up to `processes`
    - 1 pairs are repeated so that all processes have the same number.
    """
    for epoch in epochs:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        indices = order[torch.arange(rank, math.ceil(count / processes) * processes, processes) % count].tolist()
        for start in range(skip * batch_size, len(indices), batch_size):
            yield [(epoch, index) for index in indices[start : start + batch_size]]
        skip = 0


def load(
    dataset: SegmentationDataset, batches: Iterable[list[tuple[int, int]]], workers: int, per_step: int, pin: bool
) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """The batches with these keys: images (B, 3, S, S), masks (B, 1, S, S), paths. A step needs `per_step` batches."""
    ahead = max(2, math.ceil(2 * per_step / workers)) if workers else None  # per worker, enough for two steps
    options = {"pin_memory": pin, "prefetch_factor": ahead, "worker_init_fn": leave_signals_to_parent}
    return iter(DataLoader(dataset, batch_sampler=batches, num_workers=workers, **options))


def leave_signals_to_parent(worker: int) -> None:
    """In each worker process: the parent needs its workers to finish the step that a signal interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):
        os.setsid()


def check_files(pairs: Sequence[Pair], workers: int) -> str:
    """Opens every header and decodes some pairs; prints warnings. Raises OSError that lists the unreadable files.

    Returns a fingerprint of the pairs: their number and a hash of their names and sizes, the same on any disk.
    """
    sampled = {mask for _, mask in pairs[:: max(1, len(pairs) // MASKS_CHECKED)]}
    unreadable, other_size, far, problems = [], [], [], {}

    def check(pair: Pair) -> str:
        image, mask = pair
        try:
            image_size, mask_size = read_size(image), read_size(mask)
            if mask_size != image_size:
                other_size.append(f"{mask.name} {mask_size} instead of {image_size}")
            if mask in sampled:
                problems[mask] = read_and_check_mask(mask)[1]
                if text := read_photo(image, as_shown=False).info.get(FAR):
                    far.append(f"{image}: {text}; --white N says another value")
            return "".join(f"{pairing.name_of(path)}{path.suffix} {os.path.getsize(path)}\n" for path in pair)
        except OSError as error:
            unreadable.append(str(error))
            return ""

    with ThreadPoolExecutor(max(1, workers)) as pool:
        lines = in_order(pool, check, pairs, ahead=1000)
        text = "".join(progress_bar(lines, "opening files", len(pairs), unit="pair", delay=2, leave=False))
    if unreadable:
        raise OSError("; ".join(sorted(unreadable)))
    if far:
        print(f"warning: {files.printable(min(far))}")
    for warning in pairing.mask_warnings(problems):
        print(f"warning: {warning}; tools/check_dataset.py checks all masks")
    if other_size:
        masks = files.count(len(other_size), "mask")
        print(f"warning: {masks} of another (height, width) than the image: {files.listing(sorted(other_size))}")
    return f"{files.count(len(pairs), 'pair')} (names and sizes: {hashlib.sha256(os.fsencode(text)).hexdigest()[:12]})"
