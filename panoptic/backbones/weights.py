"""Weights of a backbone from the files of other projects, recognised by their keys.

| file | recognised by |
|---|---|
| torchvision's ResNet and VGG, Res2Net's (v1, v1b), Swin's, timm's, ours | the backbone's own names |
| EfficientNet-PyTorch's port (B0 to B8, Lite0 to Lite4) | `_conv_stem.weight`, `_blocks.0._depthwise_conv.weight` |
| timm's EfficientNet, whose squeeze-excite parts are dropped (EfficientPS has none) | the backbone's own names |
| timm's plain ViTs, resampled to the patch and the canvas | the backbone's own names |
| Meta's and Hugging Face's DINOv2 and DINOv3, resampled, too | the names in `vit_names` |
| detectron2's ResNet and its Res2Net fork | `stem.conv1.weight`, `res2.0.conv1.norm.weight` |
| Caffe2's ResNet (detectron2's MSRA and FAIR files) | `conv1_w`, `res2_0_branch2a_bn_s` |

A prefix `module.`, `backbone.` or `bottom_up.` is stripped and the classifier dropped. Layers of a backbone beyond the
published network (the second 3x3, the offsets of deformable convolutions, the norms of Swin's outputs, the pyramid of a
plain ViT) stay as they were initialised where the file has none of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from panoptic.backbones.config import STAGES
from panoptic.backbones.efficientnet import EfficientNet
from panoptic.backbones.resnet import ResNet
from panoptic.backbones.swin import Swin
from panoptic.backbones.timm import TimmBackbone
from panoptic.backbones.vgg import VGG
from panoptic.backbones.vit import ViT
from panoptic.backbones.vit_names import timm_vit_names
from panoptic.backbones.vit_pyramid import ViTPyramid

CLASSIFIER = ("fc.", "linear.", "head.", "classifier.", "pre_logits.", "stem.fc.", "fc1000_", "pred_")
"""Prefixes of the names that belong to the classifier."""

UNUSED = ("conv1_b", "stem.conv1.bias")
"""Names in Caffe2's files of a bias before a norm, which detectron2 drops too."""

EXTRA = {ResNet: r".*\.(conv2b|bn2b|conv2_offset)\..*", Swin: r"norm[0-3]\..*", ViTPyramid: r"simfp_[2-5]\..*"}
"""Keys of our backbones that the published networks lack, each group present as a whole or not at all."""

PORT_ENDS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
PORT_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2", **_SQUEEZE}
PORT_EXPANDED = {
    **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
    **{"_project_conv": "conv_pwl", "_bn2": "bn3"},
    **_SQUEEZE,
}
"""timm's names of the layers of EfficientNet-PyTorch: outside of the blocks, in the first group, in the others."""

CAFFE2 = {"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
CAFFE2_NORM = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}


