"""Searches for input that ends without a proper message: damaged files, and random property tests.

    python tests/fuzz.py --images 2000 --weights 500

Every damaged file goes through all functions that read it: images through unext/images.py, unext/masks.py and
tools/check_dataset.py, weights through the networks that they fill. It must be read, or refused with a message that
names it, within a minute. Then the property tests run with 2,000 new examples each. Prints counts; the exit status is
1 if a file fails. Each run draws anew; --seed repeats one.
"""

import argparse
import contextlib
import io
import json
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageCms, PngImagePlugin
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "golden")]

from tools import check_dataset, toy_dataset
from unext import cli, workers
from unext.images import configure_reading, for_network, read_image, read_photo, read_size
from unext.masks import read_and_check_mask, read_mask

PATIENCE = 60  # seconds a file
REAL = ROOT.parent / "shared" / "data" / "suim8"  # eight real images, not part of the repository
AUX, AUX_SIZE = "test_vit", 160  # timm's smallest transformer


class Outcome(NamedTuple):
    """The result for a damaged file."""

    source: str  # the intact file
    number: int
    verdict: str  # read, refused, or what is wrong


class Hang(BaseException):
    """Passes by every `except Exception`."""


def flip_bits(rng: np.random.Generator, content: bytes, most: int = 64) -> bytes:
    """The content with up to `most` bits changed, half the time only in its first 200 bytes, which are the header."""
    damaged = np.frombuffer(content, np.uint8).copy()
    end = min(200, len(damaged)) if rng.random() < 0.5 else len(damaged)
    for position in rng.integers(0, end, rng.integers(1, most, endpoint=True)):
        damaged[position] ^= 1 << rng.integers(8)
    return damaged.tobytes()


def damage(rng: np.random.Generator, content: bytes) -> bytes:
    """Many bits flipped, few, or some in what `flip_inside` reaches; or the content cut short."""
    method = rng.integers(4)
    if method == 3:
        return flip_inside(rng, content)
    return content[: rng.integers(len(content))] if method == 2 else flip_bits(rng, content, (64, 3)[method])


def flip_inside(rng: np.random.Generator, content: bytes) -> bytes:
    """Bits flipped in the pickle of an archive with right checksums, or in the first bytes of another file."""
    if not content.startswith(b"PK"):
        return flip_bits(rng, content[:2000], most=4) + content[2000:]
    archive = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(archive, "w") as new:
        for name in old.namelist():
            member = old.read(name)
            new.writestr(name, flip_bits(rng, member, most=4) if name.endswith("data.pkl") else member)
    return archive.getvalue()


