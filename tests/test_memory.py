"""The memory that is predicted is the memory that torch allocates."""

import copy
import gc
import re

import pytest
import recipe
import torch
from conftest import MICRO, arguments_of
from torch.amp import GradScaler
from torch.profiler import ProfilerActivity, profile

import train
from SAM2UNeXT import SAM2UNeXT
from tools import memory

SIDE, IMAGES = 128, 2
# Where a CPU lacks these kernels, torch holds copies for others, which the prediction does not know.
HAS_KERNELS = torch.backends.cpu.get_cpu_capability().startswith("AVX")
HAS_BF16_KERNELS = HAS_KERNELS and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
NEEDS_BF16 = pytest.mark.skipif(not HAS_BF16_KERNELS, reason="the CPU has no kernels for bf16")


def allocated(model: SAM2UNeXT, training: bool) -> int:
    """The most bytes that torch's CPU allocator gave at one time to the model, its input, and a step or inference."""
    gc.collect()  # what earlier tests left would count as given back
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = copy.deepcopy(model)
        images = recipe.image("memory", (IMAGES, 3, SIDE, SIDE)).clone()
        masks = recipe.mask("memory", (IMAGES, 1, SIDE, SIDE)).clone()
        if training:
            optimizer, _ = train.make_optimizer(model, lr=1e-3, weight_decay=0, epochs=1)
            batches = [(images, masks, ["a", "b"])] * 2  # the second step has the optimiser's state
            scaler = GradScaler("cpu", enabled=False)
            list(train.train_one_epoch(train.Objective(model), batches, optimizer, scaler))
        else:
            with torch.inference_mode():
                model(images)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.skipif(not HAS_KERNELS, reason="the CPU has no vector kernels of torch")
@pytest.mark.parametrize(
    "use, dtype",
    [
        ("train", torch.float32),
        ("checkpointed", torch.float32),
        ("infer", torch.float32),
        pytest.param("train", torch.bfloat16, marks=[pytest.mark.half, NEEDS_BF16]),
    ],
)
def test_the_predicted_peak_is_what_torch_allocates(use, dtype, monkeypatch):
    monkeypatch.setattr(memory, "in_float32", lambda function: function)  # autocast as on the CPU
    model = SAM2UNeXT(**(MICRO | {"size": SIDE}), precision=dtype).train(use != "infer")
    model.sam.grad_checkpointing = use == "checkpointed"
    loss = None if use == "infer" else train.structure_loss
    assert memory.predict(model, IMAGES, loss) == pytest.approx(allocated(model, loss is not None), rel=0.15)


def test_memory_grows_evenly_with_the_batch_and_the_model_stays_as_it_is():
    with torch.device("meta"):
        model = SAM2UNeXT(sam2="micro", aux="none", size=256, precision=torch.bfloat16).train()
    first, second, third = (memory.predict(model, images, train.structure_loss) for images in (1, 2, 3))
    assert third - second == pytest.approx(second - first, rel=1e-3)
    assert all(parameter.is_meta and parameter.grad is None for parameter in model.parameters())


def test_the_largest_batch_is_the_largest_that_fits(monkeypatch, capsys):
    monkeypatch.setattr(memory, "predict", lambda model, images, loss: 2 * images * memory.GIB)
    gpus = {
        (size * memory.GIB + memory.LIBRARIES) / (1 - memory.FRAGMENTED) / memory.GIB: images
        for images, size in ((0, 1.9), (1, 2.1), (2, 5.9), (3, 6.1), (10, 21))
    }  # GiB besides libraries and gaps
    monkeypatch.setattr(memory, "GPUS", gpus)
    memory.main(arguments_of(memory, "--sam2", "micro", "--aux", "none", "--size", 64, "--batch_size", 3))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == ["train", "train --grad_checkpointing", "test"]
    assert [int(fits) for fits in re.findall(r"GB: (\d+)", lines[0])] == list(gpus.values())
