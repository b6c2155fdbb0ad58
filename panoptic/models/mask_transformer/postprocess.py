"""Post-processing of mask classification: each query has class probabilities and a mask (MaskFormer, Mask2Former).

The rules of the two reference projects. Panoptic: a pixel goes to the confident query of the highest product of class
and mask probability; a query that loses too much of its own mask this way is dropped with its pixels. Instances
and class maps come straight from the queries, without thresholds.

What is decided without pixels is decided first: queries by their class, then places where a query cannot win
because another one is higher in every cell around. Only the rest is interpolated.

Shapes: B images, Q queries, K classes, n selected queries, h x w cells of a mask, H x W the output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from panoptic.models.base import Outputs, Prediction, Wanted
from panoptic.models.mask_transformer.config import MaskClassificationConfig
from panoptic.models.mask_transformer.mask_resampler import Extent, MaskResampler, extremes
from panoptic.models.mask_transformer.masks import mask_logits
from panoptic.models.mask_transformer.pixel_assignment import assign_pixels
from panoptic.rle import bounding_boxes, encode_masks
from panoptic.segmentation import VOID, Categories, Frame, Instances, Segmentation

QueryMasks = Callable[[Tensor], Tensor]
"""The mask logits [n, h, w] of some queries, int64 [n]."""


class ImagePrediction(NamedTuple):
    """The predictions of one image; None for what was not asked for."""

    map: Segmentation | None
    instances: Instances | None
    semantic: np.ndarray | None
    """int32 [H, W]."""


class Selection(NamedTuple):
    """The queries of an image that a map or instances are made of."""

    queries: Tensor
    """int64 [n]; among instances a query may show several classes."""
    labels: Tensor
    """int64 [n], classes."""
    scores: Tensor
    """float32 [n], their probabilities."""


def postprocess(
    outputs: Outputs,
    frame: Frame,
    want: Collection[Wanted],
    categories: Categories,
    config: MaskClassificationConfig,
) -> Prediction:
    """Maps, instances and class maps of a batch, whichever are wanted.

    Args:
        outputs: of a `MaskTransformer`.
        frame: of the batch.
        want: fields of `Prediction`; proposals are None.
        categories: tell things from stuff.
        config: has the thresholds.
    """
    images = []
    for b in range(len(frame.sizes) if {"maps", "instances", "semantics"} & set(want) else 0):
        extent = Extent(frame.canvas, frame.size(b), frame.output_size(b))
        masks = partial(mask_logits, outputs, b)
        images.append(postprocess_image(outputs["classes"][b], masks, extent, want, categories, config))
    return Prediction(
        maps=[image.map for image in images if image.map is not None] if "maps" in want else None,
        instances=[image.instances for image in images if image.instances is not None] if "instances" in want else None,
        semantics=[image.semantic for image in images if image.semantic is not None] if "semantics" in want else None,
    )


def postprocess_image(
    classes: Tensor,
    masks: QueryMasks,
    extent: Extent,
    want: Collection[Wanted],
    categories: Categories,
    config: MaskClassificationConfig,
) -> ImagePrediction:
    """The predictions of one image.

    Args:
        classes: [Q, K + 1] logits, "no object" last.
        masks: called once, with all queries whose mask is needed for anything that is wanted.
        extent: the area that the masks cover, and the size of the predictions.
        want: fields of `Prediction`.
        categories: tell things from stuff.
        config: has the thresholds.
    """
    probabilities = classes.float().softmax(-1)
    confident = confident_queries(probabilities, config.threshold) if "maps" in want else None
    things = probable_things(probabilities, categories, config.top_k) if "instances" in want else None
    if "semantics" in want:
        queries = torch.arange(len(classes), device=classes.device)
    else:  # ascending, without duplicates
        queries = torch.cat([selection.queries for selection in (confident, things) if selection is not None]).unique()
    resampler = MaskResampler(masks(queries).float(), extent)

    def resampler_of(selected: Tensor) -> MaskResampler:
        return resampler.select(torch.searchsorted(queries, selected))

    segmentation = instances = semantic = None
    if confident is not None:
        chosen = resampler_of(confident.queries)
        segmentation = merge_queries(confident, chosen, categories, overlap=config.overlap, inside=config.inside)
    if things is not None:
        distinct, place = things.queries.unique(return_inverse=True)
        instances = query_instances(things, resampler_of(distinct), place)
    if "semantics" in want:
        semantic = query_semantics(probabilities, resampler)
    return ImagePrediction(segmentation, instances, semantic)


def confident_queries(probabilities: Tensor, threshold: float) -> Selection:
    """The queries whose best class is more probable than the threshold and not "no object", in their order.

    Args:
        probabilities: [Q, K + 1], "no object" last.
        threshold: a probability.
    """
    scores, labels = probabilities.max(-1)
    kept = torch.nonzero((labels != probabilities.shape[-1] - 1) & (scores > threshold))[:, 0]
    return Selection(kept, labels[kept], scores[kept])


def probable_things(probabilities: Tensor, categories: Categories, top: int) -> Selection:
    """The most probable pairs of query and class, of which only those with a thing are left.

    Args:
        probabilities: [Q, K + 1], "no object" last.
        categories: tell things from stuff.
        top: the number of pairs, stuff included.
    """
    by_class = probabilities[:, :-1]
    scores, index = by_class.flatten().topk(min(top, by_class.numel()), sorted=False)
    labels = index % by_class.shape[1]
    things = torch.tensor(categories.is_thing, device=labels.device)[labels]
    queries = torch.div(index[things], by_class.shape[1], rounding_mode="floor")
    return Selection(queries, labels[things], scores[things])


def merge_queries(
    selection: Selection,
    resampler: MaskResampler,
    categories: Categories,
    *,
    overlap: float = 0.8,
    inside: bool = True,
) -> Segmentation:
    """The panoptic map of one image.

    Args:
        selection: the confident queries.
        resampler: of their masks.
        categories: tell things from stuff; queries of one stuff class become one segment.
        overlap: queries are dropped where they win less than this share of their own mask.
        inside: a query paints what it wins only where its mask is at least 1/2 (Mask2Former); otherwise
            everywhere (MaskFormer).

    Returns:
        segments in the order of the queries, with the probability of their class (of stuff, of the first query).
    """
    size, (queries, labels, scores) = resampler.size, selection
    if not len(queries):
        return Segmentation(np.full(size, VOID, np.int32), np.zeros(0, np.int64), scores=np.zeros(0, np.float32))
    assignment = assign_pixels(resampler, scores)
    won, whole = assignment.won, assignment.whole
    painted = won[:, 1] if inside else won.sum(1)
    accepted = (painted > 0) & (whole > 0) & (won.sum(1) >= overlap * whole)
    numbers, chosen = _numbered(accepted.tolist(), labels.tolist(), categories)
    # from the codes of the assignment to segments: 2 k where query k (1..n) is less than 1/2, 2 k + 1 where it is more
    table = torch.zeros(2 * len(queries) + 2, dtype=torch.int32)
    table[2::2], table[3::2] = (torch.zeros_like(numbers) if inside else numbers), numbers
    segments = table.to(assignment.codes.device).index_select(0, assignment.codes.reshape(-1)).view(size)
    return Segmentation(segments.cpu().numpy(), labels[chosen].cpu().numpy(), scores=scores[chosen].cpu().numpy())


def _numbered(accepted: list[bool], labels: list[int], categories: Categories) -> tuple[Tensor, Tensor]:
    """The segment of each query, int32 [n] (0 = none), and the query that each segment began with, int64 [N]."""
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


def query_instances(selection: Selection, resampler: MaskResampler, place: Tensor) -> Instances:
    """Scored things of one image; their masks may overlap and one query may show several classes.

    A mask is where its logit is positive; a score is the class probability times the mean mask probability there.
    (Mask2Former's reference leaves the boxes empty; here they are those of the masks.)

    Args:
        selection: the pairs of query and class.
        resampler: of the masks of their queries, each once.
        place: int64 [n], the mask of each pair.
    """
    if not len(selection.queries):
        nothing = np.zeros(0)
        return Instances([], nothing.astype(np.int64), nothing.astype(np.float32), np.zeros((0, 4), np.float32))
    encoded, quality = _encoded(resampler)
    masks = [encoded[k] for k in place.tolist()]
    boxes = bounding_boxes(masks)
    scores = selection.scores * quality.to(selection.scores)[place]
    labels = selection.labels.cpu().numpy()
    return Instances(masks, labels, scores.cpu().numpy().astype(np.float32), boxes.astype(np.float32))


def _encoded(resampler: MaskResampler) -> tuple[list[dict], Tensor]:
    """COCO RLE of each mask where it is positive, and its mean probability there, float [n]."""
    _, high = extremes(resampler.masks)
    encoded, quality = [], []
    # each in the window around the cells in which it is positive anywhere
    for mask, window in zip(resampler.masks, resampler.covered(high > 0), strict=True):
        binary = np.zeros(resampler.size, np.uint8, order="F")
        total, area = 0.0, 0
        if window is not None:
            rows, columns = window
            for band in resampler.bands(rows, columns[1] - columns[0]):
                x = resampler.window(mask, band, columns)
                positive = x > 0
                binary[slice(*band), slice(*columns)] = positive.cpu().numpy()
                total += float((x.sigmoid() * positive).sum())
                area += int(positive.sum())
        encoded += encode_masks(binary[None])
        quality.append(total / (area + 1e-6))
    return encoded, torch.tensor(quality)


def query_semantics(probabilities: Tensor, resampler: MaskResampler) -> np.ndarray:
    """The class of the highest sum over queries of class times mask probability in each pixel, int32 [H, W].

    Args:
        probabilities: [Q, K + 1], "no object" last.
        resampler: of the masks of all queries.
    """
    by_class = probabilities[:, :-1].t().contiguous()
    height, width = resampler.size
    semantic = np.empty(resampler.size, np.int32)
    for band in resampler.bands((0, height), width * len(probabilities) // 8 + 1):
        x = resampler.window(resampler.masks, band, (0, width)).sigmoid().flatten(1)
        semantic[slice(*band)] = (by_class @ x).argmax(0).view(-1, width).int().cpu().numpy()
    return semantic
