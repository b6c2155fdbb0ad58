"""Backbones: our ResNet, or any convolutional pyramid of timm, behind one config.

A built backbone maps normalised images [B, 3, H, W] to a dict of features "res2" to "res5" (and
"stem" where it has one) and says their `channels` and `strides`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import timm
from timm.layers.norm_act import freeze_batch_norm_2d
from timm.models import FeatureInfo
from torch import Tensor, nn

from panoptic.layers import Norm, freeze
from panoptic.resnet import DEPTHS, STAGES, ResNet


@dataclass(frozen=True)
class Backbone:
    """Which backbone, how it strides and normalises, what of it is frozen."""

    name: str = "resnet50"
    """resnet18, resnet34, resnet50, resnet101, or any timm model whose features have strides 4 to 32."""
    weights: str = "none"
    """none (from scratch), timm (downloaded by timm), or a file that the pipeline opens and `load_weights` reads."""
    output_stride: Literal[8, 16, 32] = 32
    """Stride of the last feature map; later stages trade their stride for dilation."""
    stem: Literal["conv7", "deeplab"] = "conv7"
    """conv7: one 7x7 convolution; deeplab: three 3x3 convolutions (the R-52 of detectron2)."""
    stride_in_1x1: bool = False
    """Bottlenecks stride in the first 1x1 (Caffe's and detectron2's MSRA weights), not in the 3x3 (torchvision's)."""
    dilate_first: bool = False
    """The first block of a dilated stage is dilated too (detectron2); torchvision keeps the previous dilation there."""
    multigrid: tuple[int, ...] = (1, 1, 1)
    """Factors of the dilations of the last stage's blocks (DeepLabV3)."""
    norm: Norm = "batch"
    """Normalisation of every convolution (ours only; a timm model keeps its own)."""
    freeze: int = 0
    """Freeze the stem (1) and res2 to res_n (n up to 5): no gradients, fixed batch-norm statistics."""

    def build(self) -> ResNet | TimmBackbone:
        """The module, frozen as asked. Weights of a file are loaded afterwards, by `load_weights`.

        Raises:
            ValueError: an unknown name, an option that the backbone does not have, or freeze outside 0..5.
        """
        if not 0 <= self.freeze <= len(STAGES) + 1:
            raise ValueError(f"backbone.freeze: {self.freeze} is not within 0..5 (stem, res2, res3, res4, res5)")
        if self.name not in DEPTHS:
            return self._build_timm()
        module = ResNet(
            self.name,
            self.norm,
            deeplab_stem=self.stem == "deeplab",
            output_stride=self.output_stride,
            dilate_first=self.dilate_first,
            multigrid=self.multigrid,
            stride_in_1x1=self.stride_in_1x1,
        )
        if self.weights == "timm":  # timm's ResNets have torchvision's names too
            load_weights(module, timm.create_model(self.name, pretrained=True).state_dict())
        _freeze_stages(module, self.freeze)
        return module

    def _build_timm(self) -> TimmBackbone:
        default = Backbone()
        for option in ("stem", "stride_in_1x1", "dilate_first", "multigrid", "norm"):
            if getattr(self, option) != getattr(default, option):
                raise ValueError(
                    f"backbone.{option}: only {', '.join(DEPTHS)} have this option; {self.name} comes from timm"
                )
        module = TimmBackbone(self.name, pretrained=self.weights == "timm", output_stride=self.output_stride)
        module.freeze_stages(self.freeze)
        return module


def _freeze_stages(module: ResNet, count: int) -> None:
    for stage in module.stage_modules()[:count]:
        for child in stage:
            replacement = freeze(child)
            if replacement is not child:
                name = next(name for name, other in module.named_children() if other is child)
                setattr(module, name, replacement)


class TimmBackbone(nn.Module):
    """The last four levels of a timm feature pyramid, as "res2" to "res5"; a level before them is "stem".

    Raises:
        ValueError: timm does not know the model, or its features are no pyramid of strides 4, 8, 16, 32.
    """

    def __init__(self, name: str, pretrained: bool = False, output_stride: int = 32) -> None:
        super().__init__()
        self.name = name
        options: dict[str, Any] = {} if output_stride == 32 else {"output_stride": output_stride}
        try:
            self.body = timm.create_model(name, features_only=True, pretrained=pretrained, **options)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(
                f"backbone.name: timm cannot build {name!r} as a feature pyramid of output stride {output_stride} "
                f"({error})"
            ) from error
        info = cast(FeatureInfo, self.body.feature_info)
        wanted = [min(4 * 2**k, output_stride) for k in range(4)]
        if list(info.reduction())[-4:] != wanted:
            raise ValueError(
                f"backbone.name: the features of {name} have strides {info.reduction()}, not {wanted}; "
                "choose a convolutional or hierarchical model"
            )
        names = ("stem", *STAGES)[-len(info.reduction()) :]
        self.channels = dict(zip(names, info.channels()[-5:], strict=True))
        self.strides = dict(zip(names, info.reduction()[-5:], strict=True))
        self.taps = dict(zip(names, info.module_name()[-5:], strict=True))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] to the feature maps [B, C, h, w]; channels-last models (Swin) are turned round."""
        features = dict(zip(self.channels, self.body(x)[-5:], strict=True))
        return {
            name: x if x.shape[1] == self.channels[name] else x.permute(0, 3, 1, 2).contiguous()
            for name, x in features.items()
        }

    def freeze_stages(self, count: int) -> None:
        """Freeze whatever timm registers up to and with the tap of stage `count` (1 = stem .. 5 = everything)."""
        if count == 0:
            return
        order = [name for name, _ in self.body.named_modules() if name]
        stop = len(order) if count == 5 else self._end_of_stage(order, ("stem", *STAGES)[count - 1])
        for name in order[:stop]:
            module = self.body.get_submodule(name)
            if not any(True for _ in module.children()):
                module.requires_grad_(False)
        for name in order[:stop]:
            if isinstance(self.body.get_submodule(name), (nn.BatchNorm2d, nn.SyncBatchNorm)):
                # timm's own conversion, because its batch norms may hold the activation too
                self.body.set_submodule(name, freeze_batch_norm_2d(self.body.get_submodule(name)))

    def _end_of_stage(self, order: list[str], stage: str) -> int:
        """The number of modules, in order of registration, that come no later than the stage's last."""
        if stage not in self.taps:  # a pyramid without a level of its own for the stem
            tap = self._registered(order, self.taps["res2"])
            return order.index(tap)
        tap = self._registered(order, self.taps[stage])
        return max(i for i, name in enumerate(order) if name == tap or name.startswith(f"{tap}.")) + 1

    def _registered(self, order: list[str], tap: str) -> str:
        for name in (tap, tap.replace(".", "_", 1)):  # timm flattens the first level of some models
            if name in order:
                return name
        raise ValueError(f"backbone.freeze: the stages of {self.name} cannot be told apart; use 0 or 5")


