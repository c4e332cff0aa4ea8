"""Checkpoints as folders and on Hugging Face's hub, for which a server on localhost stands in."""

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from conftest import MICRO, ROOT, failure, predict_arguments, read_maps, same_network
from safetensors.torch import load_file

import test
from evaluation import metrics
from SAM2UNeXT import SAM2UNeXT
from tools import convert_checkpoint
from unext import checkpoint, download


def test_a_folder_holds_what_was_trained_and_restores_the_network(model, encoders, tmp_path):
    model.save_pretrained(tmp_path / "hub")
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert load_file(tmp_path / "hub/model.safetensors").keys() == checkpoint.trained_state(model).keys()
    header = json.loads((tmp_path / "hub/config.json").read_text())
    assert header["config"] == MICRO and str(encoders["hiera_path"].parent) not in json.dumps(header)
    assert same_network(SAM2UNeXT.from_pretrained(tmp_path / "hub", **encoders), model)
    for option, path in encoders.items():  # found beside the files
        (tmp_path / "hub" / checkpoint.encoder_files(MICRO)[option]).symlink_to(path)
    again = SAM2UNeXT.from_pretrained(tmp_path / "hub", precision=torch.bfloat16)
    assert again.precision == torch.bfloat16 and not again.training


def test_a_network_with_random_encoders_is_whole_on_the_hub_too(micro_model, tmp_path):
    micro_model.save_pretrained(tmp_path)
    assert same_network(SAM2UNeXT.from_pretrained(tmp_path), micro_model)
    card = (tmp_path / "README.md").read_text()
    assert "its encoders included" in card and "download" not in card and "Results" not in card


def test_test_py_takes_a_folder(micro_model, micro_checkpoint, toy, tmp_path):
    micro_model.save_pretrained(tmp_path / "hub")
    for source, name in ((tmp_path / "hub", "folder"), (micro_checkpoint, "file")):
        test.main(predict_arguments(source, toy / "test/Image", tmp_path / name))
    ours, theirs = read_maps(tmp_path / "folder"), read_maps(tmp_path / "file")
    assert len(ours) == 4 and all((ours[name] == theirs[name]).all() for name in theirs)


def convert(*words):
    convert_checkpoint.main(convert_checkpoint.get_args_parser().parse_args([str(word) for word in words]))


@pytest.fixture
def results(tmp_path):
    """A folder of eval.py's results."""
    (tmp_path / "results").mkdir()
    row = {"images": 2291} | dict.fromkeys(metrics.NINE, 0.12345) | {"HCE": 1000}
    (tmp_path / "results/results.json").write_text(json.dumps({"CAMO": row, "NC4K": row | {"MAE": 0.5}}))
    return tmp_path / "results"


