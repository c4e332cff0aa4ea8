"""Searches for input that ends without a proper message: damaged files, and random property tests.

    python tests/fuzz.py --images 2000 --weights 500

Every damaged file goes through all that reads it: images through unext/images.py and tools/check_dataset.py, as image
and as mask, weights through the networks that they fill. It must be read, or refused with a message that names it;
neither may take longer than a minute or a process more than 1 GB. Then the property tests run with 2,000 new examples
each. Prints counts; the exit status is 1 if something is amiss. Each run draws anew; --seed repeats one.
"""

import argparse
import contextlib
import io
import json
import resource
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
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
from unext.images import for_network, read_image, read_photo, read_size
from unext.masks import read_and_check_mask, read_mask

PATIENCE = 60  # seconds a file
MEMORY = 1024  # MB a process
REAL = ROOT.parent / "shared" / "data" / "suim8"  # eight real images, not part of the repository
AUX, AUX_SIZE = "test_vit", 160  # timm's smallest transformer


class Outcome(NamedTuple):
    """What became of a file."""

    kind: str  # the file it was made from
    number: int
    verdict: str  # read, refused, or what is amiss
    seconds: float
    memory: float  # most that the process took so far, MB


class Hang(BaseException):
    """Passes by every `except Exception`."""


def flip_bits(rng: np.random.Generator, content: bytes, most: int = 64) -> bytes:
    """The content with up to `most` bits changed, half the time only in its first 200 bytes, which are the header."""
    damaged = np.frombuffer(content, np.uint8).copy()
    end = min(200, len(damaged)) if rng.random() < 0.5 else len(damaged)
    for place in rng.integers(0, end, rng.integers(1, most, endpoint=True)):
        damaged[place] ^= 1 << rng.integers(8)
    return damaged.tobytes()


def damage(rng: np.random.Generator, content: bytes, deepen: Callable[[np.random.Generator, bytes], bytes]) -> bytes:
    """Bits flipped, cut short, both, or bits flipped behind the checksums."""
    way = rng.integers(4)
    if way == 3:
        return deepen(rng, content)
    content = flip_bits(rng, content) if way != 1 else content
    return content[: rng.integers(len(content))] if way else content


def deepen_image(rng: np.random.Generator, content: bytes) -> bytes:
    """Bits flipped in a PNG whose checksums are put right again, so that the decoder sees the damage."""
    if not content.startswith(b"\x89PNG"):
        return flip_bits(rng, content, most=3)
    damaged = bytearray(content[:8] + flip_bits(rng, content[8:], most=8))
    place = 8
    while place + 12 <= len(content):  # by the lengths of the whole file
        length = struct.unpack(">I", content[place : place + 4])[0]
        damaged[place : place + 4] = content[place : place + 4]
        body = bytes(damaged[place + 4 : place + 8 + length])
        damaged[place + 8 + length : place + 12 + length] = struct.pack(">I", zlib.crc32(body))
        place += 12 + length
    return bytes(damaged)


def deepen_weights(rng: np.random.Generator, content: bytes) -> bytes:
    """Bits flipped in the pickle of an archive whose checksums are right, or in the header of safetensors."""
    if not content.startswith(b"PK"):
        length = struct.unpack("<Q", content[:8])[0] if content[8:9] == b"{" else len(content) - 8
        return content[:8] + flip_bits(rng, content[8 : 8 + length], most=4) + content[8 + length :]
    archive = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(archive, "w") as new:
        for name in old.namelist():
            part = old.read(name)
            new.writestr(name, flip_bits(rng, part, most=4) if name.endswith("data.pkl") else part)
    return archive.getvalue()


