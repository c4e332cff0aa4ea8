"""Hiera, the hierarchical vision transformer that encodes images in SAM 2.

Ryali et al., "Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles", arXiv:2306.00989; windowed
position embedding: Bolya et al., "Window Attention is Bugged", arXiv:2311.05613. Parameters have SAM 2's names, so that
its checkpoints load. Shapes: B batch, H W height and width, C channels, D width of a head, S side of a window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.utils.checkpoint import checkpoint

NORM_EPS = 1e-6


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


def max_pool_2x2(x: Tensor) -> Tensor:
    """2x2 max pooling of stride 2 for channels-last maps: (B, H, W, C) -> (B, H/2, W/2, C)."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), kernel_size=2).permute(0, 2, 3, 1)


def absolute_position(background: Tensor, window: Tensor, height: int, width: int) -> Tensor:
    """The absolute window position embedding (1, height, width, C) of arXiv:2311.05613.

    It is `background` (1, C, h, w), resized bicubically, plus `window` (1, C, S, S), tiled.
    """
    resized = F.interpolate(background, size=(height, width), mode="bicubic", align_corners=False)
    tiled = torch.tile(window, (1, 1, height // window.shape[2], width // window.shape[3]))
    return (resized + tiled).permute(0, 2, 3, 1)


class MultiScaleAttention(nn.Module):
    """Self-attention over the tokens of each map; with `q_pool` the queries are max-pooled 2x2 first."""

    def __init__(self, dim: int, dim_out: int, num_heads: int, q_pool: bool = False):
        super().__init__()
        self.num_heads, self.q_pool = num_heads, q_pool
        self.qkv = nn.Linear(dim, 3 * dim_out)
        self.proj = nn.Linear(dim_out, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim_out), or half of H and W where queries are pooled."""
        B, H, W, _ = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, -1)
        q, k, v = qkv.unbind(2)  # (B, H * W, heads, D) each
        if self.q_pool:
            q = max_pool_2x2(q.reshape(B, H, W, -1))
            H, W = q.shape[1:3]
            q = q.reshape(B, H * W, self.num_heads, -1)
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(x.transpose(1, 2).reshape(B, H, W, -1))


class MultiScaleBlock(nn.Module):
    """A transformer block; the first of a new stage doubles the channels and halves the map."""

    def __init__(self, dim: int, dim_out: int, num_heads: int, window_size: int):
        """`window_size` 0 means global attention. A new stage begins where `dim_out` differs from `dim`."""
        super().__init__()
        self.dim, self.dim_out, self.window_size = dim, dim_out, window_size
        self.new_stage = dim != dim_out
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = MultiScaleAttention(dim, dim_out, num_heads, q_pool=self.new_stage)
        self.norm2 = nn.LayerNorm(dim_out, eps=NORM_EPS)
        self.mlp = MLP(dim_out, 4 * dim_out)
        if self.new_stage:
            self.proj = nn.Linear(dim, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim_out), or (B, H/2, W/2, dim_out) for the first block of a stage."""
        shortcut = x
        x = self.norm1(x)
        if self.new_stage:
            shortcut = max_pool_2x2(self.proj(x))
        x = self.window_attention(x) if self.window_size else self.attn(x)
        x = shortcut + x
        return x + self.mlp(self.norm2(x))

    def window_attention(self, x: Tensor) -> Tensor:
        """Attention within windows, padded with zeros at the bottom and right; pooled queries halve map and windows."""
        B, H, W, C = x.shape
        S = self.window_size
        if H % S or W % S:
            x = F.pad(x, (0, 0, 0, -W % S, 0, -H % S))
        rows, columns = x.shape[1] // S, x.shape[2] // S
        x = x.view(B, rows, S, columns, S, C).transpose(2, 3)  # (B, rows, columns, S, S, C)
        x = self.attn(x.reshape(-1, S, S, C))  # (B * rows * columns, S, S, C), with the new S and C
        S, C = x.shape[2:]
        x = x.view(B, rows, columns, S, S, C).transpose(2, 3).reshape(B, rows * S, columns * S, C)
        return x[:, : H // 2, : W // 2] if self.new_stage else x[:, :H, :W]


class Hiera(nn.Module):
    """Four stages of `MultiScaleBlock`; returns the map (B, C, H, W) after each stage.

    `channel_list` holds the widths of the four maps from the deepest to the shallowest, as in SAM 2.
    """

    def __init__(
        self,
        embed_dim: int,  # channels of the first stage; doubled at each following one
        num_heads: int,  # heads of the first stage; doubled likewise
        stages: tuple[int, ...],  # blocks in each stage
        window_spec: tuple[int, ...],  # side of the attention windows in each stage, in tokens
        global_att_blocks: tuple[int, ...],  # blocks, counted from 0, that attend to the whole map
        window_pos_embed_bkg_spatial_size: tuple[int, int],  # size of the background position embedding
    ):
        super().__init__()
        self.grad_checkpointing = False  # recompute each block's activations in the backward pass
        self.stage_ends = [sum(stages[: i + 1]) - 1 for i in range(len(stages))]
        self.patch_embed = PatchEmbed(embed_dim)
        self.pos_embed = Parameter(torch.zeros(1, embed_dim, *window_pos_embed_bkg_spatial_size))
        self.pos_embed_window = Parameter(torch.zeros(1, embed_dim, window_spec[0], window_spec[0]))

        self.blocks = nn.ModuleList()
        dim, stage = embed_dim, 0
        for i in range(sum(stages)):
            # The first block of a stage still attends in the windows of the stage before it.
            window_size = 0 if i in global_att_blocks else window_spec[stage]
            if i - 1 in self.stage_ends:
                stage += 1
            dim_out = embed_dim * 2**stage
            self.blocks.append(MultiScaleBlock(dim, dim_out, num_heads * 2**stage, window_size))
            dim = dim_out
        self.channel_list = [self.blocks[end].dim_out for end in reversed(self.stage_ends)]

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W), sides multiples of 32, else ValueError -> maps at 1/4, 1/8, 1/16, 1/32, channels doubling."""
        if x.shape[-2] % 32 or x.shape[-1] % 32:
            raise ValueError(f"the sides of the input must be multiples of 32, got {x.shape[-2]} x {x.shape[-1]}")
        x = self.patch_embed(x)  # (B, H/4, W/4, C)
        x = x + absolute_position(self.pos_embed, self.pos_embed_window, x.shape[1], x.shape[2])
        maps = []
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing:
                # Non-reentrant: a reentrant checkpoint would not train an adapter whose input needs no gradient.
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
            if i in self.stage_ends:
                maps.append(x.permute(0, 3, 1, 2))
        return maps
