"""images.py: whatever a file holds, the pixels are the right ones, or the reason is named."""

import os
import struct
import subprocess
import sys

import cv2
import numpy as np
import pytest
from conftest import ADOBE_RGB, ADOBE_RGB_PROFILE, DISC, PHOTO, ROOT, findings_of, save_image
from PIL import Image, PngImagePlugin

from unext import cli, images, pairing
from unext.images import FAR, LIMIT, WHITE, for_network, photo_of, read_image, read_photo, read_size
from unext.masks import read_mask

SMOOTH = Image.fromarray(PHOTO).resize((30, 20)).resize((60, 40))
RAMP = np.tile(np.linspace(0, 255, 60).round().astype(np.uint8), (40, 1))
COLOUR = np.dstack([RAMP] * 3)
TWELVE = np.rint(RAMP / 255 * 4095).astype(np.uint16)  # in 12 bits
TURN = Image.Exif()
TURN[0x0112] = 6  # a quarter turn


PIXELS = {  # of RAMP, by the value that is white: None for 8 bits
    "l.png": (None, RAMP),
    "la.png": (None, np.dstack([RAMP, np.full_like(RAMP, 255)])),
    "colour.tif": (None, COLOUR),
    "16.png": (65535, RAMP * np.uint16(257)),
    "16.tif": (65535, RAMP * np.uint16(257)),
    "16.pgm": (65535, RAMP * np.uint16(257)),
    "16_colour.png": (65535, COLOUR * np.uint16(257)),
    "16_colour.tif": (65535, COLOUR * np.uint16(257)),
    "float.tif": (1, RAMP / np.float32(255)),
    "12_colour.png": (4095, np.dstack([TWELVE] * 3)),
    "12_colour.tif": (4095, np.dstack([TWELVE] * 3)),
    "32.tif": (255, RAMP.astype(np.int32)),
}


def save(path, pixels):
    if pixels.dtype == np.uint16:  # Pillow saves no such colours
        cv2.imwrite(str(path), pixels)
    else:
        Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("name", PIXELS)
def test_images_and_masks_of_any_bit_depth_are_read_in_8_bits(name, tmp_path, monkeypatch):
    white, pixels = PIXELS[name]
    path = save(tmp_path / name, pixels)
    assert np.array_equal(read_mask(path), RAMP)
    monkeypatch.setenv(WHITE, str(white if white in (255, 4095) else ""))
    photo = read_photo(path)
    assert np.array_equal(read_image(path), COLOUR) and np.array_equal(photo.convert("RGB"), COLOUR)
    assert ("16 bits or floats" in findings_of(path)) == bool(white) and FAR not in photo.info
    assert "mask not binary" in findings_of(path, is_mask=True)  # as it is read
    with Image.open(path) as image:
        assert all(np.array_equal(photo_of(image).convert("RGB"), COLOUR) for _ in range(2))  # it is not altered


@pytest.mark.parametrize(
    "white, maximum, grey, is_far",
    [
        (65535, np.uint16(3900), 15, True),
        (65535, np.uint16(4200), 16, False),
        (65535, np.uint16(65535), 255, False),
        (4095, np.uint16(3900), 243, False),
        (1, np.float32(0.05), 13, True),
        (1, np.float32(0.9), 230, False),
        (1, np.float32(1.02), 255, False),
        (1, np.float32(254), 255, True),
        (255, np.float32(254), 254, False),
    ],
)
def test_a_value_means_the_same_in_every_image(white, maximum, grey, is_far, tmp_path, monkeypatch):
    """Whatever the maximum of the image; that of a mask is the object."""
    name = "x.png" if maximum.dtype == np.uint16 else "x.tif"
    path = save(tmp_path / name, (DISC > 0).astype(maximum.dtype) * maximum)
    assert np.array_equal(read_mask(path), DISC)
    monkeypatch.setenv(WHITE, str(white if white in (255, 4095) else ""))
    assert read_image(path).getextrema() == ((0, grey),) * 3
    far = f"its values reach {maximum:g}, and {white} is white" if is_far else None
    assert read_photo(path).info.get(FAR) == findings_of(path).get(FAR) == far


