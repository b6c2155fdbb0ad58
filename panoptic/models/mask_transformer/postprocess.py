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

from panoptic.models.mask_transformer.mask_resampler import Extent, MaskResampler, extremes
from panoptic.models.mask_transformer.pixel_assignment import assign_pixels
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
    assignment = assign_pixels(MaskResampler(masks(kept).float(), extent), scores)
    won, whole = assignment.won, assignment.whole
    painted = won[:, 1] if inside else won.sum(1)
    accepted = (painted > 0) & (whole > 0) & (won.sum(1) >= overlap * whole)
    numbers, chosen = _numbered(accepted.tolist(), labels.tolist(), categories)
    table = torch.zeros(2 * len(kept) + 2, dtype=torch.int32)
    table[2::2], table[3::2] = (torch.zeros_like(numbers) if inside else numbers), numbers
    segments = table.to(assignment.codes.device).index_select(0, assignment.codes.reshape(-1)).view(extent.output)
    return Segmentation(segments.cpu().numpy(), labels[chosen].cpu().numpy(), scores=scores[chosen].cpu().numpy())


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
    encoded, quality = (
        _encoded(MaskResampler(masks(asked).float(), extent)) if len(asked) else ([], scores.new_zeros(0))
    )
    found = [encoded[k] for k in place.tolist()]
    boxes = np.zeros((0, 4))
    if found:
        boxes = rle.toBbox(found)  # pyright: ignore[reportArgumentType]  (its stub knows one mask only)
        boxes[:, 2:] += boxes[:, :2]
    scores = scores * quality.to(scores)[place]
    return Instances(found, labels.cpu().numpy(), scores.cpu().numpy().astype(np.float32), boxes.astype(np.float32))


def _encoded(planes: MaskResampler) -> tuple[list[dict], Tensor]:
    """COCO RLE of each mask where it is positive, and its mean probability there, float [n]."""
    _, high = extremes(planes.masks)
    encoded, quality = [], []
    for mask, window in zip(planes.masks, planes.covered(high > 0), strict=True):
        whole = np.zeros(planes.size, np.uint8, order="F")
        total, area = 0.0, 0
        if window is not None:
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
    planes = MaskResampler(masks(torch.arange(len(classes), device=classes.device)).float(), extent)
    height, width = planes.size
    found = np.empty(planes.size, np.int32)
    for band in planes.bands((0, height), width * len(classes) // 8 + 1):
        x = planes.window(planes.masks, band, (0, width)).sigmoid().flatten(1)
        found[slice(*band)] = (probability @ x).argmax(0).view(-1, width).int().cpu().numpy()
    return found
