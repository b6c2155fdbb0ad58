"""Mask logits at the size of the output, a window at a time.

As the references resize: bilinear to the canvas, cut to the image, bilinear to the output. Both steps and both
axes are linear, so a window of the result needs a window of the masks only, and nothing of the size of all
masks at full resolution is ever made.

Shapes: n masks, h x w their cells, which cover the canvas, H x W the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from panoptic.layers.resize import mixed_cells

BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Pixels resampled at once: what fits a core's cache, or what keeps a GPU busy within bounded memory."""

Span = tuple[int, int]
"""Positions along an axis, from the first to one behind the last."""


@dataclass(frozen=True)
class Extent:
    """The area that masks of any resolution cover, the image within it, and the size of the output."""

    canvas: tuple[int, int]
    """Height and width of the batch tensor."""
    size: tuple[int, int]
    """Height and width of the image inside of it."""
    output: tuple[int, int]
    """Height and width of the result."""


@dataclass(frozen=True)
class Step:
    """One bilinear resize along one axis, in which each pixel mixes two positions; its tables are on the CPU."""

    before: Tensor
    """int64 [pixels], the first position that each pixel mixes."""
    after: Tensor
    """int64 [pixels], the second position that each pixel mixes."""
    share: Tensor
    """float32 [pixels], the share of the second position."""
    identity: bool
    """True where pixels are the positions themselves."""

    @classmethod
    def between(cls, cells: int, pixels: int, count: int) -> Step:
        """The first `count` pixels of a resize from `cells` to `pixels` (corners not aligned)."""
        return cls(*mixed_cells(cells, pixels, count), cells == pixels)

    def needs(self, pixels: Span) -> Span:
        """The positions that `pixels` mix."""
        if self.identity:
            return pixels
        return int(self.before[pixels[0]]), int(self.after[pixels[1] - 1]) + 1

    def apply(self, x: Tensor, dim: int, pixels: Span) -> Tensor:
        """The values of `pixels` along `dim`, from `x` with exactly the positions of `needs`."""
        if self.identity:
            return x
        part, first = slice(*pixels), self.needs(pixels)[0]
        before, after, share = ((k[part] - shift).to(x.device) for k, shift in self._tables(first))
        share = share.view([-1 if d == dim else 1 for d in range(x.ndim)])
        return torch.lerp(x.index_select(dim, before), x.index_select(dim, after), share)

    def _tables(self, first: int) -> tuple[tuple[Tensor, int], ...]:
        """The tables, and what to subtract from them where positions are counted from `first`."""
        return (self.before, first), (self.after, first), (self.share, 0)


class Axis:
    """One axis of an extent: from the cells of a mask to the pixels of the output.

    Each pixel belongs to the cell nearest to it and depends on that one and the two beside it alone.
    """

    def __init__(self, cells: int, canvas: int, size: int, output: int) -> None:
        # from cells to the pixels of the image at network size, and from these to the output
        self.coarse, self.fine = Step.between(cells, canvas, size), Step.between(size, output, output)
        coarse, fine = self.coarse, self.fine
        # both steps together: the four cells that each pixel of the output depends on, and their shares
        ends = [(fine.before, 1 - fine.share), (fine.after, fine.share)]
        touched = torch.stack([cell[end] for end, _ in ends for cell in (coarse.before, coarse.after)])
        shares = torch.stack(
            [part * other for end, part in ends for other in (1 - coarse.share[end], coarse.share[end])]
        )
        # the pixel belongs to the cell nearest to its centre of mass, and its cells are within one of that
        first = torch.where(shares > 0, touched, cells).amin(0)
        last = torch.where(shares > 0, touched, 0).amax(0)
        nearest = ((shares * touched).sum(0) + 0.5).long()
        self.owners = torch.minimum(torch.maximum(nearest, last - 1), first + 1).clamp(0, cells - 1)
        """int64 [pixels], the cell that each pixel belongs to."""
        self.weights = torch.zeros(output + 1, 3)
        """float32 [pixels + 1, 3], the shares of the cell before, its own and the one after; last row: 0."""
        places = (touched - self.owners + 1).clamp(0, 2)
        self.weights[:-1].scatter_add_(1, places.t(), shares.t())
        self.counts = torch.bincount(self.owners, minlength=cells)
        """int64 [cells], the pixels of each cell."""
        within = torch.arange(int(self.counts.max()))
        starts = self.counts.cumsum(0) - self.counts
        self.members = torch.where(within < self.counts[:, None], starts[:, None] + within, output)
        """int64 [cells, most], the pixels of each cell; `output` where it has fewer."""

    def around(self, cells: np.ndarray) -> list[Span | None]:
        """The pixels from the first to the last of each row of `cells`, bool [n, cells]; None where there is none."""
        stops = self.counts.cumsum(0).tolist()
        starts = [0, *stops]
        first, last = cells.argmax(1), cells.shape[1] - 1 - cells[:, ::-1].argmax(1)
        spans = [(starts[a], stops[b]) for a, b in zip(first, last, strict=True)]
        seen = np.asarray(cells.any(1)).tolist()
        return [span if some and span[0] < span[1] else None for span, some in zip(spans, seen, strict=True)]

    def needs(self, pixels: Span) -> Span:
        """The cells that `pixels` depend on."""
        return self.coarse.needs(self.fine.needs(pixels))

    def resample(self, x: Tensor, dim: int, pixels: Span) -> Tensor:
        """The values of `pixels` along `dim`, from `x` with exactly the cells of `needs`."""
        return self.fine.apply(self.coarse.apply(x, dim, self.fine.needs(pixels)), dim, pixels)