def float_tiff(path, *values):
    return save_image(path, np.tile(np.array(values, np.float32), (4, 1)))


UNKNOWN = "its format is not known to Pillow"
TO_MEND = {  # makes a file, why it cannot be read
    "negative.tif": (lambda path: float_tiff(path, -1, 1), "its values from -1 to 1 are no grey levels; save it as 8"),
    "infinite.tif": (lambda path: float_tiff(path, 0, np.inf), "its values from 0 to inf are no grey levels; save it"),
    "nan.tif": (lambda path: float_tiff(path, np.nan, 1), "its values from nan to nan are no grey levels; save it as"),
    "bands.tif": (lambda path: cv2.imwrite(str(path), COLOUR.astype(np.float32)), f"{UNKNOWN}; save it as 8-bit RGB"),
    "phone.heic": (lambda path: path.write_bytes(b"no image"), f"{UNKNOWN}; convert to JPEG, or pip install pillow-h"),
    "zero.jpg": (lambda path: path.write_bytes(b""), "it is empty"),
    "text.jpg": (lambda path: path.write_bytes(b"no image"), UNKNOWN),
    "program.jpg": (lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%EndComments\n"), UNKNOWN),
    "cut.jpg": (lambda path: path.write_bytes(save_image(path, PHOTO).read_bytes()[:-300]), "image file is truncated"),
    "bomb.pgm": (
        lambda path: path.write_bytes(b"P5 61 40 255 "),
        "its 2,440 pixels exceed the limit of 2,400: it could be a decompression bomb; --max_pixels allows",
    ),
}


@pytest.mark.parametrize("name", TO_MEND)
def test_files_that_cannot_be_read_are_named_with_the_reason(name, tmp_path, monkeypatch):
    make, reason = TO_MEND[name]
    make(tmp_path / name)
    monkeypatch.setenv(LIMIT, "2400")
    for function in (read_image, read_mask):
        with pytest.raises(OSError) as error:
            function(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: cannot be read as an image: {reason}")
    assert reason in findings_of(tmp_path / name)["unreadable"]


@pytest.mark.parametrize("error", [MemoryError(), cv2.error("(-4:Insufficient memory) Failed to allocate 9 bytes")])
def test_lack_of_memory_is_no_fault_of_the_file(error, tmp_path):
    path = save_image(tmp_path / "x.png", PHOTO)
    with pytest.raises(MemoryError), images.opened(path):
        raise error


@pytest.mark.parametrize(
    "name, mode, options",
    [
        *((f"{mode}.png", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        ("PA.tif", "PA", {}),
        ("CMYK.tif", "CMYK", {}),
        ("CMYK.jpg", "CMYK", {}),
        ("key.png", "P", {"transparency": 0}),
        ("turned.png", "RGB", {"exif": TURN}),
        ("moving.gif", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (60, 40))]}),
        ("two.mpo", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (60, 40))]}),
        ("photo.webp", "RGB", {}),
        ("photo.jp2", "RGB", {}),
    ],
)
def test_stored_pixels_are_those_of_pillow_in_any_colour_mode_and_format(name, mode, options, tmp_path):
    path = tmp_path / name
    SMOOTH.convert(mode).save(path, **options)
    stored = Image.open(path)
    assert np.array_equal(read_image(path), stored.convert("RGB")) and read_size(path) == (40, 60)
    assert np.array_equal(read_photo(path, as_shown=False).convert("RGB"), stored.convert("RGB"))
    assert np.array_equal(read_mask(path), stored.convert("L"))
    assert [file.name for file in pairing.images_in(tmp_path)] == [name]
    if mode in ("RGB", "CMYK"):
        assert np.abs(np.array(read_image(path), int) - SMOOTH).mean() < 20  # the first frame


