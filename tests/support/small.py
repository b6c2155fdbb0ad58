"""Tiny configurations of each architecture, for the tests that run over all of them."""

from __future__ import annotations

from dataclasses import replace

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

SMALL_DEEPLAB = PanopticDeepLabConfig(
    backbone=Backbone("resnet18"),
    aspp_channels=16,
    rates=(1, 2),
    semantic_projections=(8, 8, 8),
    instance_projections=(8, 8, 8),
    semantic_channels=16,
    instance_channels=16,
    semantic_head_channels=16,
    instance_head_channels=8,
    stuff_area=0,
    top_k=None,
    threshold=0.0,
)

SMALL_DETR = DETRConfig(
    backbone=Backbone("resnet18", norm="frozen", freeze=2),
    channels=32,
    heads=4,
    hidden=32,
    encoder_layers=1,
    decoder_layers=2,
    queries=12,
    mask_channels=64,
    threshold=0.0,
    min_area=0,
)

SMALL_JSIS = JSISNetConfig(
    backbone=Backbone("resnet18", norm="group"),
    norm="group",
    semantic_channels=16,
    regions=replace(REGIONS, sizes=(16, 32, 64), samples=32, train_before=100, test_before=100, test_after=20),
    region_channels=16,
    detection=replace(DETECTION, samples=12, append_truth=True, most=10),
    head=StageOptions(width=8, blocks=1, side=3, mask_channels=8),
    regularisation=0.0,
    conflicts=Conflicts(stuff_area=0),
)

SMALL_FCN = PanopticFCNConfig(
    backbone=Backbone("resnet18", norm="group"),
    width=16,
    feature_channels=16,
    head_channels=24,  # groups of three channels: the coarsest level has one cell
    encoder_channels=8,
    head_convs=2,
    encoder_convs=1,
    points=3,
    thing_threshold=0.0,
    region_threshold=0.0,
    stuff_area=0,
)

SMALL_FPN = PanopticFPNConfig(
    backbone=Backbone("resnet18", norm="group"),
    width=16,
    semantic_width=16,
    detector=DetectorConfig(
        Regions((8, 16, 32, 64, 128), samples=64, train_before=100, train_after=50, test_before=100, test_after=30),
        Detection(samples=32, threshold=0.0, most=10),
        Heads(box_width=16, mask_width=8, mask_layers=2),
    ),
    confidence=0.0,
    stuff_area=0,
)

SMALL_EFFICIENTPS = EfficientPSConfig(
    backbone=Backbone("resnet18", norm="group"),
    norm="group",
    width=16,
    semantic_width=16,
    detector=DetectorConfig(
        replace(
            DETECTOR.regions,
            sizes=(8, 16, 32, 64),
            samples=64,
            train_before=100,
            train_after=50,
            test_before=100,
            test_after=30,
        ),
        replace(DETECTOR.detection, samples=32, threshold=0.0, most=10),
        replace(DETECTOR.heads, box_width=16, mask_width=16, mask_layers=2),
    ),
    fusion=Fusion(stuff_area=0, inclusive=False),
)

SMALL_MASKFORMER = MaskFormerConfig(
    backbone=Backbone("resnet18", norm="group"),
    divisor=32,
    channels=32,
    mask_channels=16,
    encoder_layers=0,
    decoder_layers=2,
    heads=4,
    hidden=32,
    queries=20,
    threshold=0.0,
    overlap=0.0,
)

SMALL_MASK2FORMER = Mask2FormerConfig(
    backbone=Backbone("resnet18", norm="group"),
    channels=32,
    mask_channels=16,
    encoder_layers=1,
    encoder_hidden=32,
    decoder_layers=3,
    decoder_hidden=32,
    heads=4,
    queries=20,
    loss_points=64,
    threshold=0.0,
    overlap=0.0,
)

SMALL_EOMT = EoMTConfig(
    backbone=Backbone("vit_small_patch14_reg4_dinov2"),
    divisor=32,
    canvas=(64, 96),
    width=32,
    depth=4,
    heads=2,
    hidden=64,
    queries=20,
    query_blocks=2,
    loss_points=64,
    threshold=0.0,
    overlap=0.0,
)

