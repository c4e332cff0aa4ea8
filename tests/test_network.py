"""SAM2UNeXT.py: the whole network computes the original's figures and has its parameters."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import recipe
import torch
import torch.nn.functional as F
from conftest import MICRO, ROOT, golden, relative_error, same_network
from PIL import Image

from dataset import image_tensor
from SAM2UNeXT import SAM2UNeXT
from unext import images
from unext.errors import InputError


@pytest.fixture(scope="module")
def full_shapes() -> SAM2UNeXT:
    with torch.device("meta"):
        return SAM2UNeXT()


def test_state_dict_is_that_of_the_original(full_shapes):
    shapes = {key: list(tensor.shape) for key, tensor in full_shapes.state_dict().items()}
    assert shapes == golden("sam2unext_large.keys.json")


def test_trainable_parameters_are_those_of_the_original(full_shapes):
    trained = {name: p.numel() for name, p in full_shapes.named_parameters() if p.requires_grad}
    assert sorted(trained) == sorted(golden("sam2unext_large.trainable.json"))
    assert sum(trained.values()) == 5_958_497
    assert sum(p.numel() for p in full_shapes.parameters()) == 522_120_081


def assert_figures_of_the_original(model, tolerance):
    """Of the full network with the parameters of seed 0: the encoders' maps and the logits at 1024 px."""
    expected, maps = golden("sam2unext_large_1024.npz"), {}
    x = recipe.image("full", (1, 3, 1024, 1024), 0).to(model.head.weight.device)
    hooks = [
        model.sam.register_forward_hook(lambda _, __, output: maps.update(enumerate(output, 1))),
        model.dino.register_forward_hook(lambda _, __, output: maps.update(dino=output[-1])),
    ]
    with torch.no_grad():
        logits = model(x)
    for hook in hooks:
        hook.remove()
    assert relative_error(logits[:, 0, ::8, ::8].cpu(), expected["logits"]) < tolerance
    assert relative_error(maps["dino"][0, ::13, ::2, ::2].cpu(), expected["dino"]) < tolerance
    for i in range(1, 5):
        assert relative_error(maps[i][0, ::13, ::8, ::8].cpu(), expected[f"sam/stage{i}"]) < tolerance


@pytest.mark.slow
def test_full_network_at_1024_gives_the_figures_of_the_original(full_model):
    assert_figures_of_the_original(full_model(0), 1e-4)


def test_encoders_are_frozen_and_stay_in_eval_mode():
    model = SAM2UNeXT(**MICRO).train()
    assert model.training and model.up1.training
    assert not any(module.training for module in (*model.sam.modules(), *model.dino.modules()))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all(name.startswith(("sam.", "dino.")) and "prompt_learn" not in name for name in frozen)


def test_new_adapters_have_small_weights_and_no_bias():
    adapter = SAM2UNeXT(**MICRO).sam.blocks[3].prompt_learn
    assert [type(layer).__name__ for layer in adapter] == ["Linear", "GELU", "Linear", "GELU"]
    for layer in (adapter[0], adapter[2]):
        assert 0.018 < layer.weight.std() < 0.022
        assert not layer.bias.any()


def test_the_network_works_without_auxiliary_encoder():
    model = SAM2UNeXT(sam2="tiny", aux="none")
    assert not [key for key in model.state_dict() if key.startswith(("dino", "align"))]
    assert model.reduce4.in_channels == 768
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 64, 64)


@pytest.mark.parametrize("aux", ["resnet10t", "swin_tiny_patch4_window7_224", "vit_small_patch14_reg4_dinov2"])
def test_other_timm_models_serve_as_auxiliary_encoder(aux):
    model = SAM2UNeXT(sam2="tiny", aux=aux, aux_size=224).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 64, 64)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"aux": "dinov2"}, "no model called 'dinov2'"),
        ({"aux": "vit_small_patch14_dinov2", "aux_size": 100}, "100 is not a multiple of .* 14 px"),
        ({"sam2": "big"}, "'big'"),
    ],
)
def test_arguments_that_do_not_fit_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        SAM2UNeXT(**({"sam2": "tiny", "aux": "none"} | options))


def test_predict_is_transform_network_resize_sigmoid(micro_model):
    image = Image.fromarray(recipe.photo("predict", 50, 90))
    with torch.no_grad():
        logits = micro_model(image_tensor(image, 64)[None])
    expected = F.interpolate(logits, size=(50, 90), mode="bilinear").sigmoid()[0, 0].numpy()
    probability = micro_model.predict(image)
    assert probability.shape == (50, 90) and probability.dtype == np.float32
    assert np.array_equal(probability, expected)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_predict_accepts_arrays(mode, micro_model):
    image = Image.fromarray(recipe.photo("predict", 40, 60)).convert(mode)
    assert np.array_equal(micro_model.predict(np.array(image)), micro_model.predict(image))


