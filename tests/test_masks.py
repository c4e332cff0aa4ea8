"""masks.py: which pixels of a mask are the object, and what is wrong with its values."""

import cv2
import numpy as np
import pytest
import recipe
from conftest import save_image
from PIL import Image

from tools import check_dataset
from unext.masks import read_and_check_mask, read_mask

PHOTO = recipe.photo("bad", 40, 60, 0)
DISC = cv2.circle(np.zeros((40, 60), np.uint8), (30, 20), 12, 255, -1)
WHITE = np.full_like(DISC, 255)


def findings_of(path):
    return check_dataset.inspect(path, is_mask=True).kinds


def sixteen(*channels):
    """RGBA of 16 bits as OpenCV writes it."""
    return np.dstack(channels).astype(np.uint16) * 257


def test_colour_masks_become_greyscale_and_soft_ones_stay_soft(tmp_path):
    save_image(tmp_path / "colour.png", np.full((4, 6, 3), (255, 255, 0), np.uint8))
    save_image(tmp_path / "soft.png", np.full((4, 6), 90, np.uint8))
    assert read_mask(tmp_path / "colour.png").getextrema() == (226, 226)
    assert read_mask(tmp_path / "soft.png").getextrema() == (90, 90)
    assert "mask in colour" in findings_of(tmp_path / "colour.png")


MASKS_IN_ALPHA = {
    "white.png": np.dstack([WHITE, WHITE, WHITE, DISC]),
    "black.png": np.dstack([0 * DISC, 0 * DISC, 0 * DISC, DISC]),
    "red.webp": np.dstack([WHITE, 0 * DISC, 0 * DISC, DISC]),
    "both.png": np.dstack([DISC, DISC, DISC, DISC]),  # the hidden pixels are black
    "white.tif": np.dstack([WHITE, WHITE, WHITE, DISC]),
    "grey.png": np.dstack([WHITE, DISC]),  # LA
}


@pytest.mark.parametrize("name", MASKS_IN_ALPHA)
def test_a_mask_whose_visible_colours_are_one_is_its_alpha_channel(name, tmp_path):
    Image.fromarray(MASKS_IN_ALPHA[name]).save(tmp_path / name, lossless=True)
    mask, problem = read_and_check_mask(tmp_path / name)
    assert np.array_equal(mask, DISC) and problem == ""
    assert "mask in the alpha channel" in findings_of(tmp_path / name)


