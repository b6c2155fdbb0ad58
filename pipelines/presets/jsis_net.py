"""JSIS-Net: the paper's recipes, each branch alone for its table 3, and small ones for two CPU cores."""

from __future__ import annotations

from dataclasses import replace

from panoptic.backbones import Backbone
from panoptic.models.jsis_net.config import DETECTION, REGIONS, Conflicts, JSISNetConfig, StageOptions
from panoptic.training.config import Engine, Optim
from panoptic.transforms import Augment, Resize
from pipelines.config import Data, Experiment, Train
from pipelines.presets.small import from_imagenet, on_photographs, on_scenes


def jsis_net_r50_coco() -> Experiment:
    """COCO, ResNet-50, 8 epochs of 5 images of 400x400: PQ 26.9 on val (things 29.3, stuff 23.3) from the paper.

    A target to compare with: what the paper leaves open is chosen as the model's docstring says. ImageNet weights are
    needed for that figure: --model.backbone.weights FILE. One GPU. The 500 steps of warm-up are ours.
    """
    return Experiment(
        model=JSISNetConfig(),
        data=Data(root="", train="train2017", val="val2017"),
        augment=Augment(size=(400, 400), pad="none"),
        resize=Resize(size=(400, 400)),
        optim=_solver(images=118_287, batch=5, epochs=(4, 7)),
        engine=Engine(precision="bfloat16", channels_last=True),
        train=Train(steps=8 * 118_287 // 5, batch=5, workers=1, validate_every=118_287 // 5, gpu="yes"),
    )


def jsis_net_r50_mapillary() -> Experiment:
    """Mapillary Vistas, ResNet-50, 19 epochs of 2 images of 512x1024: PQ 17.6 on val (10.0, 27.5) from the paper.

    Everything else as in jsis-net-r50-coco. The paper's table 3 after 17 epochs (--train.steps 153000): both branches
    mIoU 34.7, AP50 8.4, PQ 17.4; --model.branches semantic mIoU 33.6; --model.branches instances AP50 6.5; those
    two merged PQ 15.0 (`python jobs/independent.py JOINT SEMANTIC INSTANCES --data.root FOLDER` prints that table).
    """
    return Experiment(
        model=JSISNetConfig(),
        data=Data(root="", train="train", val="val"),
        augment=Augment(size=(512, 1024), pad="none"),
        resize=Resize(size=(512, 1024)),
        optim=_solver(images=18_000, batch=2, epochs=(7, 13)),
        engine=Engine(precision="bfloat16", channels_last=True),
        train=Train(steps=19 * 9000, batch=2, workers=1, validate_every=9000, gpu="yes"),
    )


def jsis_net_r50_cityscapes() -> Experiment:
    """Cityscapes by the paper's recipe for Mapillary Vistas: 19 epochs of 2 images of 512x1024, ResNet-50.

    The paper has no figure for it; the authors' next network reached PQ 48.1 there, from its own paper.
    """
    base = jsis_net_r50_mapillary()
    return replace(
        base,
        optim=_solver(images=2975, batch=2, epochs=(7, 13)),
        train=replace(base.train, steps=19 * 2975 // 2, validate_every=2975),
    )


def jsis_net_scenes() -> Experiment:
    """Drawn scenes on two CPU workers, from scratch.

    Measured once on 2 cores of an AMD EPYC (Zen 5), 480 steps of 8 images in 3 min 49 s, 23 images/s, 1.6 GiB a worker:
    PQ on 96 scenes 28.9 at step 240, 41.2 at 480 (things 24.4, stuff 63.6; SQ 72.3, RQ 54.3).
    `python jobs/train.py jsis-net-scenes`
    """
    return on_scenes(
        _small(stuff_area=64),
        Optim(optimiser="adamw", lr=1e-3, weight_decay=0.02, warmup_steps=50, clip_norm=5.0, ema=0.99),
        Train(steps=480, batch=8, workers=2, validate_every=240, log_every=40),
        crop=(160, 224),
    )


def jsis_net_pedestrians() -> Experiment:
    """Real photographs of pedestrians (any COCO-panoptic folder: --data.root), from scratch on two CPU cores.

    Measured once on 2 cores of an AMD EPYC (Zen 5), 485 training photographs, 1400 steps (11,200 images) in 12 min 26 s
    from the command to its last line, 15 to 17 images/s, 1.8 GiB a worker. PQ on the 127 val photographs: 43.8 at step
    700, 54.4 at 1400 (things 22.2, stuff 62.4; SQ 72.6, RQ 64.1). On the 58 of them that no training photograph
    resembles: 47.9 (things 12.9, stuff 56.6); copying the nearest training photograph's labels scores 34.8 there. Of a
    step nearly half goes to convolutions, a tenth to ReLUs, a tenth to RoIAlign; at stride 16 it takes two thirds.
    `python jobs/train.py jsis-net-pedestrians --data.root FOLDER`
    """
    return on_photographs(
        _small(stuff_area=128),
        Optim(optimiser="adamw", lr=1e-3, weight_decay=0.05, warmup_steps=100, clip_norm=5.0, ema=0.99),
        Train(steps=1400, batch=8, workers=2, validate_every=700, log_every=50),
    )


def jsis_net_pedestrians_imagenet() -> Experiment:
    """jsis-net-pedestrians on EfficientNet-Lite0 with ImageNet weights (extra `trunks`), up to res4 at stride 8.

    Measured once on 2 cores of an AMD EPYC (Zen 4), 1800 steps (14,400 images) in 25 min 29 s from the command to its
    last line, 9 to 10 images/s, 2.1 GiB a worker, with boxes from a score of 0.5 on. PQ on the 127 val photographs:
    62.0 at step 600, 69.5 at 1200, 70.4 at 1800 (things 29.9, stuff 80.5; SQ 83.8, RQ 80.5). On the 58 of them that
    no training photograph resembles: 63.9 (things 21.1, stuff 74.6), from scratch 47.9. Most of its bicycles were made
    up: from 0.7 on and with a suppression at IoU 0.3, as this preset has them since (chosen among seven on the 127),
    the same weights have 72.5 and 65.9. With res5 at stride 16 in place of res4 at stride 8 it had 64.5 and 60.8.
    `python jobs/train.py jsis-net-pedestrians-imagenet --data.root FOLDER`
    """
    model = _small(stuff_area=128)
    model = replace(model, detection=replace(model.detection, threshold=0.7, nms=0.3))
    return from_imagenet(replace(jsis_net_pedestrians(), model=model), steps=1800)


def _solver(images: int, batch: int, epochs: tuple[int, ...]) -> Optim:
    """The paper's optimiser: SGD at 0.075, halved after some epochs. Regularisation is a term of the model's loss."""
    return Optim(
        optimiser="sgd",
        lr=0.075,
        schedule="multistep",
        milestones=tuple(epoch * images // batch for epoch in epochs),
        gamma=0.5,
        warmup_steps=500,
    )


def _small(stuff_area: int) -> JSISNetConfig:
    """JSIS-Net for CPU cores, from scratch: ResNet-18 at stride 8, a narrow head of its own, norms that learn.

    The true boxes are regions to learn from and every thing has a positive anchor, because nothing is pretrained; all
    losses weigh 1 and masks are averaged over images. AdamW decays the kernels, so the loss does not.
    """
    return JSISNetConfig(
        backbone=Backbone("resnet18", output_stride=8),
        semantic_channels=128,
        regions=replace(
            REGIONS,
            sizes=(16, 32, 64, 128, 256),
            low_quality=True,
            train_before=400,
            train_after=200,
            test_before=400,
            test_after=100,
        ),
        region_channels=128,
        detection=replace(DETECTION, samples=32, append_truth=True, most=50),
        head=StageOptions(width=32, blocks=2, side=4, mask_channels=64, precision="bfloat16"),
        mask_reduction="mean",
        box_weight=1.0,
        mask_weight=1.0,
        regularisation=0.0,
        conflicts=Conflicts(stuff_area=stuff_area),
    )


PRESETS = (
    jsis_net_r50_coco,
    jsis_net_r50_mapillary,
    jsis_net_r50_cityscapes,
    jsis_net_scenes,
    jsis_net_pedestrians,
    jsis_net_pedestrians_imagenet,
)
"""Presets of this file; a function's name with hyphens is that of the preset."""
