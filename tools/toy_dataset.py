"""Makes a small camouflage data set, to try everything without a download.

    python tools/toy_dataset.py demo/data --train 160 --test 40

Each image shows a blob of fine texture, anywhere, on a background of coarser texture. Both have the same mean colour
and contrast, so that neither colour nor brightness nor position reveals the blob. The same seed makes the same files.
test/Blob has Gaussian blobs in the middle, of the width that scores best: a baseline that does not look at the image.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from unext import cli, files
from unext.workers import progress_bar

SIDES = (224, 320)  # minimum and maximum, pixels
CONTRAST = 26.0  # standard deviation of the texture's brightness, of 255
BLOB_WAVELENGTH = (8, 10)  # minimum and maximum, pixels
GROUND_WAVELENGTH = (18, 26)
CENTRED_SIGMA = 0.18  # of the centred blob, as a fraction of the image's sides


def texture(rng: np.random.Generator, height: int, width: int, wavelength: float) -> np.ndarray:
    """Noise (H, W) with stripes and spots of about `wavelength` pixels, stretched in a random direction."""
    angle, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.6)
    fy, fx = np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij")  # cycles a pixel
    along = fx * np.cos(angle) + fy * np.sin(angle)
    across = (fy * np.cos(angle) - fx * np.sin(angle)) * stretch
    radius = np.hypot(along, across) * wavelength  # 1 at the given wavelength
    band = np.exp(-(((radius - 1) / 0.25) ** 2))
    return np.fft.irfft2(np.fft.rfft2(rng.uniform(-1, 1, (height, width))) * band, s=(height, width))


def blob(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A mask (H, W), bool: a wobbly disc covering 4 to 25 % of the image, its centre anywhere but near the border."""
    cy, cx = rng.uniform(0.2, 0.8, 2) * (height, width)
    y, x = np.mgrid[:height, :width]
    angle = np.arctan2(y - cy, x - cx)
    radius = np.sqrt(rng.uniform(0.04, 0.25) * height * width / np.pi)
    wobble = sum(rng.uniform(-0.35, 0.35) / k * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(2, 6))
    return np.hypot(y - cy, x - cx) < radius * (1 + wobble)


def sample(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3), uint8, and its mask (H, W), uint8 of 0 and 255."""
    height, width = rng.integers(*SIDES, size=2, endpoint=True)
    mask = blob(rng, height, width)
    brightness = np.empty((height, width))
    for region, wavelengths in ((mask, BLOB_WAVELENGTH), (~mask, GROUND_WAVELENGTH)):
        pattern = texture(rng, height, width, rng.uniform(*wavelengths))[region]
        brightness[region] = (pattern - pattern.mean()) / pattern.std() * CONTRAST
    colour = rng.uniform(95, 160, 3) + brightness[..., None] * rng.uniform(0.8, 1.2, 3)
    return colour.clip(0, 255).round().astype(np.uint8), mask.astype(np.uint8) * 255


def centred_blob(height: int, width: int, sigma: float = CENTRED_SIGMA) -> np.ndarray:
    """A Gaussian in the middle of a map (H, W), uint8; `sigma` as a fraction of its sides."""
    y, x = np.ogrid[:height, :width]
    squared = (y / height - 0.5) ** 2 + (x / width - 0.5) ** 2
    return (255 * np.exp(-squared / (2 * sigma**2))).astype(np.uint8)


def main(args: argparse.Namespace) -> None:
    with cli.one_line_errors() as command:
        files.output_folder(args.folder)
        command.started()
        for number, (split, count) in enumerate({"train": args.train, "test": args.test}.items()):
            for i in progress_bar(range(count), desc=split, unit="img"):
                image, mask = sample(np.random.default_rng([args.seed, number, i]))
                pixels = {"Image/toy_{}.jpg": image, "Mask/toy_{}.png": mask}
                if split == "test":
                    pixels["Blob/toy_{}.png"] = centred_blob(*mask.shape)
                for name, array in pixels.items():
                    path = args.folder / split / name.format(f"{i:04}")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array).save(path, quality=92)


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("folder", type=cli.path, help="for the data set")
    parser.add_argument("--train", type=cli.number(), default=160, help="training images")
    parser.add_argument("--test", type=cli.number(), default=40, help="test images")
    parser.add_argument("--seed", type=cli.number(minimum=0), default=0, help="another seed makes other images")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
