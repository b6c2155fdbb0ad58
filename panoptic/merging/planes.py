"""Mask logits at the size at which they are wanted, a window at a time.

As the references resize: bilinear to the canvas, cut to the image, bilinear to the output. Both steps and both
axes are linear, so a window of the result needs a window of the masks only, and nothing of the size of all
masks at full resolution is ever made.

Shapes: n masks, h x w their cells, which cover the canvas, H x W the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Pixels resampled at once: what fits a core's cache, or what keeps a GPU busy within bounded memory."""

Span = tuple[int, int]
"""Positions along an axis, from the first to one behind the last."""


@dataclass(frozen=True)
class Extent:
    """What masks of any resolution cover, and which part of it is wanted at which size."""

    canvas: tuple[int, int]
    """Height and width of the batch tensor."""
    size: tuple[int, int]
    """Of the image inside of it."""
    output: tuple[int, int]
    """Of the result."""


@dataclass(frozen=True)
class Step:
    """One bilinear resize along one axis: each pixel mixes two positions by the share of the second. On the CPU."""

    before: Tensor
    after: Tensor
    share: Tensor
    identity: bool
    """Pixels are the positions themselves."""

    @classmethod
    def between(cls, cells: int, pixels: int, count: int) -> Step:
        """The first `count` pixels of a resize from `cells` to `pixels` (corners not aligned)."""
        positions = ((torch.arange(count) + 0.5) * (cells / pixels) - 0.5).clamp(min=0)
        before = positions.long().clamp(max=cells - 1)
        return cls(before, (before + 1).clamp(max=cells - 1), positions - before, cells == pixels)

    def needs(self, pixels: Span) -> Span:
        """The positions that these pixels mix."""
        if self.identity:
            return pixels
        return int(self.before[pixels[0]]), int(self.after[pixels[1] - 1]) + 1

    def apply(self, x: Tensor, dim: int, pixels: Span) -> Tensor:
        """These pixels, from exactly the positions that they need, along `dim`."""
        if self.identity:
            return x
        part, first = slice(*pixels), self.needs(pixels)[0]
        before, after, share = ((k[part] - shift).to(x.device) for k, shift in self._tables(first))
        share = share.view([-1 if d == dim else 1 for d in range(x.ndim)])
        return torch.lerp(x.index_select(dim, before), x.index_select(dim, after), share)

    def _tables(self, first: int) -> tuple[tuple[Tensor, int], ...]:
        return (self.before, first), (self.after, first), (self.share, 0)


class Axis:
    """One axis of an extent: from the cells of a mask to the pixels of the output."""

    def __init__(self, cells: int, canvas: int, size: int, output: int) -> None:
        self.coarse, self.fine = Step.between(cells, canvas, size), Step.between(size, output, output)
        self.anchors = (self.coarse.before[self.fine.before] + 1).clamp(max=cells - 1)
        """int64 [pixels], the middle one of the three cells at most that each pixel depends on."""

    def needs(self, pixels: Span) -> Span:
        """The cells that these pixels depend on."""
        return self.coarse.needs(self.fine.needs(pixels))

    def resample(self, x: Tensor, dim: int, pixels: Span) -> Tensor:
        """These pixels, from exactly the cells that they need, along `dim`."""
        return self.fine.apply(self.coarse.apply(x, dim, self.fine.needs(pixels)), dim, pixels)


class Planes:
    """Masks [n, h, w] as planes of the output's size."""

    def __init__(self, masks: Tensor, extent: Extent) -> None:
        self.masks, self.size = masks, extent.output
        sides = zip(masks.shape[-2:], extent.canvas, extent.size, extent.output, strict=True)
        self.rows, self.columns = (Axis(*side) for side in sides)

    def window(self, masks: Tensor, rows: Span, columns: Span) -> Tensor:
        """[..., rows, columns] of some of the masks, [..., h, w]."""
        top, bottom = self.rows.needs(rows)
        left, right = self.columns.needs(columns)
        # columns first, of few rows, and along an outer dimension: whole lines are copied, not single values
        x = masks[..., top:bottom, left:right].transpose(-1, -2).contiguous()
        x = self.columns.resample(x, x.ndim - 2, columns).transpose(-1, -2).contiguous()
        return self.rows.resample(x, x.ndim - 2, rows)

    def covered(self, cells: Tensor) -> tuple[Span, Span] | None:
        """The rows and columns of the output that may depend on `cells`, bool [h, w]; None where there is none."""
        spans = []
        for axis, dim in ((self.rows, 1), (self.columns, 0)):
            found = cells.any(dim).cpu()[axis.anchors].nonzero()
            if not len(found):
                return None
            spans.append((int(found[0]), int(found[-1]) + 1))
        return spans[0], spans[1]

    def bands(self, rows: Span, width: int) -> list[Span]:
        """The rows, cut into bands that are small enough to be handled at once, where one is so many pixels wide."""
        step = max(1, BLOCK["cpu" if self.masks.device.type == "cpu" else "cuda"] // max(1, width))
        return [(start, min(start + step, rows[1])) for start in range(rows[0], rows[1], step)]


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value of each cell and its eight neighbours, both [n, h, w]."""
    return _spread(x, torch.minimum), _spread(x, torch.maximum)


def _spread(x: Tensor, pick) -> Tensor:  # type: ignore[no-untyped-def]
    for dim in (-1, -2):
        if x.shape[dim] > 1:
            pairs = pick(x.narrow(dim, 0, x.shape[dim] - 1), x.narrow(dim, 1, x.shape[dim] - 1))
            inner = pick(pairs.narrow(dim, 0, max(0, pairs.shape[dim] - 1)), pairs.narrow(dim, 1, pairs.shape[dim] - 1))
            x = torch.cat([pairs.narrow(dim, 0, 1), inner, pairs.narrow(dim, pairs.shape[dim] - 1, 1)], dim)
    return x