SMALL = {
    EoMTConfig: {
        "dinov2": SMALL_EOMT,
        "dinov3": replace(SMALL_EOMT, backbone=Backbone("vit_small_patch16_dinov3_qkvb", freeze=2)),
        "unmasked": replace(
            SMALL_EOMT, backbone=Backbone("vit_tiny_patch16_224"), patch=8, masked_attention=False, inside=False
        ),
    },
    MaskFormerConfig: {
        "pyramid": SMALL_MASKFORMER,
        "encoder": replace(
            SMALL_MASKFORMER,
            backbone=Backbone("resnet18", norm="frozen", freeze=2),
            encoder_layers=1,
            norm="batch",
            divisor=1,
            deep_supervision=False,
            loss_stride=2,
            inside=True,
        ),
    },
    Mask2FormerConfig: {
        "deformable": SMALL_MASK2FORMER,
        "pyramid": replace(
            SMALL_MASK2FORMER,
            backbone=Backbone("resnet18", norm="frozen"),
            pixel_decoder="fpn",
            encoder_layers=0,
            full_precision=False,
            deep_supervision=False,
            inside=False,
        ),
    },
    PanopticFPNConfig: {
        "group_norm": SMALL_FPN,
        "caffe2": replace(
            SMALL_FPN, backbone=Backbone("resnet50", stride_in_1x1=True, norm="frozen", freeze=2), confidence=0.5
        ),
        "batch_norm": replace(
            SMALL_FPN,
            backbone=Backbone("resnet18"),
            norm="batch",
            semantic_norm="batch",
            bgr=False,
            detector=replace(
                SMALL_FPN.detector,
                regions=replace(SMALL_FPN.detector.regions, offset=0.5, positive=0.5, low_quality=False, beta=1.0),
                detection=replace(SMALL_FPN.detector.detection, overlap=0.4, beta=0.5),
                heads=replace(SMALL_FPN.detector.heads, precision="bfloat16", box_side=5, mask_layers=0),
            ),
        ),
    },
    EfficientPSConfig: {
        "group_norm": SMALL_EFFICIENTPS,
        "published": replace(
            SMALL_EFFICIENTPS, backbone=Backbone("efficientps_b0", norm="absolute", freeze=1), norm="absolute"
        ),
        "paper": replace(
            SMALL_EFFICIENTPS,
            backbone=Backbone("resnet18"),
            norm="batch",
            separable_pyramid=True,
            fusion=replace(SMALL_EFFICIENTPS.fusion, mask_factor=1.0),
        ),
    },
    PanopticFCNConfig: {
        "plain": SMALL_FCN,
        "starred": replace(
            SMALL_FCN,
            backbone=Backbone("resnet18", norm="frozen", freeze=2),
            encoder_deform=True,
            encoder_channels=12,
        ),
        "summed_all_classes": replace(
            SMALL_FCN,
            backbone=Backbone("resnet18"),
            norm="batch",
            feature="summed",
            regions="all",
            centre="box",
            points=0,
            position_deform=False,
            class_aware=False,
            encoder_norm=True,
        ),
        "p2_stuff": replace(
            SMALL_FCN,
            feature="p2",
            regions="stuff",
            stuff_kernel="region",
            head_convs=1,
            position_coordinates=True,
            kernel_deform=True,
            kernel_coordinates=False,
            encoder_coordinates=False,
        ),
    },
    JSISNetConfig: {
        "own_stage": SMALL_JSIS,
        "last_stage": replace(
            SMALL_JSIS,
            backbone=Backbone("resnet18", output_stride=8, freeze=1),
            norm="batch",
            deconvolution="same",
            align_corners=True,
            head=StageOptions(side=2, mask_channels=8, mask_upsampling="deconvolution", across_classes=False),
            mask_reduction="mean",
            soft_masks=False,
            regularisation=5.5e-5,
        ),
        "crop": replace(
            SMALL_JSIS,
            shared_level="res5",
            backbone=Backbone("resnet18", norm="group", output_stride=16),
            deconvolution="none",
            bins=(1, 2),
            bin_channels=64,
            head=replace(SMALL_JSIS.head, pooling="crop"),
            detection=replace(DETECTION, samples=12, threshold=0.0),
        ),
        "separate": replace(SMALL_JSIS, trunks="separate"),
        "semantic": replace(SMALL_JSIS, branches="semantic"),
        "instances": replace(SMALL_JSIS, branches="instances"),
    },
    DETRConfig: {
        "panoptic": SMALL_DETR,
        "boxes": replace(SMALL_DETR, masks=False, positions="learned", encoder_layers=0),
        "dc5_pre_norm": replace(
            SMALL_DETR,
            backbone=Backbone("resnet18", output_stride=16),
            pre_norm=True,
            auxiliary=False,
            logits=9,
            class_hidden=(16, 8),
            class_dropout=0.2,
        ),
    },
    PanopticDeepLabConfig: {
        "standalone": SMALL_DEEPLAB,
        "detectron2": replace(
            SMALL_DEEPLAB,
            flavour="detectron2",
            low_level=("res3", "res2"),
            semantic_projections=(8, 8),
            instance_projections=(8, 8),
            backbone=Backbone("resnet18", stem="deeplab", output_stride=16, dilate_first=True, multigrid=(1, 2, 4)),
            separable=False,
            centre_separable=False,
            aspp_separable=True,
            semantic_loss="cross_entropy",
        ),
        "group_norm_foreground": replace(
            SMALL_DEEPLAB,
            backbone=Backbone("resnet18", norm="group"),
            norm="group",
            foreground=True,
            shared_aspp=True,
            semantic_loss="ohem",
            ohem_min_kept=100,
        ),
        "frozen": replace(SMALL_DEEPLAB, backbone=Backbone("resnet18", freeze=3)),
    },
}
"""By class of configuration, then by name; with thresholds off so that the oracle can be as good as stated."""

