"""pairing.py: the images and masks of folders, paired by name."""

import re
import shlex
import unicodedata

import numpy as np
import pytest
from conftest import save_image

from unext import pairing
from unext.images import extensions

GREY = np.full((4, 6), 200, np.uint8)


@pytest.fixture
def folders(tmp_path):
    """Three images and masks; sorted by file name, the masks are in another order than the images."""
    for name in ("b.jpg", "a#1.png", "c.JPG"):
        save_image(tmp_path / "images" / name, np.dstack([GREY] * 3))
    for name in ("a#1.png", "c.bmp", "b.jpg"):
        save_image(tmp_path / "masks" / name, GREY)
    return tmp_path


def names(pairs):
    return [(image.name, mask.name) for image, mask in pairs]


def test_unpaired_files_are_an_error_that_lists_the_first(folders):
    for name in ("images/d.png", "masks/e.png", *(f"images/x{i:02}.png" for i in range(25))):
        save_image(folders / name, GREY)
    told = r"without their mask: d\.png, x00\.png, .*x08\.png and 16 more; without their image: e\.png; add the missing"
    with pytest.raises(ValueError, match=told):
        pairing.pair([folders / "images"], [folders / "masks"])
    assert len(pairing.pair([folders / "images"], [folders / "masks"], skip_unpaired=True)) == 3


def test_files_are_paired_by_stem_whatever_the_extension_and_folders_joined_in_their_order(folders):
    save_image(folders / "more" / "b.jpg", GREY)
    save_image(folders / "more_masks" / "b.png", GREY)
    pairs = pairing.pair([folders / "more", folders / "images"], [folders / "more_masks", folders / "masks"])
    assert names(pairs) == [("b.jpg", "b.png"), ("a#1.png", "a#1.png"), ("b.jpg", "b.jpg"), ("c.JPG", "c.bmp")]
    with pytest.raises(ValueError, match="2 folder.*of images but 1 of masks"):
        pairing.pair([folders / "images"] * 2, [folders / "masks"])


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(OSError, match=re.escape(f"{tmp_path / 'none'}: there is no such folder")):
        pairing.images_by_name(tmp_path / "none")
    with pytest.raises(ValueError, match="has no images$"):
        pairing.images_by_name(tmp_path)
    (tmp_path / "a.xml").write_bytes(b"")
    with pytest.raises(ValueError, match="only files that are not read: 1 .xml; how to make masks of annotations"):
        pairing.images_by_name(tmp_path)


def test_one_folder_for_images_and_masks_is_refused_however_it_is_spelled(folders):
    (folders / "link").symlink_to(folders / "images")
    for other in ("images", "masks/../images", "link"):
        with pytest.raises(ValueError, match="images: is given as the folder of both images and masks; move the masks"):
            pairing.pair([folders / "images"], [folders / other])


NAMES = {
    "--mask_suffix=_mask": ["{}.jpg", "{}_mask.gif"],
    "--mask_prefix=gt_": ["{}.png", "gt_{}.png"],
    "--mask_prefix=m- --mask_suffix='- x'": ["{}.png", "m-{}- x.png"],
    "--mask_suffix=.jpg": ["{}.jpg", "{}.jpg.png"],
}


@pytest.mark.parametrize("options", NAMES)
@pytest.mark.parametrize("mask_folder", ["data", "masks"])
@pytest.mark.parametrize("stems", [["1", "2", "10", "100"], ["a", "mask", "a_mask_a", "ü"]])
def test_names_of_masks_are_proposed_and_then_paired(options, mask_folder, stems, tmp_path):
    image, mask = NAMES[options]
    for stem in stems:
        save_image(tmp_path / "data" / image.format(stem), GREY)
        save_image(tmp_path / mask_folder / mask.format(stem), GREY)
    with pytest.raises(ValueError, match=rf"; give {re.escape(options)}$"):
        pairing.pair([tmp_path / "data"], [tmp_path / mask_folder])
    given = dict(option.removeprefix("--mask_").split("=", 1) for option in shlex.split(options))
    pairs = pairing.pair([tmp_path / "data"], [tmp_path / mask_folder], names=pairing.MaskNames(**given))
    assert sorted(names(pairs)) == sorted((image.format(stem), mask.format(stem)) for stem in stems)


