"""weights.py, download.py: files of weights are downloaded, checked and loaded (damaged files: test_bad_weights.py)."""

import errno
import http.server
import shutil
import threading
from unittest import mock

import pytest
import recipe
import timm
import torch
from conftest import SMALL, golden, parameter, relative_error, sam2_file, train_arguments

import train
from sam2.build_sam import build_sam2_trunk
from SAM2UNeXT import SAM2UNeXT, build_aux
from unext import download, weights


def spread(shapes):
    """Tensors of these shapes, of a single number in memory."""
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


def test_a_published_sam2_file_loads_into_the_trunk(monkeypatch):
    trunk, state = build_sam2_trunk("tiny", device="meta"), spread(golden("sam2_hiera_tiny.keys.json"))
    state = {key: value + i if key.startswith(weights.TRUNK) else value for i, (key, value) in enumerate(state.items())}
    monkeypatch.setattr(weights, "read", lambda source: {"model": state})
    weights.load_sam2(trunk, __file__)
    assert all(torch.equal(value, state[weights.TRUNK + key]) for key, value in trunk.state_dict().items())


def test_sam2_1_is_refused_unless_allowed(toy, tmp_path):
    path = sam2_file(tmp_path / "sam2.1_hiera_micro.pt", "micro", {"no_obj_embed_spatial": [1, 64]})
    options = f"--hiera_path {path} --device cpu"
    with pytest.raises(ValueError, match="SAM 2.1 .*--allow_sam2_1"):
        train.build_model(train_arguments(options, toy, tmp_path))
    assert train.build_model(train_arguments(f"{options} --allow_sam2_1", toy, tmp_path)).sam.pos_embed.any()


@pytest.fixture(scope="module")
def contents(micro_model):
    """The content of a file of each kind: trained networks, trunks and auxiliary encoders."""
    sizes = ("tiny", "small", "base_plus", "large")
    names = ("vit_small_patch14_dinov2", "vit_base_patch14_dinov2", "vit_small_patch14_reg4_dinov2")
    with torch.device("meta"):
        aux = {name: timm.create_model(name, num_classes=0).state_dict() for name in names}
    return (
        {"trained": micro_model.state_dict()}
        | {size: {"model": spread(golden(f"sam2_hiera_{size}.keys.json"))} for size in sizes}
        | {name: spread({key: tensor.shape for key, tensor in state.items()}) for name, state in aux.items()}
    )


TRAINED = "is a trained SAM2-UNeXT checkpoint, which goes to test.py --checkpoint; "


@pytest.mark.parametrize(
    "encoder, kind, message",
    [
        ("sam2", "trained", TRAINED + "SAM 2's sam2_hiera_tiny.pt belongs here"),
        ("sam2", "small", "is a SAM 2 checkpoint of size small, but --sam2 tiny needs sam2_hiera_tiny.pt; or give"),
        ("sam2", "base_plus", "is a SAM 2 checkpoint of size base_plus, but .*; or give --sam2 base_plus"),
        ("sam2", "large", "is a SAM 2 checkpoint of size large, but .*; or give --sam2 large"),
        ("sam2", "vit_small_patch14_dinov2", "is the DINOv2 vit_small.*; SAM 2's sam2_hiera_tiny.pt belongs here"),
        ("aux", "trained", TRAINED + "the weights of timm's vit_small"),
        ("aux", "tiny", "is a SAM 2 checkpoint of size tiny; the weights of timm's vit_small"),
        ("aux", "vit_base_patch14_dinov2", "is the DINOv2 vit_base_patch14_dinov2; give --aux vit_base_patch14_dinov2"),
        ("aux", "vit_small_patch14_reg4_dinov2", "give --aux vit_small_patch14_reg4_dinov2 or vit_small_.*'s file"),
    ],
)
def test_a_file_of_another_kind_is_named_with_the_remedy(encoder, kind, message, contents, monkeypatch):
    monkeypatch.setattr(weights, "read", lambda source: contents[kind])
    with pytest.raises(ValueError, match=f"^x.pt: .*{message}"):
        if encoder == "sam2":
            weights.load_sam2(build_sam2_trunk("tiny", device="meta"), "x.pt")
        else:
            weights.load_aux(build_aux(SMALL["aux"], 56, device="meta").model, SMALL["aux"], "x.pt")


@pytest.mark.slow
def test_dinov2_large_loads_as_in_the_original(monkeypatch):
    expected, name = golden("dinov2_loading.npz"), "vit_large_patch14_dinov2"
    tensors = {key: parameter(key, shape, 5) for key, shape in golden(f"{name}.keys.json").items()}
    monkeypatch.setattr(weights, "read", lambda source: tensors)
    aux = build_aux(name, 448, device="meta").eval()
    weights.load_aux(aux.model, name, __file__)
    assert relative_error(aux.state_dict()["model.pos_embed"][0, ::5, ::16], expected["pos_embed"]) < 1e-4
    with torch.no_grad():
        features = aux(recipe.image("dinoload", (1, 3, 448, 448), 5))[-1]
    assert relative_error(features[0, ::13, ::2, ::2], expected["features"]) < 1e-4


