"""files.py: images and masks are found, paired by name and read, and files are replaced only when complete."""

import re

import numpy as np
import pytest
from conftest import save_image

from unext import files, pairing

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
    with pytest.raises(ValueError, match="has no images"):
        pairing.find(tmp_path)


def test_a_file_is_replaced_only_when_complete(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as file:
        file.write(b"half")
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old"
    with files.replacing(path) as file:
        file.write(b"new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    assert files.output_folder(tmp_path / "new" / "folder").is_dir()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc"):
        with pytest.raises(OSError, match=f"{path}: nothing can be written there"):
            files.output_folder(path)
