"""images.py: whatever a file holds, the pixels are the right ones, or the reason is named."""

import os
import struct

import cv2
import numpy as np
import pytest
import recipe
from conftest import ADOBE_RGB, adobe_rgb, save_image
from PIL import Image, PngImagePlugin

from tools import check_dataset
from unext import images, pairing
from unext.cli import MAX_PIXELS
from unext.images import ALLOWED, FAR, allow_pixels, for_network, formats, photo_of, read_image, read_photo, read_size
from unext.masks import read_mask
from unext.workers import in_processes

PHOTO = recipe.photo("bad", 40, 60, 0)
RAMP = np.tile(np.linspace(0, 255, 60).round().astype(np.uint8), (40, 1))
TWELVE = np.rint(RAMP / 255 * 4095).astype(np.uint16)  # in 12 bits
DISC = cv2.circle(np.zeros((40, 60), np.uint8), (30, 20), 12, 255, -1)
WHITE = np.full_like(DISC, 255)
TURN = Image.Exif()
TURN[0x0112] = 6  # a quarter turn


def findings_of(path, is_mask=False):
    return check_dataset.inspect(path, is_mask).kinds


COLOUR = np.dstack([RAMP] * 3)
PIXELS = {  # of RAMP, by the value that is white: None for 8 bits
    "l.png": (None, RAMP),
    "la.png": (None, np.dstack([RAMP, WHITE])),
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
    save(tmp_path / name, pixels)
    assert np.array_equal(read_mask(tmp_path / name), RAMP)
    monkeypatch.setenv(images.WHITE, str(white if white in (255, 4095) else ""))
    photo = read_photo(tmp_path / name)
    assert np.array_equal(read_image(tmp_path / name), COLOUR) and np.array_equal(photo.convert("RGB"), COLOUR)
    assert ("16 bits or floats" in findings_of(tmp_path / name)) == bool(white) and FAR not in photo.info
    assert "mask not binary" in findings_of(tmp_path / name, is_mask=True)  # as it is read


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
    path = save(
        tmp_path / ("x.png" if maximum.dtype == np.uint16 else "x.tif"), (DISC > 0).astype(maximum.dtype) * maximum
    )
    assert np.array_equal(read_mask(path), DISC)
    monkeypatch.setenv(images.WHITE, str(white if white in (255, 4095) else ""))
    assert read_image(path).getextrema() == ((0, grey),) * 3
    far = f"its values reach {maximum:g}, and {white} is white" if is_far else None
    assert read_photo(path).info.get(FAR) == findings_of(path).get(FAR) == far


@pytest.mark.parametrize("values", [[np.nan, 1], [-1, 1], [0, np.inf]])
def test_values_that_are_no_grey_levels_are_named(values, tmp_path):
    path = save_image(tmp_path / "x.tif", np.tile(np.array(values, np.float32), (4, 1)))
    for read in (read_image, read_mask):
        with pytest.raises(OSError, match=r"x\.tif: cannot be read as an image: its values from .*; save it as 8 bits"):
            read(path)
    assert "values from" in findings_of(path)["unreadable"]


@pytest.mark.parametrize("error", [MemoryError(), cv2.error("(-4:Insufficient memory) Failed to allocate 9 bytes")])
@pytest.mark.parametrize("function", [read_image, read_mask, read_photo, findings_of])
def test_lack_of_memory_is_no_fault_of_the_file(function, error, tmp_path, monkeypatch):
    def fail(*words):
        raise error

    path = save_image(tmp_path / "x.png", PHOTO)
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(MemoryError):
        function(path)


@pytest.mark.parametrize(
    "name, options",
    [
        ("palette.png", {"mode": "P"}),
        ("transparent.png", {"mode": "P", "transparency": 0}),
        ("rgba.png", {"mode": "RGBA"}),
        ("cmyk.jpg", {"mode": "CMYK", "quality": 100}),
        ("moving.gif", {"save_all": True, "append_images": [Image.new("RGB", (60, 40))]}),
        ("two.mpo", {"save_all": True, "append_images": [Image.new("RGB", (60, 40))], "quality": 100}),
        ("turned.png", {"exif": TURN}),
        ("photo.webp", {"lossless": True}),
        ("photo.jp2", {}),
    ],
)
def test_any_colour_mode_is_read_as_its_first_frame_without_transparency(name, options, tmp_path):
    mode = options.pop("mode", "RGB")
    Image.fromarray(PHOTO).convert(mode).save(tmp_path / name, **options)
    read = np.array(read_image(tmp_path / name))
    assert read.shape == PHOTO.shape  # not turned
    tolerance = 30 if mode == "P" or name.endswith("gif") else 20  # a palette and JPEG change noise
    assert np.abs(read.astype(int) - PHOTO).mean() < tolerance
    assert read_size(tmp_path / name) == PHOTO.shape[:2]


@pytest.mark.parametrize("where", ["zTXt", "iTXt", "iCCP"])
def test_a_png_with_megabytes_of_text_or_profile_is_read_by_commands_and_their_workers(where, tmp_path, monkeypatch):
    for owner, name in ((Image, "MAX_IMAGE_PIXELS"), (PngImagePlugin, "MAX_TEXT_CHUNK")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setenv(ALLOWED, "")
    allow_pixels(MAX_PIXELS)
    notes = PngImagePlugin.PngInfo()
    if where == "zTXt":
        notes.add_text("prompt", "x" * 3_000_000, zip=True)
    elif where == "iTXt":
        notes.add_itxt("prompt", "x" * 3_000_000)
    profile = os.urandom(3_000_000) if where == "iCCP" else None
    Image.fromarray(PHOTO).save(tmp_path / "x.png", pnginfo=notes, icc_profile=profile)
    assert np.array_equal(read_image(tmp_path / "x.png"), PHOTO)
    assert np.array_equal(for_network(read_photo(tmp_path / "x.png")), PHOTO)
    assert "unreadable" not in findings_of(tmp_path / "x.png")
    assert list(in_processes(read_size, [tmp_path / "x.png"], workers=1)) == [PHOTO.shape[:2]]


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_only_the_rotation_is_read_from_exif(extension, tmp_path):
    entries = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (0x010E, 99, 4, b"abcd"), (0x8769, 2, 4, b"abc\0")]
    table = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4)
    path = tmp_path / f"x.{extension}"
    Image.fromarray(PHOTO).save(path, exif=exif, lossless=True, quality=100)
    shown = np.array(read_photo(path))
    assert shown.shape == (60, 40, 3) and np.abs(shown.astype(int) - np.rot90(PHOTO, -1)).mean() < 20
    assert read_photo(path, as_shown=False).size == read_image(path).size == (60, 40)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_damaged_exif_data_is_ignored(exif, tmp_path):
    Image.fromarray(PHOTO).save(tmp_path / "x.jpg", exif=exif)
    assert read_photo(tmp_path / "x.jpg").size == (60, 40)


