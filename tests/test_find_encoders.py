"""Where a small checkpoint's encoders are searched, and what its header can never make the program do."""

import os
import shutil

import pytest
import torch
from conftest import arguments_of, contents, failure, same_network

import test as script
from SAM2UNeXT import SAM2UNeXT
from tools import app, convert_checkpoint, export
from unext import checkpoint, cli, download, weights


@pytest.fixture(autouse=True)
def weights_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "weights")
    return tmp_path / "weights"


def other_weights(encoders, path):
    """A SAM 2 file whose trunk differs in one matrix."""
    state = torch.load(encoders["hiera_path"])
    state["model"][weights.TRUNK + "blocks.3.mlp.layers.1.weight"].mul_(1.01)
    torch.save(state, path)
    return path


def changed(small, path, change):
    """A copy of the checkpoint with a changed header: `change` maps each encoder's record."""
    content = torch.load(small, weights_only=True)
    content["encoders"] = {option: change(dict(record)) for option, record in content["encoders"].items()}
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path)
    return path


def moved(small, folder):
    """The checkpoint as it arrives on another machine: its encoders' folder is missing."""
    return changed(small, folder / "SAM2-UNeXT-7.pth", lambda record: record | {"path": f"/nowhere/{record['name']}"})


def copy_encoders(encoders, folder):
    folder.mkdir(exist_ok=True)
    for file in encoders.values():
        shutil.copy(file, folder)


@pytest.mark.parametrize(
    "module, options",
    [
        (script, "--checkpoint {checkpoint} --test_image_path {image} --save_path {output}/maps"),
        (convert_checkpoint, "{checkpoint} {output}/whole.pth --to whole"),
        (export, "{checkpoint} {output}/x.onnx"),
        (app, "{checkpoint}"),
    ],
)
def test_missing_encoders_are_named_and_nothing_is_made(module, options, small, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "require", lambda *options: None)  # of the packages that export and page need
    monkeypatch.setattr(export, "MIN_TORCH", (0,))
    path = changed(small, tmp_path / "mine/x.pth", lambda old: old | {"path": "/nowhere/weights/sam2_hiera_micro.pt"})
    options = options.format(checkpoint=path, output=tmp_path / "out", image=toy / "test/Image/toy_0001.jpg").split()
    before = contents(tmp_path)
    status, line = failure(module.main, arguments_of(module, *options), capsys)
    fingerprint = torch.load(path)["encoders"]["hiera_path"]["fingerprint"]
    folders = f"/nowhere/weights, {tmp_path}/weights, {tmp_path}/mine"
    missing = f"{path}: needs its encoder sam2_hiera_micro.pt (fingerprint {fingerprint}), not found in {folders}: "
    assert line.endswith(f"{missing}copy it there, or name it with --hiera_path")
    assert status == 2 and contents(tmp_path) == before and not (tmp_path / "out").exists()
    assert arguments_of(module, *options, "--download").download


def test_the_published_address_is_named_and_downloaded_on_request(small, encoders, weights_folder, monkeypatch):
    monkeypatch.setitem(download.PUBLISHED, "sam2_hiera_micro.pt", "https://host/sam2_hiera_micro.pt")
    path, file = moved(small, weights_folder.parent / "mine"), weights_folder / "sam2_hiera_micro.pt"
    with pytest.raises(OSError, match="--download fetches it from https://host/sam2_hiera_micro.pt to .*/weights, or"):
        SAM2UNeXT.from_checkpoint(path)
    monkeypatch.setattr(download, "retrieve", lambda url, path: shutil.copy(encoders["hiera_path"], path))
    with pytest.raises(OSError, match=f"{file}: there is no such file .https://host/sam2_hiera_micro.pt"):
        SAM2UNeXT.from_checkpoint(path, file, encoders["dinov2_path"])
    for given in (None, file):
        model = SAM2UNeXT.from_checkpoint(path, given, encoders["dinov2_path"], download=True)
        assert model.encoders["hiera_path"]["path"] == str(file)
        file.unlink()


def test_the_first_file_that_exists_must_have_the_fingerprint(small, model, encoders, tmp_path, weights_folder):
    path = moved(small, tmp_path / "mine")
    copy_encoders(encoders, tmp_path / "mine")
    weights_folder.mkdir()
    other = other_weights(encoders, weights_folder / "sam2_hiera_micro.pt")
    with pytest.raises(ValueError, match=f"not trained with {other}; give sam2_hiera_micro.pt with the fingerprint"):
        SAM2UNeXT.from_checkpoint(path)
    other.unlink()
    assert same_network(SAM2UNeXT.from_checkpoint(path), model)


@pytest.mark.posix
@pytest.mark.parametrize(
    "change",
    [
        {"path": "https://host/sam2_hiera_micro.pt"},
        {"path": "elsewhere/weights/sam2_hiera_micro.pt"},
        {"path": "mine/sam2_hiera_micro.pt"},
        {"path": "mine/passwd", "name": "passwd"},
        {"path": "mine/sam2_hiera_micro.pt/../passwd", "name": "sam2_hiera_micro.pt/../passwd"},
    ],
)
def test_a_header_asks_no_server_and_opens_only_the_encoders_file(change, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(download.PUBLISHED, "sam2_hiera_micro.pt", "https://host/sam2_hiera_micro.pt")
    monkeypatch.setattr(download, "retrieve", lambda url, path: pytest.fail("a server was asked"))
    path = changed(small, tmp_path / "mine/x.pth", lambda record: record | change)
    (tmp_path / "mine/passwd").write_text("secret")
    os.mkfifo(tmp_path / "mine/sam2_hiera_micro.pt")
    before, opened, parse = sorted(tmp_path.rglob("*")), [], weights.parse
    monkeypatch.setattr(weights, "parse", lambda path: opened.append(path) or parse(path))
    with pytest.raises(OSError, match="needs its encoder sam2_hiera_micro.pt"):
        SAM2UNeXT.from_checkpoint(path)
    assert opened == [path] and sorted(tmp_path.rglob("*")) == before
