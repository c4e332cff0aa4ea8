"""weights.py: files of weights are found, downloaded, checked and loaded (damaged ones: test_bad_weights.py)."""

import errno
import http.server
import shutil
import threading

import pytest
import recipe
import safetensors.torch
import torch
from conftest import SMALL, aux_file, golden, parameter, relative_error, sam2_file, train_arguments

import train
from sam2.build_sam import build_sam2_trunk
from SAM2UNeXT import SAM2UNeXT, build_aux
from unext import download, weights

SAM2_1_KEYS = {"no_obj_embed_spatial": [1, 64], "obj_ptr_tpos_proj.weight": [64, 256], "obj_ptr_tpos_proj.bias": [64]}


@pytest.fixture(scope="module")
def sam2_tiny(tmp_path_factory):
    return sam2_file(tmp_path_factory.mktemp("sam2") / "sam2_hiera_tiny.pt")


@pytest.fixture(scope="module")
def dinov2_small(tmp_path_factory):
    return aux_file(tmp_path_factory.mktemp("dinov2") / "model.safetensors")


def test_sam2_fills_the_trunk(sam2_tiny):
    trunk = build_sam2_trunk("tiny")
    weights.load_sam2(trunk, sam2_tiny)
    for key, value in trunk.state_dict().items():
        assert torch.equal(value, parameter(weights.TRUNK + key, value.shape))


@pytest.mark.parametrize("size", ["small", "base_plus", "large"])
def test_another_trunk_size_is_named_with_the_remedy(size, tmp_path):
    path = sam2_file(tmp_path / "weights.pt", size)
    with pytest.raises(ValueError, match=f"is a SAM 2 checkpoint of size {size}.*tiny.pt; or give --sam2 {size}"):
        weights.load_sam2(build_sam2_trunk("tiny"), path)


def test_sam2_1_is_refused_unless_allowed(tmp_path):
    path = sam2_file(tmp_path / "sam2.1_hiera_tiny.pt", extra=SAM2_1_KEYS)
    trunk = build_sam2_trunk("tiny")
    with pytest.raises(ValueError, match="SAM 2.1 .*--allow_sam2_1"):
        weights.load_sam2(trunk, path)
    weights.load_sam2(trunk, path, allow_sam2_1=True)
    assert trunk.pos_embed.any()


def test_a_trained_checkpoint_is_not_an_encoder(micro_checkpoint):
    with pytest.raises(
        ValueError, match="is a trained SAM2-UNeXT checkpoint, which goes to test.py --checkpoint.*sam2_hiera_tiny"
    ):
        weights.load_sam2(build_sam2_trunk("tiny"), micro_checkpoint)
    with pytest.raises(ValueError, match="is a trained SAM2-UNeXT checkpoint"):
        weights.load_aux(build_aux(SMALL["aux"], 56).model, SMALL["aux"], micro_checkpoint)


def test_encoders_in_each_others_place_are_named(sam2_tiny, dinov2_small):
    with pytest.raises(ValueError, match="is the DINOv2 vit_small.*SAM 2's sam2_hiera_tiny.pt belongs here"):
        weights.load_sam2(build_sam2_trunk("tiny"), dinov2_small)
    with pytest.raises(ValueError, match="is a SAM 2 checkpoint of size tiny; the weights of timm's vit_small"):
        weights.load_aux(build_aux(SMALL["aux"], 56).model, SMALL["aux"], sam2_tiny)


def test_dinov2_is_resampled_to_the_size_that_the_network_is_built_for(dinov2_small):
    net = build_aux(SMALL["aux"], 112).model
    weights.load_aux(net, SMALL["aux"], dinov2_small)
    assert net.pos_embed.shape == (1, 8 * 8 + 1, 384)
    key = "blocks.5.mlp.fc1.weight"
    assert torch.equal(net.state_dict()[key], parameter(key, (1536, 384)))


@pytest.mark.slow
def test_dinov2_large_loads_as_in_the_original(tmp_path):
    expected, path = golden("dinov2_loading.npz"), tmp_path / "model.safetensors"
    shapes = golden("vit_large_patch14_dinov2.keys.json")
    tensors = {key: parameter(key, shape, 5) for key, shape in shapes.items()}
    safetensors.torch.save_file(tensors, path)
    del tensors
    with torch.device("meta"):
        aux = build_aux("vit_large_patch14_dinov2", 448)
    aux = aux.to_empty(device="cpu").eval()
    weights.load_aux(aux.model, "vit_large_patch14_dinov2", path)
    path.unlink()
    assert relative_error(aux.state_dict()["model.pos_embed"][0, ::5, ::16], expected["pos_embed"]) < 1e-4
    with torch.no_grad():
        features = aux(recipe.image("dinoload", (1, 3, 448, 448), 5))[-1]
    assert relative_error(features[0, ::13, ::2, ::2], expected["features"]) < 1e-4