def expected_srgb(pixels):
    """Adobe RGB in sRGB, by the definitions of both."""
    to_xyz = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
    linear = ((pixels / 255) ** 2.2 @ ADOBE_RGB.T @ np.linalg.inv(to_xyz).T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_the_network_sees_srgb_and_benchmarks_the_stored_pixels(tmp_path):
    colours = Image.fromarray(PHOTO).resize((60, 40), Image.Resampling.BICUBIC)
    colours.save(tmp_path / "x.png", icc_profile=adobe_rgb())
    photo = read_photo(tmp_path / "x.png")
    assert np.array_equal(photo, colours) and photo.info["icc_profile"] == adobe_rgb()
    assert np.abs(np.array(for_network(photo)) - expected_srgb(np.array(colours))).max() < 3
    assert np.array_equal(read_image(tmp_path / "x.png"), colours)
    assert read_image(tmp_path / "x.png").info == {}
    assert "colours of a profile" in findings_of(tmp_path / "x.png")


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA"])
def test_a_profile_of_other_colours_or_a_damaged_one_is_ignored(mode, tmp_path):
    image = Image.fromarray(PHOTO).convert(mode)
    for profile in (b"no profile", adobe_rgb() if mode in ("L", "CMYK") else adobe_rgb()[:200]):
        image.save(tmp_path / "x.tif", icc_profile=profile)
        seen = for_network(read_photo(tmp_path / "x.tif"))
        assert np.array_equal(seen, image.convert("RGB"))


def test_what_is_transparent_is_white_for_the_network_and_keeps_its_alpha(tmp_path):
    path = save_image(tmp_path / "x.png", np.dstack([PHOTO, DISC]))
    photo = read_photo(path)
    assert photo.mode == "RGBA" and np.array_equal(np.array(photo)[..., 3], DISC)
    assert np.array_equal(for_network(photo), np.where(DISC[..., None] > 0, PHOTO, 255))
    assert np.array_equal(read_image(path), PHOTO)  # as benchmarks do


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK"])
def test_stored_pixels_are_those_of_pillow_whatever_the_reader(mode, tmp_path):
    path = tmp_path / ("x.tif" if mode in ("CMYK", "PA") else "x.png")
    Image.fromarray(PHOTO).convert(mode).save(path)
    expected = Image.open(path)
    assert np.array_equal(read_image(path), expected.convert("RGB"))
    assert np.array_equal(read_photo(path, as_shown=False).convert("RGB"), expected.convert("RGB"))
    assert np.array_equal(read_mask(path), expected.convert("L"))


def test_a_tiff_of_bands_that_pillow_does_not_know_is_named(tmp_path):
    assert cv2.imwrite(str(tmp_path / "x.tif"), COLOUR.astype(np.float32))
    told = "it is a TIFF of bands or numbers that Pillow does not know; save it as 8-bit RGB"
    with pytest.raises(OSError, match=f"x.tif: cannot be read as an image: {told}"):
        read_image(tmp_path / "x.tif")
    assert told in findings_of(tmp_path / "x.tif")["unreadable"]


def test_an_opened_image_of_16_bit_colours_is_not_altered(tmp_path):
    with Image.open(save(tmp_path / "x.png", COLOUR * np.uint16(257))) as image:
        for _ in range(2):
            assert np.array_equal(photo_of(image), COLOUR)


def test_mpo_is_found_in_a_folder_and_read(tmp_path):
    smooth = Image.fromarray(PHOTO).resize((60, 40))
    smooth.save(tmp_path / "x.mpo", save_all=True, append_images=[smooth], quality=100)
    assert [file.name for file in pairing.scan(tmp_path).images] == ["x.mpo"]
    assert read_image(tmp_path / "x.mpo").size == (60, 40)


def test_heic_is_named_with_the_remedy_where_pillow_heif_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "formats", lambda: ("JPEG", "PNG"))
    (tmp_path / "x.heic").write_bytes(struct.pack(">I", 24) + b"ftypheic" + bytes(12))
    with pytest.raises(OSError, match="it is HEIC, .*; convert to JPEG, or pip install pillow-heif"):
        read_image(tmp_path / "x.heic")


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    formats()
    Image.fromarray(PHOTO).resize((64, 64)).save(tmp_path / "x.heic", quality=90)
    assert pillow_heif and [file.name for file in pairing.scan(tmp_path).images] == ["x.heic"]
    assert read_image(tmp_path / "x.heic").size == (64, 64)


def test_more_pixels_are_read_once_the_user_allows_them(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setenv(ALLOWED, "")
    path = save_image(tmp_path / "x.png", PHOTO)
    allow_pixels(PHOTO[..., 0].size)
    assert read_size(path) == (40, 60)
    allow_pixels(PHOTO[..., 0].size - 1)
    with pytest.raises(OSError, match="x.png: .*2,400 pixels exceed the limit of 2,399: .*; --max_pixels allows more"):
        read_size(path)
