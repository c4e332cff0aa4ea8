"""Where a small checkpoint's encoders are searched, and what its header can never make the program do."""

import http.server
import os
import shutil
import threading

import pytest
import safetensors.torch
import torch
from conftest import failure, other_weights, same_network

import test as script
from SAM2UNeXT import SAM2UNeXT
from tools import app, convert_checkpoint, export
from unext import checkpoint, cli, download, weights


def changed(small, path, change):
    """A copy of the checkpoint with a changed header: `change` maps each encoder's record."""
    content = torch.load(small, weights_only=True)
    content["encoders"] = {option: change(dict(record)) for option, record in content["encoders"].items()}
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path)
    return path


def moved(small, folder):
    """The checkpoint as it arrives on another machine: its encoders' folder is not there."""
    return changed(small, folder / "SAM2-UNeXT-7.pth", lambda record: record | {"path": f"/nowhere/{record['name']}"})


def tree(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def test_missing_encoders_are_named_and_nothing_is_created(small, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "weights")
    path = changed(small, tmp_path / "mine/x.pth", lambda old: old | {"path": "/nowhere/weights/sam2_hiera_micro.pt"})
    before = tree(tmp_path)
    with pytest.raises(OSError) as error:
        SAM2UNeXT.from_checkpoint(path)
    fingerprint = torch.load(path)["encoders"]["hiera_path"]["fingerprint"]
    for words in (path, f"needs its encoder sam2_hiera_micro.pt (fingerprint {fingerprint})", "--hiera_path"):
        assert str(words) in str(error.value)
    for folder in ("/nowhere/weights", tmp_path / "weights", tmp_path / "mine"):
        assert str(folder) in str(error.value).split("not found in ")[1]
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "module, words",
    [
        (script, "--checkpoint {checkpoint} --test_image_path {image} --save_path {output}/maps"),
        (convert_checkpoint, "{checkpoint} {output}/whole.pth --to whole"),
        (export, "{checkpoint} {output}/x.onnx"),
        (app, "{checkpoint}"),
    ],
)
def test_commands_that_miss_an_encoder_make_nothing(module, words, small, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(cli, "require", lambda *words: None)  # of the packages that export and page need
    monkeypatch.setattr(export, "MIN_TORCH", (0,))
    places = {"checkpoint": moved(small, tmp_path / "mine"), "output": tmp_path / "out"}
    before = tree(tmp_path)
    words = words.format(**places, image=toy / "test/Image/toy_0001.jpg").split()
    status, line = failure(module.main, module.get_args_parser().parse_args(words), capsys)
    assert status == 2 and "needs its encoder sam2_hiera_micro.pt" in line and tree(tmp_path) == before
    assert module.get_args_parser().parse_args([*words, "--download"]).download


def test_the_published_address_is_named_and_downloaded_on_request(small, encoders, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setitem(download.PUBLISHED, "sam2_hiera_micro.pt", "https://host/sam2_hiera_micro.pt")
    path = moved(small, tmp_path / "mine")
    with pytest.raises(OSError, match="--download fetches it from https://host/sam2_hiera_micro.pt to .*/weights, or"):
        SAM2UNeXT.from_checkpoint(path)
    monkeypatch.setattr(download, "retrieve", lambda url, path: shutil.copy(encoders["hiera_path"], path))
    weights = tmp_path / "weights/sam2_hiera_micro.pt"
    with pytest.raises(OSError, match=f"{weights}: there is no such file .https://host/sam2_hiera_micro.pt"):
        SAM2UNeXT.from_checkpoint(path, weights, encoders["dinov2_path"])
    for given in (None, weights):
        model = SAM2UNeXT.from_checkpoint(path, given, encoders["dinov2_path"], download=True)
        assert model.encoders["hiera_path"]["path"] == str(weights)
        weights.unlink()


@pytest.mark.parametrize("place", ["weights", "mine"])
def test_encoders_are_found_in_weights_and_beside_the_checkpoint(place, small, model, encoders, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "weights")
    path = moved(small, tmp_path / "mine")
    (tmp_path / place).mkdir(exist_ok=True)
    for file in encoders.values():
        shutil.copy(file, tmp_path / place)
    assert same_network(SAM2UNeXT.from_checkpoint(path), model)


def test_the_first_file_that_exists_must_have_the_fingerprint(small, model, encoders, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "weights")
    (tmp_path / "weights").mkdir()
    other = other_weights(encoders, tmp_path / "weights" / "sam2_hiera_micro.pt")
    path = moved(small, tmp_path / "mine")
    for file in encoders.values():
        shutil.copy(file, tmp_path / "mine")
    with pytest.raises(ValueError, match=f"not trained with {other}; give sam2_hiera_micro.pt with the fingerprint"):
        SAM2UNeXT.from_checkpoint(path)
    other.unlink()
    assert same_network(SAM2UNeXT.from_checkpoint(path), model)


def test_encoders_may_be_given_in_another_file_format(small, model, encoders, tmp_path):
    state = {k: v.contiguous() for k, v in torch.load(encoders["hiera_path"])["model"].items()}
    safetensors.torch.save_file(state, tmp_path / "trunk.safetensors")
    torch.save({"state_dict": safetensors.torch.load_file(encoders["dinov2_path"])}, tmp_path / "aux.pth")
    path = moved(small, tmp_path)
    assert same_network(SAM2UNeXT.from_checkpoint(path, tmp_path / "trunk.safetensors", tmp_path / "aux.pth"), model)


@pytest.fixture
def requests():
    """The paths that a server on localhost was asked for, and its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    found = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield found, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("place", ["{url}/sam2_hiera_micro.pt", "elsewhere/weights/sam2_hiera_micro.pt"])
def test_a_header_asks_no_server_and_creates_no_folder(place, small, requests, tmp_path, monkeypatch):
    found, url = requests
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(download.PUBLISHED, "sam2_hiera_micro.pt", f"{url}/sam2_hiera_micro.pt")
    path = changed(small, tmp_path / "x.pth", lambda record: record | {"path": place.format(url=url)})
    with pytest.raises(OSError, match="needs its encoder sam2_hiera_micro.pt"):
        SAM2UNeXT.from_checkpoint(path)
    assert tree(tmp_path) == [str(path)] and found == []


@pytest.mark.posix
@pytest.mark.parametrize("name", ["passwd", "sam2_hiera_micro.pt/../passwd", "sam2_hiera_micro.pt"])
def test_a_header_opens_nothing_but_a_regular_file_of_the_encoders_name(name, small, tmp_path, monkeypatch):
    (tmp_path / "passwd").write_text("secret")
    os.mkfifo(tmp_path / "sam2_hiera_micro.pt")
    path = changed(small, tmp_path / "mine" / "x.pth", lambda old: old | {"name": name, "path": str(tmp_path / name)})
    opened, parse = [], weights.parse
    monkeypatch.setattr(weights, "parse", lambda path: opened.append(path) or parse(path))
    with pytest.raises(OSError, match="needs its encoder sam2_hiera_micro.pt") as error:
        SAM2UNeXT.from_checkpoint(path)
    assert opened == [path] and "delete" not in str(error.value)