def test_masks_in_the_alpha_channel_of_16_bits_and_of_a_palette_are_read(tmp_path):
    cv2.imwrite(str(tmp_path / "deep.png"), sixteen(WHITE, WHITE, WHITE, DISC))
    palette(DISC // 255, 0, 0, 0, 255, 0, 0).save(tmp_path / "palette.gif", transparency=0)
    for path in tmp_path.iterdir():
        assert np.array_equal(read_mask(path), DISC)


@pytest.mark.parametrize(
    "pixels, reason",
    [
        (np.dstack([PHOTO, DISC]), "its colours and its alpha channel could both be the mask"),
        (np.dstack([255 - DISC] * 3 + [DISC]), "it has white where its alpha channel is 0"),
    ],
)
def test_a_mask_that_could_be_colours_or_alpha_is_named(pixels, reason, tmp_path):
    path = save_image(tmp_path / "x.png", pixels)
    with pytest.raises(OSError, match=f"x.png: cannot be read as an image: {reason}; save the mask as greyscale"):
        read_mask(path)
    assert reason in findings_of(path)["unreadable"]


@pytest.mark.parametrize("alpha, value", [(255, 255), (0, 0), (245, 255)])
def test_a_constant_alpha_channel_is_the_mask_only_where_it_hides_something(alpha, value, tmp_path):
    path = save_image(tmp_path / "x.png", np.dstack([WHITE, WHITE, WHITE, np.full_like(DISC, alpha)]))
    assert read_mask(path).getextrema() == (value, value)
    opaque = save_image(tmp_path / "opaque.png", np.dstack([DISC, DISC, DISC, WHITE]))
    assert np.array_equal(read_mask(opaque), DISC)


SOFT = cv2.GaussianBlur(DISC, (9, 9), 0)


@pytest.mark.parametrize(
    "name, pixels, options",
    [
        ("forgotten.png", np.dstack([DISC, DISC, DISC, 0 * DISC]), {}),  # an array of zeros, of which three are filled
        ("half.png", np.dstack([DISC, DISC, DISC, 0 * DISC + 127]), {}),
        ("key.png", DISC, {"transparency": 0}),
        ("white_key.gif", DISC, {"transparency": 255}),
    ],
)
def test_an_alpha_channel_that_cannot_be_the_mask_is_ignored(name, pixels, options, tmp_path):
    Image.fromarray(pixels).save(tmp_path / name, **options)
    assert np.array_equal(read_mask(tmp_path / name), DISC)


@pytest.mark.parametrize("name, channels", [("rgba.png", 4), ("la.png", 2), ("key.png", 1)])
def test_soft_masks_are_read_whatever_their_alpha_channel(name, channels, tmp_path):
    pixels = np.squeeze(np.dstack([SOFT] * channels))
    Image.fromarray(pixels).save(tmp_path / name, **({"transparency": 0} if channels == 1 else {}))
    assert np.array_equal(read_mask(tmp_path / name), SOFT)


def test_a_black_mask_of_a_lossy_format_is_empty_and_nothing_else(tmp_path):
    Image.fromarray(np.dstack([0 * DISC + 1] * 3)).save(tmp_path / "x.webp", quality=75)
    assert read_and_check_mask(tmp_path / "x.webp")[1] == ""
    assert findings_of(tmp_path / "x.webp").keys() == {"empty mask"}


VOID = np.where(DISC, 1, cv2.dilate(DISC, np.ones((5, 5)))).astype(np.uint8)


def grey(*channels):
    """An image of one channel, or of three."""
    channels = [Image.fromarray(np.asarray(one, np.uint8)) for one in channels]
    return Image.merge("RGB", channels) if len(channels) > 1 else channels[0]


def palette(indices, *colours):
    """An image of indices with these first colours, and the last of VOC's."""
    image = Image.fromarray(np.asarray(indices, np.uint8), "P")
    image.putpalette([*colours, *[0] * (765 - len(colours)), 224, 224, 192])
    return image


@pytest.mark.parametrize(
    "name, mask, problem",
    [
        ("labels.png", grey(VOID), "mask of labels"),
        ("labels.tif", Image.fromarray(VOID.astype(np.uint16)), "mask of labels"),
        ("few.tif", Image.fromarray(VOID.astype(np.uint16) // 127 + (VOID > 0)), "mask of labels"),  # 1 and 3
        ("sixteen.png", Image.fromarray(VOID * np.uint16(257) - np.uint16(256) * (VOID == 1)), "mask of labels"),
        ("colour.bmp", grey(VOID).convert("RGB"), "mask of labels"),
        ("palette.png", palette(VOID, 0, 0, 0, 128, 0, 0), "mask of labels"),  # 38 in grey
        ("classes.png", grey(np.where((VOID == 1) & (np.arange(60) < 30), 7, VOID)), "mask of labels"),
        ("trimap.png", grey(np.where(VOID == 255, 128, DISC)), ""),
        ("stray.png", grey(cv2.circle(DISC.copy(), (2, 2), 1, 1, -1)), ""),
        ("edges.png", grey(DISC).resize((37, 23), Image.Resampling.BOX), ""),
        ("lossy.jpg", grey(DISC), ""),
        ("bilevel.png", grey(DISC).convert("1"), ""),
        ("red.png", grey(DISC, 0 * DISC, 0 * DISC), "mask too dark"),
        ("green.jpg", grey(0 * DISC, DISC, 0 * DISC), "mask in colour"),
        ("person.png", palette(np.where(VOID == 1, 15, VOID), *[0] * 45, 192, 128, 128), "mask in colour"),
        ("index.png", palette(DISC // 255, 0, 0, 0, 1, 1, 1), "0/1 mask"),
    ],
)
def test_masks_with_wrong_values_are_told_from_sound_ones(name, mask, problem, tmp_path):
    mask.save(tmp_path / name)
    assert read_and_check_mask(tmp_path / name)[1] == problem
