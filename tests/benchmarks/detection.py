"""Panoptic FPN: pasting and merging instances (rows 7c, 7d), and the whole model against torchvision's Mask R-CNN.

Row fpn puts one image of 640x480 through both, without resizing, with the same weights where both have a layer, the
same number of proposals (1000) and of detections (100). Ours also has a semantic branch and merges, so torchvision's
time is counted together with that of our semantic branch, which row fpn-semantic shows apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, roi_heads
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from panoptic.backbones import Backbone
from panoptic.layers.greedy_merge import CroppedMask, merge_by_score
from panoptic.models.panoptic_fpn.model import PanopticFPN, PanopticFPNConfig
from panoptic.models.panoptic_fpn.postprocess import semantic_classes
from panoptic.rcnn.mask_rcnn import DetectorConfig
from panoptic.rcnn.paste_masks import paste
from panoptic.rcnn.roi_heads import Detection
from panoptic.rcnn.rpn import Regions
from panoptic.segmentation import IGNORE, Categories, Frame, Segmentation
from tests.benchmarks import inputs, peers
from tests.benchmarks.timing import Case

SIZE, INSTANCES, SIDE = (800, 1333), 100, 28
"""Of rows 7c and 7d: the image, how many masks, and their side."""

PHOTOGRAPH, PROPOSALS = (480, 640), 1000

TIES = 1e-5
"""Share of a mask's pixels that lie on its threshold up to rounding."""


def cases(names: Sequence[str], scale: float, folder: Path | None) -> list[Case]:
    """The cases among 7c, 7d, fpn and fpn-semantic that are wanted, with sides multiplied by `scale`."""
    found = [make(scale, folder) for name, make in {"7c": _pasting, "7d": _merging}.items() if name in names]
    if {"fpn", "fpn-semantic"} & set(names):
        pair = Pair.build(scale)
        found += [case(pair) for name, case in {"fpn": _whole, "fpn-semantic": _semantic}.items() if name in names]
    return found


def _sides(size: tuple[int, int], scale: float) -> tuple[int, int]:
    height, width = (max(48, round(side * scale)) for side in size)
    return height, width


