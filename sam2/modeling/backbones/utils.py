"""Small layers of the Hiera trunk. Shapes: B batch, H W height and width, C channels, S side of a window."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PORTION = 8 * 2**20  # bytes of the widest intermediate result that a CPU works on at a time


class PatchEmbed(nn.Module):
    """Overlapping patches: a 7x7 convolution of stride 4, (B, 3, H, W) -> (B, H/4, W/4, C)."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=7, stride=4, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class MLP(nn.Module):
    """Linear, exact GELU, Linear; acts on the last dimension."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](F.gelu(self.layers[0](x)))


def window_partition(x: Tensor, window_size: int) -> tuple[Tensor, tuple[int, int]]:
    """Cuts (B, H, W, C) into windows (B * windows, S, S, C).

    Where windows do not fit, zeros are added at the bottom and right. Returns the windows, row by row within each
    image, and the padded (height, width) that `window_unpartition` needs.
    """
    B, H, W, C = x.shape
    S = window_size
    pad_h, pad_w = -H % S, -W % S
    if pad_h or pad_w:
        x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    H, W = H + pad_h, W + pad_w
    x = x.view(B, H // S, S, W // S, S, C).transpose(2, 3)  # (B, rows, columns, S, S, C)
    return x.reshape(-1, S, S, C), (H, W)


def window_unpartition(windows: Tensor, window_size: int, pad_hw: tuple[int, int], hw: tuple[int, int]) -> Tensor:
    """Puts windows (B * windows, S, S, C) together to (B, H, W, C) and drops the padding; `hw` is (H, W)."""
    S = window_size
    rows, columns = pad_hw[0] // S, pad_hw[1] // S
    x = windows.view(-1, rows, columns, S, S, windows.shape[-1]).transpose(2, 3)
    x = x.reshape(-1, rows * S, columns * S, windows.shape[-1])
    return x[:, : hw[0], : hw[1]]


def max_pool_2x2(x: Tensor) -> Tensor:
    """2x2 max pooling of stride 2 for channels-last maps: (B, H, W, C) -> (B, H/2, W/2, C)."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), kernel_size=2).permute(0, 2, 3, 1)


def absolute_position(background: Tensor, window: Tensor, height: int, width: int) -> Tensor:
    """The position embedding of a map (arXiv:2311.05613): a resized background plus a tiled window.

    `background` (1, C, h, w) is resized bicubically to height x width; `window` (1, C, S, S) is repeated over it, so
    both sides must be multiples of S. Returns (1, height, width, C).
    """
    resized = F.interpolate(background, size=(height, width), mode="bicubic")
    tiled = torch.tile(window, (1, 1, height // window.shape[2], width // window.shape[3]))
    return (resized + tiled).permute(0, 2, 3, 1)


def sums_as_published(x: Tensor) -> bool:
    """Whether to add up in the order of the published program: while training in fp32.

    Any other order is as right, but AdamW's first steps divide by gradients near 0 and make visible differences of
    the last bits, so that losses would no longer be those of the original.
    """
    return torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


def portions_of(values: int, device: torch.device) -> int:
    """Into how many portions to cut the work whose widest intermediate result holds so many numbers of 4 bytes.

    What a portion needs stays in a CPU's cache and in memory that malloc has at hand, whereas it gives large arrays
    back to the system each time, to be filled with zeros anew. GPUs, compiled code and the backward pass want it all
    at once.
    """
    whole = device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling()
    return 1 if whole else math.ceil(4 * values / PORTION)


def in_portions(function: Callable[[Tensor], Tensor], x: Tensor, values: int) -> Tensor:
    """function(x), which acts on each entry of the first dimension alone; on a CPU, a portion of x at a time.

    `values` is how many numbers the widest intermediate result holds for one entry.
    """
    portions = min(len(x), portions_of(len(x) * values, x.device))
    if portions == 1:
        return function(x)
    # Portions are of one length: malloc fits the next one's arrays where those of the last one were.
    return joined(map(function, x.split(math.ceil(len(x) / portions))), len(x))


def joined(parts: Iterable[Tensor], length: int) -> Tensor:
    """torch.cat(parts), `length` long, without two of it: each part is copied to its place when it is made."""
    whole, done = None, 0
    for part in parts:
        if whole is None:
            whole = part.new_empty((length, *part.shape[1:]))
        whole[done : done + len(part)] = part
        done += len(part)
    return whole
