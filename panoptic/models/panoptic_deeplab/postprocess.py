"""Panoptic-DeepLab after the network: from dense maps to panoptic maps, scored instances and class maps.

Post-processing of Cheng et al. (arXiv 1911.10194, section 3.3; "Panoptic-DeepLab in PyTorch", section 2.3), with the
tie rules of the two published implementations: the first of equally near centres, the smallest of equally frequent
classes. Batch padding is cut off first.

Shapes: B images, h x w stride-4 maps, H x W pixels, C classes, K centres.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import cv2
import numpy as np
import torch
from torch import Tensor

from panoptic.layers.resize import resize
from panoptic.layers.upsampled_argmax import best_classes, highest
from panoptic.models.base import Outputs, Prediction, Wanted
from panoptic.models.panoptic_deeplab.config import Score
from panoptic.models.panoptic_deeplab.grouping import blocks, find_centres, group_pixels
from panoptic.models.panoptic_deeplab.instance_scores import scored_instances
from panoptic.models.panoptic_deeplab.upsampling import Upsampling
from panoptic.segmentation import Categories, Frame, Instances, Segmentation


def postprocess(
    outputs: Outputs,
    frame: Frame,
    want: Collection[Wanted],
    categories: Categories,
    upsampling: Upsampling,
    *,
    threshold: float,
    kernel: int,
    top_k: int | None,
    stuff_area: int,
    rescale_offset: bool,
    score: Score,
) -> Prediction:
    """Merged maps (without scores), the things of these maps with scores, and class maps, whichever are wanted.

    Class maps are the semantic branch's alone, as both references compute mIoU.

    Args:
        outputs: of `PanopticDeepLab.network`, or as `PanopticDeepLab` takes them.
        frame: of the batch.
        want: fields of `Prediction`.
        categories: tell things from stuff.
        upsampling: of the flavour.
        threshold, kernel, top_k: of `find_centres`.
        stuff_area: of `merge_centres`.
        rescale_offset: of `merge_image`.
        score: of `scored_instances`.
    """
    merges = bool({"maps", "instances"} & set(want))
    maps: list[Segmentation] = []
    instances: list[Instances] = []
    semantics: list[np.ndarray] = []
    for b in range(len(frame.sizes) if merges or "semantics" in want else 0):
        classes, size = pixel_classes(outputs["semantic"], frame, b, upsampling), frame.output_size(b)
        if "semantics" in want:
            semantics.append(nearest(classes.cpu().numpy(), size))
        if not merges:
            continue
        merged = merge_image(
            outputs,
            classes,
            frame,
            b,
            categories,
            upsampling,
            threshold=threshold,
            kernel=kernel,
            top_k=top_k,
            stuff_area=stuff_area,
            rescale_offset=rescale_offset,
        )
        # segments that vanish when the map shrinks are dropped
        maps.append(replace(merged, segments=nearest(merged.segments, size)).compact())
        if "instances" in want:
            instances.append(image_instances(maps[b], outputs, frame, b, categories, upsampling, score))
    return Prediction(
        maps=maps if "maps" in want else None,
        instances=instances if "instances" in want else None,
        semantics=semantics if "semantics" in want else None,
    )


def pixel_classes(logits: Tensor, frame: Frame, b: int, upsampling: Upsampling) -> Tensor:
    """int32 [H, W], the best class of each pixel of image b, the first of equals, at the size at which it is merged.

    Args:
        logits: float [B, C, h, w].
        frame: of the batch.
        b: the image's number.
        upsampling: of the flavour.
    """
    size = upsampling.size(frame, b)
    if size == frame.size(b):  # one resize, not two
        canvas = upsampling.whole(logits[b], frame.canvas)
        return highest(logits[b], canvas, size, align_corners=upsampling.standalone)
    return best_classes(logits[b], lambda x: upsampling.merged(x, frame, b))[1].int()


def merge_image(
    outputs: Outputs,
    classes: Tensor,
    frame: Frame,
    b: int,
    categories: Categories,
    upsampling: Upsampling,
    *,
    threshold: float,
    kernel: int,
    top_k: int | None,
    stuff_area: int,
    rescale_offset: bool,
) -> Segmentation:
    """`merge_centres` of image b, at the size at which the flavour merges.

    Args:
        outputs: with "centre", "offset" and perhaps "foreground".
        classes: of `pixel_classes`.
        frame: of the batch.
        b: the image's number.
        categories: tell things from stuff.
        upsampling: of the flavour.
        threshold, kernel, top_k, stuff_area: of `merge_centres`.
        rescale_offset: where maps are merged at output size, offsets grow with the resize to it.
    """
    centre, offset, *foreground = (
        upsampling.merged(outputs[name][b : b + 1], frame, b)[0].contiguous()
        for name in ("centre", "offset", "foreground")
        if name in outputs
    )
    if rescale_offset and not upsampling.standalone:
        factor = frame.output_sizes[b].double() / frame.sizes[b]
        offset = offset * factor.to(offset)[:, None, None]
    return merge_centres(
        classes,
        centre[0],
        offset,
        categories,
        threshold=threshold,
        kernel=kernel,
        top_k=top_k,
        stuff_area=stuff_area,
        foreground=foreground[0][0] > 0 if foreground else None,
    )


def image_instances(
    merged: Segmentation,
    outputs: Outputs,
    frame: Frame,
    b: int,
    categories: Categories,
    upsampling: Upsampling,
    score: Score,
) -> Instances:
    """The things of the merged map of image b, at output size, with scores.

    Args:
        merged: the map.
        outputs: with "semantic" and "centre".
        frame: of the batch.
        b: the image's number.
        categories: tell things from stuff.
        upsampling: of the flavour.
        score: of `scored_instances`.
    """
    logits, heatmap = outputs["semantic"][b], upsampling.image(outputs["centre"][b : b + 1], frame, b)
    upsampled, aligned = upsampling.whole(logits, frame.canvas), upsampling.standalone
    if heatmap.shape[-2:] != merged.size:  # two resizes are not one
        logits = upsampling.image(logits[None], frame, b)[0]
        upsampled, aligned = merged.size, False
    return scored_instances(
        merged,
        logits,
        resize(heatmap, merged.size, False)[0, 0],
        categories,
        score,
        upsampled=upsampled,
        align_corners=aligned,
    )


def nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """int32 [H, W] at another size, by OpenCV's nearest neighbour as in the standalone code."""
    return values if values.shape == size else cv2.resize(values, size[::-1], interpolation=cv2.INTER_NEAREST)


