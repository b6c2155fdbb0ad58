"""Panoptic FPN: the published recipes, the backbones of a report, and small ones for two CPU cores."""

from __future__ import annotations

from dataclasses import replace

from panoptic.backbones import Backbone
from panoptic.models.panoptic_fpn.config import CAFFE2, PanopticFPNConfig
from panoptic.rcnn.config import Detection, DetectorConfig, Heads, Regions
from panoptic.training.config import Engine, Optim
from panoptic.transforms import Augment, Resize
from pipelines.config import Data, Experiment, Train
from pipelines.presets.panoptic_deeplab import CITYSCAPES_SIDES
from pipelines.presets.small import from_imagenet, on_photographs, on_scenes

RGB = PanopticFPNConfig(
    pixel_mean=(123.675, 116.28, 103.53), pixel_std=(58.395, 57.12, 57.375), bgr=False, backbone=Backbone()
)
"""A model whose pixels and backbone are as torchvision has them; all norms learn."""

SOLVER = Optim(
    optimiser="sgd",
    lr=0.02,
    scale_lr="linear",
    lr_batch=16,
    weight_decay=1e-4,
    decay="weights_and_biases",
    schedule="multistep",
    milestones=(210_000, 250_000),
    warmup_steps=1000,
)
"""detectron2's optimiser, for 270,000 steps of 16 images; another batch scales the rate linearly."""


def panoptic_fpn_r50_coco() -> Experiment:
    """detectron2's recipe for COCO, ResNet-50, 270,000 steps: PQ 41.5 (things 48.3, stuff 31.2) from its model table.

    With 90,000 steps (--train.steps 90000 --optim.milestones 60000 80000) PQ 39.4 from the same table. Both figures
    begin from its ImageNet weights (--model.backbone.weights R-50.pkl) and learn COCO's own instance masks, which
    overlap; those of a panoptic map do not.
    """
    return Experiment(
        model=PanopticFPNConfig(),
        data=Data(root="", train="train2017", val="val2017"),
        augment=Augment(scale="short", sides=(640, 672, 704, 736, 768, 800), longest=1333, pad="none", antialias=True),
        resize=Resize(short=800, longest=1333, antialias=True),
        optim=SOLVER,
        engine=Engine(precision="bfloat16", channels_last=True),
        train=Train(steps=270_000, batch=16, workers=8, validate_every=10_000, gpu="yes"),
    )


def panoptic_fpn_r101_coco() -> Experiment:
    """panoptic-fpn-r50-coco with ResNet-101 (R-101.pkl): PQ 43.0 from detectron2's model table."""
    base = panoptic_fpn_r50_coco()
    return replace(base, model=PanopticFPNConfig(backbone=replace(CAFFE2, name="resnet101")))


def panoptic_fpn_double3x3_coco() -> Experiment:
    """COCO with two 3x3 in each bottleneck, from scratch, 270,000 steps of 4 images, detectron2's recipe: no PQ known.

    The report "Image Panoptic Segmentation Challenges using COCO Dataset" trained this network otherwise, with Adam at
    one rate, to the 31.935 of its table 7: that recipe is the study `fpn-double3x3` of jobs/tune.py, as `fpn-vgg` and
    `fpn-res2net` are those of its tables 8 and 9. It does not name its norms; here all of them learn.
    """
    base = panoptic_fpn_r50_coco()
    return replace(
        base,
        model=replace(RGB, backbone=Backbone(name="resnet50_double3x3")),
        train=replace(base.train, batch=4, workers=1),
    )


def panoptic_fpn_r50_cityscapes() -> Experiment:
    """The paper's recipe for Cityscapes with ResNet-50 (32 crops of 512x1024, 65,000 steps).

    The PQ of this backbone is not at hand: ResNet-101 reaches 58.1 (see panoptic-fpn-r101-cityscapes).
    """
    return Experiment(
        model=PanopticFPNConfig(),
        data=Data(root="", train="train", val="val"),
        augment=Augment(scale="short", sides=CITYSCAPES_SIDES, crop=(512, 1024), pad="end", antialias=True),
        resize=Resize(),
        optim=replace(SOLVER, lr=0.01, lr_batch=32, milestones=(40_000, 55_000)),
        engine=Engine(precision="bfloat16", channels_last=True),
        train=Train(steps=65_000, batch=32, workers=8, validate_every=5000, gpu="yes"),
    )


def panoptic_fpn_r101_cityscapes() -> Experiment:
    """panoptic-fpn-r50-cityscapes with ResNet-101: PQ 58.1 (things 52.0, stuff 62.5) from the paper.

    ImageNet weights are needed for that figure: --model.backbone.weights R-101.pkl.
    """
    base = panoptic_fpn_r50_cityscapes()
    return replace(base, model=PanopticFPNConfig(backbone=replace(CAFFE2, name="resnet101")))


