"""Predicts the GPU memory that training and inference take, and which batch fits, in seconds and without a GPU.

    python tools/memory.py                                    the paper's network, bf16, batch 1
    python tools/memory.py --precision fp32 --batch_size 4
    python tools/memory.py --sam2 tiny --aux none --size 512

The network runs on fake tensors, which have shapes but no values. They are on the CPU, because torch runs no backward
pass on fake CUDA tensors without a driver; where autocast differs on CUDA, `predict` does as it does there.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from weakref import WeakSet, finalize

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from sam2.build_sam import CONFIGS
from SAM2UNeXT import SAM2UNeXT
from unext import cli, device

Loss = Callable[[Tensor, Tensor], Tensor]  # of logits and mask, both (B, 1, S, S)

GIB = 2**30
LIBRARIES = GIB  # bytes that CUDA's context and the workspaces of cuBLAS and cuDNN take, about
FRAGMENTED = 0.05  # the share of a GPU that is lost to gaps, about
GPUS = (8, 12, 16, 24, 48, 80)  # GiB of memory


class Memory(NamedTuple):
    """Bytes of all tensors, those of the model included."""

    activations: int  # after the forward pass: in training, what the backward pass needs
    peak: int


class LiveTensors(TorchDispatchMode):
    """The bytes of the tensors that operations in the block have made and that are alive, now and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen: WeakSet[torch.UntypedStorage] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                finalize(storage, self.add, -storage.nbytes())
                self.add(storage.nbytes())
        return result

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


class Work(nn.Module):
    """A forward pass or, with a loss, a training step up to the gradients; returns the bytes between the two passes."""

    def __init__(self, model: SAM2UNeXT, loss: Loss | None):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, images: Tensor, masks: Tensor, live: LiveTensors) -> int:
        with torch.inference_mode(self.loss is None):
            logits = self.model(images)
        if self.loss is None:
            return live.now
        loss = self.loss(logits, masks)
        activations = live.now
        loss.backward()
        return activations


def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that autocast computes in float32 on CUDA."""
    return lambda x, *args, **kwargs: function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)


def predict(model: SAM2UNeXT, batch_size: int, loss: Loss | None = None, cuda: bool = True) -> Memory:
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
        activations = functional_call(Work(model, loss), tensors, (images, masks, live))
        del moments
    return Memory(activations, live.peak)


class Demand(NamedTuple):
    """What a batch takes, and so any other: memory grows evenly with the images."""

    batch_size: int
    batch: Memory
    image: int  # bytes that each further image adds to the peak

    def largest_batch(self, gpu: float) -> int:
        """The images that should fit on a GPU with so many bytes; 0 if not even one does."""
        available = gpu * (1 - FRAGMENTED) - LIBRARIES
        return max(0, self.batch_size + math.floor((available - self.batch.peak) / self.image))


def demand(model: SAM2UNeXT, batch_size: int, loss: Loss | None = None) -> Demand:
    """What `predict` says of this batch and of one with an image more."""
    batch, more = (predict(model, images, loss) for images in (batch_size, batch_size + 1))
    return Demand(batch_size, batch, more.peak - batch.peak)


def main(args: argparse.Namespace) -> None:
    with cli.one_line_errors():
        with torch.device("meta"):
            model = SAM2UNeXT(sam2=args.sam2, aux=args.aux, aux_size=args.aux_size, size=args.size)
        model.set_precision(device.precision(args.precision, "cuda"))
        for use in ("train", "train --grad_checkpointing", "test"):
            loss = None if use == "test" else train.structure_loss
            model.train(loss is not None).sam.grad_checkpointing = "checkpointing" in use
            needed = demand(model, args.batch_size, loss)
            peak, image = needed.batch.peak / GIB, needed.image / GIB
            batches = ", ".join(f"{gpu} GB: {needed.largest_batch(gpu * GIB)}" for gpu in GPUS)
            print(f"{use}: {peak:.2f} GiB at the peak, {image:.2f} for each further image; largest batch on {batches}")
        print(f"{LIBRARIES / GIB:g} GiB is set aside for CUDA's context and workspaces, {FRAGMENTED:.0%} for gaps")


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--sam2", default="large", choices=list(CONFIGS), help="size of the trunk")
    parser.add_argument("--aux", default="vit_large_patch14_dinov2", help="a timm model, or none")
    parser.add_argument("--aux_size", type=cli.number(), default=448, help="side of its input, px")
    parser.add_argument("--size", type=cli.number(multiple=32, minimum=32), default=1024, help="side of the input, px")
    parser.add_argument("--batch_size", type=cli.number(), default=1, help="images per batch")
    parser.add_argument("--precision", default="bf16", choices=cli.PRECISIONS[1:], help="of the frozen encoders")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
