"""Random damage, names and options end in a result or a message, never in a crash."""

import argparse
import contextlib
import io
import math
import os
import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
import test as script
import train
from tools import check_dataset
from unext import cli, files, images, pairing

fuzz = pytest.importorskip("fuzz")  # it limits memory and time as POSIX does


@pytest.mark.parametrize("what, number", [("images", 120), ("weights", 15)])
def test_whole_files_are_read_and_damaged_ones_read_or_refused_by_name(what, number, tmp_path, monkeypatch):
    for name in (images.LIMIT, images.WHITE):
        monkeypatch.setenv(name, "")
    images.configure_reading(cli.MAX_PIXELS)
    write, _, read = fuzz.KINDS[what]
    write(tmp_path)
    assert {fuzz.judge(read, path) for path in tmp_path.iterdir()} == {"read"}
    verdicts = {fuzz.attempt(i, what, seed=7, folder=tmp_path).verdict for i in range(number)}
    assert {"refused"} <= verdicts <= {"read", "refused"}


def test_failures_are_reported():
    verdicts = [("read", 9), ("refused", 9), ("KeyError: 'x'", 5000), ("hangs", 9)]
    outcomes = [fuzz.Outcome("a.png", i, verdict, 1, memory) for i, (verdict, memory) in enumerate(verdicts)]
    line, failures = fuzz.summary("images", outcomes)
    assert "4 images: 1 read, 1 refused, 2 failed" in line and "5,000 MB" in failures[2]
    assert failures[:2] == ["images 2, a.png: KeyError: 'x'", "images 3, a.png: hangs"]


STEMS = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=30)
STEMS = STEMS.map(lambda stem: unicodedata.normalize("NFC", stem))  # by which they are paired
STEMS = STEMS.filter(lambda stem: not stem.startswith(".") and Path(f"{stem}.png").stem == stem)
SETS = st.sets(STEMS, max_size=6)


def touch(folder: Path, stems, extension: str) -> Path:
    folder.mkdir()
    for stem in stems:
        (folder / f"{stem}{extension}").touch()
    return folder


@given(common=SETS, left=SETS, right=SETS, skip=st.booleans())
def test_files_are_paired_by_name_or_reported_as_unpaired(common, left, right, skip):
    left, right = common | left, common | right
    with tempfile.TemporaryDirectory() as folder:
        images = touch(Path(folder, "images"), left, ".jpg")
        masks = touch(Path(folder, "masks"), right, ".png")
        try:
            pairs = pairing.pair([images], [masks], skip)
        except ValueError as error:
            message = str(error)
            assert not left & right or (left != right and not skip)
            if left & right:
                alone = [f"{stem}.jpg" for stem in left - right] + [f"{stem}.png" for stem in right - left]
                assert all(files.printable(name) in message for name in alone)
            return
    assert [image.stem for image, _ in pairs] == [mask.stem for _, mask in pairs] == sorted(left & right)
    assert all(image.parent == images and mask.parent == masks for image, mask in pairs)


ODD = ["", "-", "--", "nan", "inf", "-0", "1e999", "0x10", "1_0", "٣", "9" * 5000, " 7 ", "map,mask", "auto"]
TEXTS = st.one_of(st.text(max_size=12), st.integers().map(str), st.floats().map(str), st.sampled_from(ODD))


@given(text=TEXTS, kind=st.sampled_from([int, float]), bounds=st.tuples(st.integers(-99, 99), st.integers(0, 9**9)))
def test_numbers_are_within_their_bounds_or_refused(text, kind, bounds):
    least, most = bounds[0], sum(bounds)
    try:
        value = cli.number(kind, least, most)(text)
    except argparse.ArgumentTypeError as error:
        assert len(str(error).splitlines()) <= 1 or not text.isprintable()
    else:
        assert least <= value <= most and math.isfinite(value) and type(value) is kind


PARSERS = {
    "train": (train.get_args_parser, "--hiera_path x --save_path x"),
    "test": (script.get_args_parser, "--checkpoint x --test_image_path x --save_path x"),
    "eval": (evaluation.get_args_parser, "--pred_path x"),
    "check_dataset": (check_dataset.get_args_parser, "x x"),
}


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.data())
def test_options_are_accepted_or_refused_with_status_2(name, data):
    make, needed = PARSERS[name]
    parser = make()
    options = sorted(option for option in parser._option_string_actions if option not in ("-h", "--help"))
    given = needed.split()
    for option in data.draw(st.lists(st.sampled_from(options), max_size=4)):
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
