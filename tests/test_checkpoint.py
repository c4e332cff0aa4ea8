"""checkpoint.py: kinds of trained checkpoints, their headers, and conversion between kinds."""

import copy
import shutil

import pytest
import torch
from conftest import MICRO, SMALL, arguments_of, aux_file, failure, golden, sam2_file, same_network
from test_find_encoders import other_weights

from SAM2UNeXT import SAM2UNeXT
from tools import convert_checkpoint
from unext import checkpoint, weights


def parse(content):
    return checkpoint.parse(content, "x.pth")


RECORDS = {option: dict.fromkeys(checkpoint.RECORD, "x") for option in ("hiera_path", "dinov2_path")}
NONSENSE = [{"sam2": "huge"}, {"sam2": ["tiny"]}, {"aux": 5}, {"aux": "../../passwd"}, {"aux": "/etc/passwd"}]
NONSENSE += [{"aux": "a/b"}, {"aux": ""}, {"aux": "none/.."}, {"aux": "hub:user/model"}]


@pytest.mark.parametrize(
    "header, message",
    [
        ({"config": None}, "does not describe a network"),
        ({"config": ["tiny"]}, "does not describe a network"),
        ({"format": 2}, "has format 2, but this program reads 1; update it"),
        ({"encoders": None}, "does not describe a network"),
        ({"encoders": {"hiera_path": RECORDS["hiera_path"]}}, "does not describe a network"),
        ({"encoders": RECORDS | {"hiera_path": "x.pt"}}, "does not describe a network"),
        *(({"config": MICRO | change}, "does not describe a network") for change in NONSENSE),
    ],
)
def test_a_nonsensical_header_is_named(header, message, micro_model):
    content = {"format": 1, "config": MICRO, "encoders": RECORDS, "state_dict": micro_model.state_dict()}
    assert parse(content).config == MICRO
    with pytest.raises(ValueError, match=f"^x.pth: .*{message}"):
        parse(content | header)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": 65}, "its network cannot be built: size 65 must be a multiple of 32"),
        ({"size": "64"}, "its network cannot be built: "),
        ({"aux_size": 2**30}, "does not fit the network: "),
        ({"aux": "nonesuch"}, "its network cannot be built: timm has no model called 'nonesuch'"),
        ({"width": 3}, "its network cannot be built: .*'width'; update the program"),
        ({"checkpoint_path": "x.pt"}, "its network cannot be built: .*'checkpoint_path'; update the program"),
    ],
)
def test_a_header_of_a_network_that_cannot_be_is_named(change, message, micro_model, monkeypatch):
    content = {"format": 1, "config": MICRO | change, "encoders": {}, "state_dict": micro_model.state_dict()}
    monkeypatch.setattr(checkpoint, "read", lambda source: content)
    with pytest.raises(ValueError, match=f"^x.pth: {message}"):
        SAM2UNeXT.from_checkpoint("x.pth")
    assert micro_model.config == MICRO  # what a checkpoint records


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_of_the_original_restores_the_same_network(prefix, small_model, monkeypatch):
    state = {prefix + key: value for key, value in small_model.state_dict().items()}
    monkeypatch.setattr(checkpoint, "read", lambda source: state)
    model = SAM2UNeXT.from_checkpoint("SAM2-UNeXT-20.pth")
    assert same_network(model, small_model) and model.config == SMALL | {"size": 1024}  # by its shapes
    assert not model.training


def test_the_original_full_size_network_is_recognised_by_its_shapes():
    shapes = golden("sam2unext_large.keys.json")
    config = parse({key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}).config
    assert config == {"sam2": "large", "aux": "vit_large_patch14_dinov2", "aux_size": 448}


@pytest.mark.parametrize("change", [{"aux_size": 96}, {"aux": "none"}, {"aux": "resnet10t"}, {"sam2": "tiny"}])
def test_weights_of_another_network_name_the_option(change, micro_model):
    content = parse(checkpoint.network_content(micro_model))
    ((option, _),) = change.items()
    with pytest.raises(ValueError, match=f"^x.pth: was trained with --{option} {MICRO[option]}; give the same here"):
        checkpoint.load_trained(SAM2UNeXT(**MICRO | change), "x.pth", content)


def test_a_small_checkpoint_starts_a_network_of_another_size(small, encoders):
    """Its encoders' files contain what depends on the size."""
    model = SAM2UNeXT(*encoders.values(), **MICRO | {"aux_size": 96, "size": 96})
    checkpoint.load_trained(model, small, parse(torch.load(small)))


def convert(source, output, to, *more):
    convert_checkpoint.main(arguments_of(convert_checkpoint, source, output, "--to", to, *more))
    return output