def test_a_checkpoint_is_converted_into_a_folder_with_a_model_card_and_back(
    model, encoders, results, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(download.PUBLISHED, "sam2_hiera_micro.pt", "https://host/micro.pt")
    checkpoint.save_network(tmp_path / "SAM2-UNeXT-7.pth", model, epoch=7)
    convert(tmp_path / "SAM2-UNeXT-7.pth", tmp_path / "hub", "--to", "hub", "--results", results)
    assert "hf upload" in capsys.readouterr().out
    card = (tmp_path / "hub/README.md").read_text()
    assert "license: apache-2.0" in card and 'from_pretrained("user/model", download=True)' in card
    assert "own, [sam2_hiera_micro.pt](https://host/micro.pt) and test_vit.safetensors; with `download" in card
    assert "Evaluated on CAMO, NC4K:" in card and "trained on" not in card
    assert card.splitlines()[-4:] == [
        f"| | images | {' | '.join(metrics.NINE)} |",
        f"|---|{10 * '---:|'}",
        f"| CAMO | 2291 |{9 * ' 0.123 |'}",
        f"| NC4K | 2291 |{8 * ' 0.123 |'} 0.500 |",
    ]
    paths = [word for option, path in encoders.items() for word in (f"--{option}", path)]
    convert(tmp_path / "hub", tmp_path / "again.pth", "--to", "small", *paths)
    assert same_network(SAM2UNeXT.from_checkpoint(tmp_path / "again.pth"), model)


def test_results_that_are_not_of_one_network_are_refused(micro_checkpoint, results, tmp_path, capsys):
    for content, message in (('{"ours": {"CAMO": {}}}', "has several methods"), ("{", "is not a folder of eval.py's")):
        (results / "results.json").write_text(content)
        words = [micro_checkpoint, tmp_path / "hub", "--to", "hub", "--results", results]
        args = convert_checkpoint.get_args_parser().parse_args([str(word) for word in words])
        status, line = failure(convert_checkpoint.main, args, capsys)
        assert status == 2 and f"--results {results}: {message}" in line and not (tmp_path / "hub").exists()


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, r"config\.json: cannot be read: No such file or directory; a folder needs config.json and model.safetens"),
        ({"config.json": "{"}, r"config\.json: is not JSON"),
        ({"config.json": "[]"}, r"config\.json: is not the header of"),
        ({"config.json": '{"a": 1}'}, r"config\.json: is not the header of"),
        ({"config.json": '{"format": 1}'}, r"model\.safetensors: there is no such file"),
        ({"config.json": '{"format": 1}', "model.safetensors": "x"}, r"model\.safetensors: is truncated, damaged"),
    ],
)
def test_folders_without_a_checkpoint_are_named(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises((OSError, ValueError), match=message):
        SAM2UNeXT.from_checkpoint(tmp_path)


class StandIn(http.server.BaseHTTPRequestHandler):
    """The part of the hub that uploads and downloads small files."""

    protocol_version = "HTTP/1.1"

    def answer(self, content: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        self.server.requests.append(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            url = f"http://{self.headers['Host']}/user/model"
            return self.answer(json.dumps({"url": url, "name": "user/model"}).encode())
        if "/preupload/" in self.path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self.answer(json.dumps({"files": files}).encode())
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/user/model/commit/{'0' * 40}"
            return self.answer(json.dumps({"commitUrl": url, "commitOid": "0" * 40}).encode())
        return self.answer(b"{}")

    def do_GET(self):
        self.server.requests.append(self.path)
        content = self.server.files.get(self.path.rpartition("/resolve/main/")[2])
        if content is None:
            return self.answer(b"{}", 200 if self.path.startswith("/api/") else 404)
        tag = hashlib.sha1(content).hexdigest()
        return self.answer(content, ETag=f'"{tag}"', X_Repo_Commit="0" * 40)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


SCRIPT = """
import sys
import micro, torch
from SAM2UNeXT import SAM2UNeXT
paths, target, actions = sys.argv[1:3], sys.argv[3], sys.argv[4:]
for action in actions:
    if action == "push":
        torch.manual_seed(3)
        model = SAM2UNeXT(*paths, sam2="micro", aux="test_vit", aux_size=64, size=64)
        model.push_to_hub("user/model")
    else:
        model = SAM2UNeXT.from_pretrained("user/model", hiera_path=paths[0], dinov2_path=paths[1])
    torch.save(model.state_dict(), f"{target}/{action}.pt")
"""


@pytest.fixture
def mirror(tmp_path):
    """The stand-in, its `files` and `requests`, and in `environment` what makes huggingface_hub ask it."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as server:
        server.requests, server.files = [], {}
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        server.environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_x"}
        server.environment |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        yield server
        server.shutdown()


FETCH = "from unext import download; download.fetch_published('weights/vit_small_patch14_dinov2.safetensors')"


def test_published_weights_come_from_a_mirror_of_the_hub_and_from_its_cache(mirror, tmp_path):
    def fetch(offline):
        environment = mirror.environment | {"HF_HUB_OFFLINE": offline}
        words = [sys.executable, "-c", FETCH]
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)

    weights = tmp_path / "weights/vit_small_patch14_dinov2.safetensors"
    mirror.files["model.safetensors"] = b"weights"
    error = fetch("1").stderr.splitlines()[-1]
    assert error.startswith("OSError: https://huggingface.co/timm/") and error.endswith(
        f"save it as {weights.relative_to(tmp_path)}"
    )
    for offline in ("0", "1"):
        result = fetch(offline)
        assert result.returncode == 0, result.stderr
        assert weights.read_bytes() == b"weights" and not weights.is_symlink()
        weights.unlink()
    assert "/timm/vit_small_patch14_dinov2.lvd142m/resolve/main/model.safetensors" in mirror.requests


@pytest.mark.slow
def test_a_network_is_pushed_to_the_hub_and_loaded_again_even_offline(mirror, encoders, tmp_path):
    command = [sys.executable, "-c", SCRIPT, *map(str, encoders.values()), str(tmp_path)]
    for actions, offline in ((["push", "pull"], "0"), (["pull_offline"], "1")):
        before = len(mirror.requests)
        environment = mirror.environment | {"HF_HUB_OFFLINE": offline}
        result = subprocess.run(command + actions, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert (len(mirror.requests) > before) == (offline == "0")
    assert any("/resolve/main/model.safetensors" in path for path in mirror.requests)
    states = [torch.load(tmp_path / f"{action}.pt") for action in ("push", "pull", "pull_offline")]
    assert sorted(mirror.files) == ["README.md", "config.json", "model.safetensors"]
    assert b'from_pretrained("user/model"' in mirror.files["README.md"]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(value, state[key]) for key, value in states[0].items())
