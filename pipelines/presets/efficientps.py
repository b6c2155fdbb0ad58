"""EfficientPS: the published recipes, and small ones for two CPU cores."""

from __future__ import annotations

from dataclasses import replace

from panoptic.backbones import Backbone
from panoptic.models.efficientps.config import DETECTOR, EfficientPSConfig, Fusion
from panoptic.training.config import Engine, Optim
from panoptic.transforms import POLICIES, Resize
from pipelines.config import Data, Experiment, Train
from pipelines.presets.small import from_imagenet, on_photographs, on_scenes

PUBLISHED = EfficientPSConfig(backbone=replace(EfficientPSConfig().backbone, own_pixels=True))
"""The published model. Its pixels are those of Cityscapes, not those with which its weights were trained."""

SHORT, SIDES = 192, (176, 192, 208, 224, 240, 272)
"""Photographs are evaluated as large as their crops in training: the dense prediction cells have rates of up to 21, and
on a larger map they meet what they never met. One checkpoint had PQ 55.9 at short side 192 and 28.4 at 320."""

EPOCH = 2975 / 16
"""Steps of an epoch of Cityscapes' fine annotations, 16 images a step."""


def efficientps_b5_cityscapes() -> Experiment:
    """Cityscapes, EfficientNet-B5: PQ 64.9 (things 61.0, stuff 67.7) from the paper, 64.4 from its code's table.

    The code's recipe: 160 epochs of 16 crops of 1024 x 2048, the rate divided by ten after 120 and 144 epochs. ImageNet
    weights are needed for that figure: --model.backbone.weights imagenet. The paper's schedule, 50,000 steps:
    --train.steps 50000 --optim.milestones 32000 44000 --optim.warmup-steps 200. The rate belongs to 16 images; another
    batch scales it linearly.
    """
    return Experiment(
        model=PUBLISHED,
        data=Data(root="", train="train", val="val"),
        augment=POLICIES["efficientps"],
        resize=Resize(),
        optim=Optim(
            optimiser="sgd",
            lr=0.07,
            scale_lr="linear",
            lr_batch=16,
            weight_decay=1e-4,
            decay="all",
            schedule="multistep",
            milestones=(round(120 * EPOCH), round(144 * EPOCH)),
            warmup_steps=500,
            warmup_factor=1 / 3,
            clip_norm=35.0,
        ),
        engine=Engine(precision="bfloat16", channels_last=True),
        train=Train(steps=round(160 * EPOCH), batch=16, workers=16, sync_bn=True, validate_every=2000, gpu="yes"),
    )


def efficientps_b5_mapillary() -> Experiment:
    """Mapillary Vistas, EfficientNet-B5: the pretraining of the paper's best Cityscapes models (PQ 67.5 after it).

    Cityscapes' recipe on crops of 1024 x 2048 of images whose sizes vary, for 192,000 steps: a schedule that was not
    checked against the paper, whose PQ on Mapillary is not at hand.
    Images of up to 22 megapixels are evaluated with their long side at 2048 pixels.
    """
    base = efficientps_b5_cityscapes()
    return replace(
        base,
        resize=Resize(short=1536, longest=2048, antialias=True),
        optim=replace(base.optim, milestones=(144_000, 176_000)),
        train=replace(base.train, steps=192_000, validate_every=10_000),
    )


def efficientps_scenes() -> Experiment:
    """Drawn scenes on two CPU workers, from scratch.

    Measured once on 2 cores of an AMD EPYC (Zen 5), 500 steps of 8 images in 4 min 18 s: PQ on 96 scenes 17.7 at step
    250, 31.8 at 500 (things 26.2, stuff 39.3; SQ 67.2, RQ 46.5).
    `python jobs/train.py efficientps-scenes`
    """
    return on_scenes(
        replace(_small(stuff_area=64), backbone=Backbone(name="resnet10t")),
        Optim(optimiser="adamw", lr=1e-3, weight_decay=0.02, warmup_steps=50, clip_norm=5.0, ema=0.99),
        Train(steps=500, batch=8, workers=2, validate_every=250, log_every=40),
        crop=(160, 224),
    )


