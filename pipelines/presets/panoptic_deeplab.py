"""Panoptic-DeepLab: the demo, photographs of pedestrians, and the published recipes."""

from __future__ import annotations

from dataclasses import replace

from panoptic.backbones import Backbone
from panoptic.models.panoptic_deeplab.config import PanopticDeepLabConfig
from panoptic.training.config import Engine, Optim
from panoptic.transforms import Augment, Resize
from pipelines.config import Data, Experiment, Train
from pipelines.presets.small import from_imagenet, on_photographs, on_scenes

CITYSCAPES_SIDES = (512, 640, 704, 832, 896, 1024, 1152, 1216, 1344, 1408, 1536, 1664, 1728, 1856, 1920, 2048)
"""Short sides of detectron2's recipe for Cityscapes."""


def demo() -> Experiment:
    """Drawn scenes, a small Panoptic-DeepLab, two CPU workers: a panoptic model that learns while you watch.

    Measured on 2 cores of an AMD EPYC (Zen 5) that did a little else, val PQ of 96 scenes: 38.0 at step 400, 53.4 at
    800, 56.6 at 1200 (things 39.6, stuff 79.2; SQ 78.7, RQ 70.0); some 5 min from the command to its last line, 42
    images/s, 1.5 GiB a worker. While its dilated depthwise convolutions were bfloat16 two runs gave 57.1 and 57.3.
    `python jobs/train.py demo` or `make demo`
    """
    model = _small(sigma=5, stuff_area=64, small_area=1024)
    return on_scenes(
        replace(model, backbone=Backbone(name="resnet10t"), semantic_loss="cross_entropy"),
        Optim(optimiser="adamw", lr=2e-3, weight_decay=0.02, warmup_steps=50, clip_norm=5.0, ema=0.99),
        Train(steps=1200, batch=8, workers=2, validate_every=400, log_every=40),
    )


def panoptic_deeplab_pedestrians() -> Experiment:
    """Real photographs of pedestrians (any COCO-panoptic folder: --data.root), from scratch on two CPU cores.

    Measured once on 2 cores of an AMD EPYC (Zen 5), 485 training photographs, 2300 steps (36,800 images) in 27
    minutes from the command to its last line, 23 to 25 images/s, 2.0 GiB a worker. PQ on the 127 val photographs:
    41.5 at step 575, 54.3 at 1150, 62.7 at 1725, 66.5 at 2300 (things 44.1, stuff 72.1; SQ 85.2, RQ 75.9). On the 58
    of them that no training photograph resembles: 56.2 (things 28.4, stuff 63.2). detectron2's Panoptic-DeepLab in
    half an hour on two cores: 63.4 and 54.4. Twice the size (crops of 256 x 448) at half the images a second had
    reached 52.7 and 45.8 in 31 minutes: what counts is how often each photograph is seen.
    `python jobs/train.py panoptic-deeplab-pedestrians --data.root FOLDER`
    """
    return on_photographs(
        _small(sigma=6, stuff_area=128, small_area=4096),
        Optim(optimiser="adamw", lr=1.4e-3, weight_decay=0.05, warmup_steps=100, clip_norm=5.0),
        Train(steps=2300, batch=16, workers=2, validate_every=575, log_every=50),
    )


def panoptic_deeplab_pedestrians_imagenet() -> Experiment:
    """panoptic-deeplab-pedestrians on EfficientNet-Lite0 with ImageNet weights (extra `trunks`).

    Measured once on 2 cores of an AMD EPYC (Zen 4), 1500 steps (24,000 images) in 29 minutes from the command to its
    last line, 13 to 15 images/s, 2.3 GiB a worker. PQ on the 127 val photographs: 55.0 at step 500, 73.9 at 1000, 77.2
    at 1500 (things 53.7, stuff 83.0; SQ 88.0, RQ 86.6). On the 58 of them that no training photograph resembles: 69.8
    (things 40.0, stuff 77.2), from scratch 56.2. detectron2's Panoptic-DeepLab on the same backbone and weights,
    trained on 1470 steps of the same views, reached 73.2 and 64.6.
    `python jobs/train.py panoptic-deeplab-pedestrians-imagenet --data.root FOLDER`
    """
    return from_imagenet(panoptic_deeplab_pedestrians(), steps=1500)


def panoptic_deeplab_r50_cityscapes() -> Experiment:
    """Cityscapes, ResNet-50, output stride 32: PQ 59.0 (SQ 80.0, RQ 72.4) from the paper "Panoptic-DeepLab in PyTorch".

    Its table 1, which gives the original in TensorFlow 59.8. Backbone weights of ImageNet are needed for that figure:
    --model.backbone.weights imagenet. 8 images of 1025 x 2049 a step are those of its published code; the report says 4
    (--train.batch 4 --train.workers 4). Its oracle table keeps stuff from 4096 pixels on (--model.stuff-area 4096, from
    the caption of its table 2), the code from 2048.
    """
    return Experiment(
        model=PanopticDeepLabConfig(norm_momentum=0.01, dropout=0.5),
        data=Data(root="", train="train", val="val"),
        augment=Augment(scale="factor", crop=(1025, 2049)),
        resize=Resize(canvas=(1025, 2049)),
        optim=Optim(lr=5e-5, schedule="poly"),
        engine=Engine(precision="bfloat16", channels_last=True),
        train=Train(steps=90_000, batch=8, workers=8, sync_bn=True, validate_every=5000, gpu="yes"),
    )


