"""weights.py: files of other programs are unwrapped and load as the plain file does, or are named for what they are."""

import re

import pytest
import safetensors.torch
import torch
from conftest import MICRO, SMALL, aux_file, sam2_file

from sam2.build_sam import build_sam2_trunk
from SAM2UNeXT import SAM2UNeXT, build_aux
from unext import download, weights


def fill_network(path):
    return SAM2UNeXT.from_checkpoint(path)


def fill_trunk(path):
    trunk = build_sam2_trunk("micro", device="meta")
    weights.load_sam2(trunk, path)
    return trunk


def fill_aux(path):
    net = build_aux(MICRO["aux"], MICRO["aux_size"], device="meta").model
    weights.load_aux(net, MICRO["aux"], path)
    return net


@pytest.fixture(scope="module", params=[fill_network, fill_trunk, fill_aux])
def kind(request, encoders):
    """What fills a module from a file, the tensors of a plain file, and those that it must fill the module with."""
    fill = request.param
    if fill is fill_network:
        state = SAM2UNeXT(sam2="micro", aux="none").state_dict()
        return fill, state, state
    path = encoders["hiera_path" if fill is fill_trunk else "dinov2_path"]
    return fill, weights.tensors(weights.read(path)), fill(path).state_dict()


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def doubled(state):
    return {key: value * 2 if value.is_floating_point() else value for key, value in state.items()}


SURPLUS = {"criterion.weight": torch.ones(3), "metric.total": torch.tensor(5)}
OPTIMIZER = {"state": {i: {"step": torch.ones(()), "exp_avg": torch.ones(2)} for i in range(999)}, "param_groups": []}
WRAPPERS = {
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "compiled in parallel": lambda s: prefixed("module._orig_mod.", s),
    "parts compiled": lambda s: {key.replace(".", "._orig_mod.", 1): value for key, value in s.items()},
    "parallel": lambda s: prefixed("module.", s),
    "averaged": lambda s: {"n_averaged": torch.tensor(7)} | prefixed("module.", s),
    "Lightning": lambda s: {"epoch": 3, "optimizer_states": [OPTIMIZER], "state_dict": prefixed("model.", s) | SURPLUS},
    "any attribute": lambda s: SURPLUS | prefixed("segmentor.net.", s),
    "a copy beside": lambda s: prefixed("net.", s) | prefixed("ema.", doubled(s)),
    "optimizer beside": lambda s: {"optimizer": OPTIMIZER, "weights": s},
    "a list": lambda s: {"models": [(3, s), OPTIMIZER]},
    "model beside": lambda s: {"ema": doubled(s), "model": s},
    "the first": lambda s: {"params": s, "params_ema": doubled(s)},
    "larger network beside": lambda s: {"loss": {f"layer{i}.weight": torch.ones(1) for i in range(999)}, "net": s},
} | {
    names: lambda s, names=names: nested(names.split(), s)
    for names in ("model", "state_dict", "net", "network", "model_state_dict", "ema", "ema module", "params_ema",
                  "model_ema", "state_dict_ema", "model state_dict", "a b c d")
}  # fmt: skip


def nested(names, content):
    """The content in dicts, one in the other."""
    for name in reversed(names):
        content = {name: content}
    return content


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_file_loads_as_the_plain_one(wrapper, kind, tmp_path):
    fill, state, expected = kind
    torch.save(WRAPPERS[wrapper](state), tmp_path / "wrapped.pth")
    filled = fill(tmp_path / "wrapped.pth").state_dict()
    assert filled.keys() == expected.keys()
    assert all(torch.equal(filled[key], value) for key, value in expected.items())


def test_safetensors_are_unwrapped_too(kind, tmp_path):
    fill, state, expected = kind
    state = {key: value.contiguous() for key, value in prefixed("model._orig_mod.", state).items()}
    safetensors.torch.save_file(state | SURPLUS, tmp_path / "x.safetensors")
    filled = fill(tmp_path / "x.safetensors").state_dict()
    assert all(torch.equal(filled[key], value) for key, value in expected.items())


def test_a_file_that_contains_itself_is_read(kind, tmp_path):
    fill, state, _ = kind
    content = {"net": dict(state)}
    content["net"]["all"] = content
    torch.save(content, tmp_path / "x.pth")
    assert fill(tmp_path / "x.pth").state_dict()


def test_a_wrapped_network_is_as_strict_as_a_plain_one(kind, tmp_path):
    fill, state, expected = kind
    last = list(expected)[-1]
    key = next(key for key in state if key.endswith(last))
    torch.save({"state_dict": prefixed("model.", {k: v for k, v in state.items() if k != key})}, tmp_path / "lacks.pth")
    with pytest.raises(ValueError, match=f"does not fit the network: lacks {last}$"):
        fill(tmp_path / "lacks.pth")
    surplus = f"{key}.surplus"
    torch.save({"state_dict": prefixed("model.", state | {surplus: state[key]})}, tmp_path / "surplus.pth")
    with pytest.raises(ValueError, match=f"has an unknown {last}.surplus$"):
        fill(tmp_path / "surplus.pth")


