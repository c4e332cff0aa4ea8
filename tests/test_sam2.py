"""sam2/: the Hiera trunk computes the original's features under SAM 2's parameter names."""

import pytest
import recipe
import torch
from conftest import golden, relative_error
from hydra.core.global_hydra import GlobalHydra
from torch import nn

from sam2.build_sam import build_sam2_trunk
from sam2.modeling.backbones.hieradet import MultiScaleBlock

SIZES = ["tiny", "small", "base_plus", "large"]


@pytest.mark.parametrize("size", [*SIZES[:3], pytest.param("large", marks=pytest.mark.slow)])
def test_features_are_those_of_the_original(size):
    trunk = recipe.fill(build_sam2_trunk(size), 0)
    expected = golden(f"hiera_{size}.npz")
    shapes = sorted({key.split("/")[0] for key in expected})
    assert len(shapes) == 2
    for shape in shapes:
        height, width = map(int, shape.split("x"))
        with torch.no_grad():
            maps = trunk(recipe.image("trunk", (1, 3, height, width), 0))
        for i, features in enumerate(maps, 1):
            assert relative_error(features[0, ::7, ::3, ::3], expected[f"{shape}/stage{i}"]) < 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_keys_and_shapes_are_those_of_the_published_checkpoint(size):
    prefix = "image_encoder.trunk."
    published = golden(f"sam2_hiera_{size}.keys.json")
    expected = {key.removeprefix(prefix): shape for key, shape in published.items() if key.startswith(prefix)}
    trunk = build_sam2_trunk(size, device="meta")
    assert {key: list(tensor.shape) for key, tensor in trunk.state_dict().items()} == expected


def test_every_layer_norm_has_epsilon_1e_6():
    norms = [m for m in build_sam2_trunk("large", device="meta").modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 2 * 48
    assert {norm.eps for norm in norms} == {1e-6}


def test_built_in_eval_mode_on_the_device_that_the_caller_names():
    trunk = build_sam2_trunk("tiny", device="meta")
    assert not trunk.training and trunk.pos_embed.is_meta
    assert build_sam2_trunk("tiny").pos_embed.device.type == "cpu"
    assert not GlobalHydra.instance().is_initialized()  # nothing is left behind


def test_unknown_size_is_named():
    with pytest.raises(ValueError, match="huge.*tiny, small, base_plus, large"):
        build_sam2_trunk("huge")


def test_sides_must_be_multiples_of_32():
    with pytest.raises(ValueError, match="multiples of 32, got 64 x 80"):
        build_sam2_trunk("tiny")(torch.zeros(1, 3, 64, 80))


def test_windows_that_do_not_fit_are_padded_with_zeros_and_cropped():
    x = torch.arange(1.0, 2 * 5 * 7 * 3 + 1).reshape(2, 5, 7, 3)
    block, windows = MultiScaleBlock(3, 3, num_heads=1, window_size=4), []
    block.attn = nn.Identity()
    block.attn.register_forward_hook(lambda layer, inputs, output: windows.append(output))
    assert torch.equal(block.window_attention(x), x)
    assert windows[0].shape == (2 * 2 * 2, 4, 4, 3) and windows[0].sum() == x.sum()
