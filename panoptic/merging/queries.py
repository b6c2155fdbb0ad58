"""Merging of mask classification: each query has class probabilities and a mask (MaskFormer, Mask2Former).

The rules of the two reference projects. Panoptic: a pixel goes to the kept query of the highest product of class
and mask probability; a query that loses too much of its own mask this way is dropped with its pixels. Instances
and class maps come straight from the queries, without thresholds.

What is decided without pixels is decided first: queries by their class, then places where a query cannot win
because another one is higher in every cell around. Only the rest is interpolated.

Shapes: Q queries, K classes, n kept queries, h x w cells of a mask, H x W the output.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

from panoptic.merging.planes import BLOCK, Extent, Planes, extremes
from panoptic.segmentation import VOID, Categories, Instances, Segmentation

Masks = Callable[[Tensor], Tensor]
"""The mask logits [n, h, w] of some queries, int64 [n]."""


def merge_queries(
    classes: Tensor,
    masks: Masks,
    extent: Extent,
    categories: Categories,
    *,
    threshold: float = 0.8,
    overlap: float = 0.8,
    inside: bool = True,
) -> Segmentation:
    """The panoptic map of one image.

    Args:
        classes: [Q, K + 1] logits, "no object" last.
        masks: of the queries that are asked for.
        extent: where the masks lie, and the size of the map.
        categories: tell things from stuff; queries of one stuff class become one segment.
        threshold: queries are kept whose best class is more probable than this.
        overlap: they are dropped where they win less than this share of their own mask.
        inside: a query paints what it wins only where its mask is at least 1/2 (Mask2Former); otherwise
            everywhere (MaskFormer).

    Returns:
        segments in the order of the queries, with the probability of their class (of stuff, of the first query).
    """
    scores, labels = classes.float().softmax(-1).max(-1)
    kept = torch.nonzero((labels != classes.shape[-1] - 1) & (scores > threshold))[:, 0]
    if not len(kept):
        return Segmentation(
            np.full(extent.output, VOID, np.int32), np.zeros(0, np.int64), scores=np.zeros(0, np.float32)
        )
    labels, scores = labels[kept], scores[kept]
    contest = _Contest(Planes(masks(kept).float(), extent), scores)
    won, whole = contest.won, contest.whole
    painted = won[:, 1] if inside else won.sum(1)
    accepted = (painted > 0) & (whole > 0) & (won.sum(1) >= overlap * whole)
    numbers, chosen = _numbered(accepted.tolist(), labels.tolist(), categories)
    table = torch.zeros(2 * len(kept) + 2, dtype=torch.int32)
    table[2::2], table[3::2] = (torch.zeros_like(numbers) if inside else numbers), numbers
    segments = table[contest.codes.cpu()]
    return Segmentation(segments.numpy(), labels[chosen].cpu().numpy(), scores=scores[chosen].cpu().numpy())


class _Contest:
    """Who is highest in each pixel.

    Where all that a pixel can depend on is known to be higher for one query than for all others, the cell is
    settled as a whole; only the queries that contend for the other cells are interpolated, and those whose own
    mask begins or ends there, because its pixels have to be counted.

    `codes`, int32 [H, W], is 2 k + 1 where query k (1..n) wins and its mask is at least 1/2, 2 k where it is less.
    `won`, int64 [n, 2], counts the pixels of both kinds, the lesser first; `whole`, int64 [n], those where the
    mask is at least 1/2, won or not. Both are on the CPU.
    """

    def __init__(self, planes: Planes, scores: Tensor) -> None:
        self.planes, self.scores = planes, scores
        count, height, width = planes.masks.shape
        device = planes.masks.device
        products = planes.masks.sigmoid().mul_(scores[:, None, None])
        low, high = (extreme.flatten(1) for extreme in extremes(products))
        half = scores[:, None] / 2
        contends = high >= low.amax(0)
        disputed = contends.sum(0, dtype=torch.int32) > 1
        whole_inside = low >= half
        edge = (high >= half) & ~whole_inside
        # of cells without dispute; as a product of matrices ten times faster than as the place of a maximum
        owner = (torch.arange(float(count), device=device) @ contends.float()).long().clamp_(max=count - 1)
        unclear = disputed | edge.gather(0, owner[None])[0]
        rows, columns = (axis.counts.to(device).float() for axis in (planes.rows, planes.columns))
        inside = whole_inside.view(count, height, width).float() @ columns
        self.whole = (inside.double() @ rows.double()).long().cpu()
        settled = owner * 2 + 2 + whole_inside.gather(0, owner[None])[0]
        areas = (rows[:, None] * columns).view(-1).double()
        areas = torch.bincount(settled, areas * ~unclear, 2 * count + 2)
        self.won = areas.long().view(-1, 2)[1:].cpu()
        # one row and column more take what is written for pixels that a cell does not have
        spread = [torch.cat([axis.owners, axis.owners[-1:]]).to(device) for axis in (planes.rows, planes.columns)]
        self.codes = settled.to(torch.int32).view(height, width).index_select(0, spread[0]).index_select(1, spread[1])
        contends &= unclear
        asked = (edge | contends).sum(0, dtype=torch.int32)
        cells = torch.nonzero(asked)[:, 0]
        budget = BLOCK["cpu" if device.type == "cpu" else "cuda"] // (rows.amax() * columns.amax()).long()
        step = int((budget * len(cells) // asked.sum().clamp(min=1)).clamp(min=1))
        for part in cells.split(step) if len(cells) else ():
            self._evaluate(part, edge[:, part], contends[:, part], unclear[part])
        self.codes = self.codes[:-1, :-1]

    def _evaluate(self, cells: Tensor, edge: Tensor, contends: Tensor, unclear: Tensor) -> None:
        """The pixels of some cells (int64 [m]); bool [n, m]: which masks end there, and which queries contend."""
        place, query = torch.nonzero((edge | contends).t()).unbind(1)  # ordered by cell, then by query
        x = self.planes.values(query, cells[place]).sigmoid_()
        rows, columns = self.planes.pixels(cells)
        exists = (rows < self.planes.size[0])[:, :, None] & (columns < self.planes.size[1])[:, None]
        ends = torch.nonzero(edge[query, place])[:, 0]
        own = ((x[ends] >= 0.5) & exists[place[ends]]).sum((1, 2))
        self.whole += torch.bincount(query[ends], own.double(), len(self.scores)).long().cpu()
        rivals = torch.nonzero(contends[query, place])[:, 0]
        codes = self._highest(x[rivals].flatten(1), place[rivals], query[rivals], len(cells)).view(-1, *x.shape[1:])
        chosen = torch.nonzero(unclear)[:, 0]
        rows, columns, codes, exists = rows[chosen], columns[chosen], codes[chosen], exists[chosen]
        found = torch.bincount((codes * exists).view(-1), minlength=2 * len(self.scores) + 2)
        self.won += found.view(-1, 2)[1:].cpu()
        self.codes[rows[:, :, None].expand(codes.shape), columns[:, None].expand(codes.shape)] = codes

    def _highest(self, x: Tensor, place: Tensor, query: Tensor, cells: int) -> Tensor:
        """int32 [cells, P], the codes of the highest products.

        Args:
            x: [m, P], the mask probability of one query in the pixels of one cell each.
            place: int64 [m], the cell, ascending.
            query: int64 [m], ascending within a cell.
            cells: how many there are.
        """
        counts = torch.bincount(place, minlength=cells)
        rank = torch.arange(len(place), device=place.device) - (counts.cumsum(0) - counts)[place]
        scores = self.scores[query, None]
        x = x.mul_(scores)
        codes = (query * 2 + 2).to(torch.int32)[:, None] + (x * 2 >= scores)
        best = x.new_full((cells, x.shape[1]), -1.0)
        chosen = torch.zeros(best.shape, dtype=torch.int32, device=x.device)
        for k in range(int(counts.max())):
            at = torch.nonzero(rank == k)[:, 0]
            cell, value = place[at], x.index_select(0, at)
            before = best.index_select(0, cell)
            # later queries have higher codes: a maximum says who won last, without a branch for each pixel
            won = codes.index_select(0, at).mul_(value > before)
            chosen.index_copy_(0, cell, torch.maximum(chosen.index_select(0, cell), won))
            best.index_copy_(0, cell, torch.maximum(before, value))
        return chosen


def _numbered(accepted: list[bool], labels: list[int], categories: Categories) -> tuple[Tensor, Tensor]:
    """int32 [n], the segment of each query (0 = none), and int64 [N], the query that each segment began with."""
    numbers, chosen = [], []
    of_stuff: dict[int, int] = {}
    for k, (alive, label) in enumerate(zip(accepted, labels, strict=True)):
        known = of_stuff.get(label)
        if alive and known is None:
            chosen.append(k)
            if not categories.is_thing[label]:
                of_stuff[label] = len(chosen)
        numbers.append((known or len(chosen)) if alive else 0)
    return torch.tensor(numbers, dtype=torch.int32), torch.tensor(chosen, dtype=torch.int64)


def query_instances(
    classes: Tensor, masks: Masks, extent: Extent, categories: Categories, *, top: int = 100
) -> Instances:
    """Scored things of one image; their masks may overlap and one query may show several classes.

    Of all pairs of query and class the `top` most probable ones, then without stuff. A mask is where its logit
    is positive; a score is the class probability times the mean mask probability there. (The reference leaves
    the boxes empty; here they are those of the masks.)

    Args:
        classes: [Q, K + 1] logits, "no object" last.
        masks: of the queries that are asked for.
        extent: where the masks lie, and the size of the result.
        categories: tell things from stuff.
        top: how many pairs are looked at.
    """
    probability = classes.float().softmax(-1)[:, :-1]
    scores, index = probability.flatten().topk(min(top, probability.numel()), sorted=False)
    labels = index % probability.shape[1]
    things = torch.tensor(categories.is_thing, device=labels.device)[labels]
    scores, labels, queries = (
        scores[things],
        labels[things],
        torch.div(index[things], probability.shape[1], rounding_mode="floor"),
    )
    asked, place = queries.unique(return_inverse=True)
    encoded, quality = _encoded(Planes(masks(asked).float(), extent)) if len(asked) else ([], scores.new_zeros(0))
    found = [encoded[k] for k in place.tolist()]
    boxes = np.zeros((0, 4))
    if found:
        boxes = rle.toBbox(found)  # pyright: ignore[reportArgumentType]  (its stub knows one mask only)
        boxes[:, 2:] += boxes[:, :2]
    scores = scores * quality.to(scores)[place]
    return Instances(found, labels.cpu().numpy(), scores.cpu().numpy().astype(np.float32), boxes.astype(np.float32))


def _encoded(planes: Planes) -> tuple[list[dict], Tensor]:
    """COCO RLE of each mask where it is positive, and its mean probability there, float [n]."""
    _, high = extremes(planes.masks)
    encoded, quality = [], []
    for mask, cells in zip(planes.masks, high > 0, strict=True):
        whole = np.zeros(planes.size, np.uint8, order="F")
        total, area = 0.0, 0
        if (window := planes.covered(cells)) is not None:
            rows, columns = window
            for band in planes.bands(rows, columns[1] - columns[0]):
                x = planes.window(mask, band, columns)
                positive = x > 0
                whole[slice(*band), slice(*columns)] = positive.cpu().numpy()
                total += float((x.sigmoid() * positive).sum())
                area += int(positive.sum())
        encoded.append(rle.encode(whole))
        quality.append(total / (area + 1e-6))
    return encoded, torch.tensor(quality)


def query_semantics(classes: Tensor, masks: Masks, extent: Extent) -> np.ndarray:
    """int32 [H, W], the class of the highest sum over queries of class times mask probability.

    Args:
        classes: [Q, K + 1] logits, "no object" last.
        masks: of the queries that are asked for.
        extent: where the masks lie, and the size of the result.
    """
    probability = classes.float().softmax(-1)[:, :-1].t().contiguous()
    planes = Planes(masks(torch.arange(len(classes), device=classes.device)).float(), extent)
    height, width = planes.size
    found = np.empty(planes.size, np.int32)
    for band in planes.bands((0, height), width * len(classes) // 8 + 1):
        x = planes.window(planes.masks, band, (0, width)).sigmoid().flatten(1)
        found[slice(*band)] = (probability @ x).argmax(0).view(-1, width).int().cpu().numpy()
    return found