def load_weights(backbone: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the weights of a published or own backbone, recognised by their keys.

    Takes torchvision's keys, detectron2's (`stem.conv1.weight`, `res2.0.conv1.norm.weight`), ours and,
    for a timm backbone, that model's own. A prefix `module.`, `backbone.` or `bottom_up.` is stripped and
    the classifier dropped (for timm, whose heads have many names, whatever the pyramid lacks).

    Raises:
        ValueError: keys or shapes do not fit; the message lists them by name.
    """
    for prefix in ("module.", "backbone.", "bottom_up."):
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    own = backbone.state_dict()
    if isinstance(backbone, TimmBackbone):
        renamed = {_timm_key(key, own): value for key, value in state.items()}
        renamed = {key: value for key, value in renamed.items() if key in own}  # timm's heads have many names
    else:
        renamed = {trunk_key(key): value for key, value in state.items() if not key.startswith(("fc.", "linear."))}
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    missing = sorted(set(own) - set(renamed) - counters)
    unknown = sorted(set(renamed) - set(own) - {key for key in renamed if key.endswith("num_batches_tracked")})
    wrong = [
        f"{key} {tuple(renamed[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(set(own) & set(renamed))
        if own[key].shape != renamed[key].shape
    ]
    if missing or unknown or wrong:
        raise ValueError(
            f"backbone.weights: the file does not fit the backbone; missing: {missing}, unknown: {unknown}, "
            f"of another shape: {wrong}; check backbone.name and backbone.stem"
        )
    backbone.load_state_dict({**own, **{key: value for key, value in renamed.items() if key in own}})


def _timm_key(key: str, own: Mapping[str, Tensor]) -> str:
    """The key inside `TimmBackbone` of a key of timm's whole model."""
    key = f"body.{key.removeprefix('body.')}"
    flattened = key.replace(".", "_", 2).replace("body_", "body.", 1)
    return key if key in own or flattened not in own else flattened


def trunk_key(key: str) -> str:
    """detectron2's name of a ResNet weight as torchvision's (`res2.0.conv1.norm.bias` to `layer1.0.bn1.bias`).

    Names that are torchvision's already come back as they are.
    """
    parts = key.split(".")
    if parts[0] == "stem":
        parts = parts[1:]
    elif parts[0] in STAGES:
        parts[0] = f"layer{int(parts[0][3:]) - 1}"
    if "shortcut" in parts:
        at = parts.index("shortcut")
        norm = parts[at + 1] == "norm"
        parts[at : at + 1 + norm] = ["downsample", "1" if norm else "0"]
    if "norm" in parts:
        at = parts.index("norm")
        parts[at - 1 : at + 1] = [parts[at - 1].replace("conv", "bn")]
    return ".".join(parts)