@pytest.mark.parametrize(
    "image, kind",
    [
        ("a.jpg", "str"),
        (torch.zeros(3, 40, 60), "Tensor"),
        (np.zeros((40, 60, 3)), "float64 array (40, 60, 3)"),
        (np.zeros((40, 60, 1), np.uint8), "uint8 array (40, 60, 1)"),
        (np.zeros((0, 60, 3), np.uint8), "uint8 array (0, 60, 3)"),
    ],
)
def test_what_is_no_image_is_named_with_what_is(image, kind, micro_model):
    for method in (micro_model.predict, micro_model.cutout):
        with pytest.raises(InputError, match=f"must be a PIL image.*; this is a {re.escape(kind)}$"):
            method(image)


@pytest.mark.parametrize("tag", images.TURNS)
def test_rotated_images_are_seen_upright_and_the_map_fits_the_stored_pixels(tag, micro_model, tmp_path):
    stored, exif = Image.fromarray(recipe.photo("rotated", 40, 60)), Image.Exif()
    exif[images.ORIENTATION] = tag
    stored.save(tmp_path / "x.png", exif=exif)
    shown = stored.transpose(images.TURNS[tag])
    probability = micro_model.predict(Image.open(tmp_path / "x.png"))
    turned = Image.fromarray(probability).transpose(images.TURNS[tag])
    assert probability.shape == (40, 60) and np.array_equal(turned, micro_model.predict(shown))
    assert np.array_equal(micro_model.cutout(Image.open(tmp_path / "x.png")), micro_model.cutout(shown))


def test_predict_computes_in_eval_mode_and_leaves_the_mode(micro_model):
    model, image = copy.deepcopy(micro_model).train(), recipe.photo("predict", 40, 60)
    modes = [module.training for module in model.modules()]
    assert np.array_equal(model.predict(image), micro_model.predict(image))
    assert [module.training for module in model.modules()] == modes and same_network(model, micro_model)


@pytest.mark.parametrize("kind, tolerance", [("double", 1e-5), pytest.param("half", 0.01, marks=pytest.mark.half)])
def test_a_network_of_another_type_predicts(kind, tolerance, micro_model):
    model, image = getattr(copy.deepcopy(micro_model), kind)(), recipe.photo("predict", 40, 60)
    probability = model.predict(image)
    assert probability.dtype == np.float32 and np.abs(probability - micro_model.predict(image)).max() < tolerance


IMPORT = """
import importlib, logging, os, socket, sys, warnings
import hubconf
for name in [*hubconf.dependencies, "PIL.ImageCms", "PIL.PngImagePlugin", "PIL.TiffImagePlugin"]:
    importlib.import_module(name)
from PIL import Image, PngImagePlugin

def state():
    limits = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, list(Image.OPEN)
    logger = logging.getLogger("PIL")
    return *limits, list(warnings.filters), logger.level, logger.handlers, dict(os.environ), socket.getdefaulttimeout()

opened, before = [], state()
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
import SAM2UNeXT
assert state() == before, (state(), before)
print(*opened, sep="\\n")
"""


def test_importing_the_network_changes_nothing_and_reads_code_alone():
    environment = {name: value for name, value in os.environ.items() if name != images.LIMIT}
    command = [sys.executable, "-c", IMPORT]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    opened = [path for path in map(Path, result.stdout.splitlines()) if path.parent.name != "__pycache__"]
    assert not [path for path in opened if ROOT in path.parents and path.suffix != ".py"]


def test_glue_and_decoder_are_those_of_the_paper(micro_model):
    """Written once more from the paper's formulas, in float64."""
    model = copy.deepcopy(micro_model).double()
    x = recipe.image("paper", (2, 3, 64, 96), 0).double()

    def resize(x, size, align_corners=False):
        return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)

    with torch.no_grad():
        maps, aux = model.sam(x), model.dino(resize(x, (64, 64)))[-1]
        skips = []
        for level, sam in enumerate(maps, 1):
            aligned = getattr(model, f"align{level}")(aux)
            skips.append(getattr(model, f"reduce{level}")(torch.cat([sam, resize(aligned, sam.shape[2:])], dim=1)))
        y = skips[3]
        for level in (4, 3, 2, 1):
            y = y if level == 4 else torch.cat([y, skips[level - 1]], dim=1)
            y = resize(y, (2 * y.shape[2], 2 * y.shape[3]), align_corners=True)
            y = getattr(model, f"up{level}").conv.double_conv(y)
        expected = resize(model.head(y), (64, 96))
        assert relative_error(model(x), expected) < 1e-12