def write_images(folder: Path) -> None:
    """Intact files of each kind."""
    pixels, mask = toy_dataset.sample(np.random.default_rng(0))
    photo, exif, notes = Image.fromarray(pixels), Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112] = 6
    notes.add_text("prompt", "x" * 2_000_000, zip=True)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace("sRGB".encode("utf-16-be"), "ours".encode("utf-16-be"))  # so that it is applied
    bases = {
        "baseline.jpg": (photo, {}),
        "progressive.jpg": (photo, {"progressive": True, "exif": exif}),
        "grey.jpg": (photo.convert("L"), {}),
        "cmyk.jpg": (photo.convert("CMYK"), {}),
        "colour.png": (photo, {"exif": exif}),
        "mask.png": (Image.fromarray(mask), {}),
        "palette.png": (photo.convert("P"), {"transparency": 3}),
        "deep.png": (Image.fromarray(mask * np.uint16(257)), {}),
        "rgba.png": (photo.convert("RGBA"), {"compress_level": 1}),
        "cutout.png": (Image.fromarray(np.dstack([pixels, mask])), {"pnginfo": notes}),
        "alpha.png": (Image.fromarray(np.dstack([mask | 255, mask])), {}),
        "alpha.webp": (Image.fromarray(np.dstack([mask | 255] * 3 + [mask])), {"lossless": True}),
        "labels.png": (
            Image.fromarray(np.where(mask > 128, np.uint8(1), mask | np.tri(*mask.shape, -9, np.uint8) * 255)),
            {},
        ),
        "profile.jpg": (photo, {"icc_profile": profile, "exif": exif}),
        "profile.png": (photo, {"icc_profile": profile}),
        "cmyk.tif": (photo.convert("CMYK"), {"icc_profile": profile}),
        "turned.tif": (photo, {"exif": exif}),
        "float.tif": (Image.fromarray(mask / np.float32(255)), {}),
        "two.mpo": (photo, {"save_all": True, "append_images": [photo]}),
        "moving.gif": (photo, {"save_all": True, "append_images": [photo]}),
    }
    for name in ("deep_colour.png", "deep_colour.tif"):
        cv2.imwrite(str(folder / name), pixels * np.uint16(16))
    for path in REAL.glob("[im]*s/*.[jp][pn]g"):
        shutil.copy(path, folder)
    for name, (image, options) in bases.items():
        image.save(folder / name, **options)


def read_every_way(path: Path) -> None:
    """Reads a file in every way, and check_dataset, which never fails, must agree. Raises OSError that names it."""
    errors = []
    ways = {
        True: (read_mask, read_and_check_mask),
        False: (read_size, read_image, lambda path: for_network(read_photo(path))),
    }
    for is_mask, functions in ways.items():
        failed = []
        for function in functions:
            try:
                function(path)
            except OSError as error:
                failed.append(error)
        found = check_dataset.inspect(path, is_mask).size is not None
        assert found == (not failed), f"check_dataset disagrees: {failed}"
        errors += failed if not is_mask or "alpha channel" not in str(failed) else []  # a cutout is no mask
    if errors:
        raise errors[0]