def draw_masks(rng: np.random.Generator, size: tuple[int, int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities float32 [N, 28, 28] of ragged blobs, and boxes float32 [N, 4] as large as things on photographs."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1) * 2 - 1
    angle = np.arctan2(rows, columns)
    masks = np.empty((count, SIDE, SIDE), np.float32)
    for mask in masks:
        reach = 0.9 + sum(rng.normal(0, 0.1) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in (2, 3, 5))
        mask[:] = 1 / (1 + np.exp(-12 * (reach - np.hypot(rows, columns)) + rng.normal(0, 0.3, mask.shape)))
    half = min(size) * np.clip(0.05 * rng.lognormal(0, 0.7, (count, 1)), 0.02, 0.3) * rng.uniform(0.7, 1.4, (count, 2))
    middle = rng.uniform(0.06, 0.94, (count, 2)) * np.array(size)[::-1]
    limits = np.array(size)[::-1]
    low, high = np.clip(middle - half, 0, limits - 2), np.clip(middle + half, 2, limits)
    return masks, np.concatenate([low, high], 1).astype(np.float32)


def _whole_masks(pasted: Sequence[CroppedMask], size: tuple[int, int]) -> np.ndarray:
    masks = np.zeros((len(pasted), *size), bool)
    for mask, instance in zip(masks, pasted, strict=True):
        mask[instance.window] = instance.mask
    return masks


def _pasting(scale: float, folder: Path | None) -> Case:
    size = _sides(SIZE, scale)
    masks, boxes = draw_masks(np.random.default_rng(3), size, INSTANCES)
    tensors = torch.from_numpy(masks), torch.from_numpy(boxes)
    detectron2 = peers.mask_ops(folder)

    def torchvision(_: int) -> Tensor:
        return roi_heads.paste_masks_in_image(tensors[0][:, None], tensors[1], size)[:, 0] >= 0.5

    def similar(mine: list[CroppedMask], other: Tensor) -> None:
        ours, theirs = _whole_masks(mine, size), other.numpy()
        shared = (ours & theirs).sum((1, 2)) / np.maximum(1, (ours | theirs).sum((1, 2)))
        least = 0.9 if min(size) > 400 else 0.8  # it moves boxes to whole pixels, which small ones feel more
        if np.median(shared) < least:
            raise ValueError(f"masks overlap by {np.median(shared):.2f} in the median, at least {least} expected")

    def equal(mine: list[CroppedMask], other: Tensor) -> None:
        _nearly_equal(_whole_masks(mine, size), other.numpy())

    theirs: dict[str, Callable[[int], Any]] = {"torchvision": torchvision}
    compare: dict[str, Callable[[Any, Any], None]] = {"torchvision": similar}
    if detectron2 is not None:
        theirs["detectron2"] = lambda _: detectron2.paste_masks_in_image(*tensors, size)
        compare["detectron2"] = equal
    work = f"pasting {INSTANCES} masks, {size[1]}x{size[0]}"
    return Case("7c", work, lambda _: paste(masks, boxes, size), theirs, compare)


def _nearly_equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    if (ours != theirs).mean() > TIES:
        raise ValueError(f"{100 * (ours != theirs).mean():.4f} % of the pixels differ, at most {100 * TIES:g} % may")


def _merging(scale: float, folder: Path | None) -> Case:
    size, rng = _sides(SIZE, scale), np.random.default_rng(4)
    categories = inputs.categories(80, 53)
    masks, boxes = draw_masks(rng, size, INSTANCES)
    scores = np.sort(rng.uniform(0.4, 1.0, INSTANCES).astype(np.float32))[::-1].copy()
    classes = rng.integers(0, 80, INSTANCES)
    stuff = _draw_stuff(rng, size, categories)
    area = round(4096 * scale**2)
    labels = [categories.things[k] for k in classes]
    combine, mask_ops = peers.panoptic_merge(folder), peers.mask_ops(folder)

    def ours(_: int) -> Segmentation:
        pasted = paste(masks, boxes, size)
        return merge_by_score(pasted, labels, scores.tolist(), stuff, (IGNORE, *categories.stuff), stuff_area=area)

    semantic, tensors = torch.from_numpy(stuff.astype(np.int64)), (torch.from_numpy(masks), torch.from_numpy(boxes))

    def detectron2(_: int) -> Tensor:
        assert combine is not None and mask_ops is not None
        pasted = mask_ops.paste_masks_in_image(*tensors, size)
        found = SimpleNamespace(
            scores=torch.from_numpy(scores), pred_masks=pasted, pred_classes=torch.from_numpy(classes)
        )
        return combine(found, semantic, 0.5, area, 0.5)[0]

    def equal(mine: Segmentation, other: Tensor) -> None:
        _nearly_equal(mine.segments, other.numpy())

    work = f"pasting and merging {INSTANCES} instances, {size[1]}x{size[0]}"
    found = combine is not None and mask_ops is not None
    return Case("7d", work, ours, {"detectron2": detectron2} if found else {}, {"detectron2": equal} if found else {})


def _draw_stuff(rng: np.random.Generator, size: tuple[int, int], categories: Categories) -> np.ndarray:
    """uint8 [H, W]: 1 + the place of each pixel's class among the stuff, 0 where a thing was drawn."""
    truth = inputs.draw_truth(rng, size, 14, 7, categories)
    table = np.zeros(len(categories) + 1, np.uint8)
    table[list(categories.stuff)] = np.arange(1, len(categories.stuff) + 1)
    return table[truth.semantic()]


class Pair:
    """Our model and torchvision's, of the same weights, and an image."""

    def __init__(self, ours: PanopticFPN, theirs: MaskRCNN, image: Tensor) -> None:
        self.ours, self.theirs, self.image = ours, theirs, image
        with torch.no_grad():
            self.levels = ours.pyramid(ours.backbone(ours.pixels(image)))

    @classmethod
    def build(cls, scale: float) -> Pair:
        """Both at reduced numbers of proposals and detections where the image is smaller."""
        torch.manual_seed(0)
        height, width = _sides(PHOTOGRAPH, scale)
        proposals, detections = (max(1, round(count * scale**2)) for count in (PROPOSALS, INSTANCES))
        ours = _ours(proposals, detections)
        theirs = _theirs(height, width, proposals, detections)
        theirs.load_state_dict(same_weights(ours, theirs))
        truth = inputs.draw_truth(np.random.default_rng(5), (height, width), 14, 7, inputs.categories(80, 53))
        image = inputs.draw_image(np.random.default_rng(5), truth)
        return cls(ours, theirs, torch.from_numpy(image.transpose(2, 0, 1).copy())[None])

    @torch.no_grad()
    def panoptic(self) -> tuple[Segmentation, int]:
        """Our whole model on the image: the map, and the number of detections."""
        frame = Frame.full(self.image)
        outputs = self.ours.detector.detect(self.ours.network(self.image), frame)
        return self.ours.postprocess(outputs, frame).maps[0], outputs["detections"].shape[1]

    @torch.no_grad()
    def semantic(self) -> np.ndarray:
        """Our semantic branch on the levels of the pyramid: the map of classes."""
        logits = self.ours.classifier(self.ours.semantic(self.levels))
        return semantic_classes(logits, Frame.full(self.image), 0)

    @torch.no_grad()
    def instances(self) -> int:
        """torchvision's whole model, and the number of its detections."""
        (found,) = self.theirs([self.image[0].float() / 255])
        return len(found["boxes"])

    def check(self) -> None:
        """Both work as much as the row says.

        Raises:
            ValueError: the proposals or detections of one of them are fewer or more.
        """
        proposals, detections = self.ours.config.detector.regions.test_after, self.ours.config.detector.detection.most
        images, _ = self.theirs.transform([self.image[0].float() / 255])
        with torch.no_grad():
            features = self.theirs.backbone(images.tensors)
            (proposed,), _ = self.theirs.rpn(images, features)
            mine = self.ours.postprocess(
                self.ours.network(self.image), Frame.full(self.image), ["proposals"]
            ).proposals[0]
        found = {
            "torchvision's proposals": (len(proposed), proposals),
            "our proposals": (len(mine), proposals),
            "torchvision's detections": (self.instances(), detections),
            "our detections": (self.panoptic()[1], detections),
        }
        wrong = [f"{name}: {count} instead of {wanted}" for name, (count, wanted) in found.items() if count != wanted]
        if wrong or tuple(images.tensors.shape[-2:]) != tuple(-(-side // 32) * 32 for side in self.image.shape[-2:]):
            raise ValueError("; ".join(wrong) or f"the image was resized to {tuple(images.tensors.shape[-2:])}")


def _ours(proposals: int, detections: int) -> PanopticFPN:
    config = PanopticFPNConfig(
        backbone=Backbone(norm="frozen"),
        pixel_mean=(123.675, 116.28, 103.53),
        pixel_std=(58.395, 57.12, 57.375),
        bgr=False,
        detector=DetectorConfig(
            Regions(test_before=2 * proposals, test_after=proposals), Detection(threshold=0.02, most=detections)
        ),
        confidence=0.0,
    )
    model = config.build(inputs.categories(80, 53)).eval()
    for name, module in model.named_modules():
        if name.startswith("backbone.layer") and name.endswith("bn3"):
            nn.init.constant_(module.weight, 0.2)  # type: ignore[arg-type]  # without statistics blocks would add up
    for layer in (model.detector.boxes.classes, model.detector.regions.objectness):
        nn.init.normal_(layer.weight, std=0.05)  # detections of all classes, scores that differ
    return model


def _theirs(height: int, width: int, proposals: int, detections: int) -> MaskRCNN:
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d)
    return MaskRCNN(
        backbone,
        81,
        min_size=min(height, width),
        max_size=max(height, width),
        rpn_pre_nms_top_n_test=2 * proposals,
        rpn_post_nms_top_n_test=proposals,
        box_score_thresh=0.02,
        box_detections_per_img=detections,
    ).eval()


def same_weights(ours: PanopticFPN, theirs: MaskRCNN) -> Mapping[str, Tensor]:
    """Our weights under torchvision's names; its background is the first class, ours the last."""
    own, renamed = ours.state_dict(), {}
    for key in theirs.state_dict():
        name = key.replace("backbone.body.", "backbone.")
        for level in range(4):
            name = name.replace(f"backbone.fpn.inner_blocks.{level}.0.", f"pyramid.lateral.p{level + 2}.")
            name = name.replace(f"backbone.fpn.layer_blocks.{level}.0.", f"pyramid.output.p{level + 2}.")
        for theirs_name, our_name in _LAYERS.items():
            name = name.replace(theirs_name, our_name)
        value = own[name]
        if ".box_predictor." in key:
            value = torch.cat([value[-1:], value[:-1]]) if "cls_score" in key else _with_background(value, 4)
        if ".mask_fcn_logits." in key:
            value = _with_background(value, 1)
        renamed[key] = value
    return renamed


def _with_background(value: Tensor, rows: int) -> Tensor:
    return torch.cat([torch.zeros_like(value[:rows]), value])


_LAYERS = {
    "rpn.head.conv.0.0.": "detector.regions.conv.",
    "rpn.head.cls_logits.": "detector.regions.objectness.",
    "rpn.head.bbox_pred.": "detector.regions.deltas.",
    "roi_heads.box_head.fc6.": "detector.boxes.fc1.",
    "roi_heads.box_head.fc7.": "detector.boxes.fc2.",
    "roi_heads.box_predictor.cls_score.": "detector.boxes.classes.",
    "roi_heads.box_predictor.bbox_pred.": "detector.boxes.deltas.",
    **{f"roi_heads.mask_head.{k}.0.": f"detector.masks.convs.{k}." for k in range(4)},
    "roi_heads.mask_predictor.conv5_mask.": "detector.masks.deconv.",
    "roi_heads.mask_predictor.mask_fcn_logits.": "detector.masks.predictor.",
}


def _whole(pair: Pair) -> Case:
    height, width = pair.image.shape[-2:]
    regions = pair.ours.config.detector

    def theirs(_: int) -> tuple[int, np.ndarray]:
        return pair.instances(), pair.semantic()

    def compare(_: Any, __: Any) -> None:
        pair.check()

    work = (
        f"Panoptic FPN R50 to the merged map, {width}x{height}, {regions.regions.test_after} proposals, "
        f"{regions.detection.most} detections"
    )
    peer = "torchvision Mask R-CNN + our semantic branch"
    return Case("fpn", work, lambda _: pair.panoptic(), {peer: theirs}, {peer: compare})


def _semantic(pair: Pair) -> Case:
    height, width = pair.image.shape[-2:]
    return Case("fpn-semantic", f"its semantic branch alone, {width}x{height}", lambda _: pair.semantic())
