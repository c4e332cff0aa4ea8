"""Where all of the network is on a GPU, nothing in it makes a tensor elsewhere: tried without one, on fake tensors."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from SAM2UNeXT import SAM2UNeXT

SIZE = 1024
OLDEST = (2, 10)  # of torch; older versions ask the driver even about fake tensors
pytestmark = pytest.mark.skipif(torch.__version__ < OLDEST, reason="torch is too old for fake CUDA tensors")


@pytest.fixture(autouse=True)
def _autocast_believes_in_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *args, **options: True)


def pretend_gpu(model: SAM2UNeXT) -> None:
    """Replaces all tensors of the network by fake ones on a GPU; call it in FakeTensorMode."""
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
            setattr(module, name, nn.Parameter(fake, value.requires_grad))
        for name, value in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(value.shape, dtype=value.dtype, device="cuda"))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_full_network_and_its_loss_stay_on_the_gpu(dtype, checkpointed):
    with torch.device("meta"):
        model = SAM2UNeXT()
    model.set_precision(dtype).sam.grad_checkpointing = checkpointed
    computed = set()
    with FakeTensorMode():
        pretend_gpu(model)
        for layer in (model.sam.blocks[30].prompt_learn[0], model.align1, model.up1.conv.double_conv[0]):
            layer.register_forward_hook(lambda layer, inputs, output: computed.add(output.dtype))
        logits = model(torch.empty(2, 3, SIZE, SIZE, device="cuda"))
        loss = train.structure_loss(logits, torch.empty(2, 1, SIZE, SIZE, device="cuda"))
    assert (logits.device.type, logits.shape, logits.dtype) == ("cuda", (2, 1, SIZE, SIZE), torch.float32)
    assert loss.device.type == "cuda" and loss.shape == () and loss.requires_grad
    assert computed == {dtype}  # autocast was active where it should be
