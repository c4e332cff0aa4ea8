"""Random damage and options end in a result or a message, never in a crash.

`--hypothesis-profile anew` draws 2,000 new examples for each test.
"""

import contextlib
import io
import math
import os
import tempfile
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ADOBE_RGB_PROFILE, MICRO
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

import eval as evaluation
import test as script
import train
from sam2.build_sam import build_sam2_trunk
from SAM2UNeXT import SAM2UNeXT, build_aux
from tools import check_dataset, toy_dataset
from unext import checkpoint, cli, images, weights
from unext.images import for_network, read_image, read_photo, read_size
from unext.masks import read_and_check_mask, read_mask

TRUNK, AUX = build_sam2_trunk("micro"), build_aux(MICRO["aux"], MICRO["aux_size"]).model  # to load files into
AUX_FILE = f"{MICRO['aux']}.safetensors"


@pytest.fixture(scope="module")
def intact_images(tmp_path_factory):
    """A folder of images of each kind, and the settings of the commands that read them."""
    folder = tmp_path_factory.mktemp("images")
    pixels, mask = toy_dataset.sample(np.random.default_rng(0))
    photo, exif, notes = Image.fromarray(pixels), Image.Exif(), PngImagePlugin.PngInfo()
    exif[images.ORIENTATION] = 6
    notes.add_text("prompt", "x" * 2_000_000, zip=True)
    profile, white = ADOBE_RGB_PROFILE, mask | 255
    kinds = {
        "progressive.jpg": (pixels, {"progressive": True, "icc_profile": profile, "exif": exif}),
        "grey.jpg": (photo.convert("L"), {}),
        "cmyk.jpg": (photo.convert("CMYK"), {"icc_profile": profile}),
        "colour.png": (pixels, {"icc_profile": profile, "exif": exif}),
        "mask.png": (mask, {}),
        "palette.png": (photo.convert("P"), {"transparency": 3}),
        "deep.png": (mask * np.uint16(257), {}),
        "cutout.png": (np.dstack([pixels, mask]), {"pnginfo": notes}),
        "alpha.png": (np.dstack([white, mask]), {}),
        "alpha.webp": (np.dstack([white, white, white, mask]), {"lossless": True}),
        "labels.png": (np.where(mask > 128, 1, mask | np.tri(*mask.shape, -9, np.uint8) * 255).astype(np.uint8), {}),
        "turned.tif": (pixels, {"exif": exif}),
        "float.tif": (mask / np.float32(255), {}),
        "two.mpo": (pixels, {"save_all": True, "append_images": [photo]}),
        "moving.gif": (pixels, {"save_all": True, "append_images": [photo]}),
    }
    for name, (image, options) in kinds.items():
        (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(folder / name, **options)
    for name in ("deep_colour.png", "deep_colour.tif"):
        cv2.imwrite(str(folder / name), pixels * np.uint16(16))
    images.configure_reading(cli.MAX_PIXELS)
    return folder


def read_every_way(path):
    """Reads an image with every function; check_dataset, which never fails, must agree. Raises OSError."""
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


@pytest.fixture(scope="module")
def intact_weights(tmp_path_factory):
    """A folder of weights of each kind; but in safetensors, a tensor is a number in the file, expanded to its shape."""
    folder = tmp_path_factory.mktemp("weights")

    def expanded(state, prefix=""):
        return {prefix + key: torch.zeros((), dtype=t.dtype).expand(t.shape) for key, t in state.items()}

    sam2 = {"model": expanded(TRUNK.state_dict(), weights.TRUNK)}
    torch.save(sam2, folder / "sam2_hiera_micro.pt")
    torch.save(sam2, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(AUX.state_dict(), folder / AUX_FILE)
    model = SAM2UNeXT(folder / "sam2_hiera_micro.pt", folder / AUX_FILE, **MICRO)
    content = checkpoint.network_content(model, whole=False) | {"epoch": 1}
    content["state_dict"] = expanded(content["state_dict"])
    torch.save(content, folder / "trained.pth")
    optimizer = {"optimizer_states": [{"state": {0: {"step": torch.ones(3)}}, "param_groups": []}]}
    torch.save(content | optimizer | {"progress": {"step": 2, "terms": {"bce": 0.5}}}, folder / "last.pth")
    original = SAM2UNeXT(sam2="micro", aux="none").state_dict()
    torch.save(expanded(original), folder / "original.pth")
    torch.save({"state_dict": expanded(original, "model._orig_mod.")} | optimizer, folder / "wrapped.ckpt")
    return folder


def read_weights(path):
    """Fills the network or encoder of a file. Raises OSError or ValueError."""
    if path.suffix == ".pt":
        weights.load_sam2(TRUNK, path)
    elif path.name == AUX_FILE:
        weights.load_aux(AUX, MICRO["aux"], path)
    else:
        SAM2UNeXT.from_checkpoint(path)


def flip_bits(rng, content):
    """The content with few or many bits changed, half the time only in its first 200 bytes, which are the header."""
    damaged = np.frombuffer(content, np.uint8).copy()
    end = min(200, len(damaged)) if rng.random() < 0.5 else len(damaged)
    for position in rng.integers(0, end, int(64 ** rng.random())):
        damaged[position] ^= 1 << rng.integers(8)
    return damaged.tobytes()


def flip_inside(rng, content):
    """Bits flipped in the pickle of an archive with right checksums, or in the first bytes of another file."""
    if not content.startswith(b"PK"):
        return flip_bits(rng, content[:2000]) + content[2000:]
    archive = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(archive, "w") as new:
        for name in old.namelist():
            member = old.read(name)
            new.writestr(name, flip_bits(rng, member) if name.endswith("data.pkl") else member)
    return archive.getvalue()


def cut_short(rng, content):
    return content[: rng.integers(len(content))]


@pytest.mark.hypothesis
@pytest.mark.parametrize("kind, read", [("intact_images", read_every_way), ("intact_weights", read_weights)])
def test_whole_files_are_read_and_damaged_ones_read_or_refused_by_name(kind, read, request):
    paths = sorted(request.getfixturevalue(kind).iterdir())
    for path in paths:
        read(path)

    @given(st.sampled_from(paths), st.sampled_from([flip_bits, flip_inside, cut_short]), st.integers(0, 2**32 - 1))
    def damaged_ones_are_read_or_refused(intact, damage, seed):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = Path(folder, intact.name)
            path.write_bytes(damage(np.random.default_rng(seed), intact.read_bytes()))
            try:
                read(path)
            except (OSError, ValueError) as error:
                assert str(path) in str(error)

    damaged_ones_are_read_or_refused()


ODD = ["", "-", "--", "nan", "inf", "-0", "1e999", "0x10", "1_0", "٣", "9" * 5000, " 7 ", "map,mask", "auto"]
TEXTS = st.one_of(st.text(max_size=12), st.integers().map(str), st.floats().map(str), st.sampled_from(ODD))
NEEDED = {  # options
    train: "--hiera_path x --save_path x",
    script: "--checkpoint x --test_image_path x --save_path x",
    evaluation: "--pred_path x",
    check_dataset: "x x",
}


@pytest.mark.parametrize("program", NEEDED)
@given(data=st.data())
def test_options_are_accepted_or_refused_with_status_2(program, data):
    parser, given = program.get_args_parser(), NEEDED[program].split()
    for option in data.draw(st.lists(st.sampled_from(sorted(parser._option_string_actions)), max_size=4)):
        given += [option, *data.draw(st.lists(TEXTS, max_size=2))]
    given = [text for text in given if text not in ("-h", "--help")]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            args = parser.parse_args(given)
    except SystemExit as stop:
        assert stop.code == 2 and errors.getvalue().endswith("; --help lists all options\n")
        return
    for value in vars(args).values():
        assert value is None or isinstance(value, (str, int, float, bool, list, tuple, Path))
        assert not isinstance(value, float) or math.isfinite(value)
    assert not hasattr(args, "save_path") or os.fspath(args.save_path)
