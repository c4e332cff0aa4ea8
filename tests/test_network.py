"""The network whole: SAM2UNeXT.py."""

import shutil

import numpy as np
import pytest
import recipe
import torch
import torch.nn.functional as F
from conftest import SMALL, golden, relative_error
from PIL import Image

from dataset import image_tensor
from sam2.modeling.backbones import utils
from SAM2UNeXT import SAM2UNeXT
from tools.plain import PlainNetwork


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


@pytest.mark.slow
def test_full_network_at_1024_gives_the_figures_of_the_original(full_model):
    model, expected = full_model(0), golden("sam2unext_large_1024.npz")
    x = recipe.image("full", (1, 3, 1024, 1024), 0)
    maps = {}
    hooks = [
        model.sam.register_forward_hook(lambda _, __, output: maps.update(enumerate(output, 1))),
        model.dino.register_forward_hook(lambda _, __, output: maps.update(dino=output[-1])),
    ]
    with torch.no_grad():
        logits = model(x)
    for hook in hooks:
        hook.remove()
    assert relative_error(logits[:, 0, ::8, ::8], expected["logits"]) < 1e-4
    assert relative_error(maps["dino"][0, ::13, ::2, ::2], expected["dino"]) < 1e-4
    for i in range(1, 5):
        assert relative_error(maps[i][0, ::13, ::8, ::8], expected[f"sam/stage{i}"]) < 1e-4


def test_logits_have_the_size_of_the_images(small_model):
    with torch.no_grad():
        assert small_model(torch.zeros(2, 3, 64, 96)).shape == (2, 1, 64, 96)


def test_encoders_are_frozen_and_stay_in_eval_mode():
    model = SAM2UNeXT(**SMALL).train()
    assert model.training and model.up1.training
    assert not any(module.training for module in (*model.sam.modules(), *model.dino.modules()))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all(name.startswith(("sam.", "dino.")) and "prompt_learn" not in name for name in frozen)


def test_new_adapters_have_small_weights_and_no_bias():
    adapter = SAM2UNeXT(**SMALL).sam.blocks[3].prompt_learn
    assert [type(layer).__name__ for layer in adapter] == ["Linear", "GELU", "Linear", "GELU"]
    for layer in (adapter[0], adapter[2]):
        assert 0.018 < layer.weight.std() < 0.022
        assert not layer.bias.any()


def test_both_encoders_matter(small_model):
    x = recipe.image("matter", (1, 3, 64, 64))
    with torch.no_grad():
        whole = small_model(x)
        for encoder, parameter in ((small_model.sam, "patch_embed.proj.bias"), (small_model.dino.model, "pos_embed")):
            tensor = encoder.get_parameter(parameter)
            before = tensor.clone()
            tensor.add_(torch.linspace(0, 1, tensor.numel()).view_as(tensor))
            assert not torch.allclose(small_model(x), whole)
            tensor.copy_(before)


def test_without_auxiliary_encoder():
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
        ({"aux": "vit_small_patch14_dinov2", "aux_size": 100}, "100 is no multiple of .* 14 px"),
        ({"sam2": "big"}, "'big'"),
    ],
)
def test_arguments_that_do_not_fit_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        SAM2UNeXT(**({"sam2": "tiny", "aux": "none"} | options))


def test_predict_is_transform_network_resize_sigmoid(small_model):
    picture = Image.fromarray(recipe.photo("predict", 50, 90))
    with torch.no_grad():
        logits = small_model(image_tensor(picture, 64)[None])
    expected = F.interpolate(logits, size=(50, 90), mode="bilinear").sigmoid()[0, 0].numpy()
    probability = small_model.predict(picture)
    assert probability.shape == (50, 90) and probability.dtype == np.float32
    assert np.array_equal(probability, expected)


def test_predict_takes_arrays_and_greyscale_pictures(small_model):
    pixels = recipe.photo("predict", 40, 60)
    assert np.array_equal(small_model.predict(pixels), small_model.predict(Image.fromarray(pixels)))
    assert small_model.predict(Image.fromarray(pixels).convert("L")).shape == (40, 60)


def test_a_checkpoint_brings_back_the_same_network(small_model, small_checkpoint):
    model = SAM2UNeXT.from_checkpoint(small_checkpoint)
    assert model.network == SMALL and model.size == 64 and not model.training
    picture = recipe.photo("again", 40, 60)
    assert np.array_equal(model.predict(picture), small_model.predict(picture))


def test_a_checkpoint_of_the_original_brings_back_the_same_network(small_model, tmp_path):
    torch.save(small_model.state_dict(), tmp_path / "SAM2-UNeXT-20.pth")  # as the original's train script does
    model = SAM2UNeXT.from_checkpoint(tmp_path / "SAM2-UNeXT-20.pth")
    assert model.network == SMALL | {"size": 1024}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in small_model.state_dict().items())