def panoptic_deeplab_r50_foreground_cityscapes() -> Experiment:
    """panoptic-deeplab-r50-cityscapes with the branch that keeps instances off the ego car; nobody published a PQ.

    From the paper "Panoptic-DeepLab in PyTorch", section 4, which proposes it and did not train it. Its branch learns
    things against everything else, void included. The study `deeplab-foreground` of jobs/tune.py compares both.
    """
    base = panoptic_deeplab_r50_cityscapes()
    return replace(base, model=replace(base.model, foreground=True))


def panoptic_deeplab_r101_cityscapes() -> Experiment:
    """panoptic-deeplab-r50-cityscapes with ResNet-101: PQ 60.3 from the reference's model table."""
    base = panoptic_deeplab_r50_cityscapes()
    return replace(base, model=replace(base.model, backbone=Backbone(name="resnet101")))


def panoptic_deeplab_r52_cityscapes() -> Experiment:
    """detectron2's recipe for Cityscapes, ResNet-52, separable convolutions: PQ 60.3 from its model table."""
    return Experiment(
        model=_r52(crop=(512, 1024), sigma=10),
        data=Data(root="", train="train", val="val"),
        augment=Augment(scale="short", sides=CITYSCAPES_SIDES, crop=(512, 1024), pad="end"),
        resize=Resize(),
        optim=Optim(lr=1e-3, schedule="poly", warmup_steps=1000),
        engine=Engine(precision="bfloat16", channels_last=True),
        train=Train(steps=90_000, batch=32, workers=8, sync_bn=True, validate_every=5000, gpu="yes"),
    )


def panoptic_deeplab_r52_coco() -> Experiment:
    """detectron2's recipe for COCO, ResNet-52, separable convolutions: PQ 35.5 from its model table."""
    return Experiment(
        model=replace(_r52(crop=(640, 640), sigma=8), top_k_fraction=1.0, nms_kernel=41, stuff_area=4096, divisor=640),
        data=Data(root="", train="train2017", val="val2017"),
        augment=Augment(scale="short", sides=tuple(range(320, 961, 64)), longest=960, crop=(640, 640), pad="end"),
        resize=Resize(short=640, longest=640),
        optim=Optim(lr=5e-4, schedule="poly", warmup_steps=1000),
        engine=Engine(precision="bfloat16", channels_last=True),
        train=Train(steps=200_000, batch=64, workers=8, sync_bn=True, validate_every=10_000, gpu="yes"),
    )


def panoptic_deeplab_r101_frozen_coco() -> Experiment:
    """COCO, ResNet-101 frozen up to res4, 10,000 steps of 8, Adam: PQ 22.5 (things 23.0, stuff 21.7) from the paper.

    The best model of "Image Panoptic Segmentation Challenges using COCO Dataset" (table 6: 22.502, 23.011, 21.734).
    ImageNet weights are needed: --model.backbone.weights imagenet. What the report leaves open is detectron2's.
    """
    base = panoptic_deeplab_r52_coco()
    backbone = replace(base.model.backbone, name="resnet101", stem="conv7", freeze=4)
    return replace(
        base,
        model=replace(base.model, backbone=backbone),
        optim=replace(base.optim, optimiser="adam", lr=0.0025),
        train=replace(base.train, steps=10_000, batch=8, validate_every=5000),
    )


def _small(sigma: int, stuff_area: int, small_area: int) -> PanopticDeepLabConfig:
    """Panoptic-DeepLab for CPU cores, from scratch: ResNet-18, one pyramid pooling, narrow decoders, norms that learn.

    Depthwise convolutions of 3x3: on a CPU the backward pass of a 5x5 in bfloat16 takes eighteen times as long.
    Maps are merged at the size of the original, where thin and small segments keep their shape.
    """
    return PanopticDeepLabConfig(
        flavour="detectron2",
        backbone=Backbone(name="resnet18"),
        rates=(2, 4, 6),
        aspp_channels=128,
        aspp_separable=True,
        shared_aspp=True,
        kernel=3,
        semantic_projections=(64, 48, 32),
        instance_projections=(64, 48, 32),
        semantic_channels=64,
        instance_channels=64,
        semantic_head_channels=64,
        instance_head_channels=32,
        sigma=sigma,
        stuff_area=stuff_area,
        small_area=small_area,
    )


def _r52(crop: tuple[int, int], sigma: int) -> PanopticDeepLabConfig:
    """detectron2's flavour: ResNet-50 with the DeepLab stem, output stride 16, multigrid, separable convolutions."""
    return PanopticDeepLabConfig(
        flavour="detectron2",
        backbone=Backbone(stem="deeplab", output_stride=16, dilate_first=True, multigrid=(1, 2, 4)),
        low_level=("res3", "res2"),
        semantic_projections=(64, 32),
        instance_projections=(64, 32),
        rates=(6, 12, 18),
        aspp_separable=True,
        centre_separable=False,
        image_pool=crop,
        sigma=sigma,
    )


PRESETS = (
    demo,
    panoptic_deeplab_pedestrians,
    panoptic_deeplab_pedestrians_imagenet,
    panoptic_deeplab_r50_cityscapes,
    panoptic_deeplab_r50_foreground_cityscapes,
    panoptic_deeplab_r101_cityscapes,
    panoptic_deeplab_r52_cityscapes,
    panoptic_deeplab_r52_coco,
    panoptic_deeplab_r101_frozen_coco,
)
"""Presets of this file; a function's name with hyphens is that of the preset."""
