"""Files of weights that are damaged, hostile or of another kind: one line that names the file and the reason."""

import io
import os
import pickle
import struct
import zipfile
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import contents, failure, train_arguments

import train
from sam2.build_sam import build_sam2_trunk
from unext import run, weights

KEY = weights.TRUNK + "blocks.3.attn.qkv.weight"


@pytest.fixture
def load_with(encoders, monkeypatch):
    """A function that loads a trunk from a SAM 2 file, `encoders["hiera_path"]`, with another value under KEY."""
    state = weights.read(encoders["hiera_path"])["model"]

    def load(change):
        trunk = build_sam2_trunk("micro", device="meta")
        monkeypatch.setattr(weights, "read", lambda source: {"model": state | {KEY: change(state[KEY])}})
        weights.load_sam2(trunk, encoders["hiera_path"])
        return state[KEY], trunk.state_dict()[KEY.removeprefix(weights.TRUNK)]

    return load


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.index_fill(0, torch.tensor(7), torch.nan), "has NaN or infinity in blocks.3.attn.qkv.weight"),
        (lambda t: t.double() * 1e300, "has NaN or infinity"),  # in float32, which the network computes in
        (lambda t: t.to(torch.int32), "blocks.3.attn.qkv.weight is int32 instead of float32"),
        (lambda t: t > 0, "is bool instead of float32"),
        (lambda t: t.to(torch.complex64), "is complex64 instead of float32"),
        (lambda t: t.to(torch.float8_e4m3fn), "is float8_e4m3fn instead of float32"),
        (lambda t: t.to_sparse(), "is not a dense tensor"),
        (lambda t: t.to("meta"), "is not a dense tensor"),
        (lambda t: t[:5], "is (5, 64) instead of (192, 64)"),
        (lambda t: "no tensor", "lacks blocks.3.attn.qkv.weight"),
    ],
)
def test_values_that_cannot_be_weights_are_named(change, message, load_with, encoders):
    with pytest.raises(ValueError) as error:
        load_with(change)
    assert str(error.value).startswith(f"{encoders['hiera_path']}: ") and message in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_of_another_width_is_converted(dtype, load_with):
    original, loaded = load_with(lambda weight: weight.to(dtype))
    assert loaded.dtype == torch.float32 and torch.equal(loaded, original.to(dtype).float())


def archive(name) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(name, "no weights")
    return buffer.getvalue()


DAMAGED = r"is truncated, damaged or not weights \(.*\); download the file again"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("page.pt", b"\n<!DOCTYPE html><html>404</html>", r"is .* not weights \(it is a web page\); download"),
        ("empty.pt", b"", r"is .* not weights \(it is empty\); download"),
        ("empty.safetensors", b"", r"is .* not weights \(it is empty\); download"),
        ("notes.pt", b"hello, these are no weights", DAMAGED),
        ("long.safetensors", struct.pack("<Q", 2**62) + b"{}", DAMAGED),
        ("short.safetensors", safetensors.torch.save({"a": torch.ones(10)})[:-1], DAMAGED),
        ("zip.pt", b"PK\x03\x04 and nothing more", DAMAGED),
        ("archive.pt", archive("../data.pkl"), DAMAGED),
        ("open.pt", b"\x80\x02" + b"(" * 10_000, DAMAGED),  # a pickle that only opens
        ("array.pt", pickle.dumps(np.ones(3)), "is not a file of weights, or is a pickle with code"),
        ("list.pt", pickle.dumps([1, 2]), ""),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,  # the time in an archive would differ between processes
)
def test_files_without_weights_are_named_for_what_they_are(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^.*{name}: {message}[^\n]*$") as error:
        weights.read(tmp_path / name)
    assert "weights_only" not in str(error.value)  # nobody is told to load it all the same


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_lack_of_memory_is_not_a_damaged_file(error, encoders, monkeypatch):
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=error))
    with pytest.raises(type(error)) as raised:
        weights.read(encoders["hiera_path"])
    assert raised.value is error


def test_missing_files_folders_and_dangling_links_are_named(tmp_path):
    (tmp_path / "link.pt").symlink_to("nowhere.pt")
    (tmp_path / "self.pt").symlink_to("self.pt")
    (tmp_path / "folder.pt").mkdir()
    broken = "is a broken link"
    problems = {"missing": "there is no such file", "link": broken, "self": broken, "folder": "is not a file"}
    for name, problem in problems.items():
        with pytest.raises(OSError, match=f"{name}.pt: {problem}"):
            weights.read(tmp_path / f"{name}.pt")
    with pytest.raises(OSError, match="s3://bucket/x.pt: there is no such file"):
        weights.read("s3://bucket/x.pt")


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("option", ["--hiera_path", "--dinov2_path", "--init", "--resume"])
def test_no_option_runs_code_from_a_file(option, toy, tmp_path, capsys):
    """A payload that works: plain pickle runs it."""
    path = tmp_path / "run" / "last.pth"
    path.parent.mkdir()
    content = {"model": Payload(str(tmp_path / "ran"))}
    torch.save(content, path)
    options, folder = (option, path.parent) if option == "--resume" else (f"{option} {path}", tmp_path / "new")
    status, line = failure(train.main, train_arguments(options, toy, folder), capsys)
    assert status == 2 and f"{path}: " in line
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(content))
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("change", [{"progress": 3}, {"recipe": []}, "cut"])
def test_a_last_pth_that_is_no_run_is_named_and_no_run_starts_over(change, micro_checkpoint, toy, tmp_path, capsys):
    last, more = tmp_path / run.LAST, {"recipe": {}, "progress": {}}
    torch.save(torch.load(micro_checkpoint) | more | ({} if change == "cut" else change), last)
    if change == "cut":
        os.truncate(last, last.stat().st_size - 5000)
    before = contents(tmp_path)
    status, line = failure(train.main, train_arguments("--resume", toy, tmp_path), capsys)
    assert status == 2 and f"{last}: " in line and "damaged" in line and contents(tmp_path) == before
