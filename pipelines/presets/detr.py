"""DETR-panoptic: the paper's recipe in one stage and in two, the settings of "Panoptic Segmentation" (research topic
12), and small ones for two CPU cores.

The paper's figures come from models that started with ImageNet weights: --model.backbone.weights FILE.
"""

from __future__ import annotations

from dataclasses import replace

from panoptic.backbones import Backbone
from panoptic.models.detr import DETRConfig
from panoptic.optim import Optim
from panoptic.transforms import POLICIES, Augment, Resize
from pipelines.config import Data, Experiment, Train
from pipelines.presets.small import on_photographs, on_scenes

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
    """As detr-r50-coco with ResNet-101: PQ 45.1 from the paper (two stages)."""
    return _coco(DETRConfig(backbone=Backbone("resnet101", norm="frozen", freeze=2)), epochs=300, drop=200)


def detr_r50_dc5_coco() -> Experiment:
    """As detr-r50-coco with a dilated last stage, 8 images a step: PQ 44.6 from the paper (two stages)."""
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
    """The slides' table, version 119: 1200 frames at 400 pixels, 100 epochs of 4, Adam, one rate for all.

    From the slides: PQ 6.66, SQ 37.51, RQ 17.76, mIoU 18.63. Started from a converted Hugging Face checkpoint
    (facebook/detr-resnet-50-panoptic): `--train.weights CHECKPOINT`; the classification head is fresh. Variations of
    the slides: --augment.sides 500 (600, 700) with --augment.longest likewise, --data.limit 1000, --optim.clip-norm 1,
    --model.class-hidden (none), --train.freeze "encoder.*" "decoder.*".
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
    """Its version 125: 50 epochs of the doubled data set, the second copy with other colours.

    From the slides: PQ 5.48, SQ 36.38, RQ 15.06, mIoU 16.22.
    """
    base = detr_004_cityscapes()
    return replace(base, augment=replace(base.augment, colour="colour004", doubled=True))


def detr_scenes() -> Experiment:
    """Drawn scenes, a narrow DETR from scratch, 1200 steps of 8 images on two CPU workers. PQ not measured yet."""
    return on_scenes(
        replace(_small(), backbone=Backbone(name="resnet10t", output_stride=16)),
        _small_optim(),
        Train(steps=1200, batch=8, workers=2, validate_every=400, log_every=40),
    )


def detr_pedestrians() -> Experiment:
    """Real photographs of pedestrians (any COCO-panoptic folder: --data.root), from scratch on two CPU cores.

    A step of 4 images takes a thread 0.45 s. PQ has not been measured yet; in 150 steps of a probe the losses of boxes
    fell from 4.6 to 1.7 and the focal loss of masks from 0.3 to 0.06, while their dice loss stayed above 0.8.
    `python jobs/train.py detr-pedestrians --data.root FOLDER`
    """
    return on_photographs(
        _small(), _small_optim(), Train(steps=1800, batch=8, workers=2, validate_every=450, log_every=50)
    )


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
    """AdamW at 1e-4, a tenth of that for the trunk, gradients clipped at 0.1, one drop."""
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
    """A trunk that learns from scratch, at stride 16 because the images are small, and half the transformer."""
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


def _small_optim() -> Optim:
    return Optim(optimiser="adamw", lr=3e-4, weight_decay=0.05, warmup_steps=100, clip_norm=1.0, ema=0.99)


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
)
