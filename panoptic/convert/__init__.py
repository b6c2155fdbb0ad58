"""Published checkpoints as `(config, state dict)` of ours.

| source | what it is |
|---|---|
| `panoptic-deeplab` | bowenc0221/panoptic-deeplab (`final_state.pth`, `checkpoint.pth.tar`) |
| `detectron2` | detectron2's Panoptic-DeepLab project and its Panoptic FPN (`.pkl`, `.pth`) |
| `panopticfcn` | dvlab-research/PanopticFCN, plain and starred, and its fork for Cityscapes (`.pth`) |
| `detr` | facebookresearch/detr, detection and panoptic (`detr-r50-panoptic-00ce5173.pth`) |
| `maskformer` | facebookresearch/MaskFormer, both pixel decoders, ResNet and Swin (`.pkl`) |
| `mask2former` | facebookresearch/Mask2Former, ResNet and Swin (`.pkl`) |
| `efficientps` | DeepSceneSeg/EfficientPS (`model.pth`) |
| `eomt` | tue-mps/eomt, DINOv2 and DINOv3 (`.ckpt`, `pytorch_model.bin`), whose differences need a second file |
| `transformers` | Hugging Face's DETR, MaskFormer, Mask2Former and EoMT, versions 4 and 5 |

`convert_backbone` does the same with torchvision's ResNet classifiers.

Architecture and sizes are read off keys and shapes. Options that leave no trace in them take the published values,
which the file of each architecture states; `dataclasses.replace` changes them.

Files are read by an unpickler that builds tensors, NumPy arrays, containers and `argparse.Namespace`
and refuses every other name, so nothing in a file is executed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from panoptic.backbones import Backbone
from panoptic.backbones.weights import CLASSIFIER
from panoptic.convert import (
    detr,
    efficientps,
    eomt,
    mask2former,
    maskformer,
    panoptic_deeplab,
    panoptic_fcn,
    panoptic_fpn,
)
from panoptic.convert.backbones import backbone_config
from panoptic.convert.family import Family, Hints
from panoptic.convert.files import read_checkpoint
from panoptic.models import Architecture
from panoptic.segmentation import Categories

__all__ = ["FAMILIES", "Hints", "convert", "convert_backbone", "read_checkpoint", "reference_keys"]

FAMILIES: dict[str, tuple[Family, ...]] = {
    "panoptic-deeplab": (panoptic_deeplab.STANDALONE,),
    "detectron2": (panoptic_deeplab.DETECTRON2, panoptic_fpn.DETECTRON2),
    "panopticfcn": (panoptic_fcn.PANOPTICFCN,),
    "detr": (detr.ORIGINAL,),
    "maskformer": (maskformer.ORIGINAL,),
    "mask2former": (mask2former.ORIGINAL,),
    "efficientps": (efficientps.ORIGINAL,),
    "eomt": (eomt.ORIGINAL,),
    "transformers": (detr.TRANSFORMERS, maskformer.TRANSFORMERS, mask2former.TRANSFORMERS, eomt.TRANSFORMERS),
}
"""Every source, and the architectures that it published."""


def convert(
    state: Mapping[str, Tensor], source: str, categories: Categories, hints: Hints | None = None
) -> tuple[Architecture, dict[str, Tensor]]:
    """The configuration and the renamed weights of a published checkpoint; `build` and `load_state_dict` fit.

    Args:
        state: names and tensors, as `read_checkpoint` gives them.
        source: which project wrote them, a key of `FAMILIES`.
        categories: in the order of the published head.
        hints: what the file does not tell.

    Raises:
        ValueError: unknown, missing or misshapen keys (listed by name), another number of classes, or hints that the
            file lacks or that it does not need.
    """
    state = _unwrapped(state)
    family = _family(state, source)
    if hints is not None and hints.given():
        if family.hinted is None:
            name = hints.given()[0].replace("whole", "base").replace("_", "-")
            raise ValueError(f"--{name}: only EoMT's files need it; this one of {source} tells all by itself")
        family = family.hinted(hints)
    state = family.translate(state)
    names = _named(family.rename(state), source)
    config, weights = family.build({ours: torch.as_tensor(state[key]) for key, ours in names.items()}, categories)
    return config, _fit(dict(weights), lambda: config.build(categories), names, source)


def convert_backbone(state: Mapping[str, Tensor]) -> tuple[Backbone, dict[str, Tensor]]:
    """The configuration and the weights of one of torchvision's ResNets or VGGs, without the classifier.

    Raises:
        ValueError: as `convert`.
    """
    state = _unwrapped(state)
    names = {key: key for key in state if not key.startswith(CLASSIFIER)}
    weights = {key: torch.as_tensor(state[key]) for key in names}
    backbone = backbone_config(weights)
    return backbone, _fit(weights, backbone.build, names, "torchvision")


def reference_keys(state: Mapping[str, Tensor], source: str) -> dict[str, str]:
    """Our name of every name of the reference.

    Raises:
        ValueError: the source or some names are unknown; lists them.
    """
    family = _family(state, source)
    return _named(family.rename(family.translate(state)), source)


def _unwrapped(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state without the prefix that DataParallel leaves on every name."""
    if state and all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _family(state: Mapping[str, object], source: str) -> Family:
    """The family of a source that recognises a checkpoint."""
    if source not in FAMILIES:
        raise ValueError(f"source: {source!r} is not one of {', '.join(FAMILIES)}")
    family = next((family for family in FAMILIES[source] if family.recognise(state)), None)
    if family is None:
        some = ", ".join(sorted(state)[:3]) or "none"
        raise ValueError(f"convert: no architecture of {source} has keys like these: {some}")
    return family


def _named(names: Mapping[str, str | None], source: str) -> dict[str, str]:
    """The names, all of which must be known."""
    unknown = sorted(key for key, name in names.items() if name is None)
    if unknown:
        raise ValueError(f"convert: keys that {source} is not known to have: {', '.join(unknown)}")
    return {key: name for key, name in names.items() if name is not None}


def _fit(
    weights: dict[str, Tensor], build: Callable[[], nn.Module], renamed: Mapping[str, str], source: str
) -> dict[str, Tensor]:
    """The weights, if they are exactly those of the model that `build` makes.

    Counters of batches, which no result depends on, are zero where a file lacks them.
    """
    with torch.device("meta"):
        own = build().state_dict()
    weights = {
        key: torch.zeros((), dtype=torch.long)
        for key in own
        if key.endswith("num_batches_tracked") and key not in weights
    } | weights
    names = {key: key for key in weights} | {ours: theirs for theirs, ours in renamed.items()}
    missing = sorted(own.keys() - weights.keys())
    unknown = sorted(names[key] for key in weights.keys() - own.keys())
    shapes = [
        f"{names[key]} {list(weights[key].shape)} instead of {list(own[key].shape)}"
        for key in sorted(own.keys() & weights.keys())
        if own[key].shape != weights[key].shape
    ]
    if missing or unknown or shapes:
        raise ValueError(
            f"convert: not a checkpoint of {source}; missing (our names): {', '.join(missing) or 'none'}; "
            f"unknown: {', '.join(unknown) or 'none'}; of another shape: {', '.join(shapes) or 'none'}"
        )
    return weights
