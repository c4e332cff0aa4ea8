"""The network through torch.hub, for programs that need no checkout:

model = torch.hub.load("user/repo", "sam2unext", checkpoint="SAM2-UNeXT-20.pth")
model = torch.hub.load("user/repo", "sam2unext_random", sam2="tiny", aux="none")
"""

import typing  # torch.hub lists every class and function of this file

import torch

# torch.hub checks these before it calls a function, so the functions import the network.
dependencies = ["cv2", "filelock", "huggingface_hub", "hydra", "iopath", "numpy", "PIL", "safetensors", "timm", "torch",
                "torchvision", "tqdm"]  # fmt: skip


def sam2unext(checkpoint: str, **options: typing.Any) -> torch.nn.Module:
    """The trained network of a checkpoint, in eval mode; `predict(image)` gives its probability map.

    `checkpoint` is a file, a folder, or "user/model" on Hugging Face's hub. `options` are those of
    SAM2UNeXT.from_checkpoint or from_pretrained, such as download=True for missing encoders.
    """
    from pathlib import Path

    from SAM2UNeXT import SAM2UNeXT

    path = Path(checkpoint)
    if path.exists() or path.suffix == ".pth" or str(checkpoint).count("/") != 1:
        return SAM2UNeXT.from_checkpoint(checkpoint, **options)
    return SAM2UNeXT.from_pretrained(checkpoint, **options)


def sam2unext_random(**config: typing.Any) -> torch.nn.Module:
    """The network with random weights, in eval mode, without download; `config` are the arguments of SAM2UNeXT."""
    from SAM2UNeXT import SAM2UNeXT

    return SAM2UNeXT(**config).eval()
