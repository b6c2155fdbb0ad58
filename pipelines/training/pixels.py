"""Pixels follow the weights: mean, deviation and order of the channels with which a backbone's weights were trained."""

from __future__ import annotations

import io
from dataclasses import fields, replace
from typing import Any

from panoptic.backbones import Backbone
from panoptic.backbones.imagenet import NAMES, Pixels, file_pixels, imagenet_pixels
from panoptic.convert import read_checkpoint
from pipelines.cluster import storage
from pipelines.config import Experiment


def follow_weights(experiment: Experiment) -> tuple[Experiment, str]:
    """An experiment with the pixels of its backbone's weights, where these are known and none were given.

    Returns:
        the experiment, and a line for the log, "" where there is nothing to say.

    Raises:
        ValueError: the weights are for BGR images and the architecture takes RGB only, or their file cannot be read.
    """
    model, backbone = experiment.model, experiment.model.backbone
    known = weights_pixels(backbone)
    if known is None:
        return experiment, ""
    names = {field.name for field in fields(model)}  # type: ignore[arg-type]
    own = Pixels(model.pixel_mean, model.pixel_std, getattr(model, "bgr", False))
    if own == known:
        return experiment, ""
    if backbone.own_pixels:
        return experiment, f"pixels: {_words(own)}, as given; the weights were trained with {_words(known)}"
    if known.bgr and "bgr" not in names:
        raise ValueError(
            f"model.backbone.weights {backbone.weights}: they were trained on BGR images, and this architecture takes "
            "RGB; choose other weights, or --model.backbone.own-pixels True to train with RGB all the same"
        )
    changed: dict[str, Any] = {"pixel_mean": known.mean, "pixel_std": known.std}
    if "bgr" in names:
        changed["bgr"] = known.bgr
    model = replace(model, **changed)  # type: ignore[type-var]
    return replace(experiment, model=model), f"pixels: {_words(known)}, with which the backbone's weights were trained"


def weights_pixels(backbone: Backbone) -> Pixels | None:
    """The pixels with which the weights of a backbone were trained; None where nobody knows, or it has no weights."""
    if backbone.weights == "none":
        return None
    if backbone.weights in NAMES:
        return imagenet_pixels(backbone.timm_name)
    return file_pixels(read_checkpoint(io.BytesIO(storage.read_bytes(backbone.weights)), backbone.weights))


def _words(pixels: Pixels) -> str:
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (pixels.mean, pixels.std))
    return f"mean {mean}, deviation {std}, {'BGR' if pixels.bgr else 'RGB'}"
