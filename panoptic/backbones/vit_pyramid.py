"""A plain ViT of timm as a pyramid: the simple feature pyramid of ViTDet (Li et al., arXiv 2203.16527).

A plain ViT gives one map, of one token for each patch of 16x16 pixels. Four strides are made of its last map, each by
itself: transposed convolutions double its sides, a pooling halves them, and two convolutions with norms give each level
256 channels. There is no top-down path.

The names of the pyramid's weights and its numbers are those of detectron2's `SimpleFeaturePyramid`. Ours: the final
norm of the ViT is applied to its map, since the features of DINOv2 and DINOv3 are meant normed (detectron2's ViT has no
final norm); the ViT attends globally, without ViTDet's windows and relative positions; a canvas that is no multiple of
32 is padded inside, with zeros at the right and bottom, and the levels are cut to what a convolutional pyramid gives.

Positions are resampled at every forward from the grid on which the published weights were trained, so that any canvas
fits. Patches of 14 pixels (DINOv2) are resampled to 16 once, when weights are loaded, by the pseudo-inverse of FlexiViT
(arXiv 2212.08013).

Shapes: B images, H x W canvas, h x w the map of stride 16, C channels of the ViT.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.backbones.config import STAGES
from panoptic.backbones.stages import freeze_vit, vit_layer

PATCH = 16
"""Side of a patch: the stride of the ViT's map."""

COARSEST = 2 * PATCH
"""Stride of res5, to whose multiples the canvas is padded."""

RESAMPLED = 14
"""Patches of this side (DINOv2's) are resampled to `PATCH`."""

WIDTH = 256
"""Channels of every level."""

BUILDING_ERRORS = (RuntimeError, TypeError, AttributeError, ValueError, AssertionError)
"""Kinds of error that timm raises for names and options that it cannot build."""