def test_a_plain_network_with_surplus_tensors_is_refused(tmp_path):
    torch.save(SAM2UNeXT(sam2="micro", aux="none").state_dict() | SURPLUS, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="has an unknown criterion.weight, has an unknown metric.total"):
        fill_network(tmp_path / "x.pth")


def test_a_wrapped_encoder_makes_the_same_small_checkpoint(encoders, model, tmp_path):
    """The fingerprint is the plain file's."""
    state = weights.tensors(weights.read(encoders["hiera_path"]))
    torch.save({"state_dict": prefixed("sam._orig_mod.", state)}, tmp_path / "x.pt")
    record = weights.load_sam2(build_sam2_trunk("micro", device="meta"), tmp_path / "x.pt")
    assert record["fingerprint"] == model.encoders["hiera_path"]["fingerprint"]


def test_wrapped_sam2_1_is_still_recognised(tmp_path):
    path = sam2_file(tmp_path / "x.pt", "micro", {"no_obj_embed_spatial": [1, 64]}, "model.")
    with pytest.raises(ValueError, match="SAM 2.1 checkpoint of size micro.*--allow_sam2_1"):
        fill_trunk(path)


@pytest.mark.parametrize(
    "content, found",
    [
        ({"a": {"b": {"c.weight": torch.ones(1)}}, "d": 5}, "another network's (keys such as c.weight)"),
        ({"optimizer": OPTIMIZER}, "another network's (keys such as step)"),
        ({"epoch": 5, "net": {}}, "a file without named tensors"),
        ({"params": [torch.ones(2)], 0: torch.ones(2)}, "a file without named tensors"),
    ],
)
def test_tensors_are_found_however_deep(content, found, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=re.escape(f"x.pth: is {found}; ")):
        fill_trunk(tmp_path / "x.pth")


def keys(text, prefix=""):
    return [prefix + key for key in text.split()]


DINOV2 = """embeddings.cls_token embeddings.mask_token embeddings.patch_embeddings.projection.weight
    encoder.layer.0.attention.attention.query.weight encoder.layer.0.layer_scale1.lambda1 layernorm.weight"""
VIT = "embeddings.cls_token embeddings.patch_embeddings.projection.weight encoder.layer.0.layernorm_before.weight"
CHUNKS = "cls_token patch_embed.proj.weight mask_token blocks.0.0.norm1.weight blocks.0.0.ls1.gamma"
FOREIGN = [
    (keys(DINOV2), "DINOv2 in the format of Hugging Face's transformers"),
    (keys("classifier.weight") + keys(DINOV2, "dinov2."), "DINOv2 in the format of Hugging Face's transformers"),
    (keys(VIT, "vit."), "a ViT in the format of Hugging Face's transformers"),
    (keys(CHUNKS, "backbone.") + keys("dino_head.mlp.0.weight"), "a training checkpoint of Meta's DINOv2"),
    (keys("pos_embed patch_embed.projection.weight", "vision_encoder.backbone."),
     "SAM 2 in the format of Hugging Face's transformers"),
]  # fmt: skip


@pytest.mark.parametrize("names, found", FOREIGN)
@pytest.mark.parametrize("wrap", [dict, lambda s: {"teacher": s}, lambda s: {"state_dict": prefixed("net.", s)}])
def test_formats_of_other_programs_are_named_with_the_file_that_belongs_there(names, found, wrap, tmp_path):
    path, aux = tmp_path / "x.pth", SMALL["aux"]
    torch.save(wrap({name: torch.ones(1) for name in names}), path)
    where = re.escape(download.PUBLISHED[f"{aux}.safetensors"])
    with pytest.raises(ValueError, match=f"x.pth: is {found}; the weights of timm's {aux} belong here .{where}.$"):
        weights.load_aux(build_aux(aux, 56, device="meta").model, aux, path)
    where = re.escape(download.PUBLISHED["sam2_hiera_tiny.pt"])
    with pytest.raises(ValueError, match=f"x.pth: is {found}; SAM 2's sam2_hiera_tiny.pt belongs here .{where}.$"):
        weights.load_sam2(build_sam2_trunk("tiny", device="meta"), path)
    with pytest.raises(ValueError, match=f"x.pth: is {found}; a trained checkpoint belongs here"):
        SAM2UNeXT.from_checkpoint(path)


def test_metas_own_dinov2_loads_as_timms(tmp_path):
    """Also as the teacher of a training whose blocks are not in chunks."""
    timms = weights.read(aux_file(tmp_path / "timm.safetensors", image_size=56))
    metas = timms | {"mask_token": torch.zeros(1, 384)}
    teacher = prefixed("backbone.", metas) | {"dino_head.mlp.0.weight": torch.ones(1)}
    for name, content in {"meta.pth": metas, "teacher.pth": {"teacher": teacher}}.items():
        torch.save(content, tmp_path / name)
        net = build_aux(SMALL["aux"], 56, device="meta").model
        weights.load_aux(net, SMALL["aux"], tmp_path / name)
        assert all(torch.equal(value, timms[key]) for key, value in net.state_dict().items())