def efficientps_pedestrians() -> Experiment:
    """Real photographs of pedestrians (any COCO-panoptic folder: --data.root), from scratch on two CPU cores.

    A backbone of the size of EfficientNet-B0. Measured once on 2 cores of an AMD EPYC (Zen 5) beside other work, 485
    training photographs, 3300 steps (26,400 images) in 27 min 44 s from the command to its last line, 15 to 17
    images/s, 2.0 GiB a worker. PQ on the 127 val photographs: 56.4 at step 1100, 66.2 at 2200, 68.2 at 3300 (things
    55.0, stuff 71.5; SQ 85.8, RQ 77.9). On the 58 of them that no training photograph resembles: 58.1 (things 37.1,
    stuff 63.4); copying the nearest training photograph's labels scores 34.8 there.
    Trained at short sides of 192 to 320 it had 56.7 and 48.4 after 2200 steps.
    `python jobs/train.py efficientps-pedestrians --data.root FOLDER`
    """
    base = on_photographs(
        _small(stuff_area=128),
        Optim(optimiser="adamw", lr=1e-3, weight_decay=0.05, warmup_steps=100, clip_norm=5.0, ema=0.99),
        Train(steps=3300, batch=8, workers=2, validate_every=1100, log_every=50),
    )
    return _at_the_size_of_crops(base)


def efficientps_pedestrians_imagenet() -> Experiment:
    """efficientps-pedestrians on EfficientNet-Lite0 with ImageNet weights (extra `trunks`).

    Measured once on 2 cores of an AMD EPYC (Zen 4) beside tests, 485 training photographs, 3000 steps (24,000 images)
    in 48 min, 10.8 images/s where it was alone, 2.1 GiB a worker. PQ on the 127 val photographs: 71.9 at step 1000,
    77.0 at 2000, 78.5 at 3000 (things 65.7, stuff 81.7; SQ 90.0, RQ 86.6). On the 58 that no training photograph
    resembles: 70.4 (things 54.1, stuff 74.5), from scratch 58.1. One seed.
    `python jobs/train.py efficientps-pedestrians-imagenet --data.root FOLDER`
    """
    return _at_the_size_of_crops(from_imagenet(efficientps_pedestrians(), steps=3000))


def _at_the_size_of_crops(base: Experiment) -> Experiment:
    """An experiment that trains at short sides of `SIDES` and is evaluated at `SHORT`."""
    return replace(base, resize=replace(base.resize, short=SHORT), augment=replace(base.augment, sides=SIDES))


def _small(stuff_area: int) -> EfficientPSConfig:
    """EfficientPS for CPU cores and training from scratch: narrow pyramid and heads, few regions, plain batch norms.

    Masks are drawn where they were learnt (`fusion.inclusive` off): one pixel matters on small images.
    """
    regions, detection, heads = DETECTOR.regions, DETECTOR.detection, DETECTOR.heads
    limits = {"train_before": 400, "train_after": 300, "test_before": 400, "test_after": 200}
    return EfficientPSConfig(
        backbone=Backbone(name="efficientps_b0", norm="batch"),
        norm="batch",
        width=64,
        semantic_width=48,
        detector=replace(
            DETECTOR,
            regions=replace(regions, sizes=(16, 32, 64, 128), **limits),
            detection=replace(detection, samples=64),
            heads=replace(heads, aligned=True, box_width=256, mask_width=64, mask_layers=2, precision="bfloat16"),
        ),
        fusion=Fusion(stuff_area=stuff_area, inclusive=False),
    )


PRESETS = (
    efficientps_b5_cityscapes,
    efficientps_b5_mapillary,
    efficientps_scenes,
    efficientps_pedestrians,
    efficientps_pedestrians_imagenet,
)
"""Presets of this file; a function's name with hyphens is that of the preset."""
