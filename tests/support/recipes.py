"""Recipes by which each architecture learns four photographs of COCO by heart: size, small model, training, and PQ.

What is in the way of a PQ of 100, measured without any network: masks of stride 4, fitted to the truth at every pixel
and enlarged, reach 94.3 at 160 pixels and 94.8 at 192. Fitted at every second pixel of rows and columns they
reach 81.3 at 160 and 87.7 at 256, fitted at stride 4 itself (as Panoptic FCN learns its masks) 76.7 and 84.5.
At 160 pixels 14 of the 83 segments, and all segments of 5 of the 31 classes that occur, have less than 60 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from panoptic.backbones import Backbone
from panoptic.models.detr.model import DETRConfig
from panoptic.models.efficientps.config import DETECTOR
from panoptic.models.efficientps.model import EfficientPSConfig
from panoptic.models.efficientps.postprocess import Fusion
from panoptic.models.eomt.model import EoMTConfig
from panoptic.models.jsis_net.c4_head import StageOptions
from panoptic.models.jsis_net.config import DETECTION, REGIONS
from panoptic.models.jsis_net.model import JSISNetConfig
from panoptic.models.jsis_net.postprocess import Conflicts
from panoptic.models.mask2former.model import Mask2FormerConfig
from panoptic.models.maskformer.model import MaskFormerConfig
from panoptic.models.panoptic_deeplab.model import PanopticDeepLabConfig
from panoptic.models.panoptic_fcn.model import PanopticFCNConfig
from panoptic.models.panoptic_fpn.model import PanopticFPNConfig
from panoptic.rcnn.config import Heads
from panoptic.rcnn.mask_rcnn import DetectorConfig
from panoptic.rcnn.roi_heads import Detection
from panoptic.rcnn.rpn import Regions
from panoptic.training.optim import Optim

BACKBONE = Backbone("test_resnet")
"""A ResNet of one block a stage and 0.4 million weights: in the time of a ResNet-18 the photographs can be larger.
Batch norm serves, since every step sees all of them and the running statistics are those of the batch."""


@dataclass(frozen=True)
class Recipe:
    """A training from scratch, on all photographs in every step."""

    config: Any
    short: int
    """Shorter side of the photographs, in pixels, at which they are learnt and evaluated."""
    steps: int
    lr: float
    measured: float
    """PQ on a CPU."""
    least: float
    """PQ that the test asks for: what was measured, less what other rounding may cost."""
    present: bool = False
    """Learn the classes that occur in the photographs, and no others, in channels-last format."""

    def optim(self) -> Optim:
        return Optim(optimiser="adamw", lr=self.lr, schedule="poly", warmup_steps=20, clip_norm=5.0)


DEEPLAB = Recipe(
    PanopticDeepLabConfig(
        flavour="detectron2",  # its initial weights are not next to zero, and so learn sooner
        backbone=BACKBONE,
        rates=(1, 2, 3),
        aspp_channels=32,
        shared_aspp=True,
        dropout=0.0,
        separable=False,
        centre_separable=False,
        semantic_projections=(32, 24, 16),
        instance_projections=(32, 24, 16),
        semantic_channels=64,
        instance_channels=32,
        semantic_head_channels=64,
        instance_head_channels=32,
        semantic_loss="cross_entropy",
        ignore_crowd=True,
        offset_weight=0.1,
        sigma=3,
        nms_kernel=3,
        top_k=None,
        stuff_area=64,
    ),
    short=160,
    steps=450,
    lr=3e-3,
    measured=79.3,
    least=74,
    present=True,
)
"""With all of COCO's classes, after 350 steps, stuff reached 93.1, things 67.3. In the way: neither classes nor centres
of most things below 60 pixels are learnt after as many steps; and the offsets of a crowd, which nobody trains, make
persons of it."""

FPN = Recipe(
    PanopticFPNConfig(
        backbone=BACKBONE,
        pixel_mean=(123.675, 116.28, 103.53),
        pixel_std=(58.395, 57.12, 57.375),
        bgr=False,
        width=32,
        norm="batch",
        semantic_width=32,
        semantic_norm="batch",
        semantic_weight=1.0,
        detector=DetectorConfig(
            Regions((8, 16, 32, 64, 128), train_before=200, train_after=100, test_before=200, test_after=100),
            Detection(samples=64),
            Heads(box_width=64, mask_width=32, mask_layers=2),
        ),
        stuff_area=0,
    ),
    short=160,
    steps=400,
    lr=3e-3,
    measured=86.3,
    least=80,
    present=True,
)
"""In the way: three things whose visible part is a fifth to a half of their box (a truck behind people, a table behind
chairs, a potted plant) get no mask of an IoU above 0.5; the mask loss is still 0.16. Two classes stand at 0 for it.
(Seen with all of COCO's classes, at a PQ of 85.0.)"""

FCN = Recipe(
    PanopticFCNConfig(
        backbone=BACKBONE,
        pixel_std=(58.395, 57.12, 57.375),
        width=64,
        norm="batch",
        feature_channels=64,
        head_channels=64,
        head_convs=2,
        encoder_channels=32,
        encoder_convs=2,
        position_deform=False,
        stuff_kernel="region",
        points=3,
        fusion_threshold=0.97,
        stuff_area=64,
    ),
    short=256,
    steps=180,
    lr=3e-3,
    measured=49.5,
    least=42,
)
"""In the way: masks are learnt at stride 4 only. Were each exactly its target, PQ would be 84.5 at this size and 88.3
at 320 pixels. And the length of the training: the position losses are still at 0.31, 32 of 83 segments are missed."""

DETR = Recipe(
    DETRConfig(
        backbone=Backbone("test_resnet", output_stride=16),
        channels=64,
        hidden=128,
        encoder_layers=1,
        decoder_layers=2,
        queries=40,
        dropout=0.0,
        mask_channels=128,
        unit_mean_attention=True,
        threshold=0.5,
        min_area=0,
    ),
    short=128,
    steps=550,
    lr=2e-3,
    measured=71.2,
    least=65,
)
"""In the way: the length of the training (67.8 after 385 of these steps), since masks are still being learnt (dice loss
0.23, mean IoU 0.74) where RQ is 90; and false persons and horses beside the true ones."""

JSIS = Recipe(
    JSISNetConfig(
        backbone=Backbone("resnet18"),
        shared_level="res3",  # stride 8: at 16, several things of these photographs share a cell
        semantic_channels=64,
        region_channels=64,
        regions=replace(
            REGIONS,
            sizes=(4, 8, 16, 32, 64, 128),
            low_quality=True,
            train_before=300,
            train_after=150,
            test_before=300,
            test_after=100,
        ),
        detection=replace(DETECTION, samples=64, append_truth=True, most=50),
        head=StageOptions(width=32, blocks=1, side=4, mask_channels=32, across_classes=False),
        box_weight=1.0,
        regularisation=0.0,
        conflicts=Conflicts(stuff_area=64),
    ),
    short=160,
    steps=360,
    lr=3e-3,
    measured=71.5,
    least=67,
    present=True,
)
"""In the way: the three things that Panoptic FPN misses are missed here too, four persons, two horses and two remotes
with them; where the couch's mask is too small, false stuff is left, as there is no void. (Seen with all of COCO's
classes after 280 steps, at 73.0, which take a third more time.)"""

MASKFORMER = Recipe(
    MaskFormerConfig(
        backbone=BACKBONE,
        divisor=32,
        channels=64,
        mask_channels=64,
        norm="batch",
        encoder_layers=1,
        decoder_layers=2,
        heads=4,
        hidden=128,
        queries=40,
        dropout=0.0,
        threshold=0.5,
        overlap=0.5,
        inside=True,
    ),
    short=160,
    steps=400,
    lr=3e-3,
    measured=93.5,
    least=90,
)
"""At 176 pixels, where masks of stride 4 fit the thin blanket badly, it is 91.8 after 380 steps."""

MASK2FORMER = Recipe(
    Mask2FormerConfig(
        backbone=BACKBONE,
        channels=64,
        mask_channels=64,
        norm="batch",
        encoder_layers=1,
        encoder_hidden=128,
        decoder_layers=3,
        decoder_hidden=128,
        heads=4,
        queries=40,
        loss_points=2048,
        threshold=0.5,
        overlap=0.5,
    ),
    short=176,
    steps=420,
    lr=3e-3,
    measured=86.5,
    least=81,
)
"""Stuff reaches 92.2, things 81.1. In the way: four things of 26 to 37 pixels are not learnt yet, in classes with few
others (a microwave, a chair, two vases). At 160 pixels, 300 steps with 1536 points gave 78.9."""

EFFICIENTPS = Recipe(
    EfficientPSConfig(
        backbone=BACKBONE,
        pixel_mean=(123.675, 116.28, 103.53),
        pixel_std=(58.395, 57.12, 57.375),
        norm="batch",
        width=32,
        semantic_width=32,
        detector=replace(
            DETECTOR,
            regions=replace(
                DETECTOR.regions,
                sizes=(8, 16, 32, 64),
                train_before=200,
                train_after=100,
                test_before=200,
                test_after=100,
            ),
            detection=replace(DETECTOR.detection, samples=64),
            heads=replace(DETECTOR.heads, aligned=True, box_width=64, mask_width=32, mask_layers=2),
        ),
        fusion=Fusion(stuff_area=0, inclusive=False),
    ),
    short=160,
    steps=400,
    lr=3e-3,
    measured=83.9,
    least=80,
    present=True,
)
"""As Panoptic FPN's, with a level of anchors less. What is in the way was not taken apart; masks are learnt at stride 4
as Panoptic FPN's are, which stands at 86.3 for the reasons named there."""

EOMT = Recipe(
    EoMTConfig(
        backbone=Backbone("vit_tiny_patch16_224"),
        divisor=32,
        canvas=(160, 288),
        width=128,
        depth=4,
        heads=4,
        hidden=256,
        queries=40,
        query_blocks=2,
        loss_points=2048,
        threshold=0.5,
        overlap=0.5,
    ),
    short=160,
    steps=400,
    lr=2e-3,
    measured=93.7,
    least=89,
)
"""A plain ViT of 16-pixel patches from scratch. One of 8-pixel patches and 96 channels reached 32.0 after 150 steps, in
six tenths of the time."""

RECIPES: dict[type, Recipe] = {
    type(recipe.config): recipe
    for recipe in (DEEPLAB, FPN, FCN, DETR, JSIS, MASKFORMER, MASK2FORMER, EFFICIENTPS, EOMT)
}
