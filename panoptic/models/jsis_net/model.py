"""JSIS-Net (de Geus, Meletis, Dubbelman, "Panoptic Segmentation with a Joint Semantic and Instance Segmentation
Network", arXiv 1809.02110).

One ResNet feeds two branches: pyramid pooling says the class of each pixel, things and stuff alike; a Mask R-CNN whose
head is the last stage of the ResNet finds things. Seven weighted losses train both, `merging.jsis` makes one map of
both. Neither code nor weights were published. What the paper leaves open is an option, and its default is this:

| open in the paper | here | the authors' next network |
|---|---|---|
| shared map | res4, stride 16 (`shared_level`, `backbone.output_stride`) | the whole ResNet, stride 8, reduced to 512 |
| last layers | the ResNet's own last stage, at stride 1 (`head.width` 0) | a new stage, base width 256, 3 units |
| averages | 1, 2, 3, 6 cells a side, a quarter of the channels each | 512 channels each, with a bias |
| hybrid upsampling | 4x4 of stride 2, corners not aligned | 3x3 of stride 1, corners aligned |
| anchors | 32 to 512 pixels, ratios 1/2, 1, 2 | 8 to 256 pixels, ratios 1/4 to 4 |
| pooling of regions | aligned RoIAlign (`head.pooling`) | crop_and_resize |
| mask loss | summed over images (`mask_reduction`), soft targets | the same |
| stuff of few pixels | `merging.jsis` | counted before things, 1/2048 of the image |

Matching, sampling and the divisors of the losses are that network's: anchors from 0.5 overlap on are positive and below
0.1 background, 256 an image; proposals overlap by 0.5 at most; 64 regions an image learn, at most a quarter of them
positive (0.5 overlap), without the true boxes. L2 regularisation is half the sum of the squared kernels, without biases
and norms; with SGD it is a weight decay of that size, and `regularisation` 0 leaves it to the optimiser.

Background is the last class of a region, not the first. A class's box code has no entry for the background, which
nothing would train. Things that are crowds are background to the detector. Masks are sampled at the centres of cells,
when they are learnt as when they are pasted. True things come from the panoptic map and so never overlap.

The truth in place of the outputs (`truth`) goes through masks of 28 x 28: see `ORACLE` in the contract tests.

Shapes: B images, C classes, H x W canvas, h x w shared map of D channels, A anchors of a cell, M side of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic import losses
from panoptic.backbones import Backbone
from panoptic.layers.image import ImageNormalisation
from panoptic.layers.norm import Norm, set_norm_momentum
from panoptic.layers.resize import resize
from panoptic.models.base import Outputs, PanopticModel
from panoptic.models.jsis_net import c4_head
from panoptic.models.jsis_net.postprocess import Conflicts, Found, merge_conflicts, most_probable
from panoptic.models.jsis_net.semantic_branch import Deconvolution, PooledSemantics
from panoptic.rcnn.mask_rcnn import enlarge_boxes, paste_detections, true_detections
from panoptic.rcnn.paste_masks import encode
from panoptic.rcnn.roi_heads import Detection, Sampled, box_losses, mask_loss, sample_regions
from panoptic.rcnn.rpn import Proposals, RegionHead, Regions, anchors_of, flatten, propose, region_losses
from panoptic.segmentation import IGNORE, Categories, Frame, Instances, Segmentation, Targets
from panoptic.targets.dense import is_thing, semantic_map
from panoptic.targets.instances import instance_lists, region_masks

CERTAIN = 30.0
"""The logit of a true class in `truth`: its softmax is 1 in float32."""

REGIONS = Regions(
    negative=0.1,
    positive=0.5,
    low_quality=False,
    beta=1.0,
    divide="sampled",
    nms=0.5,
    train_before=6000,
    test_before=6000,
)
"""Region proposals as the authors' next network has them, with Mask R-CNN's anchors."""

DETECTION = Detection(samples=64, append_truth=False, beta=1.0, threshold=0.5, nms=0.4)
"""Regions and instances as the authors' next network has them."""