def write_images(folder: Path) -> None:
    """Intact files of each kind."""
    pixels, mask = toy_dataset.sample(np.random.default_rng(0))
    photo, exif, notes = Image.fromarray(pixels), Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112] = 6
    notes.add_text("prompt", "x" * 2_000_000, zip=True)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace("sRGB".encode("utf-16-be"), "ours".encode("utf-16-be"))  # so that it is applied
    labels = np.where(mask > 128, np.uint8(1), mask | np.tri(*mask.shape, -9, np.uint8) * 255)
    white = mask | 255
    images = {
        "baseline.jpg": (pixels, {}),
        "progressive.jpg": (pixels, {"progressive": True, "exif": exif}),
        "grey.jpg": (photo.convert("L"), {}),
        "cmyk.jpg": (photo.convert("CMYK"), {}),
        "colour.png": (pixels, {"exif": exif}),
        "mask.png": (mask, {}),
        "palette.png": (photo.convert("P"), {"transparency": 3}),
        "deep.png": (mask * np.uint16(257), {}),
        "rgba.png": (photo.convert("RGBA"), {"compress_level": 1}),
        "cutout.png": (np.dstack([pixels, mask]), {"pnginfo": notes}),
        "alpha.png": (np.dstack([white, mask]), {}),
        "alpha.webp": (np.dstack([white, white, white, mask]), {"lossless": True}),
        "labels.png": (labels, {}),
        "profile.jpg": (pixels, {"icc_profile": profile, "exif": exif}),
        "profile.png": (pixels, {"icc_profile": profile}),
        "cmyk.tif": (photo.convert("CMYK"), {"icc_profile": profile}),
        "turned.tif": (pixels, {"exif": exif}),
        "float.tif": (mask / np.float32(255), {}),
        "two.mpo": (pixels, {"save_all": True, "append_images": [photo]}),
        "moving.gif": (pixels, {"save_all": True, "append_images": [photo]}),
    }
    for name, (image, options) in images.items():
        (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(folder / name, **options)
    for name in ("deep_colour.png", "deep_colour.tif"):
        cv2.imwrite(str(folder / name), pixels * np.uint16(16))
    for path in REAL.glob("[im]*s/*.[jp][pn]g"):
        shutil.copy(path, folder)


def read_every_way(path: Path) -> None:
    """Reads a file with every function; check_dataset, which never fails, must agree. Raises OSError that names it."""
    errors = []
    for is_mask, functions in (
        (True, (read_mask, read_and_check_mask)),
        (False, (read_size, read_image, lambda path: for_network(read_photo(path)))),
    ):
        failed = []
        for function in functions:
            try:
                function(path)
            except OSError as error:
                failed.append(error)
        is_readable = check_dataset.inspect(path, is_mask).size is not None
        assert is_readable == (not failed), f"check_dataset disagrees: {failed}"
        errors += failed if not is_mask or "alpha channel" not in str(failed) else []  # a cutout is no mask
    if errors:
        raise errors[0]


def write_weights(folder: Path) -> None:
    """Intact files of each kind; except in safetensors, a tensor is a number in the file, expanded to its shape."""
    import safetensors.torch
    import torch

    from SAM2UNeXT import SAM2UNeXT, build_aux
    from unext import checkpoint

    def expanded(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for key, tensor in state.items()}

    golden = json.loads((ROOT / "tests/golden/sam2_hiera_tiny.keys.json").read_text())
    sam2 = {"model": {key: torch.zeros(()).expand(shape) for key, shape in golden.items()}}
    torch.save(sam2, folder / "sam2_hiera_tiny.pt")
    torch.save(sam2, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(build_aux(AUX, AUX_SIZE).model.state_dict(), folder / f"{AUX}.safetensors")
    options: dict[str, Any] = {"sam2": "tiny", "aux": AUX, "aux_size": AUX_SIZE, "size": 64}
    model = SAM2UNeXT(folder / "sam2_hiera_tiny.pt", folder / f"{AUX}.safetensors", **options)
    content = checkpoint.network_content(model, whole=False) | {"epoch": 1}
    content["state_dict"] = expanded(content["state_dict"])
    torch.save(content, folder / "trained.pth")
    states = {"optimizer": {"state": {0: {"step": torch.ones(3)}}, "param_groups": []}, "scheduler": {}, "scaler": {}}
    progress = {"epoch": 1, "step": 2, "images": 3, "terms": {"bce": 0.5, "wiou": 0.5}, "best": 0.5}
    torch.save(content | states | {"progress": progress, "recipe": {"--epoch": 3}}, folder / "last.pth")
    original = expanded(SAM2UNeXT(sam2="tiny", aux="none").state_dict())
    torch.save(original, folder / "original.pth")
    wrapped = {f"model._orig_mod.{key}": tensor for key, tensor in original.items()}
    torch.save({"epoch": 1, "state_dict": wrapped, "optimizer_states": [states["optimizer"]]}, folder / "wrapped.ckpt")


def read_weights(path: Path) -> None:
    """Fills the network or encoder of a file. Raises OSError or ValueError that names it."""
    from sam2.build_sam import build_sam2_trunk
    from SAM2UNeXT import SAM2UNeXT, build_aux
    from unext import weights

    if path.name in ("sam2_hiera_tiny.pt", "legacy.pt"):
        weights.load_sam2(build_sam2_trunk("tiny", device="meta"), path)
    elif path.name == f"{AUX}.safetensors":
        weights.load_aux(build_aux(AUX, AUX_SIZE, device="meta").model, AUX, path)
    else:
        SAM2UNeXT.from_checkpoint(path)


KINDS = {
    "images": (write_images, read_every_way),
    "weights": (write_weights, read_weights),
}


@cache
def intact_files(folder: Path) -> dict[str, bytes]:
    """The files in a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def expire(number: int, frame: object) -> None:
    raise Hang


def attempt(number: int, what: str, seed: int, folder: Path) -> Outcome:
    """Makes the damaged file `number` from an intact one of `folder`, and reads it."""
    _, read = KINDS[what]
    rng = np.random.default_rng([seed, number, list(KINDS).index(what)])
    intact = intact_files(folder)
    name = list(intact)[rng.integers(len(intact))]
    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(PATIENCE)
    try:
        with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()):
            path = Path(temporary, name)
            path.write_bytes(damage(rng, intact[name]))
            verdict = judge(read, path)
    except Hang:
        verdict = "hangs"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return Outcome(name, number, verdict)


def judge(read: Callable[[Path], None], path: Path) -> str:
    """ "read", "refused" with the file's name, or what is wrong."""
    try:
        read(path)
    except (OSError, ValueError) as error:
        return "refused" if str(path) in str(error) else f"refused without its name: {error!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "read"


def summary(what: str, outcomes: Sequence[Outcome]) -> tuple[str, list[str]]:
    """Counts in a line, and a line for each failure."""
    failures = [outcome for outcome in outcomes if outcome.verdict not in ("read", "refused")]
    counts = Counter(outcome.verdict for outcome in outcomes)
    line = f"{len(outcomes):,} {what}: {counts['read']:,} read, {counts['refused']:,} refused, {len(failures):,} failed"
    return line, [f"{what} {outcome.number}, {outcome.source}: {outcome.verdict}" for outcome in failures]


def main(args: argparse.Namespace) -> None:
    failures = []
    print(f"--seed {args.seed}")
    with cli.one_line_errors():
        configure_reading(cli.MAX_PIXELS)
        for what, number in (("images", args.images), ("weights", args.weights)):
            with tempfile.TemporaryDirectory() as folder:
                KINDS[what][0](Path(folder))
                function = partial(attempt, what=what, seed=args.seed, folder=Path(folder))
                with closing(workers.in_processes(function, range(number), args.workers)) as outcomes:
                    line, lines = summary(what, list(tqdm(outcomes, what, number)))
            print(line)
            failures += lines
        options = ["-q", "-m", "hypothesis", "--hypothesis-profile", "anew", "--hypothesis-seed", str(args.seed)]
        if subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT).returncode:
            failures.append("a property does not hold, see above")
    if failures:
        print(*failures, sep="\n")
        raise SystemExit(cli.NOT_COMPLETED)


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--images", type=cli.number(), default=2000, help="damaged images")
    parser.add_argument("--weights", type=cli.number(), default=500, help="damaged files of weights")
    parser.add_argument("--seed", type=cli.number(minimum=0), default=secrets.randbits(32), help="repeats a run")
    parser.add_argument("--workers", type=cli.number(), default=2, help="processes")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