def write_weights(folder: Path) -> None:
    """Intact files of weights of each kind.

    All tensors but those of safetensors are one number in the file, spread over a shape.
    """
    import safetensors.torch
    import torch

    from SAM2UNeXT import SAM2UNeXT, build_aux
    from unext import checkpoint

    def spread(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for key, tensor in state.items()}

    golden = json.loads((ROOT / "tests/golden/sam2_hiera_tiny.keys.json").read_text())
    sam2 = {"model": {key: torch.zeros(()).expand(shape) for key, shape in golden.items()}}
    torch.save(sam2, folder / "sam2_hiera_tiny.pt")
    torch.save(sam2, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(build_aux(AUX, AUX_SIZE).model.state_dict(), folder / f"{AUX}.safetensors")
    options: dict[str, Any] = {"sam2": "tiny", "aux": AUX, "aux_size": AUX_SIZE, "size": 64}
    model = SAM2UNeXT(folder / "sam2_hiera_tiny.pt", folder / f"{AUX}.safetensors", **options)
    content = checkpoint.network_content(model, whole=False) | {"epoch": 1}
    content["state_dict"] = spread(content["state_dict"])
    torch.save(content, folder / "trained.pth")
    parts = {"optimizer": {"state": {0: {"step": torch.ones(3)}}, "param_groups": []}, "scheduler": {}, "scaler": {}}
    progress = {"epoch": 1, "step": 2, "images": 3, "terms": {"bce": 0.5, "wiou": 0.5}, "best": 0.5}
    torch.save(content | parts | {"progress": progress, "recipe": {"--epoch": 3}}, folder / "last.pth")
    original = spread(SAM2UNeXT(sam2="tiny", aux="none").state_dict())
    torch.save(original, folder / "original.pth")
    wrapped = {f"model._orig_mod.{key}": tensor for key, tensor in original.items()}
    torch.save({"epoch": 1, "state_dict": wrapped, "optimizer_states": [parts["optimizer"]]}, folder / "wrapped.ckpt")


def read_weights(path: Path) -> None:
    """Fills what a file is for. Raises OSError or ValueError that names it."""
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
    "images": (write_images, deepen_image, read_every_way),
    "weights": (write_weights, deepen_weights, read_weights),
}


@cache
def read_bases(folder: Path) -> dict[str, bytes]:
    """The intact files by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def expire(number: int, frame: object) -> None:
    raise Hang


def attempt(number: int, what: str, seed: int, bases_folder: Path) -> Outcome:
    """Makes the damaged file `number` in a folder of its own, from an intact one, and reads it."""
    _, deepen, read = KINDS[what]
    rng = np.random.default_rng([seed, number, list(KINDS).index(what)])
    bases = read_bases(bases_folder)
    name = list(bases)[rng.integers(len(bases))]
    start = time.monotonic()
    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(PATIENCE)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            path = Path(folder, name)
            path.write_bytes(damage(rng, bases[name], deepen))
            verdict = judge(read, path)
    except Hang:
        verdict = "hangs"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Outcome(name, number, verdict, time.monotonic() - start, memory)


def judge(read: Callable[[Path], None], path: Path) -> str:
    """Whether the file was read, refused with its name, or what is amiss."""
    try:
        read(path)
    except (OSError, ValueError) as error:
        return "refused" if str(path) in str(error) else f"refused without its name: {error!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "read"


def summary(what: str, outcomes: list[Outcome]) -> tuple[str, list[str]]:
    """Counts in a line, and a line for each file that something is amiss with."""
    counts = Counter(one.verdict if one.verdict in ("read", "refused") else "amiss" for one in outcomes)
    memory = max(one.memory for one in outcomes)
    amiss = [f"{what} {one.number}, {one.kind}: {one.verdict}" for one in outcomes if one.verdict not in counts]
    if memory > MEMORY:
        amiss.append(f"{what}: a process took {memory:,.0f} MB")
    line = (
        f"{len(outcomes):,} {what}: {counts['read']:,} read, {counts['refused']:,} refused, {counts['amiss']:,} amiss; "
    )
    return f"{line}longest {max(one.seconds for one in outcomes):.1f} s, most memory {memory:,.0f} MB", amiss


def main(args: argparse.Namespace) -> None:
    amiss = []
    print(f"--seed {args.seed}")
    with cli.one_line_errors():
        for what, number in (("images", args.images), ("weights", args.weights)):
            with tempfile.TemporaryDirectory() as folder:
                KINDS[what][0](Path(folder))
                function = partial(attempt, what=what, seed=args.seed, bases_folder=Path(folder))
                results = workers.in_processes(function, range(number), args.workers)
                with closing(results):
                    line, wrong = summary(what, list(tqdm(results, what, number)))
            print(line)
            amiss += wrong
        options = ["-q", "-m", "hypothesis", "--hypothesis-profile", "anew", "--hypothesis-seed", str(args.seed)]
        if subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT).returncode:
            amiss.append("a property does not hold, see above")
    if amiss:
        print(*amiss, sep="\n")
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