@dataclass(frozen=True)
class JSISNetConfig:
    """JSIS-Net: a semantic and an instance branch on one ResNet, or either of them alone."""

    backbone: Backbone = field(default_factory=Backbone)
    """Where the features come from."""
    branches: Literal["both", "semantic", "instances"] = "both"
    """What is trained: both branches, or one of them as in the paper's table 3."""
    trunks: Literal["shared", "separate"] = "shared"
    """separate: each branch has a backbone of its own, to merge two models that were trained apart (table 3 again)."""
    divisor: int = 16
    """Batches are padded to a multiple of this."""
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Subtracted from the pixels, scale 0..255."""
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Divides the pixels, scale 0..255."""
    bgr: bool = False
    """Channels enter as blue, green, red; mean and std are then in that order."""
    norm: Norm = "batch"
    """Normalisation in the semantic branch, the mask layers and a stage of the head's own."""
    norm_momentum: float = 0.1
    """Weight of the newest batch in running statistics, everywhere."""
    shared_level: Literal["res3", "res4", "res5"] = "res4"
    """The feature that both branches share."""
    bins: tuple[int, ...] = (1, 2, 3, 6)
    """Cells a side of each average of the pyramid pooling."""
    bin_channels: int = 0
    """Channels of each average; 0 = the shared map's, shared out."""
    semantic_channels: int = 512
    """Width of the semantic branch behind the pyramid pooling."""
    deconvolution: Deconvolution = "double"
    """First step of the hybrid upsampling: 4x4 of stride 2, 3x3 of stride 1, or none."""
    align_corners: bool = False
    """Of its second, bilinear step."""
    regions: Regions = field(default_factory=lambda: REGIONS)
    """Anchors, how they learn, and which become proposals."""
    region_channels: int = 512
    """Width of the region proposal network."""
    detection: Detection = field(default_factory=lambda: DETECTION)
    """Which regions the head learns from, and which of them are instances."""
    head: c4_head.StageOptions = field(default_factory=c4_head.StageOptions)
    """The head that looks into regions."""
    soft_masks: bool = True
    """Mask targets are the covered shares of the cells; else those of at least 1/2 count as 1, the others as 0."""
    mask_reduction: Literal["sum", "mean"] = "sum"
    """Of the mask loss over the images of a batch."""
    objectness_weight: float = 1.0
    """Factor of the objectness loss."""
    region_weight: float = 1.0
    """Factor of the loss of the proposals' boxes."""
    class_weight: float = 1.0
    """Factor of the loss of the regions' classes."""
    box_weight: float = 0.15
    """Factor of the loss of the regions' boxes."""
    mask_weight: float = 0.3
    """Factor of the mask loss."""
    semantic_weight: float = 1.0
    """Factor of the semantic loss."""
    regularisation: float = 5.5e-5
    """Factor of half the sum of the squared kernels; 0 leaves it to optim.weight_decay."""
    background_wins: bool = True
    """A region whose background is more probable than every thing is no instance (not for AP)."""
    conflicts: Conflicts = field(default_factory=Conflicts)
    """How instances and semantics are merged."""
    instance_threshold: float = 0.05
    """For AP, instances score more than this (merging: detection.threshold)."""

    def build(self, categories: Categories) -> JSISNet:
        """The model, initialised from scratch but for what `backbone.weights` says of timm.

        Raises:
            ValueError: options contradict each other or the categories; the message names them.
        """
        if self.branches != "semantic" and not categories.things:
            raise ValueError("branches: there is no thing class among the categories; train `semantic` alone")
        if self.branches != "semantic" and self.head.width == 0 and self.shared_level != "res4":
            raise ValueError(
                f"shared_level: the ResNet's last stage follows res4, not {self.shared_level}; give head.width a width"
            )
        return JSISNet(self, categories)


