"""EfficientPS after the network: detections and the panoptic fusion module (arXiv 2004.02307, section 3.5).

As the authors' code computes it. A thing's logit at a pixel joins the logit a of its mask, four times, and the logit b
that the semantic head gives its class there: (sigmoid(a) + sigmoid(b)) (a + b). Things and classes of stuff then
compete pixel by pixel. Where no thing wins, the semantic head decides alone, and its thing classes become void.

Shapes: B images, K classes, N detections, H x W the output of one image, h x w the map of the semantic head, M side of
a mask.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from panoptic.layers.greedy_merge import CroppedMask
from panoptic.layers.logit_fusion import PastedMask, fuse
from panoptic.layers.resize import resize
from panoptic.layers.upsampled_argmax import best_classes
from panoptic.models.base import Outputs, Prediction, Wanted
from panoptic.models.efficientps.config import Fusion
from panoptic.rcnn.boxes import clip, is_empty
from panoptic.rcnn.canvas import padded_canvas
from panoptic.rcnn.mask_rcnn import Detector, as_instances, enlarge_boxes, output_boxes
from panoptic.rcnn.paste_masks import paste_values
from panoptic.segmentation import IGNORE, Categories, Frame, Segmentation


def postprocess(
    outputs: Outputs,
    frame: Frame,
    want: Collection[Wanted],
    detector: Detector,
    categories: Categories,
    fusion: Fusion,
) -> Prediction:
    """Merged maps (stuff scores 1), all detections, class maps and region proposals, whichever are wanted.

    Proposals, heads and masks are computed once for all of them.

    Args:
        outputs: of `EfficientPS.network`, or with "detections", "masks" and "semantic" as `EfficientPS` takes them.
        frame: of the batch.
        want: fields of `Prediction`.
        detector: of the model.
        categories: tell things from stuff.
        fusion: rules of the merge.
    """
    merges, needs_masks = "maps" in want, bool({"maps", "instances"} & set(want))
    needs_proposals = "proposals" in want or (needs_masks and "detections" not in outputs)
    proposals = detector.propose(outputs, frame) if needs_proposals else []
    if needs_masks:
        outputs = detector.detect(outputs, frame, proposals, logits=True)
    maps, instances, semantics = [], [], []
    for b in range(len(frame.sizes) if needs_masks or "semantics" in want else 0):
        masks, rows = paste_detections(outputs, frame, b, fusion.inclusive) if needs_masks else ([], torch.empty(0, 6))
        if "instances" in want:
            cropped = [CroppedMask(mask.top, mask.left, mask.logits > 0) for mask in masks]
            instances.append(as_instances(cropped, rows, frame.output_size(b)))
        if merges or "semantics" in want:
            logits = SemanticLogits(outputs["semantic"][b], frame, b)
            classes = logits.best_of(range(len(categories)))[1]
            if merges:
                maps.append(_fused(masks, rows, logits, classes, categories, fusion))
            if "semantics" in want:
                semantics.append(classes.astype(np.int32))
    return Prediction(
        maps=maps if merges else None,
        instances=instances if "instances" in want else None,
        semantics=semantics if "semantics" in want else None,
        proposals=output_boxes(proposals, frame) if "proposals" in want else None,
    )


class SemanticLogits:
    """The logits of one image's semantic head at output size; a class at a time, since all may not fit memory.

    Args:
        logits: float [K, h, w], or at the size of the padded canvas.
        frame: of the batch.
        b: the image's number.
    """

    def __init__(self, logits: Tensor, frame: Frame, b: int) -> None:
        self.logits, self.canvas = logits, padded_canvas(frame)
        self.size, self.output = frame.size(b), frame.output_size(b)
        self._classes: dict[int, np.ndarray] = {}

    def of(self, label: int) -> np.ndarray:
        """float32 [H, W], the logits of one class."""
        if label not in self._classes:
            self._classes[label] = self._upsample(self.logits[None, label, None])[0, 0].float().cpu().numpy()
        return self._classes[label]

    def best_of(self, labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The highest logit of some classes at each pixel, float32 [H, W], and its class, int64 [H, W]."""
        table = torch.tensor(list(labels), device=self.logits.device)
        best, index = best_classes(self.logits[table], self._upsample)
        return best.float().cpu().numpy(), table[index].cpu().numpy()

    def _upsample(self, x: Tensor) -> Tensor:
        # to the canvas, without the batch padding, to the output
        height, width = self.size
        return resize(resize(x, self.canvas, False)[:, :, :height, :width], self.output, False)


def paste_detections(outputs: Outputs, frame: Frame, image: int, inclusive: bool) -> tuple[list[PastedMask], Tensor]:
    """The detections of one image with the logits of their masks at output size, best first.

    Args:
        outputs: with "detections" and "masks", logits.
        frame: of the batch.
        image: its number in the batch.
        inclusive: of `Fusion`.

    Returns:
        D masks, and on the CPU float [D, 6], the rows of "detections" in pixels of the output, without those whose box
        has no area there.
    """
    rows = outputs["detections"][image]
    height, width = frame.output_size(image)
    corners = clip(enlarge_boxes(rows[:, :4], frame, image), height, width)
    kept = (rows[:, 5] != IGNORE) & ~is_empty(corners)
    listed = torch.cat([corners, rows[:, 4:]], 1)[kept].cpu()
    order = listed[:, 4].argsort(descending=True, stable=True)
    listed = listed[order]
    logits = outputs["masks"][image][kept].float().cpu()[order].numpy()
    masks = []
    for values, box in zip(logits, listed[:, :4].numpy(), strict=True):
        if inclusive:  # a box of one pixel keeps a sliver, so that there is something to divide by
            box = np.concatenate([box[:2], np.maximum(box[2:] - 1, box[:2] + np.float32(1e-3))])
        masks.append(PastedMask(*paste_values(values, box, (height, width))))
    return masks, listed


def _fused(
    masks: Sequence[PastedMask],
    rows: Tensor,
    logits: SemanticLogits,
    classes: np.ndarray,
    categories: Categories,
    fusion: Fusion,
) -> Segmentation:
    """The panoptic map of one image, see `panoptic.layers.logit_fusion.fuse`."""
    from scipy.special import expit

    return fuse(
        masks,
        rows.numpy(),
        logits,
        classes,
        categories,
        expit,
        overlap=fusion.overlap,
        stuff_area=fusion.stuff_area,
        mask_factor=fusion.mask_factor,
        inclusive=fusion.inclusive,
    )
