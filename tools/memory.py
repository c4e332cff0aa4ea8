"""Predicts the GPU memory that training and inference take, and which batch fits, in seconds and without a GPU.

    python tools/memory.py                                    the paper's network, bf16, batch 1
    python tools/memory.py --precision fp32 --batch_size 4
    python tools/memory.py --sam2 tiny --aux none --size 512

The network runs on fake tensors, which have shapes but no values. They are on the CPU, because torch runs no backward
pass on fake CUDA tensors without a driver; where autocast differs on CUDA, `predict` imitates it.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock
from weakref import WeakSet, finalize

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from sam2.build_sam import CONFIGS
from SAM2UNeXT import SAM2UNeXT
from unext import cli, device

GIB = 2**30
LIBRARIES = GIB  # bytes that CUDA's context and the workspaces of cuBLAS and cuDNN take, about
FRAGMENTED = 0.05  # the share of a GPU that is lost to gaps, about
GPUS = (8, 12, 16, 24, 48, 80)  # GiB of memory


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that operations in the block made and that are alive: now, and at most."""

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


def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that autocast computes in float32 on CUDA."""
    return lambda x, *args, **kwargs: function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)


def predict(model: SAM2UNeXT, batch_size: int, loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> int:
    """The peak memory in bytes, on a GPU, of an AdamW step or, without `loss` (of logits and mask), of inference."""
    functions = {name: in_float32(getattr(F, name)) for name in ("interpolate", "layer_norm")}
    model = copy.deepcopy(model).to("meta")
    with FakeTensorMode(allow_non_fake_inputs=True), LiveTensors() as live, mock.patch.multiple(F, **functions):
        model.to_empty(device="cpu")
        images, masks = (torch.empty(batch_size, channels, model.size, model.size) for channels in (3, 1))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad] if loss else []
        moments = [torch.empty_like(parameter) for parameter in trained for _ in range(2)]  # of AdamW
        with torch.inference_mode(loss is None):
            logits = model(images)
        if loss:
            loss(logits, masks).backward()
        del moments
    return live.peak


def main(args: argparse.Namespace) -> None:
    with cli.one_line_errors():
        precision = device.precision(args.precision, "cuda")
        with torch.device("meta"):
            model = SAM2UNeXT(**cli.options_of(SAM2UNeXT, args) | {"precision": precision})
        for use in ("train", "train --grad_checkpointing", "test"):
            loss = None if use == "test" else train.structure_loss
            model.train(loss is not None).sam.grad_checkpointing = "checkpointing" in use
            peak, larger = (predict(model, images, loss) for images in (args.batch_size, args.batch_size + 1))
            image = larger - peak
            free = {gpu: gpu * GIB * (1 - FRAGMENTED) - LIBRARIES - peak for gpu in GPUS}  # bytes that the batch leaves
            fits = {gpu: max(0, args.batch_size + math.floor(left / image)) for gpu, left in free.items()}
            largest = ", ".join(f"{gpu} GB: {images}" for gpu, images in fits.items())
            memory = f"{peak / GIB:.2f} GiB at the peak, {image / GIB:.2f} for each further image"
            print(f"{use}: {memory}; largest batch on {largest}")
        print(f"{LIBRARIES / GIB:g} GiB is set aside for CUDA's context and workspaces, {FRAGMENTED:.0%} for gaps")


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    cli.add_network(parser, CONFIGS)
    parser.add_argument("--batch_size", type=cli.number(), default=1, help="images per batch")
    parser.add_argument("--precision", default="bf16", choices=cli.PRECISIONS[1:], help="of the frozen encoders")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
