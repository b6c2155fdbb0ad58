"""Mask2Former: the published recipes, and small ones for two CPU cores.

The paper's figures come from models that started with ImageNet weights: --model.backbone.weights FILE (ResNets:
torchvision's; Swin-T and S: of ImageNet-1k at 224 pixels, B and L: of ImageNet-22k at 384).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from panoptic.backbones import Backbone
from panoptic.models.mask2former.config import Mask2FormerConfig
from panoptic.training.config import Engine, Optim
from panoptic.transforms import POLICIES, Resize
from pipelines.config import Data, Experiment, Train
from pipelines.presets.small import from_imagenet, on_photographs, on_scenes, transformer_optim


def mask2former_r50_coco() -> Experiment:
    """COCO, ResNet-50, 50 epochs of 16 images with large-scale jitter: PQ 51.9 from the paper, 8 V100 of 32 GB."""
    return _coco(Backbone("resnet50", norm="frozen"))


def mask2former_r101_coco() -> Experiment:
    """mask2former-r50-coco with ResNet-101: PQ 52.6 from the paper."""
    return _coco(Backbone("resnet101", norm="frozen"))


def mask2former_swin_tiny_coco() -> Experiment:
    """mask2former-r50-coco with Swin-T: PQ 53.2 from the paper."""
    return _coco(Backbone("swin_tiny", drop_path=0.3))


def mask2former_swin_small_coco() -> Experiment:
    """mask2former-r50-coco with Swin-S: PQ 54.6 from the paper."""
    return _coco(Backbone("swin_small", drop_path=0.3))


def mask2former_swin_base_coco() -> Experiment:
    """mask2former-r50-coco with Swin-B: PQ 56.4 from the paper."""
    return _coco(Backbone("swin_base", drop_path=0.3))


def mask2former_swin_large_coco() -> Experiment:
    """mask2former-r50-coco with Swin-L, 200 queries and 100 epochs: PQ 57.8 from the paper."""
    base = _coco(Backbone("swin_large", drop_path=0.3))
    return replace(
        base,
        model=replace(base.model, queries=200),
        optim=replace(base.optim, milestones=(655_556, 710_184)),
        train=replace(base.train, steps=737_500),
    )


def mask2former_r50_cityscapes() -> Experiment:
    """Cityscapes, ResNet-50, crops of 512x1024, 16 images a step: PQ 62.1 from the paper, 8 V100 of 32 GB."""
    return _cityscapes(Backbone("resnet50"))


def mask2former_r101_cityscapes() -> Experiment:
    """mask2former-r50-cityscapes with ResNet-101: PQ 62.4 from the paper."""
    return _cityscapes(Backbone("resnet101"))


def mask2former_swin_tiny_cityscapes() -> Experiment:
    """mask2former-r50-cityscapes with Swin-T: PQ 63.9 from the paper."""
    return _cityscapes(Backbone("swin_tiny", drop_path=0.3))


def mask2former_swin_small_cityscapes() -> Experiment:
    """mask2former-r50-cityscapes with Swin-S: PQ 64.8 from the paper."""
    return _cityscapes(Backbone("swin_small", drop_path=0.3))


def mask2former_swin_base_cityscapes() -> Experiment:
    """mask2former-r50-cityscapes with Swin-B: PQ 66.1 from the paper."""
    return _cityscapes(Backbone("swin_base", drop_path=0.3))


def mask2former_swin_large_cityscapes() -> Experiment:
    """mask2former-r50-cityscapes with Swin-L and 200 queries: PQ 66.6 from the paper."""
    base = _cityscapes(Backbone("swin_large", drop_path=0.3))
    return replace(base, model=replace(base.model, queries=200))


def mask2former_scenes() -> Experiment:
    """Drawn scenes, a narrow Mask2Former from scratch on two CPU workers.

    Measured once on 2 cores of an AMD EPYC (Zen 5), 740 steps of 8 images in 4 min 51 s, 23 images/s, 1.7 GiB a worker:
    PQ on 96 scenes 39.2 at step 370, 44.9 at 740 (things 19.3, stuff 78.9; SQ 75.0, RQ 55.6).
    `python jobs/train.py mask2former-scenes`
    """
    return on_scenes(
        replace(_small(), backbone=Backbone(name="resnet10t"), queries=40),
        transformer_optim(lr=7e-4),
        Train(steps=740, batch=8, workers=2, validate_every=370, log_every=40),
    )


def mask2former_pedestrians() -> Experiment:
    """Real photographs of pedestrians (any COCO-panoptic folder: --data.root), from scratch on two CPU cores.

    Measured once on 2 cores of an AMD EPYC (Zen 5), 485 training photographs, 3300 steps (26,400 images) in 28 min 43 s
    from the command to its last line, 15 to 17 images/s, 2.0 GiB a worker. PQ on the 127 val photographs: 57.2 at step
    1100, 69.4 at 2200, 74.3 at 3300 (things 45.8, stuff 81.5; SQ 85.9, RQ 85.2). On the 58 of them that no training
    photograph resembles: 67.1 (things 30.6, stuff 76.2). Hugging Face's Mask2Former, set up alike, reaches 62.4 and
    52.1 in half an hour of training on 2 cores; copying the nearest training photograph's labels scores 34.8 on the 58.
    `python jobs/train.py mask2former-pedestrians --data.root FOLDER`
    """
    return on_photographs(
        _small(), transformer_optim(lr=7e-4), Train(steps=3300, batch=8, workers=2, validate_every=1100, log_every=50)
    )


def mask2former_pedestrians_imagenet() -> Experiment:
    """mask2former-pedestrians on EfficientNet-Lite2 with ImageNet weights (extra `trunks`).

    Measured once on 2 cores of an AMD EPYC (Zen 5), 3600 steps (28,800 images), 16 images/s undisturbed, at which they
    take half an hour (tests ran beside this training, which took 51 minutes in two parts), 2.1 GiB a worker. PQ on the
    127 val photographs: 68.8 at step 1200, 80.0 at 2400, 81.0 at 3600 (things 56.2, stuff 87.2; SQ 89.0, RQ 90.3). On
    the 58 that no training photograph resembles: 75.1 (things 43.9, stuff 82.9), from scratch 67.1. Hugging Face's
    Mask2Former on the same backbone, weights and views reaches 77.6 and 70.6 in 2853 steps. 80 was hoped for:
    on the 58, 12 of 24 persons and 8 of 16 bicycles are found, and 285 of 299 segments of stuff; other thresholds
    of the merging (score 0.3, overlap 0.5 and 0.6) change PQ on the 127 by 0.1 at most, and EfficientNet-Lite0, seen
    smaller, had reached 74.7 there.
    `python jobs/train.py mask2former-pedestrians-imagenet --data.root FOLDER`
    """
    return from_imagenet(mask2former_pedestrians(), steps=3600, name="tf_efficientnet_lite2")


def _coco(backbone: Backbone) -> Experiment:
    """The published recipe for COCO: 50 epochs of large-scale jitter."""
    return Experiment(
        model=Mask2FormerConfig(backbone=backbone),
        data=Data(root="", train="train2017", val="val2017"),
        augment=POLICIES["lsj"],
        resize=Resize(short=800, longest=1333, antialias=True),
        optim=_optim(schedule="multistep", milestones=(327_778, 355_092)),
        engine=Engine(precision="bfloat16", channels_last=True),
        train=Train(steps=368_750, batch=16, workers=8, validate_every=5000, validation_batch=1, gpu="yes"),
    )


def _cityscapes(backbone: Backbone) -> Experiment:
    """The published recipe for Cityscapes: 90,000 steps of 16 crops."""
    return Experiment(
        model=Mask2FormerConfig(backbone=backbone),
        data=Data(root="", train="train", val="val"),
        augment=POLICIES["cityscapes_m2f"],
        resize=Resize(short=1024, longest=2048, antialias=True),
        optim=_optim(schedule="poly"),
        engine=Engine(precision="bfloat16", channels_last=True),
        train=Train(
            steps=90_000, batch=16, workers=8, sync_bn=True, validate_every=5000, validation_batch=1, gpu="yes"
        ),
    )


def _optim(schedule: Literal["poly", "multistep"], milestones: tuple[int, ...] = ()) -> Optim:
    """The published optimiser: AdamW at 1e-4, a tenth of that for the backbone, gradients clipped at 0.01."""
    return Optim(
        optimiser="adamw",
        lr=1e-4,
        backbone_lr=0.1,
        weight_decay=0.05,
        decay="weights_and_biases",
        schedule=schedule,
        milestones=milestones,
        clip_norm=0.01,
    )


def _small() -> Mask2FormerConfig:
    """Mask2Former for CPU cores, from scratch: ResNet-18, 128 channels, a pyramid with batch norm as pixel decoder.

    On one core of an AMD EPYC (Zen 5) a step of 4 images of 192x320 took 360 to 410 ms: 220 the backbone, 74 the pixel
    decoder, 31 the masked decoder, 63 matching and losses, 16 to 28 the update. With two layers of deformable attention
    and group norm it was 820 ms, on a busier machine. Queries are merged from a probability of 1/2 on: after so few
    images they are less sure of themselves than the published 0.8 expects.
    """
    return Mask2FormerConfig(
        backbone=Backbone(name="resnet18"),
        channels=128,
        mask_channels=128,
        pixel_decoder="fpn",
        norm="batch",
        encoder_layers=1,
        encoder_hidden=512,
        full_precision=False,
        decoder_layers=4,
        decoder_hidden=512,
        heads=4,
        queries=24,
        loss_points=2048,
        threshold=0.5,
    )


PRESETS = (
    mask2former_r50_coco,
    mask2former_r101_coco,
    mask2former_swin_tiny_coco,
    mask2former_swin_small_coco,
    mask2former_swin_base_coco,
    mask2former_swin_large_coco,
    mask2former_r50_cityscapes,
    mask2former_r101_cityscapes,
    mask2former_swin_tiny_cityscapes,
    mask2former_swin_small_cityscapes,
    mask2former_swin_base_cityscapes,
    mask2former_swin_large_cityscapes,
    mask2former_scenes,
    mask2former_pedestrians,
    mask2former_pedestrians_imagenet,
)
"""Presets of this file; a function's name with hyphens is that of the preset."""
