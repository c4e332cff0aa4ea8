"""pairing.py: images and masks are found, and paired by name."""

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


def test_files_are_paired_by_stem_whatever_the_extension(folders):
    pairs = pairing.pair([f"{folders}/images"], [f"{folders}/masks"])
    assert names(pairs) == [("a#1.png", "a#1.png"), ("b.jpg", "b.jpg"), ("c.JPG", "c.bmp")]


def test_unpaired_files_are_an_error_that_lists_them(folders):
    save_image(folders / "images" / "d.png", GREY)
    save_image(folders / "masks" / "e.png", GREY)
    with pytest.raises(ValueError, match=r"without their mask: d\.png; without their image: e\.png"):
        pairing.pair([folders / "images"], [folders / "masks"])
    assert len(pairing.pair([folders / "images"], [folders / "masks"], skip_unpaired=True)) == 3


def test_a_long_list_is_shortened(folders):
    for i in range(25):
        save_image(folders / "images" / f"x{i:02}.png", GREY)
    with pytest.raises(ValueError, match=r"x00\.png, .*x09\.png and 15 more"):
        pairing.pair([folders / "images"], [folders / "masks"])


def test_folders_are_joined_in_their_order(folders):
    save_image(folders / "more" / "b.jpg", GREY)
    save_image(folders / "more_masks" / "b.png", GREY)
    pairs = pairing.pair([folders / "more", folders / "images"], [folders / "more_masks", folders / "masks"])
    assert names(pairs)[:2] == [("b.jpg", "b.png"), ("a#1.png", "a#1.png")]
    assert len(pairs) == 4


def test_folders_of_images_and_masks_must_be_equally_many(folders):
    with pytest.raises(ValueError, match="2 folder.*of images but 1 of masks"):
        pairing.pair([folders / "images"] * 2, [folders / "masks"])


def test_folders_without_a_common_name_are_an_error(folders):
    save_image(folders / "other" / "z.png", GREY)
    with pytest.raises(ValueError, match="no image in .* has the name of a mask"):
        pairing.pair([folders / "images"], [folders / "other"], skip_unpaired=True)


def test_files_that_are_not_images_are_ignored(folders):
    for name in ("Thumbs.db", "readme.txt", "._b.jpg", ".hidden.png"):
        (folders / "images" / name).write_bytes(b"x")
    (folders / "images" / "folder.png").mkdir()
    assert list(pairing.find(folders / "images")) == ["a#1", "b", "c"]


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(OSError, match=re.escape(f"{tmp_path / 'none'}: there is no such folder")):
        pairing.find(tmp_path / "none")
    with pytest.raises(ValueError, match="has no images$"):
        pairing.find(tmp_path)
    (tmp_path / "a.xml").write_bytes(b"")
    for read in (pairing.find, lambda folder: pairing.gather([folder])):
        with pytest.raises(ValueError, match="only files that are not read: 1 .xml; how to make masks of annotations"):
            read(tmp_path)


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
@pytest.mark.parametrize("stems", [["1", "2", "10", "100"], ["a", "mask", "a_mask_a"], ["ü", "b"]])
def test_names_of_masks_are_proposed_and_then_paired(options, mask_folder, stems, tmp_path):
    image, mask = NAMES[options]
    for stem in stems:
        save_image(tmp_path / "data" / image.format(stem), GREY)
        save_image(tmp_path / mask_folder / mask.format(stem), GREY)
    with pytest.raises(ValueError, match=rf"; give {re.escape(options)} \(in a benchmark's YAML file: mask_[^)]*\)$"):
        pairing.pair([tmp_path / "data"], [tmp_path / mask_folder])
    words = dict(word.removeprefix("--mask_").split("=", 1) for word in shlex.split(options))
    pairs = pairing.pair([tmp_path / "data"], [tmp_path / mask_folder], names=pairing.MaskNames(**words))
    assert sorted(names(pairs)) == sorted((image.format(stem), mask.format(stem)) for stem in stems)


def test_nothing_is_proposed_that_does_not_pair_every_mask(folders):
    for name in ("b_mask.png", "c_mask.png", "other.png"):
        save_image(folders / "more" / name, GREY)
    with pytest.raises(ValueError, match=r"for example a#1\.png and b_mask\.png\)$"):
        pairing.pair([folders / "images"], [folders / "more"])