@pytest.mark.parametrize("size", [(64, 96), (256, 256), (128, 224)])  # windows that fit, and such that need padding
def test_the_network_gives_what_the_plain_one_gives(size, small_model):
    """Tokens kept in windows, the folded glue and BatchNorm, portions, against the network as it is defined."""
    x, plain = recipe.image("short", (2, 3, *size), 0), PlainNetwork(small_model)
    with torch.no_grad():
        assert relative_error(small_model(x), plain(x).numpy()) < 1e-5
    assert torch.equal(small_model(x), plain(x))  # as it trains in fp32, to the last bit


def test_on_a_cpu_inference_works_on_portions(small_model, monkeypatch):
    x, tokens, rows = recipe.image("portions", (2, 3, 128, 128), 0), [], []
    small_model.sam.blocks[0].block.mlp.register_forward_pre_hook(lambda _, inputs: tokens.append(len(inputs[0])))
    small_model.head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[2]))
    with torch.no_grad():
        monkeypatch.setattr(utils, "PORTION", 2**30)
        whole = small_model(x)
        monkeypatch.setattr(utils, "PORTION", 2**18)
        portions = small_model(x)
    small_model(x)  # the backward pass would keep all portions anyway
    assert tokens[0] == tokens[-1] == 2048 == sum(tokens[1:-1]) and max(tokens[1:-1]) < 2048
    assert (
        rows[0] == rows[-1] == 64 == sum(rows[1:-1]) / 2 and max(rows[1:-1]) == 4
    )  # two pictures, one after the other
    assert relative_error(portions, whole.numpy()) < 1e-5


@pytest.mark.parametrize("shape", [(1, 3, 32, 64), (3, 3, 96, 64), (2, 3, 128, 160)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("portion", [1, 2**15])
def test_the_least_portions_give_the_same(shape, dtype, tolerance, portion, monkeypatch):
    model, x = SAM2UNeXT(**SMALL | {"aux": "none"}).eval().set_precision(dtype), recipe.image("least", shape, 0)
    with torch.no_grad():
        whole = model(x)
        monkeypatch.setattr(utils, "PORTION", portion)
        assert relative_error(model(x), whole.numpy()) < tolerance


def test_without_gradients_batch_norm_counts_its_batch_as_long_as_the_network_trains(monkeypatch):
    model, x = SAM2UNeXT(**SMALL).train(), recipe.image("counted", (2, 3, 64, 64), 0)
    expected = model(x)
    monkeypatch.setattr(utils, "PORTION", 2**10)
    with torch.no_grad():
        assert relative_error(model(x), expected.detach().numpy()) < 1e-5


def test_a_compiled_network_is_one_graph_for_all_pictures_of_a_size():
    model, graphs = SAM2UNeXT(**SMALL).eval(), []
    x = [recipe.image(f"compiled {i}", (2, 3, 64, 64), 0) for i in range(3)]

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        expected = model(x[0])
        model.compile(backend=backend)
        for images in x:
            logits = model(images)
    assert len(graphs) == 1 and not torch.equal(logits, expected)
    model.train()(x[0]).sum().backward()
    assert len(graphs) == 2 and model.head.weight.grad.any()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++")
def test_torch_compiles_the_network_to_the_same_figures():
    model = SAM2UNeXT(**SMALL | {"aux": "none"}).eval()
    x = recipe.image("compiled", (1, 3, 64, 64), 0)
    with torch.no_grad():
        expected = model(x)
        model.compile()
        assert relative_error(model(x), expected.numpy()) < 1e-5


def test_what_torch_compiles_wrongly_is_refused():
    with pytest.raises(ValueError, match="--compile: .* give --precision fp32"):
        SAM2UNeXT(**SMALL).set_precision(torch.bfloat16).compile()


def test_the_folded_glue_has_the_gradients_of_the_defined_one(monkeypatch):
    model = recipe.fill(SAM2UNeXT(**SMALL), 0).eval()
    x = recipe.image("short", (2, 3, 64, 64), 0)

    def gradients():
        model.zero_grad()
        F.softplus(model(x)).mean().backward()
        return {name: p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}

    defined = gradients()
    for module in ("SAM2UNeXT", "sam2.modeling.backbones.hieradet"):
        monkeypatch.setattr(f"{module}.sums_as_published", lambda x: False)
    folded = gradients()
    assert defined.keys() == folded.keys()
    for name, gradient in folded.items():
        assert relative_error(gradient, defined[name]) < 1e-4, name


def test_the_kept_position_embedding_follows_its_size_and_weights():
    model = recipe.fill(SAM2UNeXT(**SMALL), 0).eval()
    with torch.no_grad():
        for height in (64, 96, 64):
            assert model.sam.position(height, 64).shape[1:3] == (height, 64)
        before = model.sam.position(64, 64)
        assert model.sam.position(64, 64) is before
        model.load_state_dict({key: 2 * value for key, value in model.state_dict().items()})
        assert torch.allclose(model.sam.position(64, 64), 2 * before)