class ViTPyramid(nn.Module):
    """Features "res2" to "res5" at strides 4 to 32, each of 256 channels, made of the last map of a plain ViT.

    Args:
        name: timm's.
        levels: those that are made. A model that uses fewer names them: no parameter may be left without a gradient.

    Raises:
        ValueError: timm cannot build the ViT for canvases of any size, or its patches do not have 16 (or 14) pixels.
    """

    def __init__(self, name: str, levels: Collection[str] = STAGES) -> None:
        super().__init__()
        self.name = name
        self.body = create_vit(name, **vit_options(name))
        self.body.prune_intermediate_layers(1, prune_norm=False, prune_head=True)  # type: ignore[operator]
        self.depth = len(self.body.get_submodule("blocks"))  # type: ignore[arg-type]
        self.channels: dict[str, int] = {level: WIDTH for level in STAGES if level in levels}
        self.strides: dict[str, int] = {level: 4 * 2**k for k, level in enumerate(STAGES) if level in levels}
        for level in self.channels:
            self.add_module(pyramid_name(level), pyramid_level(level, self.body.num_features))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] of any size to the levels [B, 256, ceil(H / stride), ceil(W / stride)]."""
        return self.from_map(self.frozen_map(x), x.shape[-2:])

    def frozen_map(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] of any size to the ViT's last "map", of a canvas padded to whole cells of the coarsest level."""
        height, width = x.shape[-2:]
        return {"map": self.last_map(F.pad(x, (0, -width % COARSEST, 0, -height % COARSEST)))}

    def from_map(self, maps: Mapping[str, Tensor], size: Sequence[int]) -> dict[str, Tensor]:
        """The levels of what `frozen_map` gives of images of a size (H, W)."""
        (height, width), x, features = size, maps["map"], {}
        for level, stride in self.strides.items():
            made = self.get_submodule(pyramid_name(level))(x)
            features[level] = made[:, :, : -(-height // stride), : -(-width // stride)]
        return features

    def last_map(self, x: Tensor) -> Tensor:
        """[B, 3, H, W], sides multiples of 32, to the ViT's normed last map [B, C, h, w], of its patches alone."""
        body: Any = self.body
        return body.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]

    def freeze_stages(self, count: int) -> None:
        """Freeze the first `count` stages of the ViT: 1 = patches, positions and tokens, up to 5 = all of it.

        res2 to res5 are quarters of its blocks. The pyramid is never frozen: it has no published weights.
        """
        freeze_vit(self.body, self.depth, count)

    def layer_of(self, name: str) -> int | None:
        """The layer of a parameter (`stages.vit_layer`); None for the pyramid, which learns like the heads."""
        return vit_layer(name.removeprefix("body."), self.depth) if name.startswith("body.") else None

    def published(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a ViT's file under this backbone's names, patches and positions resampled to its own.

        Takes timm's names and those of the files that timm converts (Meta's DINOv2 and DINOv3 among them). Heads are
        left out, whatever their names.
        """
        own = self.state_dict()
        state = {key.removeprefix("body."): value for key, value in state.items()}
        pyramid = {key: value for key, value in state.items() if key in own}
        body = {key: value for key, value in state.items() if not key.startswith("simfp_")}
        converted = sys.modules[type(self.body).__module__].checkpoint_filter_fn(body, self.body)
        renamed = {f"body.{key}": value for key, value in converted.items()}
        return pyramid | {key: value for key, value in renamed.items() if key in own}


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each cell."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, h, w] to the same."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNorm(nn.Conv2d):
    """A convolution without a bias, then a norm over the channels of each cell. No activation."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__(channels, WIDTH, size, padding=size // 2, bias=False)
        self.norm = ChannelNorm(WIDTH, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, h, w] to [B, 256, h, w]."""
        return self.norm(super().forward(input))


def pyramid_level(level: str, channels: int) -> nn.Sequential:
    """The layers from the map of stride 16 to a level.

    Args:
        level: a name of `STAGES`.
        channels: of the map.
    """
    half, quarter = channels // 2, channels // 4
    match level:
        case "res2":
            head: list[nn.Module] = [
                nn.ConvTranspose2d(channels, half, 2, stride=2),
                ChannelNorm(half, eps=1e-6),
                nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, stride=2),
            ]
            channels = quarter
        case "res3":
            head, channels = [nn.ConvTranspose2d(channels, half, 2, stride=2)], half
        case "res4":
            head = []
        case _:
            head = [nn.MaxPool2d(2, 2)]
    return nn.Sequential(*head, ConvNorm(channels, 1), ConvNorm(WIDTH, 3))


def pyramid_name(level: str) -> str:
    """detectron2's name of the layers of a level: simfp_2 for res2."""
    return f"simfp_{level.removeprefix('res')}"


@functools.cache
def patch_and_grid(name: str) -> tuple[int, tuple[int, int]] | None:
    """The side of a plain ViT's patches and its grid of positions, rows and columns; None for any other model of timm.

    A plain ViT is a model of which all features have one stride. It is looked at on torch's meta device, where it takes
    neither memory nor random numbers.
    """
    import timm

    try:
        with torch.device("meta"):
            features: Any = timm.create_model(name, features_only=True)
    except BUILDING_ERRORS:
        return None
    strides = set(features.feature_info.reduction())
    grid = getattr(getattr(getattr(features, "model", None), "patch_embed", None), "grid_size", None)
    return (strides.pop(), grid or (0, 0)) if len(strides) == 1 else None


def vit_options(name: str) -> dict[str, Any]:
    """The options with which timm builds a plain ViT for patches of 16 pixels and canvases of any size.

    Positions keep the grid of the published weights, so that they are resampled only once, to the canvas.

    Raises:
        ValueError: its patches have another size.
    """
    found = patch_and_grid(name)
    if found is None or found[0] not in (PATCH, RESAMPLED):
        side = found[0] if found else "no"
        raise ValueError(
            f"backbone.name: {name} has patches of {side} pixels, whose pyramid would not have the strides 4 to 32; "
            f"choose a ViT with patches of {PATCH} pixels, or of {RESAMPLED}, which are resampled to {PATCH}"
        )
    side, (rows, columns) = found
    options: dict[str, Any] = {"dynamic_img_size": True}
    return options if side == PATCH else options | {"patch_size": PATCH, "img_size": (rows * PATCH, columns * PATCH)}


def create_vit(name: str, **options: Any) -> nn.Module:
    """A plain ViT of timm.

    Raises:
        ValueError: timm cannot build it with these options.
    """
    import timm

    try:
        return timm.create_model(name, **options)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"backbone.name: timm cannot build {name} for canvases of any size ({error}); choose a ViT that it can, "
            "such as vit_small_patch14_reg4_dinov2 or vit_small_patch16_dinov3_qkvb"
        ) from error
