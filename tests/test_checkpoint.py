"""checkpoint.py: kinds of trained checkpoints, their headers, and conversion between kinds."""

import copy
import shutil

import pytest
import torch
from conftest import MICRO, SMALL, aux_file, failure, golden, other_weights, sam2_file, same_network, train_arguments

import train
from SAM2UNeXT import SAM2UNeXT
from tools import convert_checkpoint
from unext import checkpoint, weights


def test_an_encoder_is_not_a_trained_checkpoint(encoders, tmp_path):
    with pytest.raises(ValueError, match="is a SAM 2 checkpoint of size micro; a trained checkpoint belongs here"):
        checkpoint.load(encoders["hiera_path"])
    with pytest.raises(ValueError, match="is the DINOv2 vit_small_patch14_dinov2; a trained checkpoint belongs here"):
        checkpoint.load(aux_file(tmp_path / "model.safetensors", image_size=56))


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.01])
def test_a_truncated_checkpoint_is_named(kept, micro_checkpoint, tmp_path):
    content = micro_checkpoint.read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="cut.pth: is truncated, damaged"):
        checkpoint.load(tmp_path / "cut.pth")


NONSENSE = [{"size": "64"}, {"size": 0}, {"size": 2**40}, {"aux_size": -1}, {"aux_size": 2**40}]
NONSENSE += [{"sam2": "huge"}, {"aux": 5}, {"aux": "../../passwd"}, {"aux": "/etc/passwd"}, {"aux": "a/b"}]
NONSENSE += [{"aux": ""}, {"aux": "none/.."}, {"aux": "hub:user/model"}]


@pytest.mark.parametrize(
    "header, message",
    [
        ({"format": 1}, "does not say which network"),
        ({"format": 1, "config": ["tiny"]}, "does not say which network"),
        ({"format": 1, "config": MICRO | {"size": 65}, "encoders": {}}, "describes a network that cannot be built"),
        ({"format": 2, "config": MICRO}, "has format 2, but this program reads 1"),
        ({"format": 1, "config": MICRO | {"width": 3}}, "has width, which this program does not know; update the pro"),
        ({"format": 1, "config": MICRO}, "does not say which encoders"),
        ({"format": 1, "config": MICRO, "encoders": {"hiera_path": "x.pt"}}, "does not say which encoders"),
        *(({"format": 1, "config": MICRO | change}, "does not say which network") for change in NONSENSE),
    ],
)
def test_a_nonsensical_header_is_named(header, message, micro_model, tmp_path):
    torch.save(header | {"state_dict": micro_model.state_dict()}, tmp_path / "SAM2-UNeXT-1.pth")
    with pytest.raises(ValueError, match=f"SAM2-UNeXT-1.pth: .*{message}"):
        SAM2UNeXT.from_checkpoint(tmp_path / "SAM2-UNeXT-1.pth")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_of_the_original_restores_the_same_network(prefix, small_model, tmp_path):
    path = tmp_path / "SAM2-UNeXT-20.pth"
    torch.save({prefix + key: value for key, value in small_model.state_dict().items()}, path)
    model = SAM2UNeXT.from_checkpoint(path)
    assert same_network(model, small_model) and model.config == SMALL | {"size": 1024}  # by its shapes
    assert not model.training


def test_the_original_full_size_network_is_recognised_by_its_shapes(tmp_path):
    shapes = golden("sam2unext_large.keys.json")
    torch.save({key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}, tmp_path / "SAM2-UNeXT-20.pth")
    network, *_ = checkpoint.load(tmp_path / "SAM2-UNeXT-20.pth")
    assert network == {"sam2": "large", "aux": "vit_large_patch14_dinov2", "aux_size": 448}


def test_a_checkpoint_that_lacks_a_tensor_is_refused(small_model, tmp_path):
    state = dict(small_model.state_dict())
    del state["head.bias"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="part.pth: does not fit the network: lacks head.bias"):
        SAM2UNeXT.from_checkpoint(tmp_path / "part.pth")


@pytest.mark.parametrize("option, value", [("aux_size", 96), ("aux", "none"), ("aux", "resnet10t"), ("sam2", "tiny")])
def test_init_with_weights_of_another_network_names_the_option(option, value, micro_checkpoint, toy, tmp_path, capsys):
    args = train_arguments(f"--init {micro_checkpoint} --{option} {value} --aux_size 96", toy, tmp_path)
    status, line = failure(train.main, args, capsys)
    assert status == 2 and f"{micro_checkpoint}: was trained with --{option} {MICRO[option]}" in line
    assert line.endswith("--aux_size 64; give the same here") or value == "none"


