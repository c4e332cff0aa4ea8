"""SAM2-UNeXT in the plain arithmetic of the published program: nothing folded, kept, fused or cut into portions.

This defines what the fast network must give; benchmark.py times it against that one and tests compare the two. It runs
on the weights of a SAM2UNeXT. Shapes: B batch, H W height and width, C channels, N tokens, D width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam2.modeling.backbones.hieradet import Hiera, MultiScaleAttention
from sam2.modeling.backbones.utils import absolute_position, max_pool_2x2, window_partition, window_unpartition
from SAM2UNeXT import Adapter, SAM2UNeXT


class PlainNetwork(nn.Module):
    """Computes what `model`, whose weights it shares, does: images (B, 3, H, W) to logits (B, 1, H, W)."""

    def __init__(self, model: SAM2UNeXT):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        aux_map = None
        if model.dino is not None:
            low = F.interpolate(x, size=(model.aux_size, model.aux_size), mode="bilinear", align_corners=False)
            with torch.no_grad():
                aux_map = model.dino(low)[-1]  # (B, C, A/P, A/P)
        x1, x2, x3, x4 = (glue(model, i, map_, aux_map) for i, map_ in enumerate(trunk(model.sam, x), 1))
        x = up(model.up4, x4)  # (B, 128, H/16, W/16)
        x = up(model.up3, torch.cat([x, x3], dim=1))
        x = up(model.up2, torch.cat([x, x2], dim=1))
        x = up(model.up1, torch.cat([x, x1], dim=1))  # (B, 128, H/2, W/2)
        return F.interpolate(model.head(x), scale_factor=2, mode="bilinear", align_corners=False)


def trunk(sam: Hiera, x: Tensor) -> list[Tensor]:
    """The map (B, C, H, W) after each stage."""
    x = sam.patch_embed(x)  # (B, H/4, W/4, C)
    x = x + absolute_position(sam.pos_embed, sam.pos_embed_window, *x.shape[1:3])
    maps = []
    for i, adapter in enumerate(sam.blocks):
        x = block(adapter, x)
        if i in sam.stage_ends:
            maps.append(x.permute(0, 3, 1, 2))
    return maps


def block(adapter: Adapter, x: Tensor) -> Tensor:
    """An adapter and its block: (B, H, W, C) -> the same, or (B, H/2, W/2, 2C) for the first block of a stage."""
    block = adapter.block
    x = x + adapter.prompt_learn(x)
    shortcut, x = x, block.norm1(x)
    scale = 2 if block.new_stage else 1  # pooled queries halve the windows too
    if block.new_stage:
        shortcut = max_pool_2x2(block.proj(x))
    if block.window_size == 0:
        x = attention(block.attn, x)
    else:
        windows, padded = window_partition(x, block.window_size)
        windows = attention(block.attn, windows)
        padded = tuple(side // scale for side in padded)
        x = window_unpartition(windows, block.window_size // scale, padded, shortcut.shape[1:3])
    x = shortcut + x
    return x + block.mlp(block.norm2(x))


def attention(attn: MultiScaleAttention, x: Tensor) -> Tensor:
    B, H, W, _ = x.shape
    q, k, v = attn.qkv(x).reshape(B, H * W, 3, attn.num_heads, -1).unbind(2)  # (B, N, heads, D) each
    if attn.q_pool:
        q = max_pool_2x2(q.reshape(B, H, W, -1))
        H, W = q.shape[1:3]
        q = q.reshape(B, H * W, attn.num_heads, -1)
    x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return attn.proj(x.transpose(1, 2).reshape(B, H, W, -1))


def glue(model: SAM2UNeXT, level: int, sam_map: Tensor, aux_map: Tensor | None) -> Tensor:
    """Both maps, of one width and size, behind each other, then to the decoder's width."""
    if aux_map is not None:
        aligned = getattr(model, f"align{level}")(aux_map)
        aligned = F.interpolate(aligned, size=sam_map.shape[-2:], mode="bilinear", align_corners=False)
        sam_map = torch.cat([sam_map, aligned], dim=1)
    return getattr(model, f"reduce{level}")(sam_map)


def up(step: nn.Module, x: Tensor) -> Tensor:
    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    return step.conv.double_conv(x)
