"""Predicts the memory that the network takes, in seconds and without a GPU: on fake tensors, which have no values.

They are on the CPU, because torch runs no backward pass on fake CUDA tensors without a driver; where autocast differs
on CUDA, `predict` does as it does there. torch.distributed._tools.mem_tracker measures likewise, but is private.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock
from weakref import WeakSet, finalize

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from SAM2UNeXT import SAM2UNeXT

Loss = Callable[[Tensor, Tensor], Tensor]  # of logits and mask, both (B, 1, S, S)

GIB = 2**30
LIBRARIES = GIB  # bytes that CUDA's context and the workspaces of cuBLAS and cuDNN take, about
FRAGMENTED = 0.05  # the share of a GPU that is lost to gaps, about


class Memory(NamedTuple):
    """Bytes of all tensors, those of the model included."""

    held: int  # after the forward pass: in training, what the backward pass needs
    peak: int


class LiveTensors(TorchDispatchMode):
    """The bytes of the tensors that operations in the block have made and that are alive, now and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen: WeakSet[torch.UntypedStorage] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.note, result)
        return result

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            self.seen.add(storage)
            finalize(storage, self.add, -storage.nbytes())
            self.add(storage.nbytes())

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


class Work(nn.Module):
    """A forward pass or, with a loss, a training step up to the gradients; returns the bytes that are held between."""

    def __init__(self, model: "SAM2UNeXT", loss: Loss | None):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, images: Tensor, masks: Tensor, live: LiveTensors) -> int:
        with torch.inference_mode(self.loss is None):
            logits = self.model.forward(images)  # not what torch has perhaps compiled
        if self.loss is None:
            return live.now
        loss = self.loss(logits, masks)
        held = live.now
        loss.backward()
        return held


def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that autocast computes in float32 on CUDA."""
    return lambda x, *args, **kwargs: function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)


def predict(model: "SAM2UNeXT", batch_size: int, loss: Loss | None = None, cuda: bool = True) -> Memory:
    """What a training step with AdamW takes or, without a loss, inference; on a GPU or, without `cuda`, on the CPU.

    The model may be on any device, "meta" too, and in any precision. It is left as it is.
    """
    functions = {name: getattr(F, name) for name in ("interpolate", "layer_norm")}
    if cuda:
        functions = {name: in_float32(function) for name, function in functions.items()}
    with FakeTensorMode(), LiveTensors() as live, mock.patch.multiple(F, **functions):
        tensors = {
            f"model.{name}": torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, requires_grad=tensor.requires_grad
            )
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        trained = [tensor for tensor in tensors.values() if tensor.requires_grad] if loss else []
        moments = [torch.empty_like(tensor) for tensor in trained for _ in range(2)]  # of AdamW
        images, masks = (torch.empty(batch_size, channels, model.size, model.size) for channels in (3, 1))
        held = functional_call(Work(model, loss), tensors, (images, masks, live))
        del moments
    return Memory(held, live.peak)


class Demand(NamedTuple):
    """What a batch takes, and so any other: memory grows evenly with the images."""

    batch_size: int
    batch: Memory
    image: int  # bytes that each further image adds to the peak

    def largest_batch(self, gpu: float) -> int:
        """The images that should fit on a GPU with so many bytes; 0 if not even one does."""
        available = gpu * (1 - FRAGMENTED) - LIBRARIES
        return max(0, self.batch_size + math.floor((available - self.batch.peak) / self.image))


def demand(model: "SAM2UNeXT", batch_size: int, loss: Loss | None = None, cuda: bool = True) -> Demand:
    """What `predict` says of this batch and of one with an image more."""
    batch, more = (predict(model, images, loss, cuda) for images in (batch_size, batch_size + 1))
    return Demand(batch_size, batch, more.peak - batch.peak)


def smaller_batch(model: "SAM2UNeXT", batch_size: int, loss: Loss, device: str) -> str:
    """For a training step that was out of memory on a GPU: the batch that should fit, in words; empty if unknown."""
    with suppress(Exception):  # it is said beside an error, in whose place no other one may come
        if device.startswith("cuda"):
            free, _ = torch.cuda.mem_get_info(device)
            gpu = free + torch.cuda.memory_reserved(device)  # without what other programs take
            largest = demand(model, batch_size, loss).largest_batch(gpu)
            if 0 < largest < batch_size:
                return f"; otherwise unchanged, --batch_size {largest} should fit on this GPU"
    return ""