def test_a_png_with_megabytes_of_text_and_profile_is_read_by_commands_and_their_processes(tmp_path, monkeypatch):
    for module, name in ((Image, "MAX_IMAGE_PIXELS"), (PngImagePlugin, "MAX_TEXT_CHUNK")):
        monkeypatch.setattr(module, name, getattr(module, name))
    images.configure_reading(cli.MAX_PIXELS)
    notes = PngImagePlugin.PngInfo()
    notes.add_text("prompt", "x" * 3_000_000, zip=True)
    notes.add_itxt("prompt", "x" * 3_000_000)
    path = tmp_path / "x.png"
    Image.fromarray(PHOTO).save(path, pnginfo=notes, icc_profile=os.urandom(3_000_000))
    assert np.array_equal(read_image(path), PHOTO)
    assert np.array_equal(for_network(read_photo(path)), PHOTO)
    assert "unreadable" not in findings_of(path)
    command = [sys.executable, "-c", f"from unext.images import read_image; read_image({str(path)!r})"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK"])
def test_a_turned_tiff_is_upright_compressed_or_not(mode, tmp_path):
    for compression in (None, "tiff_lzw"):
        SMOOTH.convert(mode).save(tmp_path / "x.tif", tiffinfo={0x0112: 6}, compression=compression)
        expected = SMOOTH.convert(mode).transpose(Image.Transpose.ROTATE_270).convert("RGB")
        assert np.array_equal(read_image(tmp_path / "x.tif"), expected)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_the_rotation_is_read_from_exif_whose_other_entries_are_damaged(extension, tmp_path):
    entries = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (0x010E, 99, 4, b"abcd"), (0x8769, 2, 4, b"abc\0")]
    table = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4)
    path = tmp_path / f"x.{extension}"
    Image.fromarray(PHOTO).save(path, exif=exif, lossless=True, quality=100)
    shown = np.array(read_photo(path))
    assert shown.shape == (60, 40, 3) and np.abs(shown.astype(int) - np.rot90(PHOTO, -1)).mean() < 20
    assert read_photo(path, as_shown=False).size == read_image(path).size == (60, 40)
    Image.fromarray(PHOTO).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_photo(path).size == (60, 40)


@pytest.mark.parametrize("dpi", [(0, 0), (float("nan"), 72), (1e9, 1e9)])
def test_a_damaged_resolution_is_left_out(dpi):
    image = Image.fromarray(PHOTO)
    image.info = {"dpi": dpi}
    assert photo_of(image).info == {}


def expected_srgb(pixels):
    """Adobe RGB in sRGB, by the definitions of both."""
    to_xyz = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
    linear = ((pixels / 255) ** 2.2 @ ADOBE_RGB.T @ np.linalg.inv(to_xyz).T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_the_network_sees_srgb_and_benchmarks_the_stored_pixels(tmp_path):
    path = tmp_path / "x.png"
    SMOOTH.save(path, icc_profile=ADOBE_RGB_PROFILE)
    photo = read_photo(path)
    assert np.array_equal(photo, SMOOTH) and photo.info["icc_profile"] == ADOBE_RGB_PROFILE
    assert np.abs(np.array(for_network(photo)) - expected_srgb(np.array(SMOOTH))).max() < 3
    assert np.array_equal(read_image(path), SMOOTH) and read_image(path).info == {}
    assert "colours of a profile" in findings_of(path)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA"])
def test_a_profile_of_other_colours_or_a_damaged_one_is_ignored(mode, tmp_path):
    image = Image.fromarray(PHOTO).convert(mode)
    for profile in (b"no profile", ADOBE_RGB_PROFILE if mode in ("L", "CMYK") else ADOBE_RGB_PROFILE[:200]):
        image.save(tmp_path / "x.tif", icc_profile=profile)
        assert np.array_equal(for_network(read_photo(tmp_path / "x.tif")), image.convert("RGB"))