@pytest.mark.parametrize(
    "name, size, key",
    [
        ("mobilenetv3_small_050", 64, "conv_stem.weight"),
        ("vit_tiny_patch16_224.augreg_in21k", 224, "blocks.3.attn.qkv.weight"),
    ],
)
def test_published_weights_of_other_auxiliary_encoders_load(name, size, key, monkeypatch):
    """A published file has a classifier too."""
    state = recipe.fill(timm.create_model(name, pretrained=False), 1).state_dict()
    monkeypatch.setattr(weights, "read", lambda source: state)
    model = SAM2UNeXT(None, __file__, sam2="micro", aux=name, aux_size=size)
    weight = model.dino.model.state_dict()[key]
    assert torch.equal(weight, parameter(key, weight.shape, 1))


def test_files_are_mapped_into_memory_and_run_no_code(micro_checkpoint):
    with mock.patch.object(torch, "load", wraps=torch.load) as load:
        weights.read(micro_checkpoint)
    assert load.call_args.kwargs["mmap"] and load.call_args.kwargs["weights_only"]


@pytest.fixture
def server(monkeypatch, tmp_path):
    """An HTTP server on localhost; counts its requests.

    It has /whole.pt, /half.pt, which announces more than it sends, /unannounced.pt, which is as short and does not say
    so, and /silent.pt, of which nothing comes.
    """
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    torch.save({"a": torch.ones(5)}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            if self.path == "/silent.pt":
                return self.server.over.wait()
            if self.path not in ("/whole.pt", "/half.pt", "/unannounced.pt"):
                return self.send_error(404)
            self.send_response(200)
            if self.path != "/unannounced.pt":
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            return self.wfile.write(content if self.path == "/whole.pt" else content[: len(content) // 2])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.over = [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


def test_a_url_is_downloaded_once_and_shows_a_bar(server, capsys):
    for _ in range(2):
        assert torch.equal(weights.read(f"{server.url}/whole.pt")["a"], torch.ones(5))
    assert server.requests == ["/whole.pt"]
    assert "whole.pt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, message",
    [
        ("half.pt", "cannot be downloaded: .*; download it manually and save it as .*/half.pt"),
        ("missing.pt", "cannot be downloaded: .*404"),
        ("silent.pt", "cannot be downloaded: .*timed out"),
        ("unannounced.pt", "is truncated, damaged.*; download the file again"),
    ],
)
def test_a_broken_download_is_an_error_and_leaves_nothing(name, message, server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    with pytest.raises((OSError, ValueError), match=f"^{server.url}/{name}: {message}"):
        weights.read(f"{server.url}/{name}")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_published_weights_are_downloaded_into_weights_on_request_alone(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(download.PUBLISHED, "sam2_hiera_large.pt", f"{server.url}/whole.pt")
    path, elsewhere = tmp_path / "weights" / "sam2_hiera_large.pt", tmp_path / "sam2_hiera_large.pt"
    for missing in (path, download.fetch_published(elsewhere)):
        with pytest.raises(FileNotFoundError, match=f"{missing}: there is no such file .{server.url}/whole.pt.$"):
            weights.read(missing)
    assert not server.requests and not path.parent.exists()
    for _ in range(2):
        assert torch.equal(weights.read(download.fetch_published(path))["a"], torch.ones(5))
    assert server.requests == ["/whole.pt"] and f"{path} is missing; downloading" in capsys.readouterr().out
    assert [file.name for file in path.parent.iterdir() if file.suffix != ".lock"] == [path.name]


def test_train_py_downloads_published_weights(server, encoders, toy, tmp_path, monkeypatch):
    monkeypatch.setitem(download.PUBLISHED, "sam2_hiera_micro.pt", f"{server.url}/micro.pt")
    monkeypatch.setattr(download, "retrieve", lambda url, path: shutil.copy(encoders["hiera_path"], path))
    path = tmp_path / "weights" / "sam2_hiera_micro.pt"
    assert train.build_model(train_arguments(f"--hiera_path {path} --device cpu", toy, tmp_path)).encoders
    with pytest.raises(OSError, match=f"/sam2_hiera_micro.pt: there is no such file .{server.url}/micro.pt.$"):
        train.build_model(train_arguments(f"--hiera_path {tmp_path}/sam2_hiera_micro.pt", toy, tmp_path))


@pytest.mark.posix
def test_a_file_system_without_locks_is_downloaded_to(server, monkeypatch):
    def lock(*args, **options):
        raise OSError(errno.ENOTSUP, "not supported")

    for name in ("fcntl.flock", "portalocker.Lock.acquire"):  # filelock's and iopath's
        monkeypatch.setattr(name, lock)
    assert torch.equal(weights.read(f"{server.url}/whole.pt")["a"], torch.ones(5))
