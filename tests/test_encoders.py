"""docs/training.md, Other encoders: files in timm's format are loaded, and found again by a checkpoint."""

import re

import pytest
import safetensors.torch
import timm
import torch
from conftest import ROOT, parameter, same_network

from SAM2UNeXT import SAM2UNeXT
from unext import checkpoint

AUX = {  # the smallest of each kind, sides of the input in pixels
    "vit_small_patch14_reg4_dinov2": 56,
    "vit_small_patch16_dinov3": 64,
    "convnext_tiny.dinov3_lvd1689m": 64,
}


@pytest.mark.parametrize("name", AUX)
def test_an_encoder_of_timms_serves_from_its_file(name, encoders, tmp_path):
    state = timm.create_model(name, num_classes=0).state_dict()
    state = {key: parameter(key, tensor.shape) for key, tensor in state.items()}
    safetensors.torch.save_file(state, tmp_path / f"{name}.safetensors")
    paths = (encoders["hiera_path"], tmp_path / f"{name}.safetensors")
    model = SAM2UNeXT(*paths, sam2="micro", aux=name, aux_size=AUX[name], size=64).eval()

    loaded = {key.removeprefix("model."): tensor for key, tensor in model.dino.state_dict().items()}
    assert {key.split(".")[-2] for key in state.keys() - loaded.keys()} <= {"norm"}  # after the last map
    assert loaded.keys() <= state.keys()
    resampled = {"pos_embed"}
    assert all(torch.equal(loaded[key], state[key]) for key in loaded.keys() - resampled)
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 64)).isfinite().all()

    checkpoint.save_network(tmp_path / "SAM2-UNeXT-1.pth", model, epoch=1)
    assert (tmp_path / "SAM2-UNeXT-1.pth").stat().st_size < sum(file.stat().st_size for file in paths)
    assert same_network(SAM2UNeXT.from_checkpoint(tmp_path / "SAM2-UNeXT-1.pth"), model)


def test_the_auxiliary_encoders_of_the_document_exist():
    text = (ROOT / "docs/training.md").read_text("utf-8")
    named = re.findall(r"--aux ([a-z]\w+(?:\.\w+)?)(?: --aux_size (\d+))?", text)
    assert len(named) >= 4
    for name, size in named:
        assert name == "none" or timm.is_model(name), name
        patch = re.search(r"patch(\d+)", name)
        assert not patch or int(size or 448) % int(patch[1]) == 0, name
