"""MaskFormer: the published recipes, and small ones for two CPU cores.

The paper's figures come from models that started with ImageNet weights: --model.backbone.weights FILE (ResNets:
torchvision's; Swin-T and S: of ImageNet-1k at 224 pixels, B and L: of ImageNet-22k at 384).
"""

from __future__ import annotations

from dataclasses import replace

from panoptic.backbones import Backbone
from panoptic.models.maskformer.config import MaskFormerConfig
from panoptic.training.config import Engine, Optim
from panoptic.transforms import POLICIES, Resize
from pipelines.config import Data, Experiment, Train
from pipelines.presets.small import from_imagenet, on_photographs, on_scenes, transformer_optim


def maskformer_r50_coco() -> Experiment:
    """COCO, ResNet-50 and six transformer layers in the pixel decoder: PQ 46.5 from the paper, 64 V100 of 32 GB.

    554,400 steps of 64 images (300 epochs), the rate divided by ten after two thirds.
    """
    return _coco(Backbone("resnet50", norm="frozen"))


def maskformer_r101_coco() -> Experiment:
    """maskformer-r50-coco with ResNet-101: PQ 47.6 from the paper."""
    return _coco(Backbone("resnet101", norm="frozen"))


def maskformer_swin_tiny_coco() -> Experiment:
    """COCO, Swin-T and the plain feature pyramid: PQ 47.7 from the paper."""
    return _swin("swin_tiny")


def maskformer_swin_small_coco() -> Experiment:
    """maskformer-swin-tiny-coco with Swin-S: PQ 49.7 from the paper."""
    return _swin("swin_small")


def maskformer_swin_base_coco() -> Experiment:
    """maskformer-swin-tiny-coco with Swin-B: PQ 51.8 from the paper."""
    return _swin("swin_base")


def maskformer_swin_large_coco() -> Experiment:
    """maskformer-swin-tiny-coco with Swin-L, images of 1000 pixels at most: PQ 52.7 from the paper."""
    base = _swin("swin_large")
    return replace(base, augment=replace(base.augment, longest=1000))


def maskformer_r101_cityscapes() -> Experiment:
    """Cityscapes, ResNet-101 and the plain feature pyramid, by the recipe that was published for classes alone.

    For panoptic maps nobody published a PQ; the authors advise Mask2Former's recipe, which differs in weight
    decay only.
    """
    return Experiment(
        model=MaskFormerConfig(backbone=Backbone("resnet101"), divisor=32, encoder_layers=0),
        data=Data(root="", train="train", val="val"),
        augment=POLICIES["cityscapes_m2f"],
        resize=Resize(short=1024, longest=2048, antialias=True),
        optim=Optim(
            optimiser="adamw",
            lr=1e-4,
            backbone_lr=0.1,
            weight_decay=1e-4,
            decay="weights_and_biases",
            schedule="poly",
            clip_norm=0.01,
        ),
        engine=Engine(channels_last=True),
        train=Train(steps=90_000, batch=16, workers=8, sync_bn=True, validate_every=5000, gpu="yes"),
    )


def maskformer_scenes() -> Experiment:
    """Drawn scenes, a narrow MaskFormer from scratch on two CPU workers.

    Measured once on 2 cores of an AMD EPYC (Zen 5), 740 steps of 8 images in 4 min 7 s, 29 images/s, 1.6 GiB a worker:
    PQ on 96 scenes 32.8 at step 370, 39.0 at 740 (things 12.3, stuff 74.7; SQ 71.8, RQ 48.9).
    `python jobs/train.py maskformer-scenes`
    """
    return on_scenes(
        replace(_small(), backbone=Backbone(name="resnet10t"), queries=40),
        transformer_optim(lr=7e-4),
        Train(steps=740, batch=8, workers=2, validate_every=370, log_every=40),
    )


