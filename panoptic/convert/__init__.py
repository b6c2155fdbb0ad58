"""Published checkpoints as `(config, state dict)` of ours.

| source | what it is | returns the config |
|---|---|---|
| `panoptic-deeplab` | bowenc0221/panoptic-deeplab (`final_state.pth`, `checkpoint.pth.tar`) | `PanopticDeepLabConfig` |
| `detectron2` | detectron2's Panoptic-DeepLab project (`.pkl`, `.pth`) | `PanopticDeepLabConfig` |
| `torchvision` | ResNet classifiers; the classifier itself is dropped | `Backbone` |

Architecture and sizes are read off keys and shapes. What they cannot tell is the published default and
can be changed with `dataclasses.replace`:

- `panoptic-deeplab`: output stride 32 with rates 3 6 9 where the decoder uses res4, else 16 with 6 12 18;
  with 133 classes (COCO) plain cross-entropy, else the hardest 20 %; instances scored by class probability.
- `detectron2`: output stride 16, multigrid 1 2 4, rates 6 12 18. With 133 classes COCO's values (crop
  640x640, which is also the divisor, sigma 8, all pixels in the loss, NMS window 41, stuff area 4096), else
  those of Cityscapes (crop 512x1024, sigma 10, hardest 20 %, window 7, stuff area 2048). Offsets are not
  rescaled with the output, as published.

Files are read by an unpickler that builds tensors, NumPy arrays, containers and `argparse.Namespace`
and refuses every other name, so nothing in a file is executed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, overload

import torch
from torch import Tensor, nn

from panoptic.backbones import Backbone
from panoptic.convert import panoptic_deeplab
from panoptic.convert.files import read_checkpoint
from panoptic.convert.trunks import trunk_config
from panoptic.models.panoptic_deeplab import PanopticDeepLabConfig
from panoptic.segmentation import Categories

__all__ = ["Source", "convert", "read_checkpoint", "reference_keys"]

Source = Literal["panoptic-deeplab", "detectron2", "torchvision"]


@overload
def convert(
    state: Mapping[str, Tensor], source: Literal["torchvision"], categories: Categories | None = None
) -> tuple[Backbone, dict[str, Tensor]]: ...


@overload
def convert(
    state: Mapping[str, Tensor], source: Source, categories: Categories
) -> tuple[PanopticDeepLabConfig, dict[str, Tensor]]: ...


def convert(
    state: Mapping[str, Tensor], source: Source, categories: Categories | None = None
) -> tuple[PanopticDeepLabConfig | Backbone, dict[str, Tensor]]:
    """The configuration and the renamed weights of a published checkpoint; `build` and `load_state_dict` fit.

    Args:
        state: names and tensors, as `read_checkpoint` gives them.
        source: which project wrote them.
        categories: in the order of the published head; not needed for `torchvision`.

    Raises:
        ValueError: unknown, missing or misshapen keys (listed by name), or another number of classes.
    """
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    names = reference_keys(state, source)
    weights = {ours: torch.as_tensor(state[key]) for key, ours in names.items()}
    if source == "torchvision":
        trunk = trunk_config(weights)
        return trunk, _fit(weights, trunk.build, names, source)
    if categories is None:
        raise ValueError(f"categories: needed for source {source}, in the order of the published head")
    classes = len(panoptic_deeplab.weight(weights, "semantic_head.predictor.weight"))
    if classes != len(categories):
        raise ValueError(
            f"categories: the checkpoint's head has {classes} classes, the list has {len(categories)}; give the "
            "categories of the published model in its order (to train on others, fine-tune from the result)"
        )
    config = panoptic_deeplab.CONFIGS[source](weights)
    return config, _fit(weights, lambda: config.build(categories), names, source)


def reference_keys(state: Mapping[str, object], source: Source) -> dict[str, str]:
    """Our name of every name of the reference (torchvision's classifier left out).

    Raises:
        ValueError: the source or some names are unknown; lists them.
    """
    if source == "torchvision":
        return {key: key for key in state if not key.startswith("fc.")}
    if source not in panoptic_deeplab.RENAMING:
        known = ", ".join([*panoptic_deeplab.RENAMING, "torchvision"])
        raise ValueError(f"source: {source!r} is not one of {known}")
    names = panoptic_deeplab.RENAMING[source](state)
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
    names = {ours: theirs for theirs, ours in renamed.items()}
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
