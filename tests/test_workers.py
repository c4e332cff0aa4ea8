"""unext/workers.py: the cores of the process, and bars that leave log files short."""

import itertools
import os

import pytest

import eval as evaluation
import test as prediction
import train
from tools import check_dataset
from unext import workers


def test_the_number_of_workers_follows_the_cores_of_the_process(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    for module, most in ((train, 8), (prediction, 8), (evaluation, 128), (check_dataset, 128)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {4, 9}, raising=False)
        assert module.get_args_parser().get_default("workers") == 2
        monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS and Windows
        assert module.get_args_parser().get_default("workers") == most


@pytest.mark.parametrize("terminal, writes", [(True, range(600, 610)), (False, range(10, 14))])
def test_a_bar_writes_once_a_minute_where_standard_error_is_no_terminal(terminal, writes, monkeypatch, capsys):
    monkeypatch.setattr("tqdm.std.time", itertools.count().__next__)  # each look at the clock is a second later
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    for _ in workers.progress_bar(range(600), miniters=1):
        pass
    written = capsys.readouterr().err
    assert written.count("\r") in writes and "600/600" in written.rpartition("\r")[2]
