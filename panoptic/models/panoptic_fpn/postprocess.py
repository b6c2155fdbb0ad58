"""Panoptic FPN after the network: detections, their masks, the merged map (arXiv 1901.02446, section 3).

Shapes: B images, H x W the output of one image, S stuff classes, h x w the map of the semantic branch.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from panoptic.layers.greedy_merge import class_map, merge_by_score
from panoptic.layers.resize import resize
from panoptic.layers.upsampled_argmax import best_classes
from panoptic.models.base import Outputs, Prediction, Wanted
from panoptic.rcnn.canvas import padded_canvas
from panoptic.rcnn.mask_rcnn import Detector, as_instances, output_boxes, paste_detections
from panoptic.segmentation import IGNORE, Categories, Frame, Instances, Segmentation


def postprocess(
    outputs: Outputs,
    frame: Frame,
    want: Collection[Wanted],
    detector: Detector,
    categories: Categories,
    *,
    confidence: float,
    overlap: float,
    stuff_area: int,
) -> Prediction:
    """Merged maps (stuff scores 1), all detections, class maps and region proposals, whichever are wanted.

    Proposals, heads and masks are computed once for all of them.

    Args:
        outputs: of `PanopticFPN.network`, or with "detections", "masks" and "semantic" as `PanopticFPN` takes them.
        frame: of the batch.
        want: fields of `Prediction`.
        detector: of the model.
        categories: tell things from stuff.
        confidence, overlap, stuff_area: of `merge_by_score`.
    """
    merges = bool({"maps", "semantics"} & set(want))
    needs_masks = merges or "instances" in want
    needs_proposals = "proposals" in want or (needs_masks and "detections" not in outputs)
    proposals = detector.propose(outputs, frame) if needs_proposals else []
    if needs_masks:
        outputs = detector.detect(outputs, frame, proposals)
    # the map needs the masks of confident detections only, AP those of all
    least = -math.inf if "instances" in want else confidence
    stuff_labels = (IGNORE, *categories.stuff)
    maps: list[Segmentation] = []
    instances: list[Instances] = []
    semantics: list[np.ndarray] = []
    for b in range(len(frame.sizes) if needs_masks else 0):
        masks, rows = paste_detections(outputs, frame, b, least)
        if "instances" in want:
            instances.append(as_instances(masks, rows, frame.output_size(b)))
        if merges:
            branch = semantic_classes(outputs["semantic"], frame, b)
            merged = merge_by_score(
                masks,
                rows[:, 5].long().tolist(),
                rows[:, 4].numpy(),
                branch,
                stuff_labels,
                confidence=confidence,
                overlap=overlap,
                stuff_area=stuff_area,
            )
            maps.append(merged)
            if "semantics" in want:
                semantics.append(class_map(branch, stuff_labels, merged, categories.is_thing))
    return Prediction(
        maps=maps if "maps" in want else None,
        instances=instances if "instances" in want else None,
        semantics=semantics if "semantics" in want else None,
        proposals=output_boxes(proposals, frame) if "proposals" in want else None,
    )


def semantic_classes(logits: Tensor, frame: Frame, b: int) -> np.ndarray:
    """The best class of the semantic branch at each output pixel of image b: 0 for things, 1 + k for stuff class k.

    Args:
        logits: float [B, 1 + S, h, w], or at the size of the padded canvas.
        frame: of the batch.
        b: the image's number.

    Returns:
        uint8 (int16 for more than 256 classes) [H, W].
    """
    canvas, (height, width), output = padded_canvas(frame), frame.size(b), frame.output_size(b)

    def upsample(x: Tensor) -> Tensor:
        # to the canvas, without the batch padding, to the output
        return resize(resize(x, canvas, False)[:, :, :height, :width], output, False)

    kind = torch.uint8 if logits.shape[1] <= 256 else torch.int16
    return best_classes(logits[b], upsample)[1].to(kind).cpu().numpy()
