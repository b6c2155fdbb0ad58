"""A head made of a residual stage: "ResNet-C4" of Mask R-CNN (arXiv 1703.06870, figure 4, left), as JSIS-Net has it.

Regions are pooled at twice the side and reduced by a maximum, go through the stage, and class, box and mask
are read off its output. What JSIS-Net's authors did not publish follows the code of their next network
(DdeGeus/single-network-panoptic-segmentation), in which a region is one instance at most and suppression
sees no classes.

Shapes: R regions of the batch, K thing classes, D channels, S side of the features, M side of a mask, N instances.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.backbones.resnet import Bottleneck, DeformableConv3x3, ResNet
from panoptic.backbones.timm import TimmBackbone
from panoptic.backbones.vit_pyramid import ViTPyramid
from panoptic.layers.config import Norm
from panoptic.layers.conv import ConvNormAct, initialise_convs
from panoptic.layers.precision import autocast
from panoptic.layers.resize import resize
from panoptic.models.jsis_net.config import StageOptions
from panoptic.rcnn.boxes import clip, decode, is_empty
from panoptic.rcnn.config import Detection
from panoptic.rcnn.roi_align import pool
from panoptic.rcnn.roi_heads import Detections

AT_ONCE = 128
"""Regions that go through the stage together at test time: bounds the memory."""


class C4Head(nn.Module):
    """Pooled features through a stage; class, box and mask from its output.

    The ResNet's own last stage stays where it is, in the backbone, so that published weights fill it: it is handed
    in with each call.

    Args:
        shared: channels of the map that regions are pooled from.
        outputs: D of a stage that is handed in.
        classes: K.
        options: the rest.
        norm: of the mask layers and of a new stage.
    """

    def __init__(self, shared: int, outputs: int, classes: int, options: StageOptions, norm: Norm) -> None:
        super().__init__()
        self.options, self.background = options, classes
        self.stage = new_stage(shared, options.width, options.blocks, norm) if options.width else None
        outputs = 4 * options.width or outputs
        self.boxes = BoxPredictor(outputs, classes)
        self.masks = MaskPredictor(outputs, classes, options, norm)

    def region_features(
        self, features: Tensor, stride: int, boxes: Sequence[Tensor], stage: nn.Module | None
    ) -> Tensor:
        """The features [R, D, S, S] of all regions, float32.

        Args:
            features: [B, C, h, w].
            stride: of the features.
            boxes: for each image float [n, 4] in pixels of the canvas.
            stage: where the head has none of its own.
        """
        stage = self.stage if self.stage is not None else stage
        assert stage is not None
        with autocast(features.device, self.options.precision):
            return stage(pool_regions(features, stride, boxes, self.options)).float()

    def mask_logits(self, features: Tensor, classes: Tensor) -> Tensor:
        """[R, D, S, S] and int64 [R] to the logits of each region's class, float32 [R, M, M]."""
        with autocast(features.device, self.options.precision):
            return self.masks(features, classes).float()

    @torch.no_grad()
    def detect(
        self,
        features: Tensor,
        stride: int,
        boxes: Tensor,
        size: tuple[int, int],
        detection: Detection,
        stage: nn.Module | None,
    ) -> tuple[Detections, Tensor]:
        """The detections of one image, and float [N], how probable the region of each is to be background.

        Args:
            features: [1, C, h, w].
            stride: of the features.
            boxes: float [P, 4] of the proposals.
            size: height and width of the image, without batch padding.
            detection: thresholds and numbers.
            stage: as in `region_features`.
        """
        parts = [self.boxes(self.region_features(features, stride, [part], stage)) for part in boxes.split(AT_ONCE)]
        logits, deltas = (torch.cat(part) for part in zip(*parts, strict=True))
        probabilities = logits.softmax(1)
        decoded = decode(boxes, deltas, detection.code)
        detections = detect_best(decoded, probabilities, size, detection, self.options.across_classes)
        return detections, probabilities[detections.regions, -1]

    @torch.no_grad()
    def mask_probabilities(
        self, features: Tensor, stride: int, boxes: Tensor, classes: Tensor, stage: nn.Module | None
    ) -> Tensor:
        """The probability of each instance of one image in the cells of its box, float [N, M, M].

        Args:
            features, stride, stage: as in `detect`.
            boxes: float [N, 4].
            classes: int64 [N].
        """
        masks = [features.new_zeros(0, self.options.mask_side, self.options.mask_side)]
        for part, labels in zip(boxes.split(AT_ONCE), classes.split(AT_ONCE), strict=True):
            if len(part):
                masks.append(self.mask_logits(self.region_features(features, stride, [part], stage), labels).sigmoid())
        return torch.cat(masks)


class BoxPredictor(nn.Module):
    """Class logits and a box for each class from the mean of a region's features."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.classes, self.deltas = nn.Linear(inputs, classes + 1), nn.Linear(inputs, 4 * classes)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        nn.init.zeros_(self.classes.bias)
        nn.init.zeros_(self.deltas.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[R, D, S, S] to class logits [R, K + 1] (background last) and deltas [R, 4 K]."""
        mean = features.mean((2, 3))
        return self.classes(mean), self.deltas(mean)


