"""JSIS-Net after the network: detections, and the merge of instances and semantics (arXiv 1809.02110, section 2.2).

(a) A pixel that several instances claim goes to the one that is most probable there, the first of equals.
(b) Things leave the semantic output: each pixel takes its most probable class of stuff; instances lie above.
(c) Stuff of few pixels in the whole image is removed; its pixels take their best class among those that stay.
(d) Every instance is a segment of its own, every class of stuff one segment, and no pixel is void.

Nothing is sorted or thrown away for overlapping. The order within (c) was not published: stuff is counted
before instances cover it, once (counts can only grow), and where no class is frequent enough the most
frequent one stays. Options give the rule of the successor's code.

Shapes: B images, C classes, h x w network pixels, H x W output pixels, N instances, M side of a mask.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from panoptic.layers.resize import resize
from panoptic.layers.upsampled_argmax import best_classes
from panoptic.models.base import Outputs, Prediction, Wanted
from panoptic.models.jsis_net.config import Conflicts
from panoptic.models.jsis_net.instance_branch import InstanceBranch
from panoptic.rcnn.mask_rcnn import as_instances, enlarge_boxes, output_boxes, paste_detections
from panoptic.rcnn.rpn import Proposals
from panoptic.segmentation import IGNORE, Categories, Frame, Segmentation


def postprocess(
    outputs: Outputs,
    frame: Frame,
    want: Collection[Wanted],
    categories: Categories,
    branch: InstanceBranch | None,
    *,
    merged_threshold: float,
    instance_threshold: float,
    background_wins: bool,
    conflicts: Conflicts,
    mask_side: int,
    align_corners: bool,
) -> Prediction:
    """Merged maps (stuff scores 1), all detections, class maps and region proposals, whichever are wanted.

    Proposals, the head and the probabilities of the semantic branch are computed once for all of them. Class maps are
    the semantic branch's alone; without one they are read off the merged map.

    Args:
        outputs: of `JSISNet.network`, or with "detections", "masks" and "semantic" as `JSISNet` takes them.
        frame: of the batch.
        want: fields of `Prediction`.
        categories: tell things from stuff.
        branch: the instance branch; None detects nothing and proposes nothing.
        merged_threshold: instances in the merged map score more.
        instance_threshold: all detections score more than this or `merged_threshold`, whichever is lower.
        background_wins: a region whose background is more probable than every thing is not in the merged map.
        conflicts: the rules of the merge.
        mask_side: M.
        align_corners: of the upsampling of the semantic logits to the canvas.
    """
    has_semantic = "semantic" in outputs
    merges = "maps" in want or ("semantics" in want and not has_semantic)
    needs_detections = merges or "instances" in want
    proposals: list[Proposals] | None = None
    if branch is not None and ("proposals" in want or (needs_detections and "detections" not in outputs)):
        proposals = branch.propose(outputs, frame, training=False)
    if needs_detections:
        threshold = min(merged_threshold, instance_threshold)
        outputs = with_detections(outputs, frame, branch, proposals, threshold, mask_side)
    images = range(len(frame.sizes))
    probabilities: list[Tensor] = []
    if has_semantic and (merges or "semantics" in want):
        probabilities = [class_probabilities(outputs["semantic"], frame, b, align_corners) for b in images]
    maps: list[Segmentation] = []
    for b in images if merges else ():
        detected = merged_instances(outputs, frame, b, merged_threshold, background_wins)
        classes = probabilities[b] if has_semantic else None
        maps.append(merge_conflicts(detected, classes, frame.output_size(b), categories, conflicts))
    instances = semantics = None
    if "instances" in want:
        instances = [as_instances(*paste_detections(outputs, frame, b), frame.output_size(b)) for b in images]
    if "semantics" in want and has_semantic:
        semantics = [class_map(probabilities[b], frame.output_size(b)) for b in images]
    elif "semantics" in want:
        semantics = [merged.semantic() for merged in maps]
    return Prediction(
        maps=maps if "maps" in want else None,
        instances=instances,
        semantics=semantics,
        proposals=None if proposals is None or "proposals" not in want else output_boxes(proposals, frame),
    )


def with_detections(
    outputs: Outputs,
    frame: Frame,
    branch: InstanceBranch | None,
    proposals: Sequence[Proposals] | None,
    threshold: float,
    mask_side: int,
) -> Outputs:
    """`outputs` with "detections" and "masks", unless they are there.

    Where they are detected here, "background" [B, N] says how probable the region of each is to be background.

    Args:
        outputs: of `JSISNet.network`.
        frame: of the batch.
        branch: the instance branch; None detects nothing.
        proposals: of each image, where there is something to detect.
        threshold: detections score more.
        mask_side: M.
    """
    if "detections" in outputs and "masks" in outputs:
        return outputs
    if "detections" not in outputs and branch is not None and proposals is not None:
        detections, background = branch.detect(outputs, frame, proposals, threshold)
        outputs = outputs | {"detections": detections, "background": background}
    elif "detections" not in outputs:
        nothing = outputs["semantic"].new_full((len(frame.sizes), 1, 6), IGNORE)
        outputs = outputs | {"detections": nothing}
    rows = outputs["detections"]
    if branch is None:
        return outputs | {"masks": rows.new_zeros(*rows.shape[:2], mask_side, mask_side)}
    return outputs | {"masks": branch.masks(outputs, rows)}


def class_probabilities(logits: Tensor, frame: Frame, b: int, align_corners: bool) -> Tensor:
    """float [C, height, width], the softmax of image b at network size, without its batch padding.

    Args:
        logits: float [B, C, h, w].
        frame: of the batch.
        b: the image's number.
        align_corners: of the upsampling to the canvas.
    """
    height, width = frame.size(b)
    return resize(logits[b : b + 1], frame.canvas, align_corners)[0, :, :height, :width].softmax(0)


def class_map(probabilities: Tensor, size: tuple[int, int]) -> np.ndarray:
    """int32 [H, W], the most probable class, thing or stuff, at each pixel of an output of that size."""
    return most_probable(probabilities, size, range(len(probabilities)))[1].int().cpu().numpy()


@dataclass(frozen=True)
class DetectedInstances:
    """The instances of one image, best first."""

    boxes: Tensor
    """float [N, 4] in pixels of the output."""
    masks: Tensor
    """float [N, M, M], how probable the instance is in each cell of its box."""
    labels: Tensor
    """int64 [N], contiguous classes."""
    scores: Tensor
    """float [N], by which the instances are ordered."""


def merged_instances(
    outputs: Outputs, frame: Frame, b: int, threshold: float, background_wins: bool
) -> DetectedInstances:
    """The detections of image b that enter the merged map, in pixels of its output.

    Args:
        outputs: with "detections" and "masks", perhaps "background".
        frame: of the batch.
        b: the image's number.
        threshold: instances score more.
        background_wins: leave out those whose background is more probable.
    """
    rows = outputs["detections"][b]
    kept = (rows[:, 5] != IGNORE) & (rows[:, 4] > threshold)
    if background_wins and "background" in outputs:
        kept &= rows[:, 4] >= outputs["background"][b]
    boxes = enlarge_boxes(rows[kept, :4], frame, b)
    return DetectedInstances(boxes, outputs["masks"][b][kept], rows[kept, 5].long(), rows[kept, 4])


def merge_conflicts(
    instances: DetectedInstances,
    probabilities: Tensor | None,
    size: tuple[int, int],
    categories: Categories,
    conflicts: Conflicts,
) -> Segmentation:
    """The panoptic map of one image by (a) to (d).

    Args:
        instances: of the image.
        probabilities: float [C, h, w], of things and stuff; None (no semantic branch) leaves what no instance
            claims void.
        size: H, W.
        categories: tell things from stuff.
        conflicts: thresholds.

    Returns:
        instances in their order, then stuff in the order of classes; `scores` is that of each instance, and 1 for
        stuff.
    """
    owner = pixel_owners(instances, size, conflicts.mask_threshold)
    labels = instances.labels.cpu().numpy().astype(np.int64)
    scores = instances.scores.cpu().numpy().astype(np.float32)
    if probabilities is not None and categories.stuff:
        classes = stuff_map(probabilities, size, categories, conflicts, owner > 0)
        first = len(labels) + 1
        numbers = torch.zeros(len(categories) + 1, dtype=torch.int32, device=owner.device)  # the last entry is void
        numbers[list(categories.stuff)] = torch.arange(
            first, first + len(categories.stuff), dtype=torch.int32, device=owner.device
        )
        owner = torch.where(owner > 0, owner, numbers[classes])
        labels = np.concatenate([labels, np.array(categories.stuff, np.int64)])
        scores = np.concatenate([scores, np.ones(len(categories.stuff), np.float32)])
    return Segmentation(owner.cpu().numpy(), labels, scores=scores).compact()


def pixel_owners(instances: DetectedInstances, size: tuple[int, int], threshold: float) -> Tensor:
    """int32 [H, W], 1 + the instance that is most probable at each pixel, 0 where none reaches the threshold.

    Only the windows of the boxes are ever computed, one after another.
    """
    best = torch.zeros(size, device=instances.masks.device)
    owner = torch.zeros(size, dtype=torch.int32, device=instances.masks.device)
    for k, (rows, columns, values) in enumerate(_windows(instances, size)):
        better = (values >= threshold) & (values > best[rows, columns])
        best[rows, columns] = torch.where(better, values, best[rows, columns])
        owner[rows, columns] = torch.where(better, k + 1, owner[rows, columns])
    return owner


def _windows(instances: DetectedInstances, size: tuple[int, int]) -> list[tuple[slice, slice, Tensor]]:
    """For each instance the pixels whose centre lies in its box, and float [rows, columns], its mask there."""
    windows = []
    for (x0, y0, x1, y1), mask in zip(instances.boxes.double().tolist(), instances.masks, strict=True):
        rows, down = _axis(y0, y1, size[0], mask)
        columns, across = _axis(x0, x1, size[1], mask)
        windows.append((rows, columns, down @ mask @ across.T))
    return windows


def _axis(low: float, high: float, size: int, mask: Tensor) -> tuple[slice, Tensor]:
    """The pixels of one axis whose centre lies in [low, high), and float [pixels, M], what each takes of each cell.

    Bilinear between the centres of cells, with nothing beyond the outermost (as detectron2 pastes masks).
    """
    side = mask.shape[-1]
    first, last = (min(max(int(np.ceil(edge - 0.5)), 0), size) for edge in (low, high))
    place = torch.arange(first, last, dtype=torch.float64, device=mask.device)
    place = (place + 0.5 - low) / max(high - low, 1e-6) * side - 0.5
    cells = torch.arange(side, dtype=torch.float64, device=mask.device)
    return slice(first, max(first, last)), (1 - (place[:, None] - cells).abs()).clamp(min=0).to(mask.dtype)


def stuff_map(
    probabilities: Tensor, size: tuple[int, int], categories: Categories, conflicts: Conflicts, covered: Tensor
) -> Tensor:
    """int64 [H, W], the class of stuff of each pixel, by (b) and (c); -1 where void.

    Args:
        probabilities: float [C, h, w].
        size: H, W.
        categories: with stuff among them.
        conflicts: thresholds.
        covered: bool [H, W], pixels of instances.
    """
    best, classes = most_probable(probabilities, size, categories.stuff)
    counted = classes[~covered] if conflicts.count_after_things else classes.view(-1)
    counts = torch.bincount(counted, minlength=len(categories))[list(categories.stuff)]
    least = conflicts.stuff_area
    if conflicts.stuff_share:
        least = int(conflicts.stuff_share * size[0] * size[1]) + 1  # strictly more than the share
    allowed = [c for c, count in zip(categories.stuff, counts.tolist(), strict=True) if count >= least]
    allowed = allowed or [categories.stuff[int(counts.argmax())]]
    if set(classes.unique().tolist()) - set(allowed):
        best, classes = most_probable(probabilities, size, allowed)
    if conflicts.stuff_threshold:
        classes = torch.where(best > conflicts.stuff_threshold, classes, -1)
    return classes


def most_probable(probabilities: Tensor, size: tuple[int, int], classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The most probable of some classes at each output pixel, the first of equals.

    Args:
        probabilities: float [C, h, w], resized bilinearly.
        size: H, W.
        classes: to choose from, at least one.

    Returns:
        its probability [H, W], and the class int64 [H, W].
    """
    table = torch.tensor(classes, device=probabilities.device)
    best, index = best_classes(probabilities[table], lambda x: resize(x, size, False))
    return best, table[index]
