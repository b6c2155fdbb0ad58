"""EoMT: the published recipes on DINOv2 and DINOv3, and small ones from scratch for two CPU cores.

Published figures are those of models that started with the backbone's published weights: --model.backbone.weights
imagenet (timm's, downloaded once) or a file. DINOv2's are Apache-2.0; DINOv3's have Meta's own licence, and so has what
is trained from them. Without them a plain ViT learns far worse than a convolutional backbone from as few images.

The figures are those of the reference's own tables; what it took: DINOv2-L at 640 pixels 6 hours on four H100, 26 GB
each. --train.micro-batch divides the batch of 16 on fewer or smaller GPUs.
"""

from __future__ import annotations

from dataclasses import replace

from panoptic.backbones import Backbone
from panoptic.models.eomt.annealing import published_phases
from panoptic.models.eomt.config import EoMTConfig
from panoptic.training.config import Engine, Optim
from panoptic.transforms import POLICIES, Augment, Resize
from pipelines.config import Data, Experiment, Scenes, Train
from pipelines.presets.small import transformer_optim

EPOCH = 7391
"""Steps of 16 images through COCO's training split, of which images without a segment are left out."""


def eomt_small_coco() -> Experiment:
    """COCO, DINOv2-S at 640 pixels, 24 epochs of 16 images, large-scale jitter: PQ 46.7 from the reference's table."""
    return _coco("small", epochs=24, blocks=3)


def eomt_base_coco() -> Experiment:
    """eomt-small-coco with DINOv2-B: PQ 51.6 from the reference's table."""
    return _coco("base", epochs=24, blocks=3)


def eomt_large_coco() -> Experiment:
    """eomt-small-coco with DINOv2-L and 12 epochs: PQ 56.0 from the reference's table."""
    return _coco("large", epochs=12, blocks=4)


def eomt_giant_coco() -> Experiment:
    """eomt-small-coco with DINOv2-g and 12 epochs: PQ 57.0 from the reference's table."""
    return _coco("giant", epochs=12, blocks=5)


def eomt_large_1280_coco() -> Experiment:
    """eomt-large-coco at 1280 pixels: PQ 58.3 from the reference's table."""
    return _at(eomt_large_coco(), 1280)


def eomt_dinov3_small_coco() -> Experiment:
    """COCO, DINOv3-S at 640 pixels, 24 epochs of 16 images: PQ 47.2 from the reference's table."""
    return _dinov3("small", epochs=24, blocks=3)


def eomt_dinov3_base_coco() -> Experiment:
    """eomt-dinov3-small-coco with DINOv3-B: PQ 53.1 from the reference's table."""
    return _dinov3("base", epochs=24, blocks=3)


def eomt_dinov3_large_coco() -> Experiment:
    """eomt-dinov3-small-coco with DINOv3-L and 12 epochs: PQ 56.8 from the reference's table."""
    return _dinov3("large", epochs=12, blocks=4)


def eomt_dinov3_large_1280_coco() -> Experiment:
    """eomt-dinov3-large-coco at 1280 pixels: PQ 58.9 from the reference's table."""
    return _at(eomt_dinov3_large_coco(), 1280)


def eomt_large_ade20k() -> Experiment:
    """ADE20K, DINOv2-L at 640 pixels, 31 epochs from a model of COCO: PQ 50.6 from the reference's table.

    --train.weights: the model of eomt-large-coco, whose class head starts fresh.
    """
    base = eomt_large_coco()
    return replace(
        base,
        data=Data(root="", train="training", val="validation"),
        augment=replace(base.augment, colour="eomt"),
        train=replace(base.train, steps=39_120),
    )


def eomt_large_cityscapes() -> Experiment:
    """Cityscapes, DINOv2-L, crops of 1024x1024, 107 epochs. No panoptic figure was published: no PQ is known.

    The settings are those of the reference's model for classes alone (mIoU 84.2), with 200 queries. Whole images lie
    in windows there; here they are reduced to 1024x512 within the square.
    """
    base = _at(eomt_large_coco(), 1024)
    return replace(
        base,
        data=Data(root="", train="train", val="val"),
        augment=replace(base.augment, factors=(0.5, 2.0, 0.1), colour="eomt"),
        train=replace(base.train, steps=19_902, validate_every=2000),
    )


def eomt_scenes() -> Experiment:
    """Drawn scenes, a small plain ViT from scratch on two CPU workers.

    740 steps of 8 images. PQ on 96 scenes: 28.9 at step 370, 36.7 at 740 (things 8.5, stuff 74.2). One seed, 10 minutes
    beside other work on 2 cores.
    `python jobs/train.py eomt-scenes`
    """
    height, width = 192, 256
    return Experiment(
        model=_small((height, width), queries=40),
        data=Data(root="scenes", scenes=Scenes(train=800, val=96)),
        augment=_jitter((height, width), (0.75, 1.5)),
        resize=Resize(short=height, longest=width, rule="half_even", canvas=(height, width)),
        optim=transformer_optim(lr=7e-4),
        engine=Engine(precision="bfloat16", channels_last=True),
        train=Train(steps=740, batch=8, workers=2, validate_every=370, log_every=40),
    )


