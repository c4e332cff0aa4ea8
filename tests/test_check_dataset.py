"""tools/check_dataset.py finds every planted fault in a miniature archive, and nothing else."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ADOBE_RGB_PROFILE, arguments_of, failure
from PIL import Image

from tools import check_dataset

RNG = np.random.default_rng(0)
TURN = Image.Exif()
TURN[0x0112] = 6  # a quarter turn
TRAIN, CHAMELEON, COD10K = "COD training", "CHAMELEON", "COD10K"
TWICE = ("COD10K-CAM-1-Aquatic-3-Crab-32", "COD10K-CAM-2-Terrestrial-23-Cat-1506")


def make_image(channels=3, mode=None):
    noise = Image.fromarray(RNG.integers(0, 256, (24, 32, channels), dtype=np.uint8))
    return noise.convert(mode) if mode else noise


def make_mask(white=255, size=(24, 32)):
    pixels = np.zeros(size, np.uint8)
    pixels[4:12, 6:16] = white
    return Image.fromarray(pixels)


def save(folder, stem, image=None, mask=None, extension="jpg", mask_extension="png", **options):
    """A pair in `folder`; returns its image's path."""
    for name in ("Imgs", "GT"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (image or make_image()).save(folder / "Imgs" / f"{stem}.{extension}", **options)
    (mask or make_mask()).save(folder / "GT" / f"{stem}.{mask_extension}")
    return folder / "Imgs" / f"{stem}.{extension}"


def plant(root):
    """COD in the layout of the camouflage papers, with every fault and without the test set NC4K."""
    train, chameleon, cod10k = (root / name for name in ("TrainDataset", "TestDataset/CHAMELEON", "TestDataset/COD10K"))
    black, white = make_mask(0), make_mask()
    border = np.hstack([np.array(make_mask(1))[:, :30], np.full((24, 2), 255, np.uint8)])
    for stem, mask in {
        "camourflage_1": white, "one": make_mask(1), "dark": make_mask(100), "empty": black,
        "full": Image.new("L", (32, 24), 255), "alpha": Image.merge("LA", (black, white)),
        "void": Image.fromarray(border), "green": Image.merge("RGB", (black, white, black)),
        **{f"mode {mode}": white.convert(mode) for mode in ("1", "RGB", "P")},  # without a finding
    }.items():  # fmt: skip
        save(train, stem, mask=mask)
    save(train, "turned", exif=TURN)
    save(train, "turned_mask", mask=make_mask(size=(32, 24)), exif=TURN)
    save(train, "cmyk", make_image(mode="CMYK"))
    save(train, "deep", Image.fromarray(np.full((24, 32), 3000, np.uint16)), extension="png")
    save(train, "profile", icc_profile=ADOBE_RGB_PROFILE)
    save(train, "float", Image.fromarray(np.full((24, 32), 0.5, np.float32)), extension="tif")
    shutil.copy(save(train, "same"), train / "Imgs" / "again.jpg")
    white.save(train / "GT" / "again.png")
    shutil.copy(save(train, "two"), train / "Imgs" / "two.png")
    for i, name in enumerate(TWICE):
        image = make_image()
        save(train, name, image, extension="png")
        save(cod10k, f"renamed{i}", image, extension="bmp")
        save(cod10k, f"black{i}", Image.new("RGB", (16 + i, 17 - i)), make_mask(size=(17 - i, 16 + i)), "png")
    for name in ("COD10K-NonCAM-5.jpg", "Thumbs.db", ".hidden.jpg"):  # left out
        (train / "Imgs" / name).write_bytes(b"")
    (train / "GT" / "gone.png").symlink_to("nowhere.png")

    for stem, mask in {
        **{f"small{i}": make_mask(size=(12, 16)) for i in range(77)},
        "line\nbreak": white, "grey": make_image(mode="L"),
        "soft": Image.fromarray(np.hstack([np.array(white), np.full((24, 1), 90, np.uint8)])),
        "colour": Image.merge("RGB", (white, black, black)),
    }.items():  # fmt: skip
        save(chameleon, stem, mask=mask)
    cut = save(chameleon, "cut")
    cut.write_bytes(cut.read_bytes()[:-200])
    save(chameleon, "text").write_text("no image")
    save(chameleon, "nothing").write_bytes(b"")
    save(chameleon, "Case")
    (chameleon / "GT" / "Case.png").rename(chameleon / "GT" / "case.png")
    Image.new("RGB", (33, 24), "red").save(chameleon / "Imgs" / "soft.jpg")
    save(chameleon, "rgba", make_image(4), extension="png")
    save(chameleon, "opaque", make_image(mode="RGBA"), extension="png")
    palette = make_image(mode="P")
    save(chameleon, "palette", palette, extension="png", transparency=palette.getpixel((0, 0)))
    save(chameleon, "moving", extension="gif", save_all=True, append_images=[make_image(), make_image()])
    save(chameleon, "jpeg", mask=white.resize((33, 25)).crop((0, 0, 32, 24)), mask_extension="jpg")
    return root


def run(*options):
    """What the tool prints, and its exit status."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            check_dataset.main(arguments_of(check_dataset, "--workers", 1, *options))
        except SystemExit as stop:
            return printed.getvalue(), stop.code
    return printed.getvalue(), 0


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(the printed text, exit status, JSON) of the archive with faults."""
    root = plant(tmp_path_factory.mktemp("planted") / "archive")
    text, status = run("cod", root, "--json", root.parent / "out" / "findings.json", "--workers", "2")
    return text, status, json.loads((root.parent / "out" / "findings.json").read_text())


SMALL = sorted(f"small{i}.png" for i in range(77))
FINDINGS = {  # kind -> split -> files
    "split not found or ambiguous": {"CAMO": ["archive"], "NC4K": ["archive"]},
    "image without mask": {CHAMELEON: ["Case.jpg"]},
    "mask without image": {CHAMELEON: ["case.png"]},
    "two files of one name": {TRAIN: ["two.png"]},
    "broken link": {TRAIN: ["gone.png"]},
    "unreadable": {CHAMELEON: ["cut.jpg", "nothing.jpg", "text.jpg"]},
    "mask of another size": {CHAMELEON: SMALL, TRAIN: ["turned_mask.png"]},
    "0/1 mask": {TRAIN: ["one.png"]},
    "mask too dark": {CHAMELEON: ["colour.png"], TRAIN: ["dark.png"]},  # pure red is 76 in greyscale
    "mask of labels": {TRAIN: ["void.png"]},
    "test image in training": {COD10K: ["renamed0.bmp", "renamed1.bmp"]},
    "image twice in a split": {TRAIN: ["same.jpg"]},
    "not the published number": {CHAMELEON: ["Imgs"], COD10K: ["Imgs"], TRAIN: ["Imgs"]},
    "mask not binary": {CHAMELEON: ["grey.png"], TRAIN: ["green.png"]},
    "mask in colour": {TRAIN: ["green.png"]},
    "empty mask": {TRAIN: ["empty.png"]},
    "full mask": {TRAIN: ["full.png"]},
    "far from white": {TRAIN: ["deep.png"]},
    "rotated by EXIF": {TRAIN: ["turned.jpg", "turned_mask.jpg"]},
    "transparent pixels": {CHAMELEON: ["palette.png", "rgba.png"]},
    "animated or several pages": {CHAMELEON: ["moving.gif"]},
    "unusual colour mode": {CHAMELEON: ["opaque.png"], TRAIN: ["cmyk.jpg"]},
    "mask in the alpha channel": {TRAIN: ["alpha.png"]},
    "colours of a profile": {TRAIN: ["profile.jpg"]},
    "16 bits or floats": {TRAIN: ["deep.png", "float.tif"]},
    "mask with soft edges": {CHAMELEON: ["jpeg.jpg", "soft.png"]},
    "not an image by its extension": {TRAIN: ["Thumbs.db"]},
}


def test_each_fault_is_found_and_named_and_nothing_else(planted):
    found = {}
    for finding in planted[2]["findings"]:
        names = sorted(Path(file["file"]).name for file in finding["files"])
        found.setdefault(finding["finding"], {})[finding["split"]] = names
    others = {"no pair", "validation image in training", "test image in validation"}
    assert found == FINDINGS and check_dataset.KINDS.keys() - FINDINGS == others

    details = {Path(file["file"]).name: file["detail"] for kind in planted[2]["findings"] for file in kind["files"]}
    assert details["renamed0.bmp"] == f"as {TWICE[0]}.png" and details["nothing.jpg"] == "it is empty"
    assert details["one.png"] == "mode L, 2 levels up to 1"
    assert details["turned_mask.png"] == "32 x 24, image 24 x 32, as if rotated by EXIF"


def test_each_finding_is_printed_with_its_remedy_and_first_files_before_the_verdict(planted):
    text, status, content = planted
    assert "\nerror: mask of another size: get a newer archive" in text
    assert "\n  CHAMELEON: 77 files: GT/small0.png (12 x 16, image 24 x 32), GT/small1.png" in text
    assert status == 1 and text.splitlines()[-1].endswith(": fix the errors")
    assert f"{content['errors']} errors, {content['warnings']} warnings, {content['notes']} notes" in text
    finding = check_dataset.Finding("split", "empty mask", Path("GT/line\nbreak \udcff ü.png"))
    assert str(finding) == "GT/line\\nbreak \\udcff ü.png"


def test_a_valid_data_set_passes(toy, capsys, tmp_path):
    text, status = run(toy / "train/Image", f"{toy}/train/Mask/", "--json", tmp_path / "findings.json")
    assert (status, text.splitlines()[-1]) == (0, "6 pairs, 0 errors, 0 warnings, 0 notes: sound")
    assert json.loads((tmp_path / "findings.json").read_text())["findings"] == []
    assert "checking" in capsys.readouterr().err


def test_a_custom_benchmark_with_only_warnings_passes(toy, tmp_path):
    (tmp_path / "mine.yaml").write_text("{train: {folder: train, count: 7}, test: {mine: {folder: test}}}")
    text, status = run(tmp_path / "mine.yaml", toy)
    assert "  mine training: 1 file: train/Image (6 of 7 pairs)" in text
    assert status == 0 and text.endswith("10 pairs, 0 errors, 1 warning, 0 notes: usable, but see the warnings\n")


def test_folders_without_common_names_are_no_pair(toy, tmp_path):
    for name, told in (("a.png", "mask without image"), ("a.json", "not read: 1 .json; how to make masks of annot")):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(b"")
        text, status = run(toy / "test/Image", tmp_path / name)
        assert status == 1 and "error: no pair" in text and told in text


@pytest.mark.parametrize(
    "first, second, told",
    [
        ("COD", "nowhere", "nowhere: there is no such folder"),
        ("COD", "test", "COD: has none of its splits there; COD training: not found in test"),
        ("test/Image", "nowhere", "nowhere: there is no such folder"),
        ("photos", "test/Mask", "there is no benchmark and no folder called photos"),
        ("none.yaml", "test", "none.yaml: cannot be read"),
        ("empty", "empty/too", "have no images"),
        ("test/Image", "test/../test/Image", "is given as the folder of both images and masks"),
    ],
)
def test_nothing_to_check_is_one_line_and_status_2(first, second, told, toy, tmp_path, monkeypatch, capsys):
    shutil.copytree(toy / "test", tmp_path / "test")
    (tmp_path / "empty" / "too").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    status, line = failure(check_dataset.main, arguments_of(check_dataset, first, second), capsys)
    assert status == 2 and told in line