def merge_centres(
    semantic: Tensor,
    heatmap: Tensor,
    offset: Tensor,
    categories: Categories,
    *,
    threshold: float = 0.1,
    kernel: int = 7,
    top_k: int | None = 200,
    stuff_area: int = 2048,
    foreground: Tensor | None = None,
) -> Segmentation:
    """The panoptic map of one image: centres, pixels grouped by them, a vote on the class of each group, stuff.

    Every instance takes the class that most of its thing pixels have, the smallest of equally frequent ones.

    Args:
        semantic: int [H, W], contiguous classes; values outside 0..C-1 are void.
        heatmap: float [H, W].
        offset: float [2, H, W], (dy, dx) in pixels of this map.
        categories: tell things from stuff.
        threshold: of `find_centres`.
        kernel: of `find_centres`.
        top_k: of `find_centres`.
        stuff_area: stuff of fewer pixels becomes void.
        foreground: bool [H, W], where instances may be; None means wherever the class is a thing. Stuff
            inside of it and things outside become void, as in bowenc0221.

    Returns:
        instances in the order of their centres, then stuff in the order of classes; `scores` is None.
    """
    is_thing = torch.tensor([False, *categories.is_thing], device=semantic.device)  # entry 0 is void
    classes = semantic.int().add_(1) if semantic.dtype != torch.int32 else semantic + 1
    classes.masked_fill_((classes < 0) | (classes > len(categories)), 0)
    thing = is_thing.index_select(0, classes.view(-1)).view_as(classes) if foreground is None else foreground
    centres = find_centres(heatmap, threshold, kernel, top_k)
    segments = group_pixels(centres, offset, thing)
    # the number of pixels of each pair of an instance and a class
    wide = len(is_thing)
    votes = torch.zeros((len(centres) + 1) * wide, dtype=torch.int64, device=semantic.device)
    for lines in blocks(segments.shape, segments.device):
        segments[lines] *= wide
        segments[lines] += classes[lines]  # now (instance, class) in one number
        votes += torch.bincount(segments[lines].view(-1), minlength=len(votes))
    # the pair of each pixel becomes its segment
    table, labels = _elect(votes.view(-1, wide), is_thing, stuff_area)
    for lines in blocks(segments.shape, segments.device):
        segments[lines] = table.index_select(0, segments[lines].view(-1)).view(-1, segments.shape[1])
    return Segmentation(segments.cpu().numpy(), labels.cpu().numpy())


def _elect(votes: Tensor, is_thing: Tensor, stuff_area: int) -> tuple[Tensor, Tensor]:
    """The segment of each pair (instance or none, class or void), given the number of pixels that have it.

    Args:
        votes: int64 [K + 1, C + 1]; row 0 is no instance, column 0 is void.
        is_thing: bool [C + 1].
        stuff_area: as in `merge_centres`.

    Returns:
        int32 [(K + 1) * (C + 1)], the segment of each pair, and the labels, int64 [N].
    """
    # an instance takes the class that most of its pixels have; one without a pixel is none
    ballots = votes[1:] * is_thing
    alive = ballots.sum(1) > 0
    classes = ballots.argmax(1)[alive]
    # stuff is counted where there is no instance
    stuff = torch.nonzero((votes[0] >= max(1, stuff_area)) & ~is_thing)[:, 0]
    stuff = stuff[stuff > 0]
    # the remaining pairs are void: stuff within an instance, things outside of every instance
    table = torch.zeros_like(votes, dtype=torch.int32)
    table[1:] = (alive.cumsum(0) * alive)[:, None] * is_thing
    table[0, stuff] = torch.arange(1, len(stuff) + 1, dtype=torch.int32, device=votes.device) + len(classes)
    return table.view(-1), torch.cat([classes, stuff]) - 1