def test_masks_without_the_suffix_are_an_error(folders):
    with pytest.raises(ValueError, match=r"has the name of a mask .*\(for example a#1\.png and nothing\)"):
        pairing.pair([folders / "images"], [folders / "masks"], names=pairing.MaskNames(suffix="_mask"))


def test_a_wrong_suffix_gets_the_right_one_as_remedy(folders):
    for name in ("b_mask.png", "c_mask.png"):
        save_image(folders / "more" / name, GREY)
    with pytest.raises(ValueError, match=r"; give --mask_suffix=_mask "):
        pairing.pair([folders / "images"], [folders / "more"], names=pairing.MaskNames(suffix="_mask.png"))


def test_an_image_may_end_like_a_mask(tmp_path):
    for name in ("im/a.png", "im/a_m.png", "gt/a_m.png", "gt/a_m_m.png"):
        save_image(tmp_path / name, GREY)
    pairs = pairing.pair([tmp_path / "im"], [tmp_path / "gt"], names=pairing.MaskNames(suffix="_m"))
    assert names(pairs) == [("a.png", "a_m.png"), ("a_m.png", "a_m_m.png")]


def test_one_file_spelled_twice_is_one(folders, monkeypatch):
    monkeypatch.chdir(folders)
    assert len(pairing.gather(["images", folders / "images", "masks/../images/b.jpg"])) == 3


def test_a_link_to_itself_is_a_broken_one(folders):
    (folders / "images" / "loop.png").symlink_to("loop.png")
    assert pairing.scan(folders / "images").broken == ["loop.png"]


def test_names_are_paired_whatever_the_form_of_their_accents(tmp_path):
    for form, folder in (("NFC", "images"), ("NFD", "masks")):
        save_image(tmp_path / folder / f"{unicodedata.normalize(form, 'café_ü')}.png", GREY)
    assert len(pairing.pair([tmp_path / "images"], [tmp_path / "masks"])) == 1
    names = pairing.MaskNames(suffix=unicodedata.normalize("NFD", "_ü"))
    save_image(tmp_path / "short" / "café.png", GREY)
    assert len(pairing.pair([tmp_path / "short"], [tmp_path / "masks"], names=names)) == 1


def test_what_is_left_out_is_counted(folders):
    assert pairing.left_out([folders / "images"]) == ""
    for name in ("a.HEIC", "b.HEIC", "film.mp4", "README", "Thumbs.db", "settings.json", ".hidden"):
        (folders / "images" / name).write_bytes(b"x")
    for name in ("gone.jpg", "gone.txt"):
        (folders / "images" / name).symlink_to("nowhere")
    if ".heic" not in extensions():
        remedy = "convert to JPEG, or pip install pillow-heif"
        told = f"2 .HEIC ({remedy}), 1 .mp4, 1 README, 2 broken links"
        assert pairing.left_out([folders / "images", folders / "images"]) == told


def test_a_broken_link_to_an_image_is_an_error_in_training_and_scoring(folders):
    (folders / "masks" / "d.png").symlink_to("nowhere")
    with pytest.raises(OSError, match=r"masks: broken links; fetch the files, or remove the links: d\.png"):
        pairing.pair([folders / "images"], [folders / "masks"])
    assert "d" not in pairing.gather([folders / "masks"])


def test_sub_folders_are_read_on_request_without_hidden_linked_and_skipped_ones(folders):
    for name in ("sub/a.png", "sub/deep/b.png", ".git/c.png", "__MACOSX/d.png", "skipped/below/e.png"):
        save_image(folders / "images" / name, GREY)
    (folders / "images" / "link").symlink_to(folders / "masks")
    found = pairing.gather([folders / "images"], recursive=True, skip=lambda folder: folder.name == "skipped")
    assert sorted(found) == ["a#1", "b", "c", "sub/a", "sub/deep/b"]
    assert sorted(pairing.gather([folders / "images"])) == ["a#1", "b", "c"]
    assert pairing.images_below(folders / "images") == 3
    with pytest.raises(ValueError, match="/images: has no images; 6 images in sub-folders, which --recursive reads"):
        (folders / "top").mkdir()
        (folders / "images").rename(folders / "top" / "images")
        (folders / "top").rename(folders / "images")
        pairing.gather([folders / "images"])
