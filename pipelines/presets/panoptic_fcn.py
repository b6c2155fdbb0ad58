"""Panoptic FCN: the published recipes for COCO, Cityscapes and Mapillary Vistas, scenes, photographs of pedestrians.

The tables of the paper are studies (`jobs/tune.py --study list`): its ablations, the true positions and classes of
table 9, the comparisons of tables 10 to 13.
"""

from __future__ import annotations

from dataclasses import replace

from panoptic.backbones import Backbone
from panoptic.models.panoptic_fcn.config import PanopticFCNConfig
from panoptic.training.config import Engine, Optim
from panoptic.transforms import Augment, Resize
from pipelines.config import Data, Experiment, Train
from pipelines.presets.small import from_imagenet, on_photographs, on_scenes

CITYSCAPES_SIDES = (512, 768, 1024, 1152, 1216, 1344, 1408, 1536, 1664, 1728, 1856, 1920, 2048)
"""Short sides of the recipe for Cityscapes."""

PUBLISHED = PanopticFCNConfig(backbone=replace(PanopticFCNConfig().backbone, own_pixels=True))
"""The published model. Its pixels are not those of its weights: a mean of RGB is subtracted from BGR images."""


def panoptic_fcn_scenes() -> Experiment:
    """Drawn scenes on two CPU workers, from scratch.

    Measured once on 2 cores of an AMD EPYC (Zen 5), 520 steps of 8 images in 3 min 51 s, 23 images/s, 1.6 GiB a worker:
    PQ on 96 scenes 20.1 at step 260, 35.5 at 520 (things 25.7, stuff 48.7; SQ 70.4, RQ 49.3). It has not learnt all:
    900 steps (`--train.steps 900`) reached 45.3.
    `python jobs/train.py panoptic-fcn-scenes`
    """
    base = panoptic_fcn_pedestrians()
    train = Train(steps=520, batch=8, workers=2, validate_every=260, log_every=40)
    return on_scenes(replace(base.model, stuff_area=64), base.optim, train)


def panoptic_fcn_pedestrians() -> Experiment:
    """Photographs of pedestrians (any COCO-panoptic folder: --data.root), from scratch on two CPU cores.

    Measured once on 2 cores of an AMD EPYC (Zen 5), 485 training photographs, 1450 steps (11,600 images) in 15
    minutes from the command to its last line, 13 to 14 images/s (a thread of its own takes 0.40 s for a step of 4), 1.7
    GiB a worker. PQ on the 127 val photographs: 35.2 at step 725, 48.5 at 1450 (things 38.1, stuff 51.1; SQ 58.2, RQ
    56.7). On the 58 of them that no training photograph resembles: 41.8 (things 19.4, stuff 47.4); copying the nearest
    training photograph's labels scores 34.8 there. With kernels of stuff that are means over the whole map, as
    published (`--model.stuff-kernel map`), the same recipe reached 36.5 and 30.1 in 1350 steps: sky was never drawn.
    `python jobs/train.py panoptic-fcn-pedestrians --data.root FOLDER`
    """
    return on_photographs(
        _small(),
        Optim(optimiser="adamw", lr=1e-3, weight_decay=0.05, warmup_steps=100, clip_norm=5.0),
        Train(steps=1450, batch=8, workers=2, validate_every=725, log_every=50),
    )


def panoptic_fcn_pedestrians_imagenet() -> Experiment:
    """panoptic-fcn-pedestrians on EfficientNet-Lite0 with ImageNet weights (extra `trunks`).

    Measured once on 2 cores of an AMD EPYC (Zen 4), 1800 steps (14,400 images) in 26 minutes, 9 to 11 images/s, 1.9
    GiB a worker. PQ on the 127 val photographs: 40.6 at step 600, 42.1 at 1200, 52.6 at 1800 (things 51.5, stuff
    52.9). On the 58 of them that no training photograph resembles: 44.7 (things 42.0, stuff 45.3). 65 was hoped for.
    Things are as good as those of Panoptic-DeepLab there, stuff is not (on the 58 sky 20, rock 13, fence 0). With the
    true positions PQ is 48.8 on the 58, with the true classes as well 53.1: what fails is mostly how the kernels of
    stuff draw. Tried on the finished weights: other thresholds of regions, of stuff's area, of masks and of the merge,
    argmax in place of the greedy merge, fewer levels (49.2 with the kernels of p4 alone), short sides 208 and 256:
    none exceeds 49.2.
    `python jobs/train.py panoptic-fcn-pedestrians-imagenet --data.root FOLDER`
    """
    return from_imagenet(panoptic_fcn_pedestrians(), steps=1800)