def maskformer_pedestrians() -> Experiment:
    """Real photographs of pedestrians (any COCO-panoptic folder: --data.root), from scratch on two CPU cores.

    Measured once on 2 cores of an AMD EPYC (Zen 5), 485 training photographs, 1600 steps (12,800 images) in 13 min 22 s
    from the command to its last line, 17 images/s, 1.9 GiB a worker. PQ on the 127 val photographs: 47.8 at step 800,
    54.4 at 1600 (things 22.0, stuff 62.5; SQ 67.0, RQ 64.1). On the 58 of them that no training photograph resembles:
    43.6 (things 5.0, stuff 53.2); copying the nearest training photograph's labels scores 34.8 there.
    `python jobs/train.py maskformer-pedestrians --data.root FOLDER`
    """
    return on_photographs(
        _small(), transformer_optim(lr=7e-4), Train(steps=1600, batch=8, workers=2, validate_every=800, log_every=50)
    )


def maskformer_pedestrians_imagenet() -> Experiment:
    """maskformer-pedestrians on EfficientNet-Lite0 with ImageNet weights (extra `trunks`).

    Measured once on 2 cores of an AMD EPYC (Zen 5), 2100 steps (16,800 images) in 22 min 41 s from the command to its
    last line beside tests, 16 to 18 images/s undisturbed, 2.1 GiB a worker. PQ on the 127 val photographs: 56.1 at step
    700, 62.6 at 1400, 65.7 at 2100 (things 26.0, stuff 75.6; SQ 83.4, RQ 75.9). On the 58 that no training photograph
    resembles: 58.1 (things 14.6, stuff 69.0), from scratch 43.6. 65 was hoped for: things, which a mask of stride 4 of
    the whole image must draw, are learnt last, and PQ still rises.
    `python jobs/train.py maskformer-pedestrians-imagenet --data.root FOLDER`
    """
    return from_imagenet(maskformer_pedestrians(), steps=2100)


def _coco(backbone: Backbone) -> Experiment:
    """The published recipe for COCO with six transformer layers in the pixel decoder."""
    return Experiment(
        model=MaskFormerConfig(backbone=backbone, divisor=1),
        data=Data(root="", train="train2017", val="val2017"),
        augment=replace(POLICIES["detr"], rule="detectron2"),
        resize=Resize(short=800, longest=1333, antialias=True),
        optim=Optim(
            optimiser="adamw",
            lr=1e-4,
            backbone_lr=0.1,
            weight_decay=1e-4,
            decay="weights_and_biases",
            schedule="multistep",
            milestones=(369_600,),
            clip_norm=0.01,
        ),
        engine=Engine(channels_last=True),
        train=Train(steps=554_400, batch=64, workers=64, validate_every=5000, validation_batch=1, gpu="yes"),
    )


def _swin(name: str) -> Experiment:
    """The published recipe for COCO with a Swin transformer and the plain feature pyramid."""
    base = _coco(Backbone(name, drop_path=0.3))
    optim = replace(base.optim, lr=6e-5, backbone_lr=1.0, weight_decay=0.01, warmup_steps=1500, warmup_factor=1e-6)
    return replace(base, model=replace(base.model, encoder_layers=0), optim=optim)


def _small() -> MaskFormerConfig:
    """MaskFormer for CPU cores, from scratch: ResNet-18, 128 channels, one transformer layer in the pixel decoder.

    Masks are compared at every fourth pixel, which is the resolution that they have. A step of 4 images of 192x320 took
    340 to 380 ms of one core of an AMD EPYC (Zen 5).
    """
    return MaskFormerConfig(
        backbone=Backbone(name="resnet18"),
        divisor=32,
        channels=128,
        mask_channels=128,
        norm="batch",
        encoder_layers=1,
        decoder_layers=4,
        heads=4,
        hidden=512,
        dropout=0.0,
        queries=24,
        loss_stride=4,
        threshold=0.5,
        inside=True,
    )


PRESETS = (
    maskformer_r50_coco,
    maskformer_r101_coco,
    maskformer_swin_tiny_coco,
    maskformer_swin_small_coco,
    maskformer_swin_base_coco,
    maskformer_swin_large_coco,
    maskformer_r101_cityscapes,
    maskformer_scenes,
    maskformer_pedestrians,
    maskformer_pedestrians_imagenet,
)
"""Presets of this file; a function's name with hyphens is that of the preset."""
