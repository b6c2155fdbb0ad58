"""The graphs of each architecture, as modules with named inputs and outputs.

A model is a graph "network", from uint8 images [B, 3, H, W] and the sizes of the images within their padding (int64
[B, 2]) to named outputs, and where it looks at single segments later a second one: "masks" (DETR), "boxes" and "masks"
(heads on regions), or "kernels" (Panoptic FCN). What is decided in between is `panoptic.runtime`'s, by the rules of
`panoptic.export.rules`.

Shapes: B images, R regions, n queries or kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.export import Dim

from panoptic.models.base import Outputs, PanopticModel
from panoptic.models.detr.model import DETR, valid_cells
from panoptic.models.efficientps.model import EfficientPS
from panoptic.models.jsis_net.c4_head import C4Head, pool_regions
from panoptic.models.jsis_net.model import JSISNet
from panoptic.models.panoptic_fcn.kernel_generator import embedded
from panoptic.models.panoptic_fcn.model import PanopticFCN
from panoptic.models.panoptic_fpn.model import PanopticFPN
from panoptic.rcnn.config import COARSEST
from panoptic.rcnn.mask_rcnn import Detector
from panoptic.rcnn.roi_align import with_image
from panoptic.runtime.runner import NETWORK
from panoptic.segmentation import Frame

TRAINING_ONLY = ("auxiliary_", "features_")
"""Beginnings of the names of outputs that only a loss reads."""

EXAMPLE = (256, 384)
"""Height and width of the images that a graph is traced with: no map of it has a single row or column."""


@dataclass(frozen=True)
class Graph:
    """A part of a model as a function of named tensors."""

    name: str
    module: nn.Module
    """Takes what `arguments` says and gives a dict of tensors."""
    inputs: dict[str, Tensor]
    """Examples, by name."""
    varies: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """The axes of each input whose size is free."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The examples as the module takes them: images and sizes apart, what a second graph reads as one dict."""
        return tuple(self.inputs.values()) if self.name == NETWORK else (self.inputs,)

    @property
    def shapes(self) -> tuple[Any, ...]:
        """The free axes in the same structure, as `torch.export` takes them."""
        free = {name: {axis: Dim.DYNAMIC for axis in self.varies.get(name, ())} for name in self.inputs}
        return tuple(free.values()) if self.name == NETWORK else (free,)


class Network(nn.Module):
    """`PanopticModel.network`, without what only losses read."""

    def __init__(self, model: PanopticModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, sizes: Tensor) -> Outputs:
        """uint8 [B, 3, H, W] and int64 [B, 2] to the network's outputs; of DETR also the "valid" cells of its map."""
        frame = Frame((images.shape[2], images.shape[3]), sizes, sizes)
        outputs = self.model.network(images, frame)
        outputs = {name: value for name, value in outputs.items() if not name.startswith(TRAINING_ONLY)}
        if isinstance(self.model, DETR) and "memory" in outputs:
            valid = valid_cells(frame, outputs["memory"].shape[-2:], images.device)
            assert valid is not None
            outputs["valid"] = valid
        return outputs


@contextmanager
def constant_padding(model: PanopticModel) -> Iterator[None]:
    """A context in which timm's convolutions with TensorFlow's "SAME" padding pad by a constant.

    "SAME" padding follows from the size of the map, which an exporter of free sizes cannot unroll. On a canvas of whole
    cells of the coarsest map, which is what such a model is given, it is always the same: a kernel's reach less the
    stride, the odd pixel right and below.

    Raises:
        ValueError: the canvas is not of whole cells, or another layer pads so; names the remedy or the layer.
    """
    padded = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and isinstance(layer, Conv2dSame)]
    others = {type(layer).__name__ for layer in model.modules() if type(layer).__name__.endswith("Same")}
    if others - {Conv2dSame.__name__}:
        raise ValueError(f"{', '.join(sorted(others))} of timm cannot be exported: its padding follows from the size")
    if padded and model.divisor % COARSEST:
        raise ValueError(
            f"the backbone pads by the size of its maps, exported only where sides are multiples of {COARSEST}; "
            f"model.divisor is {model.divisor}"
        )
    for layer in padded:
        layer.forward = partial(_padded, layer)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for layer in padded:
            del layer.forward