def panoptic_fpn_r50_mapillary() -> Experiment:
    """Mapillary Vistas, ResNet-50. The paper has no recipe and no PQ for it: Cityscapes' with crops of 1024x1024.

    Images of up to 22 megapixels are evaluated with their long side at 2048 pixels.
    """
    base = panoptic_fpn_r50_cityscapes()
    sides = tuple(range(1024, 2049, 128))
    return replace(
        base,
        augment=replace(base.augment, sides=sides, crop=(1024, 1024)),
        resize=Resize(short=1536, longest=2048, antialias=True),
        optim=replace(base.optim, lr_batch=32),
        train=replace(base.train, batch=16),
    )


def panoptic_fpn_scenes() -> Experiment:
    """Drawn scenes on two CPU workers, from scratch.

    Measured once on 2 cores of an AMD EPYC (Zen 5), 500 steps of 8 images in 3 min 36 s, 22 images/s, 1.6 GiB a worker:
    PQ on 96 scenes 43.8 at step 250, 52.2 at 500 (things 35.6, stuff 74.3; SQ 76.6, RQ 66.1).
    `python jobs/train.py panoptic-fpn-scenes`
    """
    return on_scenes(
        replace(_small(stuff_area=64), backbone=Backbone(name="resnet10t")),
        Optim(optimiser="adamw", lr=1e-3, weight_decay=0.02, warmup_steps=50, clip_norm=5.0, ema=0.99),
        Train(steps=500, batch=8, workers=2, validate_every=250, log_every=40),
        crop=(160, 224),
    )


def panoptic_fpn_pedestrians() -> Experiment:
    """Real photographs of pedestrians (any COCO-panoptic folder: --data.root), from scratch on two CPU cores.

    Measured once on 2 cores of an AMD EPYC (Zen 5), 485 training photographs, 1450 steps (11,600 images) in 14
    minutes from the command to its last line, 14 to 16 images/s, 2.0 GiB a worker (4 images take 0.37 s of one core,
    half of it in convolutions, a tenth in RoIAlign). PQ on the 127 val photographs: 47.3 at step 725, 60.2 at 1450
    (things 45.9, stuff 63.8; SQ 82.0, RQ 70.7). On the 58 of them that no training photograph resembles: 49.7 (things
    29.9, stuff 54.6); copying the nearest training photograph's labels scores 34.8 there.
    `python jobs/train.py panoptic-fpn-pedestrians --data.root FOLDER`
    """
    return on_photographs(
        _small(stuff_area=128),
        Optim(optimiser="adamw", lr=1e-3, weight_decay=0.05, warmup_steps=100, clip_norm=5.0, ema=0.99),
        Train(steps=1450, batch=8, workers=2, validate_every=725, log_every=50),
    )


def panoptic_fpn_pedestrians_imagenet() -> Experiment:
    """panoptic-fpn-pedestrians on EfficientNet-Lite0 with ImageNet weights (extra `trunks`).

    Measured once on 2 cores of an AMD EPYC (Zen 5), 1800 steps (14,400 images) in 14 min 53 s from the command to its
    last line, 18 to 20 images/s undisturbed (tests ran beside for some minutes), 2.2 GiB a worker. PQ on the 127 val
    photographs: 64.1 at step 600, 69.9 at 1200, 73.6 at 1800 (things 57.4, stuff 77.7; SQ 87.5, RQ 83.2). On the 58
    that no training photograph resembles: 66.5 (things 47.2, stuff 71.3), from scratch 49.7.
    `python jobs/train.py panoptic-fpn-pedestrians-imagenet --data.root FOLDER`
    """
    return from_imagenet(panoptic_fpn_pedestrians(), steps=1800)


def _small(stuff_area: int) -> PanopticFPNConfig:
    """Panoptic FPN for CPU cores, from scratch: ResNet-18, narrow pyramid and heads, norms that learn.

    Few regions of an image learn, and anchors are half as large as on COCO's
    upsampled photographs. The heads compute in bfloat16 too.
    """
    return replace(
        RGB,
        backbone=Backbone(name="resnet18"),
        width=64,
        norm="batch",
        semantic_width=64,
        semantic_norm="batch",
        semantic_weight=1.0,
        stuff_area=stuff_area,
        detector=DetectorConfig(
            Regions((16, 32, 64, 128, 256), train_before=400, train_after=300, test_before=400, test_after=200),
            Detection(samples=64),
            Heads(box_width=256, mask_width=64, mask_layers=2, precision="bfloat16"),
        ),
    )


PRESETS = (
    panoptic_fpn_r50_coco,
    panoptic_fpn_r101_coco,
    panoptic_fpn_double3x3_coco,
    panoptic_fpn_r50_cityscapes,
    panoptic_fpn_r101_cityscapes,
    panoptic_fpn_r50_mapillary,
    panoptic_fpn_scenes,
    panoptic_fpn_pedestrians,
    panoptic_fpn_pedestrians_imagenet,
)
"""Presets of this file; a function's name with hyphens is that of the preset."""
