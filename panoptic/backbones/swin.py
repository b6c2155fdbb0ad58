"""Swin Transformer (Liu et al. 2021) as a pyramid, with the key names of the original and of MaskFormer's.

Attention within windows, every second block within windows shifted by half of one. As dense prediction
has it: a map is padded to whole windows before it is shifted (timm shifts first, which gives other numbers
where a map is no multiple of the window), and each stage's output has a norm of its own.

Shapes: B images, H x W canvas, h x w a feature map, C channels, w windows of s x s tokens, n = s s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.backbones.config import STAGES

MASKED = -100.0
"""Added to the logits between tokens that the cyclic shift has brought together, as the original does."""


@dataclass(frozen=True)
class Size:
    """The shape of one member of the family."""

    width: int
    """Channels of the first stage; each further stage doubles them."""
    blocks: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    window: int


SWINS = {
    "swin_tiny": Size(96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "swin_small": Size(96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "swin_base": Size(128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "swin_large": Size(192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
}


class Swin(nn.Module):
    """Features "res2" to "res5" at strides 4 to 32, each through its own layer norm.

    Args:
        name: a key of `SWINS`.
        drop_path: probability of skipping the last block's residual branches in training; earlier
            blocks less, linearly from 0 (0.3 in MaskFormer and Mask2Former).
    """

    def __init__(self, name: str, drop_path: float = 0.0) -> None:
        super().__init__()
        size = SWINS[name]
        widths = [size.width * 2**stage for stage in range(4)]
        self.channels: dict[str, int] = dict(zip(STAGES, widths, strict=True))
        self.strides: dict[str, int] = {stage: 4 * 2**k for k, stage in enumerate(STAGES)}
        rates = [drop_path * k / (sum(size.blocks) - 1) for k in range(sum(size.blocks))]
        self.patch_embed = Patches(size.width)
        self.layers = nn.ModuleList()
        for stage, (width, blocks, heads) in enumerate(zip(widths, size.blocks, size.heads, strict=True)):
            first = sum(size.blocks[:stage])
            self.layers.append(Stage(width, heads, size.window, rates[first : first + blocks], last=stage == 3))
            self.add_module(f"norm{stage}", nn.LayerNorm(width))
        self.apply(_initialise)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] of any size to the four maps [B, C, h, w]; quarters and halves are rounded up."""
        x = self.patch_embed(x)
        features = {}
        for index, (name, stage) in enumerate(zip(STAGES, cast(list[Stage], self.layers), strict=True)):
            x = stage(x)
            features[name] = self.get_submodule(f"norm{index}")(x).permute(0, 3, 1, 2).contiguous()
            x = stage.downsample(x) if index < 3 else x
        return features

    def stage_names(self) -> list[list[str]]:
        """The modules of the five freezable stages. Merging patches belongs to the stage that it leads to."""
        stages = [["patch_embed"], ["layers.0.blocks", "norm0"]]
        stages += [[f"layers.{k - 1}.downsample", f"layers.{k}.blocks", f"norm{k}"] for k in (1, 2, 3)]
        return stages

    def fix_stages(self, count: int) -> None:
        """Stop skipping residual branches in the first `count` stages, the stem included: they are frozen."""
        for stage in cast(list[Stage], list(self.layers))[: max(0, count - 1)]:
            for block in cast(list[Block], stage.blocks):
                block.drop_path = 0.0


class Patches(nn.Module):
    """4x4 pixels to a token, after zeros at the right and bottom have filled up the last ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, 4, 4)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, ceil(H / 4), ceil(W / 4), C]."""
        x = F.pad(x, (0, -x.shape[-1] % 4, 0, -x.shape[-2] % 4))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Blocks whose windows are shifted in turn, and the merging of patches that follows them."""

    def __init__(self, width: int, heads: int, window: int, rates: list[float], last: bool) -> None:
        super().__init__()
        self.window = window
        shifts = [0 if k % 2 == 0 else window // 2 for k in range(len(rates))]
        self.blocks = nn.ModuleList(
            Block(width, heads, window, shift, rate) for shift, rate in zip(shifts, rates, strict=True)
        )
        self.downsample = nn.Identity() if last else Merging(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, C] to the same."""
        height, width = (-(-side // self.window) * self.window for side in x.shape[1:3])
        mask = shift_mask(height, width, self.window, self.window // 2, x.device)
        for block in self.blocks:
            x = block(x, mask)
        return x


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, width: int, heads: int, window: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.window, self.shift, self.drop_path = window, shift, drop_path
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window)
        self.mlp = MLP(width, 4 * width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, h, w, C] to the same; `mask` [w, n, n] is for shifted windows."""
        x = x + self._dropped(self._attend(self.norm1(x), mask))
        return x + self._dropped(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, mask: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window, 0, -height % self.window))
        padded = x.shape[1:3]
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        x = self.attn(to_windows(x, self.window), mask if self.shift else None)
        x = from_windows(x, self.window, padded[0], padded[1])
        x = torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x
        return x[:, :height, :width]

    def _dropped(self, x: Tensor) -> Tensor:
        """Stochastic depth: the branch of some images is 0, that of the others grows to keep the mean."""
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) < keep
        return x * (kept / keep).to(x.dtype)


class WindowAttention(nn.Module):
    """Attention among the tokens of a window, with a learnt bias for each relative position."""

    relative_position_index: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        # a function of the window alone, so files' copies of it are not read
        self.register_buffer("relative_position_index", relative_positions(window), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B w, n, C] to the same; `mask` [w, n, n] is added to the logits."""
        count, tokens, width = x.shape
        query, key, value = self.qkv(x).view(count, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[
            None
        ]  # [1, heads, n, n]
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(count // len(mask), 1, 1, 1)
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return self.proj(x.transpose(1, 2).reshape(count, tokens, width))


class MLP(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to the same."""
        return self.fc2(F.gelu(self.fc1(x)))


class Merging(nn.Module):
    """Four neighbouring tokens to one of twice the width; odd sides are padded."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, C] to [B, ceil(h / 2), ceil(w / 2), 2 C]; left before right, each from above."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1)))


def to_windows(x: Tensor, window: int) -> Tensor:
    """[B, h, w, C] of whole windows to [B w, n, C]."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // window, window, width // window, window, channels)
    return x.transpose(2, 3).reshape(-1, window * window, channels)


def from_windows(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """The inverse of `to_windows`."""
    x = x.view(-1, height // window, width // window, window, window, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, x.shape[-1])


def shift_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """float [w, n, n]: `MASKED` between tokens of different regions of the shifted map, 0 within one."""

    def region(side: int) -> Tensor:
        place = torch.arange(side, device=device)
        return (place >= side - window).int() + (place >= side - shift)

    regions = 3 * region(height)[:, None] + region(width)[None]
    regions = to_windows(regions[None, ..., None], window).squeeze(-1)
    return (regions[:, :, None] != regions[:, None]) * MASKED


def relative_positions(window: int) -> Tensor:
    """int64 [n, n], the row of the bias table that belongs to a pair of tokens."""
    rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    return (rows[:, None] - rows + window - 1) * (2 * window - 1) + columns[:, None] - columns + window - 1


def _initialise(module: nn.Module) -> None:
    """Truncated normal for linear layers, as in the original; the rest keeps torch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
