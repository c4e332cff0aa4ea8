"""Trained checkpoints: their kinds, their headers, and the way to their encoders."""

import copy
import http.server
import os
import pickle
import shutil
import threading

import pytest
import safetensors.torch
import torch
from conftest import MICRO, aux_file, failure, golden, sam2_file

import checkpoint
import weights
from SAM2UNeXT import SAM2UNeXT
from tools import convert_checkpoint


def test_an_encoder_is_not_a_trained_checkpoint(encoders, tmp_path):
    with pytest.raises(ValueError, match="is a SAM 2 checkpoint of size micro; a trained checkpoint belongs here"):
        checkpoint.read_network(encoders["hiera_path"])
    with pytest.raises(ValueError, match="is the DINOv2 vit_small_patch14_dinov2; a trained checkpoint belongs here"):
        checkpoint.read_network(aux_file(tmp_path / "model.safetensors", image_size=56))


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.01])
def test_a_truncated_checkpoint_is_named(kept, micro_checkpoint, tmp_path):
    content = micro_checkpoint.read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="cut.pth: is truncated, damaged"):
        checkpoint.read_network(tmp_path / "cut.pth")


@pytest.mark.parametrize(
    "header, message",
    [
        ({"format": 1}, "does not say which network"),
        ({"format": 1, "network": ["tiny"]}, "does not say which network"),
        ({"format": 1, "network": MICRO | {"colour": 3}}, "does not say which network"),
        ({"format": 1, "network": MICRO | {"size": "64"}}, "does not say which network"),
        ({"format": 1, "network": MICRO | {"size": 65}}, "describes a network that cannot be built"),
        ({"format": 1, "network": MICRO | {"sam2": "huge"}}, "does not say which network"),
        ({"format": 1, "network": MICRO | {"aux": 5}}, "does not say which network"),
        ({"format": 4, "network": MICRO}, "has format 4"),
        ({"format": 2, "network": MICRO, "encoders": {"hiera_path": "x.pt"}}, "does not say which encoders"),
    ],
)
def test_a_header_that_makes_no_sense_is_named(header, message, micro_model, tmp_path):
    torch.save(header | {"state_dict": micro_model.state_dict()}, tmp_path / "SAM2-UNeXT-1.pth")
    with pytest.raises(ValueError, match=f"SAM2-UNeXT-1.pth: .*{message}"):
        SAM2UNeXT.from_checkpoint(tmp_path / "SAM2-UNeXT-1.pth")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_of_the_original_tells_its_network_by_its_shapes(prefix, small_model, tmp_path):
    path = tmp_path / "SAM2-UNeXT-20.pth"
    torch.save({prefix + key: value for key, value in small_model.state_dict().items()}, path)
    network, state, _ = checkpoint.read_network(path)
    assert network == {"sam2": "tiny", "aux": "vit_small_patch14_dinov2", "aux_size": 56}
    assert state.keys() == small_model.state_dict().keys()


def test_the_original_full_size_network_is_told_by_its_shapes(tmp_path):
    shapes = golden("sam2unext_large.keys.json")
    torch.save({key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}, tmp_path / "SAM2-UNeXT-20.pth")
    network, *_ = checkpoint.read_network(tmp_path / "SAM2-UNeXT-20.pth")
    assert network == {"sam2": "large", "aux": "vit_large_patch14_dinov2", "aux_size": 448}


def test_a_checkpoint_that_lacks_a_tensor_is_refused(small_model, tmp_path):
    state = dict(small_model.state_dict())
    del state["head.bias"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="part.pth: does not fit the network: lacks head.bias"):
        SAM2UNeXT.from_checkpoint(tmp_path / "part.pth")


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "SAM2-UNeXT-5.pth"
    checkpoint.save(path, {"a": torch.ones(3)})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoint.save(path, {"a": torch.zeros(3), "b": lambda: None})
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="SAM2-UNeXT-5.pth: cannot be written: .*No space left"):
        checkpoint.save(path, {"a": torch.zeros(3)})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(3))


