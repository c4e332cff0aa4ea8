"""Small layers of the Hiera trunk. Shapes: B batch, H W height and width, C channels, S side of a window."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    """Splits (B, H, W, C) into windows (B * windows, S, S, C), row by row within each image.

    Pads with zeros at the bottom and right where the windows do not fit. Returns the windows and the padded
    (height, width) that `window_unpartition` needs.
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
    """Merges windows (B * windows, S, S, C) into (B, H, W, C) and removes the padding; `hw` is (H, W)."""
    S = window_size
    rows, columns = pad_hw[0] // S, pad_hw[1] // S
    x = windows.view(-1, rows, columns, S, S, windows.shape[-1]).transpose(2, 3)
    x = x.reshape(-1, rows * S, columns * S, windows.shape[-1])
    return x[:, : hw[0], : hw[1]]


def max_pool_2x2(x: Tensor) -> Tensor:
    """2x2 max pooling of stride 2 for channels-last maps: (B, H, W, C) -> (B, H/2, W/2, C)."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), kernel_size=2).permute(0, 2, 3, 1)


def absolute_position(background: Tensor, window: Tensor, height: int, width: int) -> Tensor:
    """The absolute window position embedding (1, height, width, C) of arXiv:2311.05613.

    Resizes `background` (1, C, h, w) bicubically to height x width and adds `window` (1, C, S, S) tiled over it; both
    sides must be multiples of S.
    """
    resized = F.interpolate(background, size=(height, width), mode="bicubic", align_corners=False)
    tiled = torch.tile(window, (1, 1, height // window.shape[2], width // window.shape[3]))
    return (resized + tiled).permute(0, 2, 3, 1)
