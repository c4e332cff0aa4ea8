"""Hiera, the hierarchical vision transformer that encodes images in SAM 2.

Ryali et al., "Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles", arXiv:2306.00989; windowed
position embedding: Bolya et al., "Window Attention is Bugged", arXiv:2311.05613. Names of modules and parameters are
those of SAM 2, so that its checkpoints load. Shapes: B batch, H W height and width, C channels, D width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.utils.checkpoint import checkpoint

from sam2.modeling.backbones.utils import (
    MLP,
    PatchEmbed,
    absolute_position,
    max_pool_2x2,
    window_partition,
    window_unpartition,
)

NORM_EPS = 1e-6


class MultiScaleAttention(nn.Module):
    """Self-attention over the tokens of each map; with `q_pool` the queries are max-pooled 2x2 first."""

    def __init__(self, dim: int, dim_out: int, num_heads: int, q_pool: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.q_pool = q_pool
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

    def __init__(self, dim: int, dim_out: int, num_heads: int, window_size: int, mlp_ratio: float = 4.0):
        """`window_size` 0 means global attention. The stage changes where `dim_out` is not `dim`."""
        super().__init__()
        self.dim = dim
        self.dim_out = dim_out
        self.window_size = window_size
        self.new_stage = dim != dim_out
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = MultiScaleAttention(dim, dim_out, num_heads, q_pool=self.new_stage)
        self.norm2 = nn.LayerNorm(dim_out, eps=NORM_EPS)
        self.mlp = MLP(dim_out, int(dim_out * mlp_ratio))
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
        """Attention within windows of a map; pooled queries halve map and windows."""
        _, H, W, _ = x.shape
        scale = 2 if self.new_stage else 1
        windows, (padded_h, padded_w) = window_partition(x, self.window_size)  # (B * windows, S, S, dim)
        windows = self.attn(windows)  # (B * windows, S / scale, S / scale, dim_out)
        padded = (padded_h // scale, padded_w // scale)
        return window_unpartition(windows, self.window_size // scale, padded, (H // scale, W // scale))


class Hiera(nn.Module):
    """Four stages of `MultiScaleBlock`; returns the map after each stage.

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
        """(B, 3, H, W), sides multiples of 32 -> maps (B, C, H/4, W/4), then 1/8, 1/16 and 1/32, channels doubling.

        Raises ValueError for other sides.
        """
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
