"""Messages about files of any name, see names.py."""

import names
import pytest

FAST = ["train_and_resume", "test_unreadable", "eval_allowed", "check_everything"]  # one of each command


@pytest.mark.parametrize("scenario", names.SCENARIOS)
def test_each_message_is_one_printable_line_that_names_the_file(scenario, tmp_path):
    assert names.amiss(scenario, names.NASTY, tmp_path) == ""


@pytest.mark.parametrize(
    "scenario", [pytest.param(one, marks=pytest.mark.slow if one not in FAST else ()) for one in names.SCENARIOS]
)
def test_names_that_are_not_utf_8_are_shown_too(scenario, tmp_path):
    assert names.amiss(scenario, names.BYTES, tmp_path) == ""


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\u2028b", "a\rb"])
def test_a_message_with_an_unescaped_name_is_detected(name, tmp_path, monkeypatch):
    monkeypatch.setitem(names.SCENARIOS, "careless", lambda folder, name: print(f"{name}: is missing"))
    assert names.amiss("careless", name, tmp_path)