def eomt_pedestrians() -> Experiment:
    """Real photographs of pedestrians (any COCO-panoptic folder: --data.root), a small plain ViT from scratch.

    2800 steps of 8 images, each within 192x352 pixels. PQ on the 127 val photographs: 40.2 at step 700, 49.0 at 1400,
    53.3 at 2100, 56.1 at 2800 (things 15.4, stuff 66.2); on the 58 that resemble no training photograph 44.0 (things
    1.8, stuff 54.5), where mask2former-pedestrians has 67.1: a plain ViT from scratch learns hardly any things from 485
    photographs. One seed, beside other work; at the 16 images/s of two quiet cores it takes 24 minutes.
    `python jobs/train.py eomt-pedestrians --data.root FOLDER`
    """
    height, width = 192, 352
    return Experiment(
        model=_small((height, width), queries=24),
        data=Data(root="", train="train", val="val"),
        augment=replace(_jitter((height, width), (0.75, 1.5)), colour="ssd"),
        resize=Resize(short=height, longest=width, rule="half_even", canvas=(height, width)),
        optim=transformer_optim(lr=7e-4),
        engine=Engine(precision="bfloat16", channels_last=True),
        train=Train(steps=2800, batch=8, workers=2, validate_every=700, log_every=50),
    )


def _coco(size: str, *, epochs: int, blocks: int) -> Experiment:
    """The published recipe for COCO on DINOv2."""
    steps = epochs * EPOCH
    return Experiment(
        model=EoMTConfig(backbone=Backbone(f"vit_{size}_patch14_reg4_dinov2"), query_blocks=blocks),
        data=Data(root="", train="train2017", val="val2017"),
        augment=POLICIES["eomt"],
        resize=Resize(short=640, longest=640, rule="half_even", canvas=(640, 640), antialias=True),
        optim=Optim(
            optimiser="adamw",
            lr=1e-4,
            layer_decay=0.8,
            weight_decay=0.05,
            decay="all",
            schedule="poly",
            schedule_start="after_warmup",
            warmup_steps=500,
            warmup_factor=0.0,
            backbone_warmup_steps=1000,
            clip_norm=0.01,
        ),
        engine=Engine(
            precision="bfloat16", tf32="all"
        ),  # the reference asks for float32 products of "medium" precision
        train=Train(steps=steps, batch=16, workers=4, validate_every=EPOCH, validation_batch=1, gpu="yes"),
    )


def _dinov3(size: str, *, epochs: int, blocks: int) -> Experiment:
    """The published recipe for COCO on DINOv3: the first block's masks are gone after 3000 steps."""
    base = _coco(size, epochs=epochs, blocks=blocks)
    starts, ends = zip(*published_phases(blocks, base.train.steps), strict=True)
    return replace(
        base,
        model=replace(
            base.model,
            backbone=Backbone(f"vit_{size}_patch16_dinov3_qkvb"),
            anneal_starts=(0, *starts[1:]),
            anneal_ends=(3000, *ends[1:]),
        ),
        optim=replace(base.optim, lr=2e-4, undecayed_layers=blocks, warmup_steps=2000, backbone_warmup_steps=3000),
    )


def _at(base: Experiment, side: int) -> Experiment:
    """An experiment on a square canvas of another side."""
    square = (side, side)
    return replace(
        base,
        model=replace(base.model, divisor=side, canvas=square),
        augment=replace(base.augment, target=square, crop=square),
        resize=replace(base.resize, short=side, longest=side, canvas=square),
    )


def _jitter(canvas: tuple[int, int], factors: tuple[float, float]) -> Augment:
    """Images as large as fits factors times the canvas, cut or padded to it."""
    return replace(POLICIES["eomt"], factors=(*factors, 0.1), target=canvas, crop=canvas)


def _small(canvas: tuple[int, int], queries: int) -> EoMTConfig:
    """EoMT for CPU cores, from scratch: eight blocks of 192 channels, the last three with queries.

    Queries are merged from a probability of 1/2 on: after so few images they are less sure of themselves than the
    published 0.8 expects.
    """
    return EoMTConfig(
        backbone=Backbone("vit_tiny_patch16_224"),
        divisor=16,
        canvas=canvas,
        depth=8,
        queries=queries,
        query_blocks=3,
        loss_points=2048,
        threshold=0.5,
    )


PRESETS = (
    eomt_small_coco,
    eomt_base_coco,
    eomt_large_coco,
    eomt_giant_coco,
    eomt_large_1280_coco,
    eomt_dinov3_small_coco,
    eomt_dinov3_base_coco,
    eomt_dinov3_large_coco,
    eomt_dinov3_large_1280_coco,
    eomt_large_ade20k,
    eomt_large_cityscapes,
    eomt_scenes,
    eomt_pedestrians,
)
"""Presets of this file; a function's name with hyphens is that of the preset."""
