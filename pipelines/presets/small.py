"""Small settings that architectures share: drawn scenes and photographs, from scratch, on two CPU cores."""

from __future__ import annotations

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