class MaskResampler:
    """Masks [n, h, w] resampled to the output's size, as far as they are asked for.

    Args:
        masks: logits of any resolution over the canvas; finer ones than the canvas are resized to it first.
        extent: the area that they cover.
        axes: rows and columns of another resampler of the same extent and resolution.
    """

    def __init__(self, masks: Tensor, extent: Extent, axes: tuple[Axis, Axis] | None = None) -> None:
        if len(masks) and (masks.shape[-2] > extent.canvas[0] or masks.shape[-1] > extent.canvas[1]):
            masks = F.interpolate(masks[None], size=extent.canvas, mode="bilinear", align_corners=False)[0]
        self.masks, self.extent, self.size = masks, extent, extent.output
        if axes is None:
            sides = zip(masks.shape[-2:], extent.canvas, extent.size, extent.output, strict=True)
            rows, columns = (Axis(*side) for side in sides)
            axes = rows, columns
        self.rows, self.columns = axes

    def select(self, index: Tensor) -> MaskResampler:
        """A resampler of some of the masks, int64 [m]."""
        return MaskResampler(self.masks[index], self.extent, (self.rows, self.columns))

    def window(self, masks: Tensor, rows: Span, columns: Span) -> Tensor:
        """A window [..., rows, columns] of the output of some of the masks, [..., h, w]."""
        top, bottom = self.rows.needs(rows)
        left, right = self.columns.needs(columns)
        # columns first, of few rows, and along an outer dimension: whole lines are copied, not single values
        x = masks[..., top:bottom, left:right].transpose(-1, -2).contiguous()
        x = self.columns.resample(x, x.ndim - 2, columns).transpose(-1, -2).contiguous()
        return self.rows.resample(x, x.ndim - 2, rows)

    @cached_property
    def _padded(self) -> Tensor:
        """The masks with their border repeated, [n, h + 2, w + 2]."""
        return F.pad(self.masks[None], (1, 1, 1, 1), mode="replicate")[0]

    def pixels(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [m, R] and columns [m, C] of the pixels of some cells (int64 [m], flat); H and W where there is none."""
        device, width = self.masks.device, self.masks.shape[-1]
        row, column = torch.div(cells, width, rounding_mode="floor"), cells % width
        return self.rows.members.to(device)[row], self.columns.members.to(device)[column]

    def values(self, masks: Tensor, cells: Tensor) -> Tensor:
        """The values of one mask (int64 [m]) at the pixels of one cell each, [m, R, C], as `pixels` orders them."""
        device, (height, width) = self.masks.device, self.masks.shape[-2:]
        # the 3x3 cells around each one; indices are flat, and (0, 0) of the padded mask is the corner of cell (0, 0)
        corner = masks * (height + 2) + torch.div(cells, width, rounding_mode="floor")
        corner = corner * (width + 2) + cells % width
        steps = torch.arange(3, device=device)
        around = (corner[:, None, None] + steps[:, None] * (width + 2) + steps).view(-1)
        # a pixel is the product of three shares along each axis with these cells
        rows, columns = self.pixels(cells)
        down, across = self.rows.weights.to(device)[rows], self.columns.weights.to(device)[columns]
        values = self._padded.view(-1).index_select(0, around).view(-1, 3, 3)
        return torch.bmm(torch.bmm(down, values), across.transpose(1, 2))

    def covered(self, cells: Tensor) -> list[tuple[Span, Span] | None]:
        """Rows and columns of the output around all pixels of `cells`, bool [n, h, w]; None where there is none."""
        marked = cells.cpu().numpy()
        rows, columns = self.rows.around(np.asarray(marked.any(2))), self.columns.around(np.asarray(marked.any(1)))
        return [(row, column) if row and column else None for row, column in zip(rows, columns, strict=True)]

    def bands(self, rows: Span, width: int) -> list[Span]:
        """The rows, cut into bands of `width` pixels that are small enough to be handled at once."""
        step = max(1, BLOCK["cpu" if self.masks.device.type == "cpu" else "cuda"] // max(1, width))
        return [(start, min(start + step, rows[1])) for start in range(rows[0], rows[1], step)]


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value of each cell and its eight neighbours, both [n, h, w]."""
    return _spread(x, torch.minimum), _spread(x, torch.maximum)


def _spread(x: Tensor, pick: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The pick of each cell and its eight neighbours: of three in a row, then of three such picks in a column."""
    for dim in (-1, -2):
        if x.shape[dim] > 1:
            pairs = pick(x.narrow(dim, 0, x.shape[dim] - 1), x.narrow(dim, 1, x.shape[dim] - 1))
            inner = pick(pairs.narrow(dim, 0, max(0, pairs.shape[dim] - 1)), pairs.narrow(dim, 1, pairs.shape[dim] - 1))
            x = torch.cat([pairs.narrow(dim, 0, 1), inner, pairs.narrow(dim, pairs.shape[dim] - 1, 1)], dim)
    return x