class MaskPredictor(nn.Module):
    """A mask for each class from a region's features."""

    def __init__(self, inputs: int, classes: int, options: StageOptions, norm: Norm) -> None:
        super().__init__()
        self.side, self.bilinear, channels = (
            options.mask_side,
            options.mask_upsampling == "bilinear",
            options.mask_channels,
        )
        if self.bilinear:
            self.first: nn.Module = ConvNormAct(inputs, channels, 3, norm)
            self.second: nn.Module = ConvNormAct(channels, channels, 3, norm)
        else:
            self.first = nn.ConvTranspose2d(inputs, channels, 2, 2)
            self.second = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.predictor = nn.Conv2d(channels, classes, 1)
        initialise_convs(self)
        nn.init.normal_(self.predictor.weight, std=0.001)

    def forward(self, features: Tensor, classes: Tensor) -> Tensor:
        """[R, D, S, S] and int64 [R] to the logits of each region's class [R, M, M]."""
        x, size = self.first(features), (self.side, self.side)
        if self.bilinear:
            x = self.second(resize(x, size, True))
        else:
            x = resize(F.relu(self.second(F.relu(x))), size, True)
        return self.predictor(x)[torch.arange(classes.shape[0], device=classes.device), classes]


def pool_regions(features: Tensor, stride: int, boxes: Sequence[Tensor], options: StageOptions) -> Tensor:
    """[R, C, S, S]: regions sampled at side 2 S, then the maximum of each 2x2.

    Args:
        features: [B, C, h, w].
        stride: of the features.
        boxes: for each image float [n, 4] in pixels of the canvas.
        options: S and the kind of sampling.
    """
    side = 2 * options.side
    if options.pooling == "align":
        return F.max_pool2d(pool([features], [stride], boxes, side), 2)
    parts = [crop(features[b : b + 1], stride, part, side) for b, part in enumerate(boxes)]
    return F.max_pool2d(torch.cat(parts), 2)


def crop(features: Tensor, stride: int, boxes: Tensor, side: int) -> Tensor:
    """[n, C, side, side], TensorFlow's crop_and_resize: samples from one border of a box to the other, evenly.

    Boxes are normalised by the extent of the map, whose outermost cells stand for its borders.

    Args:
        features: [1, C, h, w].
        stride: of the features.
        boxes: float [n, 4] in pixels of the canvas.
        side: how many samples along each axis.
    """
    extent = boxes.new_tensor([features.shape[-1], features.shape[-2]]) * stride
    steps = torch.linspace(0, 1, side, device=boxes.device)[:, None]
    low, high = (2 * boxes[:, None, k : k + 2] / extent - 1 for k in (0, 2))  # [n, 1, 2], -1 to 1 over the map
    places = low + steps * (high - low)  # [n, side, 2], x and y
    x, y = places[:, None, :, 0].expand(-1, side, -1), places[:, :, None, 1].expand(-1, -1, side)
    grid = torch.stack([x, y], -1).reshape(1, -1, side, 2).to(features.dtype)
    sampled = F.grid_sample(features, grid, align_corners=True)
    return sampled.view(features.shape[1], -1, side, side).transpose(0, 1)


def new_stage(inputs: int, width: int, blocks: int, norm: Norm) -> nn.Sequential:
    """`blocks` bottlenecks of stride 1, 4 `width` channels out."""
    stage = nn.Sequential(*(Bottleneck(inputs if k == 0 else 4 * width, width, 1, 1, norm) for k in range(blocks)))
    initialise_convs(stage)
    return stage


def cut_backbone(backbone: nn.Module, shared: str, head: bool) -> None:
    """Remove the stages that come after the `shared` feature, but for the last one where it is the `head`'s.

    Raises:
        ValueError: the backbone is used in part and is no ResNet of ours, or it has no stage for the head.
    """
    if isinstance(backbone, ViTPyramid) and head:
        raise ValueError(f"head.width: 0 takes a ResNet's last stage, which {backbone.name} has not got; give a width")
    if isinstance(backbone, TimmBackbone) and head:
        raise ValueError(f"head.width: 0 takes a ResNet's last stage, and {backbone.name} is timm's; give a width")
    if shared == "res5" or isinstance(backbone, (ViTPyramid, TimmBackbone)):
        return
    if not isinstance(backbone, ResNet):
        raise ValueError(
            f"shared_level: {shared} needs one of our ResNets or one of timm's models; choose res5, and set head.width"
        )
    if head:
        remove_stride(backbone.get_submodule("layer4"))
    for k in range(int(shared[3:]), 4 if head else 5):
        delattr(backbone, f"layer{k}")


def remove_stride(stage: nn.Module) -> None:
    """Every convolution of a ResNet's stage at stride 1, undilated: pooled features are small already."""
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            module.stride, module.dilation = (1, 1), (1, 1)
            module.padding = (module.kernel_size[0] // 2, module.kernel_size[1] // 2)
        elif isinstance(module, DeformableConv3x3):
            module.stride = module.dilation = 1


@torch.no_grad()
def detect_best(
    boxes: Tensor, probabilities: Tensor, size: tuple[int, int], detection: Detection, across_classes: bool
) -> Detections:
    """Detections of one image, at most one of each region: that of its most probable thing.

    Args:
        boxes: float [P, 4 K], decoded, a box for each class.
        probabilities: float [P, K + 1], background last.
        size: height and width of the image.
        detection: thresholds and numbers.
        across_classes: detections of different classes suppress each other too.
    """
    from torchvision.ops import batched_nms  # torchvision takes seconds, and most processes need nothing of it

    best, label = probabilities[:, :-1].max(1)
    chosen = clip(boxes.unflatten(1, (-1, 4))[torch.arange(len(label), device=label.device), label], *size)
    kept = chosen.isfinite().all(1) & (best > detection.threshold) & ~is_empty(chosen)
    region = kept.nonzero()[:, 0]
    group = torch.zeros_like(region) if across_classes else label[region]
    region = region[batched_nms(chosen[region], best[region], group, detection.nms)[: detection.most]]
    return Detections(chosen[region], best[region], label[region], region)