class JSISNet(PanopticModel):
    """A shared backbone, a semantic branch, region proposals and a head.

    Outputs: "semantic" logits [B, C, 2 h, 2 w]; "features" [B, D, h, w], the shared map; "objectness"
    [B, 2 A, h, w] (background, thing of each anchor) and "deltas" [B, 4 A, h, w]. A branch alone has its own only.

    `segment` and `instances` also take "semantic" of any size up to the canvas, from another model too, and instead of
    detecting anything "detections" [B, N, 6] (x0 y0 x1 y1 in pixels of the canvas, score, class, `IGNORE` for none)
    with "masks" [B, N, M, M], probabilities.
    """

    truth_needs = MappingProxyType({"masks": ("detections",)})

    def __init__(self, config: JSISNetConfig, categories: Categories) -> None:
        super().__init__()
        self.config, self.categories, self.divisor = config, categories, config.divisor
        self.background = len(categories.things)
        self.pixels = ImageNormalisation(config.pixel_mean, config.pixel_std, config.bgr)
        self.backbone = config.backbone.build()
        shared, self.stride = self.backbone.channels[config.shared_level], self.backbone.strides[config.shared_level]
        reaches_end = config.branches != "semantic" and config.head.width == 0
        c4_head.cut_backbone(self.backbone, config.shared_level, head=reaches_end)
        self.semantic = self.regions = self.head = self.semantic_backbone = None
        if config.branches == "both" and config.trunks == "separate":
            self.semantic_backbone = config.backbone.build()
            c4_head.cut_backbone(self.semantic_backbone, config.shared_level, head=False)
        if config.branches != "instances":
            pooling = (config.bins, config.bin_channels, config.norm)
            width, classes = config.semantic_channels, len(categories)
            self.semantic = PooledSemantics(shared, width, classes, config.deconvolution, *pooling)
        if config.branches != "semantic":
            anchors = len(config.regions.cells(1)[0])
            self.regions = RegionHead(shared, config.region_channels, anchors, logits=2)
            last = self.backbone.channels["res5"]
            self.head = c4_head.StageHead(shared, last, self.background, config.head, config.norm)
        set_norm_momentum(self, config.norm_momentum)

    def network(self, images: Tensor, frame: Frame | None = None) -> Outputs:
        """uint8 [B, 3, H, W] to the outputs that the class describes."""
        x, outputs = self.pixels(images, frame), {}
        features = self._shared(x, self.backbone)
        if self.semantic is not None:
            other = self.semantic_backbone
            outputs["semantic"] = self.semantic(features if other is None else self._shared(x, other))
        if self.regions is not None:
            (objectness,), (deltas,) = self.regions([features])
            outputs |= {"features": features, "objectness": objectness, "deltas": deltas}
        return outputs

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Of "objectness", "region", "class", "box", "mask", "semantic" and "regularisation" those that are trained."""
        config, terms = self.config, {}
        if self.regions is not None:
            terms |= self._region_losses(outputs, targets)
        if self.semantic is not None:
            logits = resize(outputs["semantic"], targets.frame.canvas, config.align_corners)
            terms["semantic"] = config.semantic_weight * losses.cross_entropy(logits, semantic_map(targets))
        if config.regularisation:
            terms["regularisation"] = config.regularisation * losses.squared_kernels(self)
        return terms

    @torch.no_grad()
    def segment(self, outputs: Outputs, frame: Frame) -> list[Segmentation]:
        """Merged maps at `frame.output_sizes`; things have the probability of their class as score, stuff has 1."""
        outputs, maps = self.detections(outputs, frame), []
        for b in range(len(frame.sizes)):
            found = self._found(outputs, frame, b)
            probabilities = self._probabilities(outputs, frame, b) if "semantic" in outputs else None
            maps.append(
                merge_conflicts(found, probabilities, frame.output_size(b), self.categories, self.config.conflicts)
            )
        return maps

    @torch.no_grad()
    def instances(self, outputs: Outputs, frame: Frame, merged: list[Segmentation] | None = None) -> list[Instances]:
        """All detections, best first: those of `instance_threshold`."""
        outputs, scored = self.detections(outputs, frame), []
        for b in range(len(frame.sizes)):
            pasted, rows = paste_detections(outputs, frame, b, -np.inf)
            masks = [encode(instance, frame.output_size(b)) for instance in pasted]
            scored.append(Instances(masks, rows[:, 5].long().numpy(), rows[:, 4].numpy(), rows[:, :4].numpy()))
        return scored

    @torch.no_grad()
    def semantics(self, outputs: Outputs, frame: Frame, merged: list[Segmentation] | None = None) -> list[np.ndarray]:
        """int32 [H, W] class maps by the semantic branch alone; read off the merged map where there is none."""
        if "semantic" not in outputs:
            return super().semantics(outputs, frame, merged)
        every, images = range(len(self.categories)), range(len(frame.sizes))
        maps = [most_probable(self._probabilities(outputs, frame, b), frame.output_size(b), every)[1] for b in images]
        return [classes.int().cpu().numpy() for classes in maps]

    @torch.no_grad()
    def proposals(self, outputs: Outputs, frame: Frame) -> list[Tensor] | None:
        """float [P, 4] of each image, best first, in pixels of the output; None without an instance branch."""
        if self.regions is None:
            return None
        proposed = self._proposed(outputs, frame, training=False)
        return [enlarge_boxes(part.boxes, frame, b) for b, part in enumerate(proposed)]

    @torch.no_grad()
    def detections(self, outputs: Outputs, frame: Frame) -> Outputs:
        """`outputs` with "detections" and "masks", unless they are there, and with "background" [B, N] if found here.

        They are those of the lower one of the two thresholds; `segment` takes its own out of them.
        """
        if "detections" in outputs and "masks" in outputs:
            return outputs
        if "detections" not in outputs:
            found = self._detect(outputs, frame)
            most = max([1, *(len(part) for part in found)])
            rows = torch.stack([F.pad(part, (0, 0, 0, most - len(part)), value=IGNORE) for part in found])
            outputs = outputs | {"detections": rows[:, :, :6], "background": rows[:, :, 6]}
        rows, side = outputs["detections"], self.config.head.mask_side
        masks = rows.new_zeros(*rows.shape[:2], side, side)
        if self.head is None:
            return outputs | {"masks": masks}
        things = torch.tensor(self.categories.things, device=rows.device)
        for b, part in enumerate(rows):
            kept = part[:, 5] != IGNORE
            features, classes = outputs["features"][b : b + 1], torch.searchsorted(things, part[kept, 5].long())
            places = part[kept, :4].contiguous()
            masks[b, kept] = self.head.outline(features, self.stride, places, classes, self._last_stage())
        return outputs | {"masks": masks}

    @torch.no_grad()
    def truth(self, targets: Targets, outputs: Outputs) -> Outputs:
        """The "semantic", "detections" and "masks" of the truth, crowds included; void is the first class of stuff."""
        semantic = semantic_map(targets)
        void = (self.categories.stuff or self.categories.things)[0]
        classes = torch.where(semantic == IGNORE, void, semantic)[:, None]
        logits = torch.zeros(len(classes), len(self.categories), *targets.frame.canvas, device=classes.device)
        found = true_detections(targets, is_thing(targets, self.categories), self.config.head.mask_side)
        return {"semantic": logits.scatter_(1, classes, CERTAIN), **found}

    def _shared(self, x: Tensor, backbone: nn.Module) -> Tensor:
        """Normalised images to the map that both branches share."""
        if self.config.shared_level == "res5":
            return backbone(x)["res5"]
        x = backbone.stem(x)  # type: ignore[operator]
        for k in range(1, int(self.config.shared_level[3:])):
            x = backbone.get_submodule(f"layer{k}")(x)
        return x

    def _region_losses(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """The five terms of the instance branch."""
        config, detection = self.config, self.config.detection
        assert self.head is not None
        entries, truth, classes = instance_lists(targets, self.categories)
        logits, deltas, anchors = self._anchored(outputs)
        objectness, region = region_losses(logits, deltas, anchors, truth, config.regions)
        proposed = self._proposed(outputs, targets.frame, training=True)
        sampled = sample_regions(proposed, truth, classes, self.background, detection)
        places = [part.boxes for part in sampled]
        features = self.head.look(outputs["features"], self.stride, places, self._last_stage())
        class_logits, codes = self.head.boxes(features)
        entropy, box = box_losses(class_logits, codes, sampled, truth, detection)
        share = len(features) / (detection.samples * len(sampled))  # divided by the quota, not by what there was
        mask = self._mask_loss(features, sampled, entries, targets)
        return {
            "objectness": config.objectness_weight * objectness,
            "region": config.region_weight * region,
            "class": config.class_weight * share * entropy,
            "box": config.box_weight * share * box,
            "mask": config.mask_weight * mask,
        }

    def _mask_loss(
        self, features: Tensor, sampled: Sequence[Sampled], entries: Sequence[Tensor], targets: Targets
    ) -> Tensor:
        """Of each image the mean over its positive regions, added up or averaged over the images."""
        assert self.head is not None
        classes = torch.cat([part.classes for part in sampled])
        held = (classes != self.background).nonzero()[:, 0]
        if not len(held):  # every layer keeps its gradient
            return 0 * self.head.read_mask(features[:1], torch.zeros_like(classes[:1])).sum()
        owners, places = [part.owners for part in sampled], [part.positives for part in sampled]
        wanted = region_masks(targets, entries, places, owners, self.config.head.mask_side)
        if not self.config.soft_masks:
            wanted = (wanted >= 0.5).to(wanted)
        counts = [len(owner) for owner in owners]
        logits = self.head.read_mask(features[held], classes[held])
        terms = [mask_loss(x, y) for x, y in zip(logits.split(counts), wanted.split(counts), strict=True)]
        total = torch.stack(terms).sum()
        return total if self.config.mask_reduction == "sum" else total / len(sampled)

    def _anchored(self, outputs: Outputs) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Logits, deltas and anchors in one order. Two logits of an anchor count by their difference: the softmax."""
        pairs = outputs["objectness"].unflatten(1, (-1, 2))
        logits = pairs[:, :, 1] - pairs[:, :, 0]
        return *flatten([logits], [outputs["deltas"]]), anchors_of([logits], [self.stride], self.config.regions)

    def _proposed(self, outputs: Outputs, frame: Frame, training: bool) -> list[Proposals]:
        """Of each image one proposal at least: the whole image, where every box vanished."""
        logits, deltas, anchors = self._anchored(outputs)
        found = propose(logits, deltas, anchors, frame.sizes, self.config.regions, training)
        for b, (height, width) in enumerate(frame.sizes.tolist()):
            if not len(found[b].boxes):
                whole = outputs["deltas"].new_tensor([[0, 0, width, height]])
                found[b] = Proposals(whole, whole.new_zeros(1))
        return found

    def _last_stage(self) -> nn.Module | None:
        """The ResNet's, where the head has none of its own."""
        return None if self.config.head.width else self.backbone.get_submodule("layer4")

    def _detect(self, outputs: Outputs, frame: Frame) -> list[Tensor]:
        """For each image float [N, 7]: a row of "detections" and how probable the background is."""
        if self.head is None:
            return [outputs["semantic"].new_zeros(0, 7) for _ in frame.sizes]
        threshold = min(self.config.detection.threshold, self.config.instance_threshold)
        detection, found = replace(self.config.detection, threshold=threshold), []
        things = torch.tensor(self.categories.things, device=outputs["features"].device)
        for b, proposed in enumerate(self._proposed(outputs, frame, training=False)):
            features, size = outputs["features"][b : b + 1], frame.size(b)
            best, background = self.head.detect(
                features, self.stride, proposed.boxes, size, detection, self._last_stage()
            )
            columns = torch.stack([best.scores, things[best.classes].to(best.scores), background], 1)
            found.append(torch.cat([best.boxes, columns], 1))
        return found

    def _found(self, outputs: Outputs, frame: Frame, b: int) -> Found:
        """The instances of image b that are merged."""
        rows = outputs["detections"][b]
        kept = (rows[:, 5] != IGNORE) & (rows[:, 4] > self.config.detection.threshold)
        if self.config.background_wins and "background" in outputs:
            kept &= rows[:, 4] >= outputs["background"][b]
        corners = enlarge_boxes(rows[kept, :4], frame, b)
        return Found(corners, outputs["masks"][b][kept], rows[kept, 5].long(), rows[kept, 4])

    def _probabilities(self, outputs: Outputs, frame: Frame, b: int) -> Tensor:
        """float [C, height, width] of image b without its batch padding."""
        height, width = frame.size(b)
        logits = resize(outputs["semantic"][b : b + 1], frame.canvas, self.config.align_corners)
        return logits[0, :, :height, :width].softmax(0)
