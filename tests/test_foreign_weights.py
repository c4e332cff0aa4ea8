"""weights.py: files of other programs are unwrapped and load as the plain file does, or are named for what they are."""

import re

import pytest
import safetensors.torch
import torch
from conftest import MICRO, SMALL, aux_file, parameter

from sam2.build_sam import build_sam2_trunk
from SAM2UNeXT import SAM2UNeXT, build_aux
from unext import download, weights


def load_trunk(path, size="micro"):
    trunk = build_sam2_trunk(size, device="meta")
    return trunk, weights.load_sam2(trunk, path)


def load_aux(path, config=MICRO):
    net = build_aux(config["aux"], config["aux_size"], device="meta").model
    return net, weights.load_aux(net, config["aux"], path)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A function that returns the path of a file, x.pth, with this content."""
    (tmp_path / "x.pth").touch()

    def of(content):
        monkeypatch.setattr(weights, "read", lambda source: content)
        return tmp_path / "x.pth"

    return of


@pytest.fixture(scope="module")
def states(encoders):
    """The tensors of a plain file of each kind, with a function that loads from it; not to be changed."""
    trunk, aux = (weights.tensors(weights.read(path)) for path in encoders.values())
    return {
        "network": (SAM2UNeXT.from_checkpoint, SAM2UNeXT(sam2="micro", aux="none").state_dict()),
        "trunk": (load_trunk, trunk),
        "aux": (load_aux, aux),
    }


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def doubled(state):
    return {key: value * 2 if value.is_floating_point() else value for key, value in state.items()}


SURPLUS = {"criterion.weight": torch.ones(3), "metric.total": torch.tensor(5)}
OPTIMIZER = {"state": {i: {"step": torch.ones(()), "exp_avg": torch.ones(2)} for i in range(999)}, "param_groups": []}
WRAPPERS = {
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "compiled in parallel": lambda s: prefixed("module._orig_mod.", s),
    "submodules compiled": lambda s: {key.replace(".", "._orig_mod.", 1): value for key, value in s.items()},
    "parallel": lambda s: prefixed("module.", s),
    "averaged": lambda s: {"n_averaged": torch.tensor(7)} | prefixed("module.", s),
    "Lightning": lambda s: {"epoch": 3, "optimizer_states": [OPTIMIZER], "state_dict": prefixed("model.", s) | SURPLUS},
    "any attribute": lambda s: SURPLUS | prefixed("segmentor.net.", s),
    "a copy beside": lambda s: prefixed("net.", s) | prefixed("ema.", doubled(s)),
    "optimizer beside": lambda s: {"optimizer": OPTIMIZER, "weights": s},
    "model beside": lambda s: {"ema": doubled(s), "model": s},
    "the first": lambda s: {"params": s, "params_ema": doubled(s)},
    "larger network beside": lambda s: {"loss": {f"layer{i}.weight": torch.ones(1) for i in range(999)}, "net": s},
    "model": lambda s: {"model": s},
    "state_dict": lambda s: {"state_dict": s},
    "two names": lambda s: {"model": {"state_dict": s}},
    "any names": lambda s: {"a": {"b": {"c": {"d": s}}}},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", ["network", "trunk", "aux"])
def test_a_wrapped_file_has_the_tensors_of_the_plain_file(kind, wrapper, states):
    _, state = states[kind]
    unwrapped = weights.tensors(WRAPPERS[wrapper](state), weights.PATCHES)
    assert unwrapped.keys() == state.keys() and all(unwrapped[key] is value for key, value in state.items())


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("kind", ["network", "trunk", "aux"])
def test_missing_and_surplus_tensors_are_named(kind, prefix, states, file):
    load, state = states[kind]
    key = next(key for key in state if key.endswith("norm1.weight"))
    last = key.removeprefix(weights.TRUNK)
    with pytest.raises(ValueError, match=f"does not fit the network: lacks {last}$"):
        load(file({"state_dict": prefixed(prefix, {k: v for k, v in state.items() if k != key})}))
    with pytest.raises(ValueError, match=f"has an unknown {last}.surplus$"):
        load(file({"state_dict": prefixed(prefix, state | {f"{key}.surplus": state[key]})}))


@pytest.mark.parametrize(
    "content, kind",
    [
        ({"a": {"b": {"c.weight": torch.ones(1)}}, "d": 5}, "another network's (keys such as c.weight)"),
        ({"optimizer": OPTIMIZER}, "another network's (keys such as step)"),
        ({"params": [torch.ones(2)], 0: torch.ones(2)}, "a file without named tensors"),
    ],
)
def test_tensors_are_found_however_deep(content, kind, file):
    with pytest.raises(ValueError, match=re.escape(f"x.pth: is {kind}; ")):
        load_trunk(file(content))


def keys(text, prefix=""):
    return [prefix + key for key in text.split()]


DINOV2 = """embeddings.cls_token embeddings.mask_token embeddings.patch_embeddings.projection.weight
    encoder.layer.0.attention.attention.query.weight encoder.layer.0.layer_scale1.lambda1 layernorm.weight"""
CHUNKS = "cls_token patch_embed.proj.weight mask_token blocks.0.0.norm1.weight blocks.0.0.ls1.gamma"
FOREIGN = [
    (keys(DINOV2), "DINOv2 in the format of Hugging Face's transformers"),
    (keys("classifier.weight") + keys(DINOV2, "dinov2."), "DINOv2 in the format of Hugging Face's transformers"),
    (keys(CHUNKS, "backbone.") + keys("dino_head.mlp.0.weight"), "a training checkpoint of Meta's DINOv2"),
    (keys("pos_embed patch_embed.projection.weight", "vision_encoder.backbone."),
     "SAM 2 in the format of Hugging Face's transformers"),
]  # fmt: skip


@pytest.mark.parametrize("names, kind", FOREIGN)
def test_formats_of_other_programs_are_named_with_the_file_that_belongs_there(names, kind, file):
    path, aux = file({"state_dict": {f"net.{name}": torch.ones(1) for name in names}}), SMALL["aux"]
    url = re.escape(download.PUBLISHED[f"{aux}.safetensors"])
    with pytest.raises(ValueError, match=f"x.pth: is {kind}; the weights of timm's {aux} belong here .{url}.$"):
        load_aux(path, SMALL)
    url = re.escape(download.PUBLISHED["sam2_hiera_tiny.pt"])
    with pytest.raises(ValueError, match=f"x.pth: is {kind}; SAM 2's sam2_hiera_tiny.pt belongs here .{url}.$"):
        load_trunk(path, "tiny")
    with pytest.raises(ValueError, match=f"x.pth: is {kind}; a trained checkpoint belongs here"):
        SAM2UNeXT.from_checkpoint(path)


def test_metas_own_dinov2_loads_as_timms(file, tmp_path):
    """Also as the teacher of a training whose blocks are not in chunks."""
    timms = safetensors.torch.load_file(aux_file(tmp_path / "timm.safetensors", image_size=56))
    metas = timms | {"mask_token": parameter("mask_token", (1, 384))}
    teacher = prefixed("backbone.", metas) | {"dino_head.mlp.0.weight": torch.ones(1)}
    for content in (metas, {"teacher": teacher}):
        net, _ = load_aux(file(content), SMALL)
        assert all(torch.equal(value, timms[key]) for key, value in net.state_dict().items())
