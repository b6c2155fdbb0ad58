"""DETR-panoptic: the paper's recipe in one stage and in two, the settings of "Panoptic Segmentation" (research topic
12), and small ones for two CPU cores.

The paper's figures come from models that started with ImageNet weights: --model.backbone.weights FILE.
"""

from __future__ import annotations

from dataclasses import replace

from panoptic.backbones import Backbone
from panoptic.models.detr.config import DETRConfig
from panoptic.training.config import Optim
from panoptic.transforms import POLICIES, Augment, Resize
from pipelines.config import Data, Experiment, Train
from pipelines.presets.small import from_imagenet, on_photographs, on_scenes, transformer_optim

COCO_IMAGES = 118_287

DETECTOR = ("backbone.*", "projection.*", "encoder.*", "decoder.*", "queries.*", "class_head.*", "box_head.*")
"""Everything but the mask head."""


def detr_r50_coco() -> Experiment:
    """COCO, boxes and masks together from the start, 300 epochs of 16 images, the rate dropped after 200.

    PQ 43.4 (things 48.2, stuff 36.3) is the figure of the paper's two stages; it says that training both at once
    is similar. Started from a converted checkpoint with its 250 logits: --model.logits 250.
    """
    return _coco(DETRConfig(), epochs=300, drop=200)


def detr_r101_coco() -> Experiment:
    """detr-r50-coco with ResNet-101: PQ 45.1 from the paper (two stages)."""
    return _coco(DETRConfig(backbone=Backbone("resnet101", norm="frozen", freeze=2)), epochs=300, drop=200)


def detr_r50_dc5_coco() -> Experiment:
    """detr-r50-coco with a dilated last stage, 8 images a step: PQ 44.6 from the paper (two stages)."""
    model = DETRConfig(backbone=Backbone("resnet50", norm="frozen", freeze=2, output_stride=16))
    return _coco(model, epochs=300, drop=200, batch=8)


def detr_r50_coco_boxes() -> Experiment:
    """First of two stages: boxes of things and stuff, no masks; box AP 38.8 from the reference's model table.

    `segment` paints the boxes meanwhile, so the PQ of this stage says little.
    """
    return _coco(DETRConfig(masks=False), epochs=300, drop=200)


def detr_r50_coco_masks() -> Experiment:
    """Second of two stages: 25 epochs of the mask head alone; PQ 43.4 from the paper.

    Needs the first stage: `--train.weights CHECKPOINT`. What is frozen keeps its dropout, as published.
    """
    base = _coco(DETRConfig(), epochs=25, drop=15)
    return replace(base, train=replace(base.train, freeze=DETECTOR, frozen_dropout=True))


