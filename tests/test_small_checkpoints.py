"""Checkpoints that hold only what was trained, and their way into the other kinds and back."""

import shutil

import pytest
import safetensors.torch
import torch
from conftest import TINY, dinov2_file, failure, sam2_file

import checkpoint
from SAM2UNeXT import SAM2UNeXT
from tools import convert_checkpoint

PICTURE = torch.linspace(-2, 2, 3 * 64 * 64).view(1, 3, 64, 64)


@pytest.fixture(scope="module")
def model(encoders):
    torch.manual_seed(3)
    model = SAM2UNeXT(*encoders.values(), **TINY)
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
    assert (content["format"], content["network"], content["epoch"]) == (2, TINY, 7)
    assert {option: record["source"] for option, record in content["encoders"].items()} == {
        option: str(path) for option, path in encoders.items()
    }


def test_a_small_checkpoint_brings_back_the_same_network(small, model):
    again = SAM2UNeXT.from_checkpoint(small)
    assert same(again, model) and again.encoders == model.encoders and not again.training


@pytest.mark.parametrize("random", ["hiera_path", "dinov2_path"])
def test_with_a_random_encoder_the_file_is_whole(random, encoders, tmp_path):
    paths = encoders | {random: None}
    model = SAM2UNeXT(*paths.values(), **TINY).eval()
    checkpoint.save_network(tmp_path / "whole.pth", model, epoch=1)
    assert same(SAM2UNeXT.from_checkpoint(tmp_path / "whole.pth"), model)


def test_a_whole_file_of_the_first_format_is_read(model, tmp_path):
    old = {"format": 1, "network": TINY, "epoch": 1, "state_dict": model.state_dict()}
    torch.save(old, tmp_path / "old.pth")
    assert same(SAM2UNeXT.from_checkpoint(tmp_path / "old.pth"), model)


def test_encoders_that_moved_are_named_and_may_lie_elsewhere_in_another_container(small, model, encoders, tmp_path):
    content = torch.load(small, weights_only=True)
    for record in content["encoders"].values():
        record["source"] = record["source"].replace("encoders", "nowhere")
    moved = tmp_path / "SAM2-UNeXT-7.pth"
    torch.save(content, moved)
    with pytest.raises(OSError, match="nowhere.*sam2_hiera_tiny.pt: there is no such file; .*--hiera_path"):
        SAM2UNeXT.from_checkpoint(moved)
    hiera = tmp_path / "trunk.safetensors"
    safetensors.torch.save_file(
        {k: v.contiguous() for k, v in torch.load(encoders["hiera_path"])["model"].items() if "trunk" in k}, hiera
    )
    aux = tmp_path / "aux.pth"
    torch.save({"state_dict": safetensors.torch.load_file(encoders["dinov2_path"])}, aux)
    assert same(SAM2UNeXT.from_checkpoint(moved, hiera, aux), model)


def other_trunk(folder, encoders):
    state = torch.load(encoders["hiera_path"])
    state["model"][checkpoint.TRUNK + "blocks.5.mlp.layers.1.weight"].mul_(1.01)
    torch.save(state, folder / "other.pt")
    return folder / "other.pt"


def test_another_encoder_is_refused(small, encoders, tmp_path):
    path = other_trunk(tmp_path, encoders)
    with pytest.raises(ValueError, match=f"another encoder than --hiera_path {path}; give {encoders['hiera_path']}"):
        SAM2UNeXT.from_checkpoint(small, path)
    aux = dinov2_file(tmp_path / "aux.safetensors", "vit_tiny_patch16_224", 96)  # resampled: the same but for positions
    assert SAM2UNeXT.from_checkpoint(small, None, aux)
    with pytest.raises(ValueError, match="7.pth: its encoders make no network.* size small"):
        SAM2UNeXT.from_checkpoint(small, sam2_file(tmp_path / "small.pt", "small"))


def test_the_encoders_of_a_whole_file_are_its_own(small, encoders, tmp_path):
    whole = convert(small, tmp_path / "whole.pth", "whole")
    assert SAM2UNeXT.from_checkpoint(whole, *encoders.values()).encoders
    with pytest.raises(ValueError, match="whole.pth: was trained with another encoder.*holds its encoders itself"):
        SAM2UNeXT.from_checkpoint(whole, other_trunk(tmp_path, encoders), encoders["dinov2_path"])


def test_a_url_is_recorded_as_it_is():
    url = "https://dl.fbaipublicfiles.com/sam2_hiera_tiny.pt"
    assert checkpoint.location(url) == url
    assert checkpoint.location("weights/x.pt").startswith("/")


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
    assert status == 2 and "is the input too" in line


def test_a_fingerprint_looks_at_every_matrix(model):
    before = model.fingerprints()
    for name, weight in (*model.sam.named_parameters(), *model.dino.named_parameters()):
        if not weight.requires_grad and weight.ndim > 1 and "pos_embed" not in name and "token" not in name:
            kept = weight.clone()
            weight.mul_(1.01)
            assert model.fingerprints() != before, name
            weight.copy_(kept)
    assert model.fingerprints() == before