def load_weights(backbone: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Load the weights of a published or own backbone.

    Frozen norms without statistics (detectron2's MSRA files) get mean 0 and variance 1, as detectron2 loads them.

    Returns:
        the keys that the file lacks and that stay as they were initialised (see the module).

    Raises:
        ValueError: keys or shapes do not fit, listed by name; or the file's network strides elsewhere.
    """
    for prefix in ("module.", "backbone.", "bottom_up."):
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    own = backbone.state_dict()
    renamed = _renamed(backbone, state, own)
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    fresh = _fresh(backbone, own, renamed)
    missing = sorted(set(own) - set(renamed) - counters - set(fresh))
    unknown = sorted(key for key in set(renamed) - set(own) if not key.endswith("num_batches_tracked"))
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
    return fresh


def _renamed(backbone: nn.Module, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the backbone's own names, the classifier's left out."""
    if "_conv_stem.weight" in state:
        state = _efficientnet(state, own)
    if isinstance(backbone, ViT):
        return backbone.fitted(timm_vit_names(state))
    if isinstance(backbone, ViTPyramid):
        return backbone.published(timm_vit_names(state))
    if isinstance(backbone, TimmBackbone):  # whose heads have many names: whatever the pyramid lacks
        renamed = {_timm_key(key, own): value for key, value in state.items()}
        return {key: value for key, value in renamed.items() if key in own}
    state = {key: value for key, value in state.items() if not key.startswith(CLASSIFIER) and key not in UNUSED}
    if isinstance(backbone, Swin):
        return _swin(state)
    if isinstance(backbone, VGG):
        return dict(state)
    if isinstance(backbone, EfficientNet):
        return {key: value for key, value in state.items() if ".se." not in key}
    if any(key.endswith("_bn_s") for key in state) and not backbone.stride_in_1x1:
        raise ValueError(
            "backbone.weights: these are Caffe2's weights, whose bottlenecks stride in the first 1x1: set "
            "backbone.stride_in_1x1 true (and the model's pixels to BGR with mean 103.53 116.28 123.675, deviation 1)"
        )
    if any(key.endswith("_gn_s") for key in state) and any(key.endswith("running_mean") for key in own):
        raise ValueError("backbone.weights: these are weights with group norms: set backbone.norm group")
    renamed = {backbone_key(key): value for key, value in state.items()}
    if not any(key.endswith("running_mean") for key in renamed):
        renamed |= _statistics({key for key in own if key not in renamed}, own)
    stages = (f"layer{k}." for k in (1, 2, 3, 4))
    cut = tuple(stage for stage in stages if not any(key.startswith(stage) for key in own))  # by a model without use
    return {key: value for key, value in renamed.items() if not key.startswith(cut)}


def _statistics(missing: set[str], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Statistics for norms whose file has none, because they were folded into the affine: mean 0, variance 1."""
    means = {key: torch.zeros_like(own[key]) for key in missing if key.endswith("running_mean")}
    return means | {key: torch.ones_like(own[key]) for key in missing if key.endswith("running_var")}


def _efficientnet(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names of the weights of the EfficientNet-PyTorch port, whose blocks are counted through all groups.

    A block without an expansion (those of the first group) has its names one place further on in timm.
    """
    found = (re.match(r"(?:body\.)?blocks\.(\d+)\.(\d+)\.", key) for key in own)
    blocks = sorted({(int(match[1]), int(match[2])) for match in found if match})
    expanded = {key.split(".")[1] for key in state if key.endswith("._expand_conv.weight")}
    renamed = {}
    for key, value in state.items():
        if not key.startswith("_blocks."):
            layer, rest = key.split(".", 1)
            renamed[f"{PORT_ENDS.get(layer, layer)}.{rest}"] = value
            continue
        _, number, layer, rest = key.split(".", 3)
        place = ".".join(map(str, blocks[int(number)])) if int(number) < len(blocks) else f"beyond.{number}"
        names = PORT_EXPANDED if number in expanded else PORT_FIRST
        renamed[f"blocks.{place}.{names.get(layer, layer)}.{rest}"] = value
    return renamed


def _swin(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Swin's weights under our names, without tables that are computed and the norm before the classifier.

    timm merges patches at the start of a stage, the original at the end of the one before.
    """
    late = any(key.startswith("layers.3.downsample.") for key in state)
    renamed = {}
    for key, value in state.items():
        if key.endswith(("relative_position_index", "attn_mask")) or key.startswith("norm."):
            continue
        parts = key.split(".")
        if late and parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        renamed[".".join(parts)] = value
    return renamed


def _fresh(backbone: nn.Module, own: Mapping[str, Tensor], renamed: Mapping[str, Tensor]) -> list[str]:
    """The extra keys (`EXTRA`) of the groups of which the file has nothing."""
    pattern = EXTRA.get(type(backbone))
    if pattern is None:
        return []
    extra = [key for key in own if re.fullmatch(pattern, key)]
    groups = {key: "offset" if "conv2_offset" in key else "other" for key in extra}
    there = {groups[key] for key in extra if key in renamed}
    return sorted(key for key in extra if groups[key] not in there and not key.endswith("num_batches_tracked"))


def _timm_key(key: str, own: Mapping[str, Tensor]) -> str:
    """The key inside `TimmBackbone` of a key of timm's whole model."""
    key = f"body.{key.removeprefix('body.')}"
    flattened = key.replace(".", "_", 2).replace("body_", "body.", 1)
    return key if key in own or flattened not in own else flattened


def backbone_key(key: str) -> str:
    """The published network's name of a weight of a ResNet or Res2Net, from detectron2's or Caffe2's name.

    `res2.0.conv1.norm.bias` and `res2_0_branch2a_bn_b` become `layer1.0.bn1.bias`; names that are the published ones
    already come back as they are.
    """
    parts = _caffe2_key(key).split(".")
    if parts[0] == "stem":
        parts = parts[1:]
    elif parts[0] in STAGES:
        parts[0] = f"layer{int(parts[0][3:]) - 1}"
    if "shortcut" in parts:
        at = parts.index("shortcut")
        pooled = parts[at + 1].isdigit()  # Res2Net's averages first: shortcut.1.weight, shortcut.1.norm.weight
        norm = parts[at + 1 + pooled] == "norm"
        parts[at : at + 1 + pooled + norm] = ["downsample", str(pooled + norm)]
    if "norm" in parts:
        at = parts.index("norm")
        parts[at - 1 : at + 1] = [parts[at - 1].replace("conv", "bn")]
    return ".".join(parts)


def _caffe2_key(key: str) -> str:
    """detectron2's name of Caffe2's name; any other comes back as it is."""
    match = re.fullmatch(r"(?:res_)?(conv1)_(?:(?:bn|gn)_(s|b|rm|riv)|w)", key)
    if match is None:
        match = re.fullmatch(r"(res[2-5]_\d+_branch(?:1|2a|2b|2c))_(?:(?:bn|gn)_(s|b|rm|riv)|w)", key)
        if match is None:
            return key
        stage, block, branch = match[1].split("_")
        layer = f"{stage}.{block}.{CAFFE2[branch]}"
    else:
        layer = "stem.conv1"
    return f"{layer}.weight" if match[2] is None else f"{layer}.norm.{CAFFE2_NORM[match[2]]}"