@pytest.mark.parametrize(
    "masks, given, told",
    [
        (["z.png"], "", r"has the name of a mask in .* \(for example a#1\.png and z\.png\)$"),
        (["b_mask.png", "c_mask.png", "other.png"], "", r"\(for example a#1\.png and b_mask\.png\)$"),
        (["b.png"], "_mask", r"has the name of a mask .*\(for example a#1\.png and nothing\)"),
        (["b_mask.png", "c_mask.png"], "_mask.png", "; give --mask_suffix=_mask$"),
    ],
)
def test_only_options_that_pair_every_mask_are_proposed(masks, given, told, folders):
    for name in masks:
        save_image(folders / "more" / name, GREY)
    for skip in (False, True):
        with pytest.raises(ValueError, match=told):
            pairing.pair([folders / "images"], [folders / "more"], skip, pairing.MaskNames(suffix=given))


def test_an_image_may_end_like_a_mask(tmp_path):
    for name in ("im/a.png", "im/a_m.png", "gt/a_m.png", "gt/a_m_m.png"):
        save_image(tmp_path / name, GREY)
    pairs = pairing.pair([tmp_path / "im"], [tmp_path / "gt"], names=pairing.MaskNames(suffix="_m"))
    assert names(pairs) == [("a.png", "a_m.png"), ("a_m.png", "a_m_m.png")]


def test_names_are_paired_whatever_the_form_of_their_accents(tmp_path):
    for form, folder in (("NFC", "images"), ("NFD", "masks")):
        save_image(tmp_path / folder / f"{unicodedata.normalize(form, 'café_ü')}.png", GREY)
    assert len(pairing.pair([tmp_path / "images"], [tmp_path / "masks"])) == 1
    names = pairing.MaskNames(suffix=unicodedata.normalize("NFD", "_ü"))
    save_image(tmp_path / "short" / "café.png", GREY)
    assert len(pairing.pair([tmp_path / "short"], [tmp_path / "masks"], names=names)) == 1


def test_files_that_are_not_images_are_left_out_and_counted(folders):
    assert pairing.left_out([folders / "images"]) == ""
    for name in ("a.HEIC", "b.HEIC", "film.mp4", "README", "Thumbs.db", "settings.json", ".hidden.png", "._b.jpg"):
        (folders / "images" / name).write_bytes(b"x")
    (folders / "images" / "folder.png").mkdir()
    for name in ("gone.jpg", "gone.txt"):
        (folders / "images" / name).symlink_to("nowhere")
    if ".heic" not in extensions():
        assert list(pairing.gather([folders / "images"])) == ["a#1", "b", "c"]
        remedy = "convert to JPEG, or pip install pillow-heif"
        told = f"2 .HEIC ({remedy}), 1 .mp4, 1 README, 2 broken link(s)"
        assert pairing.left_out([folders / "images", folders / "images"]) == told


def test_a_broken_link_to_an_image_is_an_error_in_training_and_scoring(folders):
    for name, target in (("d.png", "nowhere"), ("loop.png", "loop.png")):
        (folders / "masks" / name).symlink_to(target)
    with pytest.raises(OSError, match=r"masks: broken links; fetch the files, or remove the links: d\.png, loop\.png"):
        pairing.pair([folders / "images"], [folders / "masks"])
    assert list(pairing.gather([folders / "masks"])) == ["a#1", "b", "c"]


def test_sub_folders_are_read_on_request_without_hidden_linked_and_skipped_ones(folders):
    top = folders / "images"
    for name in ("sub/a.png", "sub/deep/b.png", ".git/c.png", "__MACOSX/d.png", "skipped/below/e.png"):
        save_image(top / name, GREY)
    (top / "link").symlink_to(folders / "masks")
    images = pairing.gather([top], recursive=True, skip=lambda folder: folder.name == "skipped")
    assert sorted(images) == ["a#1", "b", "c", "sub/a", "sub/deep/b"]
    assert sorted(pairing.gather([top])) == ["a#1", "b", "c"]
    assert pairing.images_below(top) == 3
