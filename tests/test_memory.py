"""What goes back to the system: memory.py."""

import platform
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL

import checkpoint
import memory
from SAM2UNeXT import SAM2UNeXT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone")


def resident(kind: str) -> float:
    """Megabytes of files (RssFile) or of its own (RssAnon) that this process has in memory."""
    return int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0]) / 1024


def test_mapped_pages_leave_memory_and_come_back_unless_they_were_written_to(tmp_path):
    values = torch.arange(2**23, dtype=torch.float32)  # 32 MB
    torch.save({"w": values}, tmp_path / "w.pt")
    mapped = checkpoint.read(tmp_path / "w.pt")["w"]
    assert torch.equal(mapped, values)
    before = resident("RssFile")
    memory.let_go(tmp_path / "w.pt")
    assert resident("RssFile") < before - 30
    assert torch.equal(mapped, values)
    mapped[5] = 77
    memory.let_go(tmp_path / "w.pt")
    assert mapped[5] == 77 and mapped[6] == 6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone")
def test_holes_between_arrays_go_back():
    kept = [np.ones(10_000) for _ in range(1000)][::2]  # every other of 80 MB, each too small to be mapped by itself
    before = resident("RssAnon")
    memory.trim()
    assert resident("RssAnon") < before - 30
    assert all(array.all() for array in kept)


def test_for_large_inputs_the_network_gives_back_what_each_encoder_left(monkeypatch):
    model, calls = SAM2UNeXT(**SMALL), []
    monkeypatch.setattr(memory, "trim", lambda: calls.append("trim"))
    monkeypatch.setattr("SAM2UNeXT.TRIM_FROM", 2 * 64 * 64)
    model(torch.zeros(1, 3, 64, 64))
    assert not calls
    model(torch.zeros(2, 3, 64, 64))
    assert calls == ["trim", "trim"]