def panoptic_fcn_r50_coco() -> Experiment:
    """COCO, ResNet-50, 90k steps ("1x"): PQ 41.1 (AP 32.2, mIoU 41.5) from the reference's table, 41.3 from the paper.

    Needs detectron2's ImageNet weights of MSRA: --model.backbone.weights R-50.pkl. The reference leaves out images
    without a thing. Its faster variants only cut earlier: --model.thing-threshold 0.2 --model.region-threshold 0.1.
    """
    return Experiment(
        model=PUBLISHED,
        data=Data(root="", train="train2017", val="val2017"),
        augment=Augment(scale="short", sides=(640, 672, 704, 736, 768, 800), longest=1333, antialias=True),
        resize=Resize(short=800, longest=1333, antialias=True),
        optim=_sgd(lr=0.01, clip=35.0),
        engine=Engine(precision="bfloat16", channels_last=True),
        train=Train(steps=90_000, batch=16, workers=8, validate_every=10_000, gpu="yes"),
    )


def panoptic_fcn_r50_coco_2x() -> Experiment:
    """panoptic-fcn-r50-coco for 180k steps: PQ 43.2 (things 48.8, stuff 34.7) from the paper."""
    return _longer(panoptic_fcn_r50_coco(), 180_000)


def panoptic_fcn_r50_coco_3x() -> Experiment:
    """panoptic-fcn-r50-coco for 270k steps: PQ 43.6 (AP 34.4, mIoU 43.6) from the reference's table."""
    return _longer(panoptic_fcn_r50_coco(), 270_000)


def panoptic_fcn_r101_coco() -> Experiment:
    """panoptic-fcn-r50-coco-3x with ResNet-101: PQ 45.5 on test-dev from the paper."""
    base = panoptic_fcn_r50_coco_3x()
    return replace(base, model=replace(base.model, backbone=replace(base.model.backbone, name="resnet101")))


def panoptic_fcn_dcn101_coco() -> Experiment:
    """panoptic-fcn-r101-coco with deformable res3 to res5: PQ 47.0 on test-dev from the paper, without a recipe."""
    base = panoptic_fcn_r101_coco()
    return replace(base, model=replace(base.model, backbone=replace(base.model.backbone, deformable="v1")))


def panoptic_fcn_star_dcn101_coco() -> Experiment:
    """panoptic-fcn-dcn101-coco, starred: PQ 47.1 (things 53.2, stuff 37.8) on test-dev from the paper.

    With the validation images in training as well 47.5 (things 53.7, stuff 38.2) from the same table.
    """
    base = panoptic_fcn_dcn101_coco()
    return replace(base, model=replace(base.model, encoder_deform=True, encoder_channels=256))


def panoptic_fcn_star_r50_coco() -> Experiment:
    """panoptic-fcn-r50-coco-3x, starred: PQ 44.2 (AP 35.6, mIoU 43.9) from the reference's table."""
    base = panoptic_fcn_r50_coco_3x()
    return replace(base, model=replace(base.model, encoder_deform=True, encoder_channels=256))


def panoptic_fcn_r50_coco_400() -> Experiment:
    """Short side 400: PQ 41.0 (AP 30.7, mIoU 43.6), 22.5 images/s on a V100, from the reference's table."""
    return _smaller((352, 384, 416, 448, 480, 512), 854, Resize(short=400, longest=666, antialias=True), points=3)


def panoptic_fcn_r50_coco_512() -> Experiment:
    """Short side 512: PQ 42.3 (AP 32.4, mIoU 43.2), 19.8 images/s on a V100, from the reference's table."""
    return _smaller((352, 384, 416, 448, 480, 512), 854, Resize(short=512, longest=854, antialias=True), points=3)


def panoptic_fcn_r50_coco_600() -> Experiment:
    """Short side 600: PQ 42.7 (AP 33.6, mIoU 43.9), 17.5 images/s on a V100, from the reference's table."""
    return _smaller((440, 472, 504, 536, 568, 600), 1000, Resize(short=600, longest=1000, antialias=True), points=5)


def panoptic_fcn_r50_cityscapes() -> Experiment:
    """Cityscapes in COCO-panoptic form: PQ 59.0 (things 51.3, stuff 64.6) from the fork that published a recipe.

    The paper has 59.6. Its crops hold an instance each; these are any crops. Weights as panoptic-fcn-r50-coco.
    """
    model = PanopticFCNConfig(
        regions="all",
        scales=((1, 128), (64, 256), (128, 512), (256, 1024), (512, 2048)),
        most_things=150,
        mask_weight=4.0,
        thing_threshold=0.01,
        region_threshold=0.1,
        most_kernels=200,
        mask_threshold=0.5,
        fusion_threshold=0.97,
        stuff_area=2048,
    )
    return Experiment(
        model=model,
        data=Data(root="", train="train", val="val"),
        augment=Augment(scale="short", sides=CITYSCAPES_SIDES, crop=(512, 1024), pad="none", antialias=True),
        resize=Resize(short=1024, longest=2048, antialias=True),
        optim=_sgd(lr=0.02, clip=15.0),
        engine=Engine(precision="bfloat16", channels_last=True),
        train=Train(steps=65_000, batch=32, workers=8, validate_every=5000, gpu="yes"),
    )


