"""Panoptic FPN (Kirillov, Girshick, He, Dollár, "Panoptic Feature Pyramid Networks", arXiv 1901.02446).

Mask R-CNN on a feature pyramid finds things, a light branch on the same pyramid says the class of each pixel, and
things lie above stuff in the merged map.

Everything is computed as detectron2 does: anchors without an offset within their cell, aligned RoIAlign with adaptive
sampling, L1 for boxes, one class "things" in the semantic branch (class 0; stuff k is class 1 + k), and a merge that
keeps an instance however little of it is left. Its odd choices stay: both losses of the proposals are divided by the
number of anchors that should have been sampled, not by those that were, and an anchor that overlaps a thing as much as
any other does is positive, however little that is. The default configuration is the published one, which trains from
converted weights (fixed norms, a frozen stem and res2); from scratch the backbone wants norms that learn.

Deviations: true things come from the panoptic map and so never overlap; their masks are cut out of that map (as
detectron2 does with bitmaps), not rasterised from polygons. Instances of equal score keep the order of detection.
Only the predictor of a region's own class is multiplied in the mask head, which changes no result.
Canvases of any size work: the network pads them to whole cells of its coarsest level.

`semantics` is what the semantic branch says of stuff; where it says "things" the class comes from the merged map.

The truth in place of the outputs (`truth`) goes through masks of 28 x 28 in boxes, so that the map comes back only
nearly: PQ 99 at least in the contract tests, 97 on the same maps four times as large. "masks" of the truth lie in its
boxes and so count only with its "detections".

Shapes: B images, S stuff classes, K thing classes, H x W canvas, h x w a level, A anchors of a cell, N detections, M
side of a mask. "p2" to "p6" have strides 4 to 64.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic import losses
from panoptic.backbones import Backbone
from panoptic.layers.fpn import FPN, LEVELS, SemanticFPN
from panoptic.layers.greedy_merge import merge_instances
from panoptic.layers.image import ImageNormalisation
from panoptic.layers.norm import Norm
from panoptic.layers.resize import resize
from panoptic.layers.upsampled_argmax import best_classes
from panoptic.models.base import Outputs, PanopticModel
from panoptic.rcnn.mask_rcnn import Detector, DetectorConfig, enlarge_boxes, paste_detections
from panoptic.rcnn.paste_masks import encode
from panoptic.segmentation import IGNORE, Categories, Frame, Instances, Segmentation, Targets
from panoptic.targets.dense import semantic_map

CERTAIN = 30.0
"""The logit of a true class in `truth`: its softmax is 1 in float32."""

COARSEST = 32
"""Stride of the backbone's last feature; the canvas becomes a multiple of it."""

CAFFE2 = Backbone(name="resnet50", stride_in_1x1=True, norm="frozen", freeze=2)
"""The backbone of the published models."""


