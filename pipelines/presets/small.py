"""The two small settings in which every architecture is tried from scratch, on two CPU workers of one thread each."""

from __future__ import annotations

from panoptic.models import Architecture
from panoptic.training.device import Engine
from panoptic.training.optim import Optim
from panoptic.transforms import Augment, Resize
from pipelines.config import Data, Experiment, Scenes, Train


def on_scenes(model: Architecture, optim: Optim, train: Train, crop: tuple[int, int] = (144, 208)) -> Experiment:
    """Drawn scenes of short side 192."""
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
    """Photographs from a COCO-panoptic folder (`--data.root`) at short sides around 256."""
    return Experiment(
        model=model,
        data=Data(root="", train="train", val="val"),
        augment=Augment(scale="short", sides=(192, 224, 256, 288, 320), crop=(192, 320), colour="ssd"),
        resize=Resize(short=256),
        optim=optim,
        engine=Engine(precision="bfloat16", channels_last=True),
        train=train,
    )
