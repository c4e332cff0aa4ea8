"""bf16 and gradient checkpointing compute what they should, and the precision is chosen as documented."""

import json

import pytest
import recipe
import torch
from conftest import MICRO, SMALL, predict_arguments, pretend_torchrun, train_arguments

import test
import train
from SAM2UNeXT import SAM2UNeXT
from unext import device, output
from unext.errors import InputError

IMAGES = recipe.image("precision", (2, 3, 64, 64))
MASKS = recipe.mask("precision", (2, 1, 64, 64))


def network(dtype=torch.float32, sizes=MICRO) -> SAM2UNeXT:
    return recipe.fill(SAM2UNeXT(**sizes), 0).eval().set_precision(dtype)


def gradients(model) -> dict[str, torch.Tensor]:
    ((model(IMAGES) - MASKS) ** 2).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_frozen_matrices_are_stored_in_the_compute_type(dtype):
    model = network(dtype, SMALL)
    types = {True: set(), False: set()}
    stored = {torch.float32: 0, dtype: 0}
    for parameter in model.parameters():
        types[parameter.requires_grad].add(parameter.dtype)
        stored[parameter.dtype] += 0 if parameter.requires_grad else parameter.numel()
    assert types == {True: {torch.float32}, False: {torch.float32, dtype}}
    assert stored[dtype] > 0.98 * sum(stored.values())  # the rest: norms and position embeddings
    assert {b.dtype for n, b in model.named_buffers() if "running" in n} == {torch.float32}


def test_a_precision_that_has_rounded_the_encoders_is_not_replaced():
    model = network(torch.bfloat16).set_precision(torch.bfloat16)
    with pytest.raises(InputError, match="are in torch.bfloat16 already: .* with precision=torch.float32"):
        model.set_precision(torch.float32)


@pytest.mark.half
def test_storing_the_encoders_in_the_compute_type_changes_nothing():
    model, plain = network(torch.bfloat16), network()
    plain.precision = torch.bfloat16  # plain autocast over float32 weights
    assert torch.equal(model(IMAGES), plain(IMAGES))
    ours, theirs = gradients(model), gradients(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.half
def test_bf16_computes_about_the_same_logits_and_float32_gradients():
    model, exact, tolerance = network(torch.bfloat16), network(), 0.05
    logits, expected = model(IMAGES), exact(IMAGES)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < tolerance * expected.abs().max()
    ours, theirs = gradients(model), gradients(exact)
    assert {gradient.dtype for gradient in ours.values()} == {torch.float32}
    for name in ("head.weight", "sam.blocks.0.prompt_learn.0.weight"):
        assert (ours[name] - theirs[name]).norm() < 4 * tolerance * theirs[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.half)])
def test_gradient_checkpointing_computes_the_same_gradients_in_less_memory(dtype):
    def kept(model):
        """Bytes that the backward pass needs, and the gradients."""
        storages = {}

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = ((model(IMAGES) - MASKS) ** 2).mean()
        loss.backward()
        return sum(storages.values()), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    sizes = {"sam2": "tiny", "aux": "none", "size": 64}
    model, saving = network(dtype, sizes), network(dtype, sizes)
    saving.sam.grad_checkpointing = True
    (plenty, expected), (little, gradients) = kept(model), kept(saving)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert gradients["sam.blocks.0.prompt_learn.0.weight"].any()
    assert little < 0.7 * plenty


@pytest.mark.parametrize(
    "flags, dtype",
    [
        pytest.param("avx512_bf16", "bfloat16", marks=pytest.mark.half),
        pytest.param("fpu amx_bf16", "bfloat16", marks=pytest.mark.half),
        ("fpu avx512f", "float32"),
    ],
)
def test_auto_is_the_precision_of_the_cpu(flags, dtype, toy, micro_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device, "cpu_flags", lambda: set(flags.split()))
    train.main(train_arguments("--epoch 1 --batch_size 6 --precision auto", toy, tmp_path / "run"))
    assert json.loads((tmp_path / "run/args.json").read_text())["precision"] == f"torch.{dtype}"
    test.main(predict_arguments(micro_checkpoint, toy / "test/Image", tmp_path / "maps", "--precision", "auto"))
    assert f"{micro_checkpoint} on cpu in {dtype}; 4 images" in capsys.readouterr().out
    assert output.read_settings(tmp_path / "maps")["precision"] == dtype


def test_auto_on_a_gpu_is_bf16_since_ampere(monkeypatch):
    for capability, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert device.precision("auto", "cuda:0") == dtype


@pytest.mark.parametrize("rank, processes", [(0, 1), (1, 8)])
def test_under_torchrun_each_process_has_the_gpu_of_its_rank(rank, processes, monkeypatch):
    """With its index, which torch.cuda.set_device wants."""
    pretend_torchrun(monkeypatch, rank, processes)
    monkeypatch.setattr(torch, "ones", lambda size, device: torch.zeros(size))
    assert device.resolve("cuda") == f"cuda:{rank}"
