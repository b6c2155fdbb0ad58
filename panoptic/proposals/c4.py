"""A head made of a residual stage: "ResNet-C4" of Mask R-CNN (arXiv 1703.06870, figure 4, left), as JSIS-Net has it.

Regions are pooled at twice the side and reduced by a maximum, go through the stage, and class, box and mask
are read off its output. What was not published follows the code of JSIS-Net's successor by the same authors
(DdeGeus/single-network-panoptic-segmentation), in which a region has one class and suppression sees no classes.

Shapes: R regions of the batch, K thing classes, S side of the pooled features, M side of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import batched_nms

from panoptic.layers import ConvNormAct, Norm, resize
from panoptic.proposals.boxes import clip, is_empty
from panoptic.proposals.heads import Detection, Detections
from panoptic.proposals.pooling import pool
from panoptic.resnet import Bottleneck

Pooling = Literal["align", "crop"]
"""align: RoIAlign (aligned, adaptive); crop: one bilinear sample a place, the outermost on the box's border."""

MaskUpsampling = Literal["bilinear", "deconvolution"]


def pool_regions(features: Tensor, stride: int, boxes: Sequence[Tensor], side: int, how: Pooling) -> Tensor:
    """[R, C, S, S]: regions at side 2 S, then the maximum of each 2x2.

    Args:
        features: [B, C, h, w].
        stride: of the features.
        boxes: for each image float [n, 4] in pixels of the canvas.
        side: S.
        how: the features are sampled.
    """
    if how == "align":
        return functional.max_pool2d(pool([features], [stride], boxes, 2 * side), 2)
    cropped = [crop(features[b : b + 1], stride, part, 2 * side) for b, part in enumerate(boxes)]
    return functional.max_pool2d(torch.cat(cropped), 2)


def crop(features: Tensor, stride: int, boxes: Tensor, side: int) -> Tensor:
    """[n, C, side, side], TensorFlow's crop_and_resize: samples from one border of a box to the other, evenly.

    A box is normalised by the canvas and the features' outermost samples stand for its borders.
    """
    size = boxes.new_tensor([features.shape[-1], features.shape[-2]]) * stride
    steps = torch.linspace(0, 1, side, device=boxes.device)[:, None]
    low, high = (2 * boxes[:, None, k : k + 2] / size - 1 for k in (0, 2))  # [n, 1, 2], from -1 to 1
    along = low + steps * (high - low)  # [n, side, 2], x and y
    x, y = along[:, None, :, 0].expand(-1, side, -1), along[:, :, None, 1].expand(-1, -1, side)
    grid = torch.stack([x, y], -1).reshape(1, -1, side, 2).to(features.dtype)
    sampled = functional.grid_sample(features, grid, align_corners=True)
    return sampled.view(features.shape[1], -1, side, side).transpose(0, 1)


def residual_stage(inputs: int, width: int, blocks: int, norm: Norm) -> nn.Sequential:
    """`blocks` bottlenecks of stride 1 and 4 `width` channels out: a stage of the head's own."""
    stage = nn.Sequential(*(Bottleneck(inputs if k == 0 else 4 * width, width, 1, 1, norm) for k in range(blocks)))
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return stage


def without_stride(stage: nn.Module) -> nn.Module:
    """A stage of a ResNet with every convolution at stride 1, undilated: pooled features are small already."""
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            module.stride, module.dilation = (1, 1), (1, 1)
            module.padding = (module.kernel_size[0] // 2, module.kernel_size[1] // 2)
    return stage


class BoxReader(nn.Module):
    """Class logits and a box for each class from the mean of a region's features."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.classes, self.deltas = nn.Linear(inputs, classes + 1), nn.Linear(inputs, 4 * classes)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        nn.init.zeros_(self.classes.bias)
        nn.init.zeros_(self.deltas.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[R, C, S, S] to class logits [R, K + 1] (background last) and deltas [R, 4 K], both float32."""
        mean = features.mean((2, 3))
        return self.classes(mean).float(), self.deltas(mean).float()


class MaskReader(nn.Module):
    """A mask for each class: a 3x3, upsampling to M, a 3x3, a 1x1; or two transposed convolutions, to 4 S.

    Args:
        inputs: channels of the features.
        channels: of the hidden layers.
        classes: K.
        side: M.
        upsampling: bilinear with corners aligned, or transposed 2x2 of stride 2 in place of all but the last layer.
        norm: of the 3x3 convolutions.
    """

    def __init__(
        self, inputs: int, channels: int, classes: int, side: int, upsampling: MaskUpsampling, norm: Norm
    ) -> None:
        super().__init__()
        self.side, self.upsampling = side, upsampling
        if upsampling == "bilinear":
            self.first: nn.Module = ConvNormAct(inputs, channels, 3, norm)
            self.second: nn.Module = ConvNormAct(channels, channels, 3, norm)
        else:
            self.first = nn.ConvTranspose2d(inputs, channels, 2, 2)
            self.second = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.predictor = nn.Conv2d(channels, classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.predictor.weight, std=0.001)

    def forward(self, features: Tensor, classes: Tensor) -> Tensor:
        """[R, C, S, S] and int64 [R] to the logits of each region's class, float32 [R, M, M]."""
        if self.upsampling == "bilinear":
            x = self.second(resize(self.first(features), (self.side, self.side), True))
        else:
            x = functional.relu(self.first(features), inplace=True)
            x = resize(functional.relu(self.second(x), inplace=True), (self.side, self.side), True)
        return self.predictor(x)[torch.arange(len(classes), device=classes.device), classes].float()


@torch.no_grad()
def detect_best(
    boxes: Tensor,
    probabilities: Tensor,
    size: tuple[int, int],
    detection: Detection,
    *,
    background_wins: bool,
    across_classes: bool,
) -> Detections:
    """Detections of one image, at most one of each region: that of its most probable thing.

    Args:
        boxes: float [P, 4 K], decoded, a box for each class.
        probabilities: float [P, K + 1], background last.
        size: height and width of the image.
        detection: thresholds and numbers.
        background_wins: a region whose background is more probable than every thing is none.
        across_classes: detections of different classes suppress each other too.
    """
    best, label = probabilities[:, :-1].max(1)
    chosen = clip(boxes.unflatten(1, (-1, 4))[torch.arange(len(label), device=label.device), label], *size)
    kept = chosen.isfinite().all(1) & (best > detection.threshold) & ~is_empty(chosen)
    if background_wins:
        kept &= best >= probabilities[:, -1]
    region = kept.nonzero()[:, 0]
    group = torch.zeros_like(region) if across_classes else label[region]
    first = batched_nms(chosen[region], best[region], group, detection.nms)[: detection.most]
    region = region[first]
    return Detections(chosen[region], best[region], label[region], region)