def test_a_small_checkpoint_starts_a_network_of_another_size(small, encoders):
    """Its encoders' files hold what depends on the size."""
    model = SAM2UNeXT(*encoders.values(), **MICRO | {"aux_size": 96, "size": 96})
    checkpoint.load_trained(model, small, checkpoint.load(small))


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
    assert (content["format"], content["config"], content["epoch"]) == (1, MICRO, 7)
    names = {"hiera_path": "sam2_hiera_micro.pt", "dinov2_path": MICRO["aux"]}
    for option, record in content["encoders"].items():
        assert (record["name"], record["path"]) == (names[option], str(encoders[option]))


def test_a_small_checkpoint_restores_the_same_network(small, model):
    again = SAM2UNeXT.from_checkpoint(small)
    assert same_network(again, model) and again.encoders == model.encoders and not again.training


@pytest.mark.parametrize("random", ["hiera_path", "dinov2_path"])
def test_with_a_random_encoder_the_file_is_whole(random, encoders, tmp_path):
    paths = encoders | {random: None}
    model = SAM2UNeXT(*paths.values(), **MICRO).eval()
    checkpoint.save_network(tmp_path / "whole.pth", model, epoch=1)
    assert same_network(SAM2UNeXT.from_checkpoint(tmp_path / "whole.pth"), model)


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
    assert same_network(again, copy.deepcopy(model).set_precision(torch.bfloat16))
    if kind == "small":
        checkpoint.save_network(tmp_path / "again.pth", again, epoch=7)
        assert torch.load(tmp_path / "again.pth")["encoders"] == torch.load(small)["encoders"]


def test_small_to_whole_to_original_to_small_is_the_same_network(small, model, encoders, tmp_path, capsys):
    whole = convert(small, tmp_path / "new" / "whole.pth", "whole")
    original = convert(whole, tmp_path / "original.pth", "original")
    assert "original.pth: " in capsys.readouterr().out
    shutil.move(encoders["hiera_path"], tmp_path / "away")
    try:  # neither needs the encoders' files
        assert same_network(SAM2UNeXT.from_checkpoint(whole), model)
        bare = torch.load(original, weights_only=True)
    finally:
        shutil.move(tmp_path / "away", encoders["hiera_path"])
    assert bare.keys() == model.state_dict().keys()
    assert all(torch.equal(value, bare[key]) for key, value in model.state_dict().items())
    options = (f"--{option}={path}" for option, path in encoders.items())
    again = convert(whole, tmp_path / "small.pth", "small", *options)
    assert again.stat().st_size == pytest.approx(small.stat().st_size, rel=1e-3)
    assert same_network(SAM2UNeXT.from_checkpoint(again), model)
    assert torch.load(again)["epoch"] == 7


@pytest.mark.parametrize("kind", ["small", "whole", "original", "hub"])
def test_files_hold_contiguous_tensors_whatever_the_layout_in_memory(kind, small, model, encoders, tmp_path):
    path = small if kind == "small" else convert(small, tmp_path / kind, kind)
    for key, tensor in weights.tensors(checkpoint.read(path)).items():
        assert tensor.stride() == torch.empty(tensor.shape, device="meta").stride(), key
        assert torch.equal(tensor, model.state_dict()[key])
    if kind != "original":  # which does not say that it is the network MICRO
        maps = [p for p in SAM2UNeXT.from_checkpoint(path, *encoders.values()).parameters() if p.ndim == 4]
        assert maps and all(p.is_contiguous(memory_format=torch.channels_last) for p in maps)


def test_conversions_that_are_impossible_are_one_line(small, tmp_path, capsys):
    def fails(*words):
        args = convert_checkpoint.get_args_parser().parse_args([str(word) for word in words])
        return failure(convert_checkpoint.main, args, capsys)

    whole = convert(small, tmp_path / "whole.pth", "whole")
    capsys.readouterr()
    status, line = fails(whole, tmp_path / "out.pth", "--to", "small")
    assert status == 2 and "name its encoders' files with --hiera_path and --dinov2_path" in line
    status, line = fails(whole, whole, "--to", "original")
    assert status == 2 and "is one of the inputs and would be replaced" in line


def test_the_fingerprint_covers_every_matrix(model):
    state = model.dino.state_dict()
    before = weights.fingerprint(state)
    for key, weight in state.items():
        if weight.ndim > 1 and "pos_embed" not in key and "token" not in key:
            assert weights.fingerprint(state | {key: weight * 1.01}) != before, key
    assert weights.fingerprint(dict(state)) == before
