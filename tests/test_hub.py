"""Checkpoints as folders and on Hugging Face's hub, whose library is replaced here."""

import json
import shutil
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
from conftest import MICRO, arguments_of, failure, same_network
from safetensors.torch import load_file

from evaluation import metrics
from SAM2UNeXT import SAM2UNeXT
from tools import convert_checkpoint
from unext import checkpoint, download

FILES = ["README.md", "config.json", "model.safetensors"]


def test_a_folder_has_the_trained_tensors_and_restores_the_network(model, encoders, tmp_path):
    model.save_pretrained(tmp_path / "hub")
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == FILES
    assert load_file(tmp_path / "hub/model.safetensors").keys() == checkpoint.trained_state(model).keys()
    header = json.loads((tmp_path / "hub/config.json").read_text())
    assert header["config"] == MICRO and str(encoders["hiera_path"].parent) not in json.dumps(header)
    for option, path in encoders.items():  # found beside the files
        (tmp_path / "hub" / checkpoint.encoder_files(MICRO)[option]).symlink_to(path)
    assert same_network(SAM2UNeXT.from_pretrained(tmp_path / "hub"), model)


def test_a_folder_of_a_whole_network_is_a_checkpoint(micro_model, tmp_path):
    micro_model.save_pretrained(tmp_path / "hub")
    card = (tmp_path / "hub/README.md").read_text()
    assert "its encoders included" in card and "download" not in card and "Results" not in card
    assert same_network(SAM2UNeXT.from_checkpoint(tmp_path / "hub"), micro_model)


@pytest.fixture
def results(tmp_path):
    """A folder of eval.py's results."""
    (tmp_path / "results").mkdir()
    row = {"images": 2291} | dict.fromkeys(metrics.NINE, 0.12345) | {"HCE": 1000}
    (tmp_path / "results/results.json").write_text(json.dumps({"CAMO": row, "NC4K": row | {"MAE": 0.5}}))
    return tmp_path / "results"


def test_a_checkpoint_becomes_a_folder_with_a_card_and_back(model, encoders, results, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(download.PUBLISHED, "sam2_hiera_micro.pt", "https://host/micro.pt")
    checkpoint.save_network(tmp_path / "SAM2-UNeXT-7.pth", model, epoch=7)
    options = tmp_path / "SAM2-UNeXT-7.pth", tmp_path / "hub", "--to", "hub", "--results", results
    convert_checkpoint.main(arguments_of(convert_checkpoint, *options))
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
    options = tmp_path / "hub", tmp_path / "again.pth", "--to", "small", *(f"--{k}={v}" for k, v in encoders.items())
    convert_checkpoint.main(arguments_of(convert_checkpoint, *options))
    assert same_network(SAM2UNeXT.from_checkpoint(tmp_path / "again.pth"), model)


def test_an_encoder_in_the_folder_for_the_hub_is_not_replaced(model, encoders, tmp_path, capsys):
    encoder = Path(encoders["dinov2_path"]).rename(tmp_path / "model.safetensors")
    before = encoder.read_bytes()
    options = f"--hiera_path {encoders['hiera_path']} --dinov2_path {encoder}".split()
    checkpoint.save_network(tmp_path / "x.pth", model, epoch=7)
    try:
        args = arguments_of(convert_checkpoint, tmp_path / "x.pth", tmp_path, "--to", "hub", *options)
        status, line = failure(convert_checkpoint.main, args, capsys)
    finally:
        encoder.rename(encoders["dinov2_path"])
    assert status == 2 and f"{encoder}: is one of the inputs and would be replaced" in line
    assert Path(encoders["dinov2_path"]).read_bytes() == before


@pytest.mark.parametrize(
    "content, problem", [('{"ours": {"CAMO": {}}}', "has several methods"), ("{", "results.json is damaged")]
)
def test_results_that_a_card_cannot_show_are_refused(content, problem, micro_checkpoint, results, tmp_path, capsys):
    (results / "results.json").write_text(content)
    args = arguments_of(convert_checkpoint, micro_checkpoint, tmp_path / "hub", "--to", "hub", "--results", results)
    status, line = failure(convert_checkpoint.main, args, capsys)
    assert status == 2 and f"--results {results}: {problem}" in line and not (tmp_path / "hub").exists()


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, r"config\.json: there is no such file"),
        *(({"config.json": text}, r"config\.json: is not the header of") for text in ("{", "[]", '{"a": 1}')),
        ({"config.json": '{"format": 1}'}, r"model\.safetensors: there is no such file"),
        ({"config.json": '{"format": 1}', "model.safetensors": "x"}, r"model\.safetensors: is truncated, damaged"),
    ],
)
def test_folders_without_a_checkpoint_are_named(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises((OSError, ValueError), match=message):
        SAM2UNeXT.from_checkpoint(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The library, whose calls must have its signatures; with the folder that its hub is."""
    folder = tmp_path / "hub"
    api = mock.create_autospec(huggingface_hub.HfApi, instance=True)
    api.create_repo.side_effect = lambda repo_id, **options: mock.Mock(repo_id=repo_id)
    api.upload_folder.side_effect = lambda repo_id, folder_path, **options: shutil.copytree(folder_path, folder)
    fetch = mock.create_autospec(huggingface_hub.hf_hub_download)
    fetch.side_effect = lambda repo_id, filename, **options: str(folder / filename)
    monkeypatch.setattr(huggingface_hub, "HfApi", mock.Mock(return_value=api))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    return mock.Mock(folder=folder, api=api, fetch=fetch)


def test_a_network_is_pushed_to_the_hub_and_loaded_again(hub, model, encoders):
    model.push_to_hub("user/model", private=True, token="hf_x", commit_message="new")
    huggingface_hub.HfApi.assert_called_once_with(token="hf_x")
    hub.api.create_repo.assert_called_once_with("user/model", private=True, exist_ok=True)
    assert hub.api.upload_folder.call_args.kwargs["commit_message"] == "new"
    assert sorted(path.name for path in hub.folder.iterdir()) == FILES
    assert 'from_pretrained("user/model"' in (hub.folder / "README.md").read_text()
    assert same_network(SAM2UNeXT.from_pretrained("user/model", **encoders, revision="v1"), model)
    assert hub.fetch.call_args_list == [mock.call("user/model", name, revision="v1") for name in FILES[1:]]


def test_published_weights_come_from_the_hub_by_its_library(hub, tmp_path):
    hub.folder.mkdir()
    (hub.folder / "model.safetensors").write_bytes(b"weights")
    weights = tmp_path / "weights/vit_small_patch14_dinov2.safetensors"
    download.fetch_published(weights)
    assert weights.read_bytes() == b"weights" and not weights.is_symlink()
    place = {"repo_id": "timm/vit_small_patch14_dinov2.lvd142m", "revision": "main", "filename": "model.safetensors"}
    hub.fetch.assert_called_once_with(**place)