@dataclass(frozen=True)
class PanopticFPNConfig:
    """Panoptic FPN on any backbone; the defaults are detectron2's for COCO."""

    backbone: Backbone = CAFFE2
    """Where the features come from."""
    divisor: int = 32
    """Batches are padded to a multiple of this."""
    pixel_mean: tuple[float, float, float] = (103.53, 116.28, 123.675)
    """Subtracted from the pixels, scale 0..255."""
    pixel_std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Divides the pixels, scale 0..255."""
    bgr: bool = True
    """Channels enter as blue, green, red; mean and std are then in that order."""
    width: int = 256
    """Channels of every level of the pyramid."""
    norm: Norm | None = None
    """Normalisation in the pyramid; None = a bias instead."""
    semantic_width: int = 128
    """Channels of the semantic branch."""
    semantic_norm: Norm = "group"
    """Normalisation in the semantic branch."""
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    """Region proposals, box head and mask head."""
    semantic_weight: float = 0.5
    """Factor of the semantic loss."""
    instance_weight: float = 1.0
    """Factor of the losses of the box and mask heads (not of the proposals)."""
    confidence: float = 0.5
    """Instances enter the merged map from this score on."""
    overlap: float = 0.5
    """Share of an instance that better ones may cover."""
    stuff_area: int = 4096
    """Stuff of fewer pixels becomes void."""

    def build(self, categories: Categories) -> PanopticFPN:
        """The model, initialised from scratch but for what `backbone.weights` says of timm.

        Raises:
            ValueError: options contradict each other, or there is no thing to detect; the message names them.
        """
        if not categories.things:
            raise ValueError("categories: there is no thing class to detect; Panoptic FPN needs one")
        if self.divisor % COARSEST:
            raise ValueError(f"divisor: {self.divisor} is no multiple of {COARSEST}, the stride of the backbone")
        if self.backbone.output_stride != COARSEST:
            raise ValueError(
                f"backbone.output_stride: {self.backbone.output_stride}; the levels of the pyramid double in stride, "
                f"so it must be {COARSEST}"
            )
        return PanopticFPN(self, categories)


class PanopticFPN(PanopticModel):
    """Trunk, pyramid, semantic branch, region proposals, box head and mask head.

    Outputs: "semantic" logits [B, 1 + S, H / 4, W / 4] ("things", then the stuff classes), the levels "p2" to "p5"
    [B, C, h, w], and of "p2" to "p6" "objectness_p2" [B, A, h, w] and "deltas_p2" [B, 4 A, h, w].

    `segment` and `instances` also take "semantic" at the size of the padded canvas, and "detections" [B, N, 6] (x0 y0
    x1 y1 in pixels of the canvas, score, class; `IGNORE` for none) with "masks" [B, N, M, M], probabilities, instead of
    detecting anything.
    """

    truth_needs = MappingProxyType({"masks": ("detections",)})

    def __init__(self, config: PanopticFPNConfig, categories: Categories) -> None:
        super().__init__()
        self.config, self.categories, self.divisor = config, categories, config.divisor
        self.pixels = ImageNormalisation(config.pixel_mean, config.pixel_std, config.bgr)
        self.backbone = config.backbone.build()
        self.pyramid = FPN({name: self.backbone.channels[name] for name in LEVELS}, config.width, config.norm)
        strides = {level: self.backbone.strides[name] for name, level in LEVELS.items()}
        self.detector = Detector(
            strides | {"p6": 2 * strides["p5"]}, list(strides), config.width, categories, config.detector
        )
        self.semantic = SemanticFPN(config.width, config.semantic_width, config.semantic_norm)
        self.classifier = nn.Conv2d(config.semantic_width, 1 + len(categories.stuff), 1)
        nn.init.kaiming_normal_(self.classifier.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]

    def network(self, images: Tensor, frame: Frame | None = None) -> Outputs:
        """uint8 [B, 3, H, W] to the outputs that the class describes, of the canvas padded to whole cells."""
        height, width = images.shape[-2:]
        x = F.pad(self.pixels(images, frame), (0, -width % COARSEST, 0, -height % COARSEST))
        levels = self.pyramid(self.backbone(x))
        return {"semantic": self.classifier(self.semantic(levels)), **self.detector(levels)}

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Terms "semantic", "objectness", "region", "class", "box" and "mask"."""
        terms = {"semantic": self.config.semantic_weight * self._semantic_loss(outputs["semantic"], targets)}
        for name, value in self.detector.losses(outputs, targets).items():
            terms[name] = value * (self.config.instance_weight if name in ("class", "box", "mask") else 1.0)
        return terms

    @torch.no_grad()
    def segment(self, outputs: Outputs, frame: Frame) -> list[Segmentation]:
        """Merged maps at `frame.output_sizes`; things have the score of their detection, stuff has 1."""
        outputs = self.detections(outputs, frame)
        return [self._merge(outputs, frame, b) for b in range(len(frame.sizes))]

    @torch.no_grad()
    def instances(self, outputs: Outputs, frame: Frame, merged: list[Segmentation] | None = None) -> list[Instances]:
        """All detections, best first."""
        outputs, scored = self.detections(outputs, frame), []
        for b in range(len(frame.sizes)):
            pasted, rows = paste_detections(outputs, frame, b, -np.inf)
            masks = [encode(instance, frame.output_size(b)) for instance in pasted]
            scored.append(Instances(masks, rows[:, 5].long().numpy(), rows[:, 4].numpy(), rows[:, :4].numpy()))
        return scored

    @torch.no_grad()
    def semantics(self, outputs: Outputs, frame: Frame, merged: list[Segmentation] | None = None) -> list[np.ndarray]:
        """int32 [H, W] class maps: stuff by the semantic branch alone, things from the merged map."""
        table = np.array([IGNORE, *self.categories.stuff], np.int32)
        is_thing = np.array([*self.categories.is_thing, False])
        found = []
        for b, segmentation in enumerate(self.segment(outputs, frame) if merged is None else merged):
            classes = table[self.semantic_classes(outputs["semantic"], frame, b)]
            drawn = segmentation.semantic()
            found.append(np.where((classes == IGNORE) & is_thing[drawn], drawn, classes))
        return found

    @torch.no_grad()
    def proposals(self, outputs: Outputs, frame: Frame) -> list[Tensor]:
        """float [P, 4] of each image, best first, in pixels of the output: what testing proposes."""
        return [enlarge_boxes(part.boxes, frame, b) for b, part in enumerate(self.detector.propose(outputs, frame))]

    @torch.no_grad()
    def detections(self, outputs: Outputs, frame: Frame) -> Outputs:
        """`outputs` with "detections" and "masks", unless they are there."""
        return self.detector.detections(outputs, frame)

    @torch.no_grad()
    def truth(self, targets: Targets, outputs: Outputs) -> Outputs:
        """The "semantic", "detections" and "masks" of the truth. Void and crowds of things are "things": no stuff."""
        classes = self._semantic_targets(targets).clamp(min=0)[:, None]
        height, width = self._padded(targets.frame)
        logits = torch.zeros(len(classes), 1 + len(self.categories.stuff), height, width, device=classes.device)
        logits[:, :, : classes.shape[2], : classes.shape[3]].scatter_(1, classes, CERTAIN)
        return {"semantic": logits, **self.detector.truth(targets)}

    def _semantic_loss(self, logits: Tensor, targets: Targets) -> Tensor:
        height, width = targets.frame.canvas
        upsampled = self._on_canvas(logits, targets.frame)[:, :, :height, :width]
        return losses.cross_entropy(upsampled, self._semantic_targets(targets))

    def _semantic_targets(self, targets: Targets) -> Tensor:
        """int64 [B, H, W]: 0 things (crowds too), 1 + k stuff, `IGNORE`."""
        table = torch.zeros(len(self.categories) + 1, dtype=torch.int64)
        table[list(self.categories.stuff)] = torch.arange(1, 1 + len(self.categories.stuff))
        table[IGNORE] = IGNORE
        return semantic_map(replace(targets, labels=table.to(targets.labels.device)[targets.labels]))

    def _merge(self, outputs: Outputs, frame: Frame, b: int) -> Segmentation:
        pasted, rows = paste_detections(outputs, frame, b, self.config.confidence)
        return merge_instances(
            pasted,
            rows[:, 5].long().tolist(),
            rows[:, 4].tolist(),
            self.semantic_classes(outputs["semantic"], frame, b),
            self.categories,
            confidence=self.config.confidence,
            overlap=self.config.overlap,
            stuff_area=self.config.stuff_area,
        )

    def semantic_classes(self, logits: Tensor, frame: Frame, b: int) -> np.ndarray:
        """uint8 or int16 [H, W] of image b at output size: the best class of the semantic branch."""
        height, width = frame.size(b)
        output = frame.output_size(b)

        def upsample(x: Tensor) -> Tensor:
            return resize(self._on_canvas(x, frame)[:, :, :height, :width], output, False)

        kind = torch.uint8 if logits.shape[1] <= 256 else torch.int16
        return best_classes(logits[b], upsample)[1].to(kind).cpu().numpy()

    def _on_canvas(self, x: Tensor, frame: Frame) -> Tensor:
        """[B, C, h, w] to the size of the padded canvas; what has that size already stays as it is."""
        return resize(x, self._padded(frame), False)

    def _padded(self, frame: Frame) -> tuple[int, int]:
        """The canvas in whole cells of the coarsest level."""
        height, width = frame.canvas
        return -(-height // COARSEST) * COARSEST, -(-width // COARSEST) * COARSEST
