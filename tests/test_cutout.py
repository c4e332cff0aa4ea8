"""cutout.py: colours of a known foreground, alpha, backgrounds and the box of the object."""

import cv2
import numpy as np
import pytest
from PIL import Image

from unext.cutout import composite, extract_object, identity, load_background, make_cutout, object_box

SIZE = (240, 320)  # height, width
COLOURS = [((200, 60, 40), (40, 90, 180)), ((230, 220, 200), (20, 60, 30)), ((60, 40, 30), (240, 240, 245))]


def strands(rng):
    """A disc with hairs that are 1 to 2 pixels thick: alpha (H, W)."""
    height, width = SIZE
    alpha = cv2.circle(np.zeros((4 * height, 4 * width), np.uint8), (2 * width, 2 * height), height, 255, -1)
    for angle in rng.uniform(0, 2 * np.pi, 60):
        bends = angle + np.cumsum(np.r_[0, rng.normal(0, 0.15, 12)])
        steps = np.stack([np.cos(bends), np.sin(bends)], axis=1) * np.r_[height, np.full(12, 0.07 * height)][:, None]
        points = np.rint((2 * width, 2 * height) + np.cumsum(steps, axis=0)).astype(np.int32)
        cv2.polylines(alpha, [points], False, 255, int(rng.integers(4, 9)), cv2.LINE_AA)
    return cv2.resize(alpha, (width, height), interpolation=cv2.INTER_AREA)


def soft_disc(rng):
    """A disc whose edge takes 20 pixels from nothing to all: alpha (H, W)."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.rint(255 * np.clip((100 - np.hypot(y - SIZE[0] / 2, x - SIZE[1] / 2)) / 20, 0, 1)).astype(np.uint8)


def texture(colour, rng, shape, grain=0):
    """A smooth texture around a colour, and grain: float (H, W, 3) in [0, 255]."""
    noise = cv2.resize(rng.normal(0, 18, (8, 8, 3)), shape[::-1], interpolation=cv2.INTER_CUBIC)
    return np.clip(np.array(colour) + noise + rng.normal(0, 1, noise.shape) * grain, 0, 255)


def mixed(foreground, background, alpha):
    """A foreground on a background by alpha, uint8 (H, W)."""
    return background + (foreground - background) * (alpha[..., None] / 255)


@pytest.mark.parametrize("shape", [strands, soft_disc])
@pytest.mark.parametrize("colours", COLOURS)
@pytest.mark.parametrize("scale, grain", [(1, 0), (5, 10)])  # the larger one has more detail than its alpha
def test_the_colours_of_a_known_foreground_are_estimated(shape, colours, scale, grain):
    rng = np.random.default_rng(0)
    alpha = cv2.resize(shape(rng), None, fx=scale, fy=scale)
    foreground, scene = (texture(colour, rng, alpha.shape, grain) for colour in colours)
    image = np.rint(mixed(foreground, scene, alpha)).astype(np.uint8)
    result = extract_object(image, alpha)
    partial = (alpha > 0.1 * 255) & (alpha < 0.9 * 255)
    error, before = (np.abs(pixels - foreground)[partial].mean() for pixels in (result[..., :3], image))
    assert error < 0.15 * before
    for background in ((255, 0, 0), (255, 255, 255)):
        expected = mixed(foreground, np.array(background), alpha)
        ours = composite(Image.fromarray(result), Image.new("RGB", (1, 1), background))
        before = np.abs(mixed(image, np.array(background), alpha) - expected).mean()
        assert np.abs(np.array(ours) - expected).mean() < 0.2 * before


def test_pixels_stay_where_alpha_is_255_and_are_blank_where_it_is_0():
    alpha = strands(np.random.default_rng(0))
    image = np.random.default_rng(1).integers(0, 256, (*SIZE, 3), np.uint8)
    result = extract_object(image, alpha)
    assert result.dtype == np.uint8 and np.array_equal(result[..., 3], alpha)
    assert np.array_equal(result[alpha == 255, :3], image[alpha == 255]) and not result[alpha == 0].any()


@pytest.mark.parametrize("low, high", [(0, 200), (60, 255), (128, 128)])
def test_colours_are_not_guessed_where_nothing_is_sure(low, high):
    alpha = np.linspace(low, high, 60 * 40).astype(np.uint8).reshape(60, 40)
    image = np.random.default_rng(1).integers(0, 256, (60, 40, 3), np.uint8)
    assert np.array_equal(extract_object(image, alpha)[alpha > 0, :3], image[alpha > 0])


def test_transparency_of_the_image_multiplies_and_its_colours_there_stay():
    alpha = cv2.GaussianBlur(cv2.circle(np.zeros(SIZE, np.uint8), (160, 120), 80, 255, -1), (21, 21), 0)
    image = np.random.default_rng(1).integers(0, 256, (*SIZE, 3), np.uint8)
    probability = np.repeat(np.float32([[0, 1]]), SIZE[1] // 2, axis=1).repeat(SIZE[0], axis=0)
    result = np.array(make_cutout(Image.fromarray(np.dstack([image, alpha])), probability))
    assert np.array_equal(result[..., 3], np.where(probability == 1, alpha, 0))
    visible = result[..., 3] > 0
    assert np.array_equal(result[visible, :3], image[visible]) and not result[~visible].any()


def test_the_box_is_that_of_alpha_above_a_half_and_a_margin_within_the_image():
    pixels = np.zeros((*SIZE, 4), np.uint8)
    pixels[5:80, 90:200, 3] = 127
    pixels[20:60, 100:180, 3] = 128
    cutout = Image.fromarray(pixels)
    boxes = {0: (100, 20, 180, 60), 0.1: (92, 12, 188, 68), 1: (20, 0, 260, 140)}
    assert {margin: object_box(cutout, margin) for margin in boxes} == boxes
    assert object_box(Image.new("RGBA", (9, 5), (0, 0, 0, 127))) is None


def test_a_colour_or_a_scaled_and_centred_image_covers_the_background(tmp_path):
    cutout = Image.fromarray(np.dstack([np.full((*SIZE, 3), 7, np.uint8), soft_disc(None)]))
    for name, colour in (("white", (255, 255, 255)), ("#ff8000", (255, 128, 0)), ("Navy", (0, 0, 128))):
        result = np.array(composite(cutout, load_background(name)))
        assert (result[0, 0] == colour).all() and (result[120, 160] == 7).all()
        assert np.abs(result - mixed(np.full(3, 7), np.array(colour), soft_disc(None))).max() <= 1
    wide = np.zeros((50, 300, 3), np.uint8)
    wide[:, 140:150], wide[:, 150:160] = (255, 0, 0), (0, 0, 255)  # the middle
    Image.fromarray(wide).save(tmp_path / "wide.png")
    background = load_background(str(tmp_path / "wide.png"))
    assert np.array_equal(composite(Image.new("RGBA", (20, 50)), background), wide[:, 140:160])
    assert composite(Image.new("RGBA", (80, 200)), background).getpixel((20, 100)) == (255, 0, 0)
    assert identity(str(tmp_path / "wide.png")).startswith("sha256:") and identity("red") == "#ff0000"