def detr_r50_cityscapes() -> Experiment:
    """Cityscapes from a converted COCO checkpoint (`--train.weights CHECKPOINT`): only the class layer is fresh.

    Nobody published a PQ for it. Frames of more than 100 segments lose the rest: --model.queries.
    """
    images, batch, epochs = 2975, 16, 200
    return Experiment(
        model=DETRConfig(),
        data=Data(root="", train="train", val="val"),
        augment=POLICIES["cityscapes_m2f"],
        resize=Resize(short=1024, longest=2048, antialias=True),
        optim=_optim(images * 150 // batch),
        train=Train(steps=images * epochs // batch, batch=batch, workers=8, validate_every=2500, gpu="yes"),
    )


def detr_004_cityscapes() -> Experiment:
    """Version 119 of the slides (research topic 12): 1200 frames at 400 pixels, 100 epochs of 4, Adam at one rate.

    From the slides: PQ 6.66, SQ 37.51, RQ 17.76, mIoU 18.63. Started from a converted Hugging Face checkpoint
    (facebook/detr-resnet-50-panoptic): `--train.weights CHECKPOINT`; the classification head is fresh. Their 50
    validation images: --data.limit-val 50; their 50 test images are others, of the same split here: jobs/evaluate.py
    takes 50 after skipping 50. What the slides vary are the studies detr-* of jobs/tune.py.
    """
    side = 400
    return Experiment(
        model=DETRConfig(class_hidden=(128, 64), class_dropout=0.2),
        data=Data(root="", train="train", val="val", limit=1200),
        augment=Augment(scale="short", sides=(side,), longest=side, rule="huggingface", flip=0.0, antialias=True),
        resize=Resize(short=side, longest=side, rule="huggingface", antialias=True),
        optim=Optim(
            optimiser="adam",
            lr=1e-4,
            backbone_lr=1.0,
            weight_decay=1e-4,
            decay="all",
            schedule="constant",
            clip_norm=0.1,
        ),
        train=Train(steps=30_000, batch=4, workers=1, validate_every=1500, validation_batch=1, gpu="yes"),
    )


def detr_004_cityscapes_augmented() -> Experiment:
    """detr-004-cityscapes, version 125 of its slides: 50 epochs of each image twice, the second time in other colours.

    From the slides: PQ 5.48, SQ 36.38, RQ 15.06, mIoU 16.22.
    """
    base = detr_004_cityscapes()
    return replace(base, augment=replace(base.augment, colour="colour004", doubled=True))


def detr_scenes() -> Experiment:
    """Drawn scenes, a narrow DETR from scratch on two CPU workers: too short a training for DETR.

    Measured once on 2 cores of an AMD EPYC (Zen 5), 600 steps of 8 images in 4 min 43 s, 24 images/s, 1.8 GiB a worker:
    PQ on 96 scenes 4.3 at step 300, 8.9 at 600 (things 1.1, stuff 19.2; SQ 36.6, RQ 13.5). Losses from step 40 to the
    last: boxes 4.77 to 1.44, GIoU 2.34 to 1.38, dice 4.50 to 3.32.
    `python jobs/train.py detr-scenes`
    """
    return on_scenes(
        replace(_small(), backbone=Backbone(name="resnet10t", output_stride=16)),
        transformer_optim(lr=3e-4),
        Train(steps=600, batch=8, workers=2, validate_every=300, log_every=40),
    )


def detr_pedestrians() -> Experiment:
    """Real photographs of pedestrians (any COCO-panoptic folder: --data.root), from scratch on two CPU cores.

    DETR learns slowly from scratch: the paper trains for 300 epochs of COCO, this for 20 of 485 photographs. Measured
    once on 2 cores of an AMD EPYC (Zen 5), 1200 steps (9,600 images) in 11 min 50 s from the command to its last line,
    15 images/s, 2.0 GiB a worker. PQ on the 127 val photographs: 25.6 at step 600, 30.9 at 1200 (things 0, stuff 38.7;
    SQ 38.9, RQ 38.7). On the 58 of them that no training photograph resembles: 27.8 (things 0, stuff 34.7), less than
    the 34.8 of copying the nearest training photograph's labels. Losses from step 50 to the last: boxes (L1, times 5)
    4.70 to 0.74, GIoU (times 2) 1.94 to 0.85, masks focal 0.111 to 0.066, dice (times 5) 4.04 to 2.01. With maps of
    attention that sum to 1, as published, dice did not fall in 1000 steps, and PQ at step 700 was 0.0.
    `python jobs/train.py detr-pedestrians --data.root FOLDER`
    """
    return on_photographs(
        _small(), transformer_optim(lr=3e-4), Train(steps=1200, batch=8, workers=2, validate_every=600, log_every=50)
    )


def detr_pedestrians_imagenet() -> Experiment:
    """detr-pedestrians on EfficientNet-Lite0 with ImageNet weights (extra `trunks`), which stay as they are.

    A step takes 0.6 of the time with a frozen backbone, and steps are what DETR lacks. Measured once on 2 cores of an
    AMD EPYC (Zen 4), 2700 steps (21,600 images) in 20 minutes from the command to its last line, 19 to 20 images/s, 1.7
    GiB a worker. PQ on the 127 val photographs: 30.4 at step 900, 37.4 at 1800, 39.4 at 2700 (things 10.8, stuff 46.5;
    SQ 48.5, RQ 47.4). On the 58 of them that no training photograph resembles: 34.5 (things 6.0, stuff 41.7), as much
    as copying the nearest training photograph's labels and far from the 65 that was hoped for: fence, rock and stairs
    are never found yet, and the paper trains on 1600 times as many images.
    `python jobs/train.py detr-pedestrians-imagenet --data.root FOLDER`
    """
    base = from_imagenet(detr_pedestrians(), steps=2700)
    backbone = replace(base.model.backbone, freeze=5)
    return replace(base, model=replace(base.model, backbone=backbone), optim=replace(base.optim, lr=5e-4))


def _coco(model: DETRConfig, epochs: int, drop: int, batch: int = 16) -> Experiment:
    """The reference's recipe; its 16 images are two on each of eight GPUs. Padding would cost DC5 some of its AP."""
    steps = COCO_IMAGES // batch
    return Experiment(
        model=model,
        data=Data(root="", train="train2017", val="val2017"),
        augment=POLICIES["detr"],
        resize=Resize(short=800, longest=1333, rule="detr", antialias=True),
        optim=_optim(drop * steps),
        train=Train(
            steps=epochs * steps, batch=batch, workers=8, validate_every=5 * steps, validation_batch=1, gpu="yes"
        ),
    )


def _optim(drop: int) -> Optim:
    """AdamW at 1e-4, a tenth of that for the backbone, gradients clipped at 0.1, one drop."""
    return Optim(
        optimiser="adamw",
        lr=1e-4,
        backbone_lr=0.1,
        weight_decay=1e-4,
        decay="all",
        schedule="multistep",
        milestones=(drop,),
        clip_norm=0.1,
    )


def _small() -> DETRConfig:
    """A backbone that learns from scratch, at stride 16 because the images are small, and half the transformer."""
    return DETRConfig(
        backbone=Backbone(name="resnet18", output_stride=16),
        channels=128,
        hidden=256,
        encoder_layers=2,
        decoder_layers=3,
        queries=30,
        dropout=0.0,
        mask_channels=128,
        unit_mean_attention=True,
        dice_weight=5.0,
        threshold=0.5,
    )


PRESETS = (
    detr_r50_coco,
    detr_r101_coco,
    detr_r50_dc5_coco,
    detr_r50_coco_boxes,
    detr_r50_coco_masks,
    detr_r50_cityscapes,
    detr_004_cityscapes,
    detr_004_cityscapes_augmented,
    detr_scenes,
    detr_pedestrians,
    detr_pedestrians_imagenet,
)
"""Presets of this file; a function's name with hyphens is that of the preset."""