@pytest.fixture(scope="module")
def model(encoders):
    torch.manual_seed(3)
    model = SAM2UNeXT(*encoders.values(), **MICRO)
    model.up1.conv.double_conv[1].running_mean.fill_(0.5)  # as training would leave it
    return model.eval()


@pytest.fixture(scope="module")
def small(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "SAM2-UNeXT-7.pth"
    checkpoint.save_network(path, model, epoch=7)
    return path


def same(one: SAM2UNeXT, other: SAM2UNeXT) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def convert(source, output, to, *more):
    words = [str(source), str(output), "--to", to, *map(str, more)]
    convert_checkpoint.main(convert_checkpoint.get_args_parser().parse_args(words))
    return output


def test_with_encoders_from_files_only_what_was_trained_is_saved(small, model, encoders):
    content = torch.load(small, weights_only=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    buffers = {key for key in model.state_dict() if key.startswith("up") and key not in trained}
    assert content["state_dict"].keys() == trained | buffers
    assert len(buffers) == 24  # three of each of the decoder's eight BatchNorms
    assert (content["format"], content["network"], content["epoch"]) == (3, MICRO, 7)
    names = {"hiera_path": "sam2_hiera_micro.pt", "dinov2_path": MICRO["aux"]}
    for option, record in content["encoders"].items():
        assert (record["name"], record["path"]) == (names[option], str(encoders[option]))


def test_a_small_checkpoint_brings_back_the_same_network(small, model):
    again = SAM2UNeXT.from_checkpoint(small)
    assert same(again, model) and again.encoders == model.encoders and not again.training


@pytest.mark.parametrize("random", ["hiera_path", "dinov2_path"])
def test_with_a_random_encoder_the_file_is_whole(random, encoders, tmp_path):
    paths = encoders | {random: None}
    model = SAM2UNeXT(*paths.values(), **MICRO).eval()
    checkpoint.save_network(tmp_path / "whole.pth", model, epoch=1)
    assert same(SAM2UNeXT.from_checkpoint(tmp_path / "whole.pth"), model)


def test_a_whole_file_of_the_first_format_is_read(model, tmp_path):
    old = {"format": 1, "network": MICRO, "epoch": 1, "state_dict": model.state_dict()}
    torch.save(old, tmp_path / "old.pth")
    assert same(SAM2UNeXT.from_checkpoint(tmp_path / "old.pth"), model)


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


def other_weights(encoders, path):
    """A SAM 2 file whose trunk differs in one matrix."""
    state = torch.load(encoders["hiera_path"])
    state["model"][weights.TRUNK + "blocks.3.mlp.layers.1.weight"].mul_(1.01)
    torch.save(state, path)
    return path


def test_encoders_elsewhere_are_asked_for_and_nothing_is_created(small, tmp_path, monkeypatch):
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


def test_the_published_address_is_named_and_followed_when_asked(small, encoders, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setitem(weights.PUBLISHED, "sam2_hiera_micro.pt", "https://host/sam2_hiera_micro.pt")
    path = moved(small, tmp_path / "mine")
    with pytest.raises(OSError, match="--download fetches it from https://host/sam2_hiera_micro.pt to .*/weights, or"):
        SAM2UNeXT.from_checkpoint(path)
    monkeypatch.setattr(weights, "download", lambda url, folder: shutil.copy(encoders["hiera_path"], tmp_path / "x"))
    model = SAM2UNeXT.from_checkpoint(path, dinov2_path=encoders["dinov2_path"], download=True)
    assert model.encoders["hiera_path"]["path"] == str(tmp_path / "weights/sam2_hiera_micro.pt")


@pytest.mark.parametrize("place", ["weights", "mine"])
def test_encoders_are_found_in_weights_and_beside_the_checkpoint(place, small, model, encoders, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "weights")
    path = moved(small, tmp_path / "mine")
    (tmp_path / place).mkdir(exist_ok=True)
    for file in encoders.values():
        shutil.copy(file, tmp_path / place)
    assert same(SAM2UNeXT.from_checkpoint(path), model)


def test_the_fingerprint_decides_between_files_of_one_name(small, model, encoders, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "weights")
    (tmp_path / "weights").mkdir()
    other = other_weights(encoders, tmp_path / "weights" / "sam2_hiera_micro.pt")
    path = moved(small, tmp_path / "mine")
    shutil.copy(encoders["dinov2_path"], tmp_path / "mine")
    with pytest.raises(
        ValueError, match=f"was not trained with {other}; give sam2_hiera_micro.pt with the fingerprint"
    ):
        SAM2UNeXT.from_checkpoint(path)
    shutil.copy(encoders["hiera_path"], tmp_path / "mine")
    assert same(SAM2UNeXT.from_checkpoint(path), model)


def test_encoders_may_be_named_in_another_container(small, model, encoders, tmp_path):
    state = {k: v.contiguous() for k, v in torch.load(encoders["hiera_path"])["model"].items()}
    safetensors.torch.save_file(state, tmp_path / "trunk.safetensors")
    torch.save({"state_dict": safetensors.torch.load_file(encoders["dinov2_path"])}, tmp_path / "aux.pth")
    path = moved(small, tmp_path)
    assert same(SAM2UNeXT.from_checkpoint(path, tmp_path / "trunk.safetensors", tmp_path / "aux.pth"), model)


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


def with_path(place, key):
    """Changes a record to one with `place` as its path, in the third format ("path") or the second ("source")."""
    return lambda old: {"fingerprint": old["fingerprint"], key: place} | ({"name": "x"} if key == "path" else {})


@pytest.mark.parametrize("key", ["path", "source"])
def test_a_header_never_makes_the_program_ask_a_server(key, small, requests, tmp_path):
    found, url = requests
    path = changed(small, tmp_path / "x.pth", with_path(f"{url}/sam2_hiera_micro.pt", key))
    for download in (False, True):
        with pytest.raises(OSError, match="needs its encoder sam2_hiera_micro.pt"):
            SAM2UNeXT.from_checkpoint(path, download=download)
    assert found == []


@pytest.mark.parametrize("key", ["path", "source"])
def test_a_header_creates_no_folder(key, small, requests, tmp_path, monkeypatch):
    found, url = requests
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(weights.PUBLISHED, "sam2_hiera_micro.pt", f"{url}/sam2_hiera_micro.pt")
    path = changed(small, tmp_path / "x.pth", with_path("elsewhere/weights/sam2_hiera_micro.pt", key))
    with pytest.raises(OSError, match="needs its encoder"):
        SAM2UNeXT.from_checkpoint(path)
    assert tree(tmp_path) == [str(path)] and found == []


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


@pytest.mark.parametrize("aux", ["../../passwd", "/etc/passwd", "a/b", "", "none/..", "hub:user/model"])
def test_a_header_cannot_name_a_path_as_its_network(aux, micro_model, tmp_path):
    header = {"format": 3, "network": MICRO | {"aux": aux}, "encoders": {}}
    torch.save(header | {"state_dict": micro_model.state_dict()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth: its header does not say which network"):
        SAM2UNeXT.from_checkpoint(tmp_path / "x.pth")


def test_headers_of_the_second_format_are_read(small, model, tmp_path):
    content = torch.load(small, weights_only=True) | {"format": 2}
    for record in content["encoders"].values():
        record["source"] = record.pop("path")
        del record["name"]
    torch.save(content, tmp_path / "old.pth")
    assert same(SAM2UNeXT.from_checkpoint(tmp_path / "old.pth"), model)


def test_another_encoder_is_refused(small, encoders, tmp_path):
    path = other_weights(encoders, tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match=f"7.pth: was not trained with {path}; give sam2_hiera_micro.pt with the finger"
    ):
        SAM2UNeXT.from_checkpoint(small, path)
    aux = aux_file(tmp_path / "aux.safetensors", MICRO["aux"], 96)  # differs in the position embedding alone
    assert SAM2UNeXT.from_checkpoint(small, None, aux)
    with pytest.raises(ValueError, match="7.pth: its encoders make a network that cannot be built: .* size small"):
        SAM2UNeXT.from_checkpoint(small, sam2_file(tmp_path / "small.pt", "small"))


def test_the_encoders_of_a_whole_file_are_its_own(small, encoders, tmp_path):
    whole = convert(small, tmp_path / "whole.pth", "whole")
    assert checkpoint.is_small(SAM2UNeXT.from_checkpoint(whole, *encoders.values()))
    with pytest.raises(ValueError, match="whole.pth: was not trained with .*; it holds its encoders itself"):
        SAM2UNeXT.from_checkpoint(whole, other_weights(encoders, tmp_path / "other.pt"), encoders["dinov2_path"])


@pytest.mark.parametrize("kind", ["small", "whole"])
def test_in_bf16_the_frozen_matrices_are_converted_as_they_are_read(kind, small, model, tmp_path):
    path = small if kind == "small" else convert(small, tmp_path / "whole.pth", "whole")
    again = SAM2UNeXT.from_checkpoint(path, precision=torch.bfloat16)
    assert again.precision == torch.bfloat16
    assert same(again, copy.deepcopy(model).set_precision(torch.bfloat16))
    if kind == "small":
        checkpoint.save_network(tmp_path / "again.pth", again, epoch=7)
        assert torch.load(tmp_path / "again.pth")["encoders"] == torch.load(small)["encoders"]


def test_a_small_file_that_lacks_a_tensor_is_refused(small, tmp_path):
    content = torch.load(small, weights_only=True)
    del content["state_dict"]["up1.conv.double_conv.1.running_mean"]
    torch.save(content, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="part.pth: does not fit the network: lacks up1.conv"):
        SAM2UNeXT.from_checkpoint(tmp_path / "part.pth")


def test_small_to_whole_to_original_to_small_is_the_same_network(small, model, encoders, tmp_path, capsys):
    whole = convert(small, tmp_path / "new" / "whole.pth", "whole")
    original = convert(whole, tmp_path / "original.pth", "original")
    assert "original.pth: " in capsys.readouterr().out
    shutil.move(encoders["hiera_path"], tmp_path / "away")
    try:  # neither needs the encoders' files
        assert same(SAM2UNeXT.from_checkpoint(whole), model)
        bare = torch.load(original, weights_only=True)
    finally:
        shutil.move(tmp_path / "away", encoders["hiera_path"])
    assert bare.keys() == model.state_dict().keys()
    assert all(torch.equal(value, bare[key]) for key, value in model.state_dict().items())
    options = (f"--{option}={path}" for option, path in encoders.items())
    again = convert(whole, tmp_path / "small.pth", "small", *options)
    assert again.stat().st_size == pytest.approx(small.stat().st_size, rel=1e-3)
    assert same(SAM2UNeXT.from_checkpoint(again), model)
    assert torch.load(again)["epoch"] == 7


def test_what_cannot_be_converted_is_one_line(small, tmp_path, capsys):
    def fails(*words):
        args = convert_checkpoint.get_args_parser().parse_args([str(word) for word in words])
        return failure(convert_checkpoint.main, args, capsys)

    whole = convert(small, tmp_path / "whole.pth", "whole")
    capsys.readouterr()
    status, line = fails(whole, tmp_path / "out.pth", "--to", "small")
    assert status == 2 and "name its encoders' files with --hiera_path and --dinov2_path" in line
    status, line = fails(whole, whole, "--to", "original")
    assert status == 2 and "is also the input" in line


def test_a_fingerprint_looks_at_every_matrix(model):
    state = model.dino.state_dict()
    before = weights.fingerprint(state)
    for key, weight in state.items():
        if weight.ndim > 1 and "pos_embed" not in key and "token" not in key:
            assert weights.fingerprint(state | {key: weight * 1.01}) != before, key
    assert weights.fingerprint(dict(state)) == before
