"""VGG-16 (Simonyan and Zisserman 2014) as a pyramid, with torchvision's key names.

The features are taken after the pools: "stem" at stride 2, "res2" to "res5" at strides 4 to 32 (a tap
before each pool would give strides 2 to 16, wrong for the anchors of a pyramid network).

Shapes: B images, H x W canvas.
"""

from __future__ import annotations

from torch import Tensor, nn

from panoptic.backbones.config import STEM_AND_STAGES
from panoptic.layers.config import Norm
from panoptic.layers.norm import norm_layer

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of the convolutions before each pool."""

VGGS = ("vgg16", "vgg16_bn")


class VGG(nn.Module):
    """Five blocks of 3x3 convolutions, each followed by a 2x2 pool.

    Args:
        norm: after each convolution; None for the plain network.
    """

    def __init__(self, norm: Norm | None = None) -> None:
        super().__init__()
        self.channels: dict[str, int] = {name: block[-1] for name, block in zip(STEM_AND_STAGES, BLOCKS, strict=True)}
        self.strides: dict[str, int] = {name: 2 ** (k + 1) for k, name in enumerate(STEM_AND_STAGES)}
        layers: list[nn.Module] = []
        self.taps: dict[int, str] = {}
        inputs = 3
        for name, block in zip(STEM_AND_STAGES, BLOCKS, strict=True):
            for outputs in block:
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1)]
                layers += [] if norm is None else [norm_layer(norm, outputs)]
                layers += [nn.ReLU(inplace=True)]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
            self.taps[len(layers) - 1] = name
        self.features = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] to the five feature maps; sides are halved and rounded down."""
        features = {}
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                features[self.taps[index]] = x
        return features

    def stage_names(self) -> list[list[str]]:
        """The modules of the five freezable stages: what lies before each pool."""
        ends = list(self.taps)
        starts = [0, *(end + 1 for end in ends[:-1])]
        return [[f"features.{k}" for k in range(start, end + 1)] for start, end in zip(starts, ends, strict=True)]


def _initialise(module: nn.Module) -> None:
    """torchvision's: He et al.'s by fan-out, no bias."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