def _padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of a map whose sides are multiples of its stride, with "SAME" padding."""
    sides: list[int] = []
    for size, stride, dilation in reversed(list(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True))):
        reach = max((size - 1) * dilation + 1 - stride, 0)
        sides += [reach // 2, reach - reach // 2]
    return F.conv2d(F.pad(x, sides), layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)


def network_graph(model: PanopticModel, batch: bool) -> Graph:
    """The first graph.

    Args:
        model: in evaluation mode.
        batch: the number of images is free; else it is one.
    """
    step = math.lcm(model.divisor, COARSEST)
    height, width = (-(-side // step) * step for side in EXAMPLE)
    count = 2 if batch else 1
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)
    sizes = torch.tensor([[height - 8, width - 16]] * count)
    first = (0,) if batch else ()
    return Graph(
        NETWORK, Network(model), {"images": images, "sizes": sizes}, {"images": (*first, 2, 3), "sizes": first}
    )


def second_graphs(model: PanopticModel, outputs: Outputs) -> list[Graph]:
    """The graphs that look at single segments, of one image.

    Args:
        model: in evaluation mode.
        outputs: of `Network` for one image, as examples.
    """
    if isinstance(model, DETR) and model.mask_head is not None:
        maps = {name: outputs[name] for name in ("memory", "valid", "levels_0", "levels_1", "levels_2", "levels_3")}
        varies: dict[str, Sequence[int]] = {name: range(x.ndim)[-2:] for name, x in maps.items()}
        return [
            Graph("masks", DETRMasks(model), maps | {"states": outputs["states"][0, :3]}, varies | {"states": (0,)})
        ]
    if isinstance(model, PanopticFCN):
        things = torch.randn(3, model.config.head_channels)
        return [
            Graph(
                "kernels", Kernels(model), {"things": things, "regions": things + 1}, {"things": (0,), "regions": (0,)}
            )
        ]
    if isinstance(model, PanopticFPN | EfficientPS):
        detector = model.detector
        return _heads(DetectorBoxes(detector), DetectorMasks(detector), detector.pooled, outputs)
    if isinstance(model, JSISNet) and model.head is not None:
        stage = None if model.config.head.width else model.backbone.get_submodule("layer4")
        parts = model.head, stage, model.stride
        return _heads(StageBoxes(*parts), StageMasks(*parts), ["features"], outputs)
    return []


def _heads(boxes: nn.Module, masks: nn.Module, levels: Sequence[str], outputs: Outputs) -> list[Graph]:
    """The graphs "boxes" and "masks" of heads on regions of these levels."""
    corners = torch.tensor([[4.0, 8.0, 60.0, 70.0], [40.0, 20.0, 130.0, 190.0], [0.0, 0.0, 16.0, 16.0]])
    inputs = {level: outputs[level] for level in levels}
    varies: dict[str, Sequence[int]] = {level: (2, 3) for level in levels}
    for k, level in enumerate(levels):
        inputs[f"regions_{level}"] = torch.cat([corners, corners[:k] + 1])
        varies[f"regions_{level}"] = (0,)
    count = sum(len(inputs[f"regions_{level}"]) for level in levels)
    classes = {"classes": torch.zeros(count, dtype=torch.int64)}
    return [
        Graph("boxes", boxes, inputs, varies),
        Graph("masks", masks, inputs | classes, varies | {"classes": (0,)}),
    ]


class DETRMasks(nn.Module):
    """DETR's mask head for some queries of one image."""

    def __init__(self, model: DETR) -> None:
        super().__init__()
        assert model.mask_attention is not None and model.mask_head is not None
        self.attention, self.head = model.mask_attention, model.mask_head

    def forward(self, inputs: dict[str, Tensor]) -> Outputs:
        """Outputs of the network, of "states" those of the queries [n, D], to logits "masks" [n, H / 4, W / 4]."""
        maps = self.attention(inputs["states"][None], inputs["memory"], inputs["valid"])[0]
        return {"masks": self.head(maps, [inputs[f"levels_{k}"] for k in range(4)])}