def test_with_encoders_from_files_only_trained_tensors_are_saved(small, model, encoders):
    content = torch.load(small, weights_only=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    buffers = {key for key in model.state_dict() if key.startswith("up") and key not in trained}
    assert content["state_dict"].keys() == trained | buffers
    assert len(buffers) == 24  # three of each of the decoder's eight BatchNorms
    assert (content["format"], content["config"], content["epoch"]) == (1, MICRO, 7)
    names = {"hiera_path": "sam2_hiera_micro.pt", "dinov2_path": MICRO["aux"]}
    for option, record in content["encoders"].items():
        assert (record["name"], record["path"]) == (names[option], str(encoders[option]))


@pytest.mark.parametrize("random", ["hiera_path", "dinov2_path"])
def test_with_a_random_encoder_the_checkpoint_is_whole(random, encoders):
    model = SAM2UNeXT(*(encoders | {random: None}).values(), **MICRO)
    content = checkpoint.network_content(model)
    assert content["state_dict"].keys() == model.state_dict().keys() and content["encoders"] == {}


def test_another_encoder_is_refused(small, encoders, tmp_path):
    path = other_weights(encoders, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=f"7.pth: was not trained with {path}; give sam2_hiera_micro.pt with the"):
        SAM2UNeXT.from_checkpoint(small, path)
    aux = aux_file(tmp_path / "aux.safetensors", MICRO["aux"], 96)  # differs in the position embedding alone
    torch.save(weights.read(aux), tmp_path / "aux.pt")
    for same in (aux, tmp_path / "aux.pt"):
        assert SAM2UNeXT.from_checkpoint(small, None, same)
    with pytest.raises(ValueError, match="7.pth: its network cannot be built: .* size small"):
        SAM2UNeXT.from_checkpoint(small, sam2_file(tmp_path / "small.pt", "small"))


def test_encoders_beside_a_whole_file_must_be_those_that_it_contains(model, encoders, tmp_path):
    content = parse(checkpoint.network_content(model, whole=True))
    again = SAM2UNeXT(*encoders.values(), **MICRO)
    checkpoint.load_trained(again, "x.pth", content)
    assert checkpoint.is_small(again) and same_network(again, model)
    other = other_weights(encoders, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=f"was not trained with {other}; .*, or no encoder: it contains them"):
        checkpoint.load_trained(SAM2UNeXT(other, encoders["dinov2_path"], **MICRO), "x.pth", content)


@pytest.mark.parametrize("whole", [False, True])
def test_in_bf16_the_frozen_matrices_are_converted_as_they_are_read(whole, model, monkeypatch):
    content = checkpoint.network_content(model, whole)
    monkeypatch.setattr(checkpoint, "read", lambda source: content)
    again = SAM2UNeXT.from_checkpoint("x.pth", precision=torch.bfloat16)
    assert again.precision == torch.bfloat16
    assert same_network(again, copy.deepcopy(model).set_precision(torch.bfloat16))
    assert again.encoders == content["encoders"]


def test_small_to_whole_to_original_to_small_is_the_same_network(small, model, encoders, tmp_path, capsys):
    whole = convert(small, tmp_path / "new" / "whole.pth", "whole")
    original = convert(whole, tmp_path / "original.pth", "original")
    output = capsys.readouterr().out
    assert "original.pth: " in output and "does not record the size of the input: give test.py --size 64" in output
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


@pytest.mark.parametrize("whole", [False, True])
def test_files_have_contiguous_tensors_whatever_the_layout_in_memory(whole, small, model, encoders):
    for key, tensor in checkpoint.network_content(model, whole)["state_dict"].items():
        assert tensor.stride() == torch.empty(tensor.shape, device="meta").stride(), key
        assert torch.equal(tensor, model.state_dict()[key])
    maps = [p for p in SAM2UNeXT.from_checkpoint(small, *encoders.values()).parameters() if p.ndim == 4]
    assert maps and all(p.is_contiguous(memory_format=torch.channels_last) for p in maps)


@pytest.mark.parametrize(
    "output, to, message",
    [
        ("out.pth", "small", "name its encoders' files with --hiera_path and --dinov2_path"),
        ("SAM2-UNeXT-1.pth", "original", "is one of the inputs and would be replaced"),
    ],
)
def test_conversions_that_are_impossible_are_one_line(output, to, message, micro_checkpoint, capsys):
    args = arguments_of(convert_checkpoint, micro_checkpoint, micro_checkpoint.with_name(output), "--to", to)
    status, line = failure(convert_checkpoint.main, args, capsys)
    assert status == 2 and message in line


def test_the_fingerprint_covers_every_matrix(model):
    state = model.dino.state_dict()
    before = weights.fingerprint(state)
    for key, weight in state.items():
        if weight.ndim > 1 and "pos_embed" not in key and "token" not in key:
            assert weights.fingerprint(state | {key: weight * 1.01}) != before, key
    assert weights.fingerprint(dict(state)) == before


def test_a_bug_in_the_constructor_shows_its_traceback(micro_checkpoint, monkeypatch):
    monkeypatch.setattr("SAM2UNeXT.build_sam2_trunk", lambda *args, **options: None + 1)
    with pytest.raises(TypeError, match="unsupported operand"):
        SAM2UNeXT.from_checkpoint(micro_checkpoint)