PLAIN_VIT = Backbone("test_vit", freeze=2)
"""timm's tiny ViT (6 blocks of 64 channels) under its pyramid, partly frozen."""

VITS = {
    PanopticDeepLabConfig: replace(SMALL_DEEPLAB, backbone=PLAIN_VIT),
    PanopticFPNConfig: replace(SMALL_FPN, backbone=PLAIN_VIT),
    JSISNetConfig: replace(SMALL_JSIS, backbone=PLAIN_VIT),
    PanopticFCNConfig: replace(SMALL_FCN, backbone=PLAIN_VIT),
    DETRConfig: replace(SMALL_DETR, backbone=PLAIN_VIT),
    MaskFormerConfig: replace(SMALL_MASKFORMER, backbone=PLAIN_VIT),
    Mask2FormerConfig: replace(SMALL_MASK2FORMER, backbone=PLAIN_VIT),
    EfficientPSConfig: replace(SMALL_EFFICIENTPS, backbone=PLAIN_VIT),
}
"""Every architecture whose decoder takes a pyramid, on a plain ViT."""

ORACLE: dict[type, float] = {JSISNetConfig: 99.0, PanopticFPNConfig: 99.0, EfficientPSConfig: 99.0}
"""PQ that the truth in place of the outputs reaches at least, where they do not determine the map (see the model's
docstring); 100 where no bound stands here."""

FIRST_LAYER = (
    *(f"decoder.layers.0.{name}.weight" for name in ("self_attention.out_proj", "norm1", "norm2")),
    "decoder.layers.0.self_attention.in_proj_weight",
)

NOT_YET: dict[type, tuple[str, ...]] = {
    DETRConfig: FIRST_LAYER,
    MaskFormerConfig: FIRST_LAYER,
    Mask2FormerConfig: ("pixel_decoder.level_embedding",),
}
"""Parameters whose gradient may be zero in the first step. DETR's decoder starts from zeros, so that its queries
have nothing to tell each other in the first layer; where deformable attention looks does not depend on the query
before the first step."""
