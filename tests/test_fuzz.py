"""Random damage and options end in a result or a message, never in a crash."""

import contextlib
import io
import math
import os
from pathlib import Path

import fuzz
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
import test as script
import train
from tools import check_dataset
from unext import cli, images


@pytest.mark.posix
@pytest.mark.parametrize("what, number", [("images", 120), ("weights", 15)])
def test_whole_files_are_read_and_damaged_ones_read_or_refused_by_name(what, number, tmp_path, monkeypatch):
    for name in (images.LIMIT, images.WHITE):
        monkeypatch.setenv(name, "")
    images.configure_reading(cli.MAX_PIXELS)
    write, read = fuzz.KINDS[what]
    write(tmp_path)
    assert {fuzz.judge(read, path) for path in tmp_path.iterdir()} == {"read"}
    verdicts = {fuzz.attempt(i, what, seed=7, folder=tmp_path).verdict for i in range(number)}
    assert {"refused"} <= verdicts <= {"read", "refused"}


def test_failures_are_reported():
    outcomes = [fuzz.Outcome("a.png", i, verdict) for i, verdict in enumerate(["read", "refused", "KeyError", "hangs"])]
    failures = ["images 2, a.png: KeyError", "images 3, a.png: hangs"]
    assert fuzz.summary("images", outcomes) == ("4 images: 1 read, 1 refused, 2 failed", failures)


ODD = ["", "-", "--", "nan", "inf", "-0", "1e999", "0x10", "1_0", "٣", "9" * 5000, " 7 ", "map,mask", "auto"]
TEXTS = st.one_of(st.text(max_size=12), st.integers().map(str), st.floats().map(str), st.sampled_from(ODD))
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
