"""The assignment of pixels to queries, by the highest product of class and mask probability.

Two ways to the same answer. Where masks are sure of themselves, most cells are settled as a whole: all that their
pixels depend on is higher for one query than for all others. Only where queries contend, or a mask begins or ends,
are pixels interpolated. Where masks are vague, as before training, whole windows cost less than many cells.

Shapes: n queries, h x w cells of a mask, m of these cells, H x W the output, R x C pixels of a cell at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from panoptic.models.mask_transformer.mask_resampler import BLOCK, MaskResampler, extremes

VAGUE = 1 / 16
"""Share of all cells of all queries from which on windows are cheaper (a pixel costs 15 times as much in a cell)."""


@dataclass(frozen=True)
class PixelAssignment:
    """The winners of all pixels, and what each query won."""

    codes: Tensor
    """int32 [H, W], 2 k + 1 where query k (1..n) wins and its mask is at least 1/2, 2 k where it is less."""
    won: Tensor
    """int64 [n, 2] on the CPU, the pixels that each query wins: where its mask is less than 1/2, and where not."""
    whole: Tensor
    """int64 [n] on the CPU, the pixels where each mask is at least 1/2, won or not."""


def assign_pixels(resampler: MaskResampler, scores: Tensor) -> PixelAssignment:
    """The assignment of every pixel to a query, to the first of equally high ones.

    Args:
        resampler: the masks, n at least 1.
        scores: float [n], the class probabilities.
    """
    products = resampler.masks.sigmoid().mul_(scores[:, None, None])
    low, high = extremes(products)
    cells = _Cells(resampler, scores, low.flatten(1), high.flatten(1))
    if int(cells.asked.sum()) <= VAGUE * products.numel():
        return cells.assignment()
    # a query matters where nobody is higher all around, and where its own mask has to be counted
    return _by_windows(resampler, scores, high >= torch.minimum(low.amax(0), scores[:, None, None] / 2))


class _Cells:
    """The assignment cell by cell.

    Args:
        low: [n, h w], the least product of each query that a pixel of the cell can depend on.
        high: the highest.
    """

    def __init__(self, resampler: MaskResampler, scores: Tensor, low: Tensor, high: Tensor) -> None:
        self.resampler, self.scores = resampler, scores
        half = scores[:, None] / 2
        # a query contends where it may be the highest, is inside where its mask is at least 1/2 in every pixel, and has
        # an edge where it is in some
        contends = high >= low.amax(0)
        self.inside = low >= half
        self.edge = (high >= half) & ~self.inside
        # the contender of each cell with one; a product of matrices is ten times faster than the place of a maximum
        numbers = torch.arange(float(len(scores)), device=low.device)
        self.owner = (numbers @ contends.float()).long().clamp_(max=len(scores) - 1)
        # unclear are cells of several contenders, or of one whose mask ends within; others are settled as a whole
        disputed = contends.sum(0, dtype=torch.int32) > 1
        self.unclear = disputed | self.edge.gather(0, self.owner[None])[0]
        self.contends = contends & self.unclear
        self.asked = (self.edge | self.contends).sum(0, dtype=torch.int32)
        """int32 [h w], how many queries have to be interpolated in each cell."""

    def assignment(self) -> PixelAssignment:
        """The assignment of settled cells first, then of the pixels of the others."""
        resampler, device = self.resampler, self.asked.device
        count, height, width = resampler.masks.shape
        # pixels of cells that are inside a mask: those of its rows times those of its columns
        rows, columns = (axis.counts.to(device).float() for axis in (resampler.rows, resampler.columns))
        inside = self.inside.view(count, height, width).float() @ columns
        self.whole = (inside.double() @ rows.double()).long().cpu()
        # codes and areas of settled cells
        settled = self.owner * 2 + 2 + self.inside.gather(0, self.owner[None])[0]
        areas = (rows[:, None] * columns).view(-1).double() * ~self.unclear
        # not bincount, which has no deterministic kernel for weights on a GPU
        self.won = areas.new_zeros(2 * count + 2).index_add_(0, settled, areas).long().view(-1, 2)[1:].cpu()
        # codes of cells are spread to their pixels; one row and column more take what is written for pixels that a cell
        # does not have
        spread = [torch.cat([axis.owners, axis.owners[-1:]]).to(device) for axis in (resampler.rows, resampler.columns)]
        codes = settled.to(torch.int32).view(height, width)
        self.codes = codes.index_select(0, spread[0]).index_select(1, spread[1])
        # interpolate the cells that need it, as many at once as memory is meant for
        cells = torch.nonzero(self.asked)[:, 0]
        most = resampler.rows.members.shape[1] * resampler.columns.members.shape[1]
        budget = BLOCK["cpu" if device.type == "cpu" else "cuda"] // most
        step = max(1, budget * len(cells) // max(1, int(self.asked.sum())))
        for part in cells.split(step) if len(cells) else ():
            self._evaluate(part)
        return PixelAssignment(self.codes[:-1, :-1], self.won, self.whole)

    def _evaluate(self, cells: Tensor) -> None:
        """Interpolate, write and count the pixels of some cells, int64 [m]."""
        # mask probabilities [pairs, R, C] of each cell and query that is asked for there
        edge, contends, unclear = self.edge[:, cells], self.contends[:, cells], self.unclear[cells]
        place, query = torch.nonzero((edge | contends).t()).unbind(1)  # ordered by cell, then by query
        x = self.resampler.values(query, cells[place]).sigmoid_()
        rows, columns = self.resampler.pixels(cells)
        exists = (rows < self.resampler.size[0])[:, :, None] & (columns < self.resampler.size[1])[:, None]
        # pixels of at least 1/2 of the masks that have an edge here
        ends = torch.nonzero(edge[query, place])[:, 0]
        own = ((x[ends] >= 0.5) & exists[place[ends]]).sum((1, 2))
        self.whole += own.new_zeros(len(self.scores)).index_add_(0, query[ends], own).cpu()
        # the highest of the contenders, written and counted where the cell is unclear
        rivals = torch.nonzero(contends[query, place])[:, 0]
        codes = self._highest(x[rivals].flatten(1), place[rivals], query[rivals], len(cells)).view(-1, *x.shape[1:])
        chosen = torch.nonzero(unclear)[:, 0]
        rows, columns, codes, exists = rows[chosen], columns[chosen], codes[chosen], exists[chosen]
        areas = torch.bincount((codes * exists).view(-1), minlength=2 * len(self.scores) + 2)
        self.won += areas.view(-1, 2)[1:].cpu()
        self.codes[rows[:, :, None].expand(codes.shape), columns[:, None].expand(codes.shape)] = codes

    def _highest(self, x: Tensor, place: Tensor, query: Tensor, cells: int) -> Tensor:
        """The codes of the highest products, int32 [cells, P].

        Args:
            x: [pairs, P], the mask probability of one query in the pixels of one cell each.
            place: int64 [pairs], the cell, ascending.
            query: int64 [pairs], ascending within a cell.
            cells: how many there are.
        """
        # the rank of each pair among those of its cell
        counts = torch.bincount(place, minlength=cells)
        rank = torch.arange(len(place), device=place.device) - (counts.cumsum(0) - counts)[place]
        scores = self.scores[query, None]
        x = x.mul_(scores)
        codes = (query * 2 + 2).to(torch.int32)[:, None] + (x * 2 >= scores)
        # rank by rank, all cells at once; a later query wins only where it is higher
        best = x.new_full((cells, x.shape[1]), -1.0)
        chosen = torch.zeros(best.shape, dtype=torch.int32, device=x.device)
        for k in range(int(counts.max())):
            at = torch.nonzero(rank == k)[:, 0]
            cell, value = place[at], x.index_select(0, at)
            before = best.index_select(0, cell)
            won = codes.index_select(0, at).mul_(value > before)
            chosen.index_copy_(0, cell, torch.maximum(chosen.index_select(0, cell), won))
            best.index_copy_(0, cell, torch.maximum(before, value))
        return chosen


def _by_windows(resampler: MaskResampler, scores: Tensor, needed: Tensor) -> PixelAssignment:
    """The assignment query by query, each in the window around the cells where it is needed, bool [n, h, w]."""
    device = resampler.masks.device
    best = torch.full(resampler.size, -1.0, device=device)
    codes = torch.zeros(resampler.size, dtype=torch.int32, device=device)
    whole = torch.zeros(len(scores), dtype=torch.int64)
    windows = resampler.covered(needed)
    for k, (mask, score, window) in enumerate(zip(resampler.masks, scores.tolist(), windows, strict=True)):
        if window is None:
            continue
        rows, columns = window
        for band in resampler.bands(rows, columns[1] - columns[0]):
            x = resampler.window(mask, band, columns).sigmoid()
            own = x >= 0.5
            whole[k] += _count(own)
            x.mul_(score)
            place = (slice(*band), slice(*columns))
            # later queries have higher codes: a maximum says who won last, without a branch for each pixel
            won = own.to(torch.int32).add_(2 * k + 2).mul_(x > best[place])
            torch.maximum(codes[place], won, out=codes[place])
            torch.maximum(best[place], x, out=best[place])
    won = torch.bincount(codes.view(-1), minlength=2 * len(scores) + 2).view(-1, 2)[1:].cpu()
    return PixelAssignment(codes, won, whole)


def _count(mask: Tensor) -> int:
    """The number of true elements; NumPy's way of counting bytes is several times faster than a sum of integers."""
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(mask.sum())