@pytest.mark.parametrize(
    "name", [pytest.param("vit_base_patch14_dinov2", marks=pytest.mark.slow), "vit_small_patch14_reg4_dinov2"]
)
def test_another_dinov2_is_named_with_the_remedy(name, tmp_path):
    path = aux_file(tmp_path / "model.safetensors", name, image_size=56)
    with pytest.raises(ValueError, match=f"is the DINOv2 {name}; give --aux {name} or vit_small_patch14_dinov2's"):
        weights.load_aux(build_aux(SMALL["aux"], 56).model, SMALL["aux"], path)


@pytest.mark.parametrize(
    "name, size, key",
    [
        ("resnet10t", 64, "conv1.0.weight"),
        ("mobilenetv3_small_050", 64, "conv_stem.weight"),
        ("deit_tiny_distilled_patch16_224", 224, "blocks.3.attn.qkv.weight"),
        ("vit_tiny_patch16_224.augreg_in21k", 224, "blocks.3.attn.qkv.weight"),
    ],
)
def test_published_weights_of_other_auxiliary_encoders_load(name, size, key, tmp_path):
    """A published file holds a classifier too."""
    import timm

    torch.save(recipe.fill(timm.create_model(name, pretrained=False), 1).state_dict(), tmp_path / "aux.pth")
    model = SAM2UNeXT(None, tmp_path / "aux.pth", sam2="tiny", aux=name, aux_size=size)
    weight = model.dino.model.state_dict()[key]
    assert torch.equal(weight, parameter(key, weight.shape, 1))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("page.pt", b"\n<!DOCTYPE html><html>404</html>", "is a web page.*download"),
        ("empty.pt", b"", "is empty"),
        ("notes.pt", b"hello, these are no weights", "not weights"),
        ("broken.safetensors", b"\x40\x00\x00\x00\x00\x00\x00\x00{\"a\":", "is truncated, damaged"),
        ("zip.pt", b"PK\x03\x04 and nothing more", "is truncated, damaged"),
    ],
)  # fmt: skip
def test_files_without_weights_are_named_for_what_they_are(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        weights.read(tmp_path / name)


def test_large_files_are_mapped_into_memory(micro_checkpoint, monkeypatch):
    seen = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: seen.append(options) or load(*args, **options))
    weights.read(micro_checkpoint)
    assert seen[0]["mmap"] and seen[0]["weights_only"]


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
        server.port = server.server_port
        server.url = f"http://127.0.0.1:{server.port}"
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


def test_a_url_is_downloaded_once_and_shows_a_bar(server, capsys):
    for _ in range(2):
        assert torch.equal(weights.read(f"{server.url}/whole.pt")["a"], torch.ones(5))
    assert server.requests == ["/whole.pt"]
    assert "whole.pt" in capsys.readouterr().err


def test_the_same_path_on_two_hosts_is_two_files(server):
    weights.read(f"{server.url}/whole.pt")
    weights.read(f"http://localhost:{server.port}/whole.pt")
    assert server.requests == ["/whole.pt"] * 2


def test_a_broken_download_is_an_error_and_leaves_nothing(server, tmp_path):
    with pytest.raises(OSError, match="half.pt: cannot be downloaded"):
        weights.read(f"{server.url}/half.pt")
    with pytest.raises(OSError, match="none.pt: cannot be downloaded: .*404"):
        weights.read(f"{server.url}/none.pt")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_download_that_was_truncated_unnoticed_is_not_kept(server, tmp_path):
    with pytest.raises(ValueError, match="unannounced.pt: .*truncated, damaged.*next start downloads it again"):
        weights.read(f"{server.url}/unannounced.pt")
    assert not list((tmp_path / "cache").rglob("*.pt"))


def test_a_silent_server_is_abandoned(server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    with pytest.raises(OSError, match="silent.pt: cannot be downloaded: .*timed out"):
        weights.read(f"{server.url}/silent.pt")


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


def test_published_weights_that_cannot_be_downloaded_leave_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setitem(download.PUBLISHED, "sam2_hiera_large.pt", f"{server.url}/half.pt")
    with pytest.raises(OSError, match="half.pt: cannot be downloaded: .* and save it as .*weights/sam2_hiera_large.pt"):
        download.fetch_published(tmp_path / "weights" / "sam2_hiera_large.pt")
    assert not [path for path in (tmp_path / "weights").rglob("*") if path.suffix != ".lock"]


@pytest.mark.posix
def test_a_file_system_without_locks_is_downloaded_to(server, tmp_path, monkeypatch):
    def lock(*args, **options):
        raise OSError(errno.ENOTSUP, "not supported")

    for name in ("fcntl.flock", "portalocker.Lock.acquire"):  # filelock's and iopath's
        monkeypatch.setattr(name, lock)
    assert torch.equal(weights.read(f"{server.url}/whole.pt")["a"], torch.ones(5))