def panoptic_fcn_star_r50_cityscapes() -> Experiment:
    """panoptic-fcn-r50-cityscapes, starred: PQ 61.4 (things 54.8, stuff 66.6) from the paper."""
    base = panoptic_fcn_r50_cityscapes()
    return replace(base, model=replace(base.model, encoder_deform=True, encoder_channels=256))


def panoptic_fcn_r50_mapillary() -> Experiment:
    """Mapillary Vistas in COCO-panoptic form: PQ 34.8 (things 30.6, stuff 40.5) from the paper.

    Thresholds, crop and schedule are those that its authors gave; the short sides are a choice of ours, and the
    published crops hold an instance each. Weights as panoptic-fcn-r50-coco.
    """
    model = PanopticFCNConfig(
        scales=((1, 128), (64, 256), (128, 512), (256, 1024), (512, 4096)),
        most_things=400,
        points=3,
        thing_threshold=0.2,
        region_threshold=0.1,
        most_kernels=200,
        mask_threshold=0.5,
        fusion_threshold=0.95,
    )
    return Experiment(
        model=model,
        data=Data(root="", train="train", val="val"),
        augment=Augment(
            scale="short", sides=tuple(range(1024, 2049, 128)), crop=(1024, 1024), pad="none", antialias=True
        ),
        resize=Resize(short=2048, antialias=True),
        optim=_sgd(lr=0.02, clip=15.0),
        engine=Engine(precision="bfloat16", channels_last=True),
        train=Train(steps=150_000, batch=32, workers=8, validate_every=10_000, gpu="yes"),
    )


def panoptic_fcn_star_r50_mapillary() -> Experiment:
    """panoptic-fcn-r50-mapillary, starred: PQ 36.9 (things 32.9, stuff 42.3) from the paper."""
    base = panoptic_fcn_r50_mapillary()
    return replace(base, model=replace(base.model, encoder_deform=True, encoder_channels=256))


def _sgd(lr: float, clip: float) -> Optim:
    """Momentum 0.9, decay of all but norms, poly with 1000 steps of warm-up, gradients clipped entry by entry."""
    decay = Optim(optimiser="sgd", lr=lr, weight_decay=1e-4, decay="weights_and_biases")
    return replace(decay, schedule="poly", warmup_steps=1000, clip_value=clip)


def _longer(base: Experiment, steps: int) -> Experiment:
    """An experiment with another number of steps."""
    return replace(base, train=replace(base.train, steps=steps))


def _smaller(sides: tuple[int, ...], longest: int, resize: Resize, points: int) -> Experiment:
    """The 3x schedule at smaller sizes, with fewer kernels a thing, since the coarsest level has fewer cells."""
    base = panoptic_fcn_r50_coco_3x()
    augment = replace(base.augment, sides=sides, longest=longest)
    return replace(base, model=replace(base.model, points=points), augment=augment, resize=resize)


def _small() -> PanopticFCNConfig:
    """Panoptic FCN for CPU cores, from scratch: ResNet-18, narrow heads of plain convolutions, norms that learn."""
    return PanopticFCNConfig(
        backbone=Backbone(name="resnet18"),
        pixel_std=(58.395, 57.12, 57.375),
        bgr=False,
        width=96,
        feature_channels=64,
        head_convs=2,
        head_channels=96,
        position_deform=False,
        encoder_convs=2,
        encoder_channels=32,
        points=3,
        stuff_kernel="region",
        stuff_area=128,
    )


PRESETS = (
    panoptic_fcn_scenes,
    panoptic_fcn_pedestrians,
    panoptic_fcn_pedestrians_imagenet,
    panoptic_fcn_r50_coco,
    panoptic_fcn_r50_coco_2x,
    panoptic_fcn_r50_coco_3x,
    panoptic_fcn_r50_coco_400,
    panoptic_fcn_r50_coco_512,
    panoptic_fcn_r50_coco_600,
    panoptic_fcn_r101_coco,
    panoptic_fcn_dcn101_coco,
    panoptic_fcn_star_dcn101_coco,
    panoptic_fcn_star_r50_coco,
    panoptic_fcn_r50_cityscapes,
    panoptic_fcn_star_r50_cityscapes,
    panoptic_fcn_r50_mapillary,
    panoptic_fcn_star_r50_mapillary,
)
"""Presets of this file; a function's name with hyphens is that of the preset."""
