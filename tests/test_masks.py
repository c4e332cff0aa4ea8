"""masks.py: which pixels of a mask are the object, and what is wrong with its values."""

import cv2
import numpy as np
import pytest
from conftest import DISC, PHOTO, findings_of, save_image
from PIL import Image

from unext.masks import read_and_check_mask, read_mask

SOFT = cv2.GaussianBlur(DISC, (9, 9), 0)
BLACK, WHITE = 0 * DISC, np.full_like(DISC, 255)
VOID = np.where(DISC, 1, cv2.dilate(DISC, np.ones((5, 5)))).astype(np.uint8)


def grey(*channels):
    """An image of one, two (LA), three or four channels."""
    return Image.fromarray(np.squeeze(np.dstack(channels)).astype(np.uint8))


def deep(pixels):
    return Image.fromarray(pixels.astype(np.uint16))


def palette(indices, *colours):
    """An image of indices with these first colours, and the last of VOC's."""
    image = Image.fromarray(np.asarray(indices, np.uint8), "P")
    image.putpalette([*colours, *[0] * (765 - len(colours)), 224, 224, 192])
    return image


PIXELS = [  # file, its image, options of saving, the mask that is read
    ("colour.png", grey(WHITE, WHITE, BLACK), {}, np.full_like(DISC, 226)),
    ("soft.png", grey(np.full_like(DISC, 90)), {}, np.full_like(DISC, 90)),
    # The alpha channel, where all visible pixels have one colour
    ("white.png", grey(WHITE, WHITE, WHITE, DISC), {}, DISC),
    ("black.png", grey(BLACK, BLACK, BLACK, DISC), {}, DISC),
    ("red.webp", grey(WHITE, BLACK, BLACK, DISC), {"lossless": True}, DISC),
    ("both.png", grey(DISC, DISC, DISC, DISC), {}, DISC),  # the hidden pixels are black
    ("white.tif", grey(WHITE, WHITE, WHITE, DISC), {}, DISC),
    ("grey.png", grey(WHITE, DISC), {}, DISC),
    ("palette.gif", palette(DISC // 255, 0, 0, 0, 255, 0, 0), {"transparency": 0}, DISC),
    # A constant one is the mask only where it hides something
    ("opaque.png", grey(WHITE, WHITE, WHITE, WHITE), {}, WHITE),
    ("hidden.png", grey(WHITE, WHITE, WHITE, BLACK), {}, BLACK),
    ("almost.png", grey(WHITE, WHITE, WHITE, 0 * DISC + 245), {}, WHITE),
    ("visible.png", grey(DISC, DISC, DISC, WHITE), {}, DISC),
    # One that cannot be the mask
    ("forgotten.png", grey(DISC, DISC, DISC, BLACK), {}, DISC),  # an array of zeros, of which three are filled
    ("half.png", grey(DISC, DISC, DISC, 0 * DISC + 127), {}, DISC),
    ("key.png", grey(DISC), {"transparency": 0}, DISC),
    ("white_key.gif", grey(DISC), {"transparency": 255}, DISC),
    # Soft masks whatever their alpha channel
    ("soft_rgba.png", grey(SOFT, SOFT, SOFT, SOFT), {}, SOFT),
    ("soft_la.png", grey(SOFT, SOFT), {}, SOFT),
    ("soft_key.png", grey(SOFT), {"transparency": 0}, SOFT),
]


@pytest.mark.parametrize("name, image, options, expected", PIXELS)
def test_the_mask_is_the_grey_levels_or_the_alpha_channel(name, image, options, expected, tmp_path):
    image.save(tmp_path / name, **options)
    assert np.array_equal(read_mask(tmp_path / name), expected)
    if name in ("white.png", "red.webp", "both.png", "grey.png"):
        assert "mask in the alpha channel" in findings_of(tmp_path / name, is_mask=True)


def test_the_alpha_channel_of_16_bits_is_read(tmp_path):
    pixels = np.dstack([WHITE, WHITE, WHITE, DISC]).astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / "deep.png"), pixels)
    assert np.array_equal(read_mask(tmp_path / "deep.png"), DISC)


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
    assert reason in findings_of(path, is_mask=True)["unreadable"]


@pytest.mark.parametrize(
    "name, mask, problem",
    [
        ("labels.png", grey(VOID), "mask of labels"),
        ("labels.tif", deep(VOID), "mask of labels"),
        ("few.tif", deep(VOID // 127 + (VOID > 0)), "mask of labels"),  # 1 and 3
        ("sixteen.png", deep(VOID * np.uint16(257) - np.uint16(256) * (VOID == 1)), "mask of labels"),
        ("colour.bmp", grey(VOID, VOID, VOID), "mask of labels"),
        ("palette.png", palette(VOID, 0, 0, 0, 128, 0, 0), "mask of labels"),  # 38 in grey
        ("classes.png", grey(np.where((VOID == 1) & (np.arange(60) < 30), 7, VOID)), "mask of labels"),
        ("trimap.png", grey(np.where(VOID == 255, 128, DISC)), ""),
        ("stray.png", grey(cv2.circle(DISC.copy(), (2, 2), 1, 1, -1)), ""),
        ("edges.png", grey(DISC).resize((37, 23), Image.Resampling.BOX), ""),
        ("lossy.jpg", grey(DISC), ""),
        ("bilevel.png", grey(DISC).convert("1"), ""),
        ("alpha.png", grey(WHITE, WHITE, WHITE, DISC), ""),
        ("black.webp", grey(BLACK + 1, BLACK + 1, BLACK + 1), ""),  # of a lossy format
        ("red.png", grey(DISC, BLACK, BLACK), "mask too dark"),
        ("green.jpg", grey(BLACK, DISC, BLACK), "mask in colour"),
        ("person.png", palette(np.where(VOID == 1, 15, VOID), *[0] * 45, 192, 128, 128), "mask in colour"),
        ("index.png", palette(DISC // 255, 0, 0, 0, 1, 1, 1), "0/1 mask"),
    ],
)
def test_masks_with_wrong_values_are_told_from_sound_ones(name, mask, problem, tmp_path):
    mask.save(tmp_path / name)
    assert read_and_check_mask(tmp_path / name)[1] == problem
    if name == "black.webp":
        assert findings_of(tmp_path / name, is_mask=True).keys() == {"empty mask"}