class Kernels(nn.Module):
    """Panoptic FCN's embeddings of kernels."""

    def __init__(self, model: PanopticFCN) -> None:
        super().__init__()
        self.thing_embed, self.stuff_embed = model.thing_embed, model.stuff_embed

    def forward(self, inputs: dict[str, Tensor]) -> Outputs:
        """ "things" and "regions" [n, D] to "thing_kernels" and "region_kernels" [n, C]."""
        return {
            "thing_kernels": embedded(self.thing_embed, inputs["things"]),
            "region_kernels": embedded(self.stuff_embed, inputs["regions"]),
        }


class DetectorBoxes(nn.Module):
    """The box head of a `Detector`, in float32 whatever `Heads.precision` says.

    Regions come level by level, as they are pooled: "regions_p2" [R, 4] in pixels of the canvas, and so on.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.head, self.pooled, self.heads = detector.boxes, list(detector.pooled), detector.config.heads
        self.strides = [detector.strides[name] for name in detector.pooled]
        self.side = self.heads.box_side

    def forward(self, inputs: dict[str, Tensor]) -> Outputs:
        """Levels [1, C, h, w] and regions to "logits" [R, K + 1] and "deltas" [R, 4 K], level by level."""
        logits, deltas = self.head(self.features(inputs))
        return {"logits": logits, "deltas": deltas}

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """[R, C, S, S], the regions of each level pooled from it."""
        from torchvision.ops import roi_align

        options = self.side, self.heads.cell_samples, self.heads.aligned
        return torch.cat(
            [
                roi_align(
                    inputs[name],
                    with_image([inputs[f"regions_{name}"]]),
                    options[0],
                    1 / stride,
                    options[1],
                    options[2],
                )
                for name, stride in zip(self.pooled, self.strides, strict=True)
            ]
        )


class DetectorMasks(DetectorBoxes):
    """The mask head of a `Detector`."""

    def __init__(self, detector: Detector) -> None:
        super().__init__(detector)
        self.head, self.side = detector.masks, self.heads.mask_side

    def forward(self, inputs: dict[str, Tensor]) -> Outputs:
        """Levels, regions and their "classes" [R] among the things to logits "masks" [R, M, M]."""
        return {"masks": self.head(self.features(inputs), inputs["classes"])}


class StageBoxes(nn.Module):
    """The box predictor of JSIS-Net's head on a residual stage, in float32."""

    def __init__(self, head: C4Head, stage: nn.Module | None, stride: int) -> None:
        super().__init__()
        self.head, self.stage, self.stride = head, head.stage if stage is None else stage, stride

    def forward(self, inputs: dict[str, Tensor]) -> Outputs:
        """The map "features" [1, C, h, w] and "regions_features" [R, 4] to "logits" [R, K + 1], "deltas" [R, 4 K]."""
        logits, deltas = self.head.boxes(self.regions(inputs))
        return {"logits": logits, "deltas": deltas}

    def regions(self, inputs: dict[str, Tensor]) -> Tensor:
        """[R, D, S, S], regions through the stage."""
        assert self.stage is not None
        return self.stage(
            pool_regions(inputs["features"], self.stride, [inputs["regions_features"]], self.head.options)
        )


class StageMasks(StageBoxes):
    """The mask predictor of JSIS-Net's head."""

    def forward(self, inputs: dict[str, Tensor]) -> Outputs:
        """The map, regions and their "classes" [R] among the things to logits "masks" [R, M, M]."""
        return {"masks": self.head.masks(self.regions(inputs), inputs["classes"])}
