"""Fully Convolutional Networks for Panoptic Segmentation: its tables 1 to 13, and its future work.

In tables 10 to 13 the methods that this project has are trained and the others are quoted. All figures are those of the
slides, also where the authors' repository has others.
"""

from pipelines.studies.study import ALL_QUALITIES, Row, Study

COLUMNS = ("PQ", "things", "stuff", "AP", "mIoU")
PRESET, SMALL = "panoptic-fcn-r50-coco", "panoptic-fcn-pedestrians"
DEFORM, CONVS, CHANNELS = "model.position_deform", "model.head_convs", "model.encoder_channels"
KERNEL, ENCODER = "model.kernel_coordinates", "model.encoder_coordinates"
FUSION, AWARE, POINTS, FEATURE = "model.fusion_threshold", "model.class_aware", "model.points", "model.feature"
PLAIN = {KERNEL: False, ENCODER: False}
"""Tables 1 and 2 begin without coordinates."""


def fusion(threshold: float, aware: bool) -> dict[str, object]:
    """Options of kernel fusion, which act on a trained model."""
    return {FUSION: threshold, AWARE: aware}


def scaled(share: float) -> dict[str, object]:
    """Options with --small of an input whose short side is this share of the default's."""
    sides = tuple(round(share * side) for side in (192, 224, 256, 288, 320))
    return {"augment.sides": sides, "augment.crop": (sides[0], sides[-1]), "resize.short": round(share * 256)}


def other(method: str, paper: str) -> Row:
    """A method that is none of this project's, or whose recipe is not at hand."""
    return Row(method, {}, paper, quoted=True)


FPN_SMALL, DEEPLAB_SMALL = "panoptic-fpn-pedestrians", "panoptic-deeplab-pedestrians"
DEEP = {"model.backbone.name": "resnet14"}
"""Deformable convolutions need bottlenecks, which the small presets' ResNet-18 has not."""
DEFORMABLE = {**DEEP, "model.backbone.deformable": "v1"}
STAR = {"model.encoder_deform": True, CHANNELS: 256}
ONCE, THRICE = {"train.steps": 90_000}, {"train.steps": 270_000}

TABLE_10 = (
    other("Panoptic FPN", "39.0 - - 45.9 - - 28.7 - - -"),
    Row(
        "Panoptic FPN, 1x",
        ONCE,
        "39.4 77.8 48.3 45.9 80.9 55.3 29.6 73.3 37.7 17.5",
        preset="panoptic-fpn-r50-coco",
        small=FPN_SMALL,
    ),
    Row(
        "Panoptic FPN, 3x",
        THRICE,
        "41.5 79.1 50.5 48.3 82.2 57.9 31.2 74.4 39.5 17.5",
        preset="panoptic-fpn-r50-coco",
        small=FPN_SMALL,
    ),
    other("AUNet", "39.6 - - 49.1 - - 25.2 - - -"),
    other("CIAE", "40.2 - - 45.3 - - 32.3 - - 12.5"),
    other("UPSNet", "42.5 78.0 52.5 48.6 79.4 59.6 33.4 75.9 41.7 9.1"),
    other("Unifying", "43.4 79.6 53.0 48.6 - - 35.5 - - -"),
    other("DeeperLab, Xception-71", "33.8 - - - - - - - - 10.6"),
    other("Panoptic-DeepLab", "35.1 - - - - - - - - 20.0"),
    other("AdaptIS", "35.9 - - 40.3 - - 29.3 - - -"),
    other("RealTimePan", "37.1 - - 41.0 - - 31.3 - - 15.9"),
    other("PCV", "37.5 77.7 47.2 40.0 78.4 50.0 33.7 76.5 42.9 5.7"),
    other("SOLO V2", "42.1 - - 49.6 - - 30.7 - - -"),
    Row(
        "Panoptic FCN-400",
        THRICE,
        "40.7 80.5 49.3 44.9 82.0 54.0 34.3 78.1 42.1 20.9",
        preset="panoptic-fcn-r50-coco-400",
        small_change={**THRICE, **scaled(0.5)},
    ),
    Row(
        "Panoptic FCN-512",
        THRICE,
        "42.3 80.9 51.2 47.4 82.1 56.9 34.7 79.1 42.7 18.9",
        preset="panoptic-fcn-r50-coco-512",
        small_change={**THRICE, **scaled(0.64)},
    ),
    Row(
        "Panoptic FCN-600",
        THRICE,
        "42.8 80.6 51.6 47.9 82.6 57.2 35.1 77.4 43.1 16.8",
        preset="panoptic-fcn-r50-coco-600",
        small_change={**THRICE, **scaled(0.75)},
    ),
    Row("Panoptic FCN", THRICE, "43.6 80.6 52.6 49.3 82.6 58.9 35.0 77.6 42.9 12.5"),
    Row(
        "Panoptic FCN*",
        THRICE,
        "44.3 80.7 53.0 50.0 83.4 59.3 35.6 76.7 43.5 9.2",
        preset="panoptic-fcn-star-r50-coco",
        small_change={**THRICE, **STAR},
    ),
)
"""Rows of table 10, on ResNet-50 where they say nothing else: box-based methods, then box-free ones."""

TABLE_11 = (
    Row(
        "Panoptic FPN, Res101",
        {},
        "40.9 48.3 29.7",
        preset="panoptic-fpn-r101-coco",
        small=FPN_SMALL,
        small_change=DEEP,
    ),
    other("CIAE, DCN101", "44.5 49.7 36.8"),
    other("AUNet, ResNeXt152", "46.5 55.8 32.5"),
    other("UPSNet, DCN101", "46.6 53.2 36.7"),
    other("Unifying‡, DCN101", "47.2 53.5 37.7"),
    other("DeeperLab, Xception-71", "34.3 37.5 29.6"),
    other("SSAP, Res101", "36.9 40.1 32.0"),
    other("PCV, Res50", "37.7 40.7 33.1"),
    other("Panoptic-DeepLab, Xception-71", "39.7 43.9 33.2"),
    other("AdaptIS, ResNeXt-101", "42.8 53.2 36.7"),
    other("Axial-DeepLab, Axial-ResNet-L", "43.6 48.9 35.6"),
    Row("Panoptic FCN, Res101", {}, "45.5 51.4 36.4", preset="panoptic-fcn-r101-coco", small_change=DEEP),
    Row("Panoptic FCN, DCN101", {}, "47.0 53.0 37.8", preset="panoptic-fcn-dcn101-coco", small_change=DEFORMABLE),
    Row(
        "Panoptic FCN*, DCN101",
        {},
        "47.1 53.2 37.8",
        preset="panoptic-fcn-star-dcn101-coco",
        small_change={**DEFORMABLE, **STAR},
    ),
    other("Panoptic FCN*‡, DCN101", "47.5 53.7 38.2"),
)
"""Rows of table 11. ‡: trained on the validation images too."""

TABLE_12 = (
    Row("Panoptic FPN, Res101", {}, "58.1 52.0 62.5", preset="panoptic-fpn-r101-cityscapes", small=FPN_SMALL),
    other("AUNet, Res101", "59.0 54.8 62.1"),
    other("UPSNet, Res50", "59.3 54.6 62.7"),
    other("Seamless, Res50", "60.2 55.6 63.6"),
    other("Unifying, Res50", "61.4 54.7 66.3"),
    other("PCV, Res50", "54.2 47.8 58.9"),
    other("DeeperLab, Xception-71", "56.5 - -"),
    other("SSAP, Res50", "58.4 50.6 -"),
    other("AdaptIS, Res50", "59.0 55.8 61.3"),
    Row("Panoptic-DeepLab, Res50", {}, "59.7 - -", preset="panoptic-deeplab-r50-cityscapes", small=DEEPLAB_SMALL),
    Row("Panoptic FCN, Res50", {}, "59.6 52.1 65.1"),
    Row(
        "Panoptic FCN*, Res50",
        {},
        "61.4 54.8 66.6",
        preset="panoptic-fcn-star-r50-cityscapes",
        small_change=STAR,
    ),
)
"""Rows of table 12."""

TABLE_13 = (
    other("TASCNet, Res50", "32.6 31.1 34.4"),
    other("Seamless, Res50", "36.2 33.6 40.0"),
    other("DeeperLab, Xception-71", "32.0 - -"),
    other("AdaptIS, Res50", "32.0 26.6 39.1"),
    other("Panoptic-DeepLab, Res50", "33.3 - -"),
    Row("Panoptic FCN, Res50", {}, "34.8 30.6 40.5"),
    Row(
        "Panoptic FCN*, Res50",
        {},
        "36.9 32.9 42.3",
        preset="panoptic-fcn-star-r50-mapillary",
        small_change=STAR,
    ),
)
"""Rows of table 13."""

STUDIES = {
    "fcn-kernels": Study(
        title="Table 1: the kernel generator",
        preset=PRESET,
        small=SMALL,
        begins="ImageNet",
        columns=COLUMNS,
        setting=PLAIN,
        rows=(
            Row("plain, 1 convolution", {DEFORM: False, CONVS: 1}, "38.4 43.4 31.0 28.3 39.9"),
            Row("plain, 2 convolutions", {DEFORM: False, CONVS: 2}, "38.9 44.1 31.1 28.9 40.1"),
            Row("plain, 3 convolutions", {DEFORM: False, CONVS: 3}, "39.2 44.7 31.0 29.6 40.2"),
            Row("plain, 4 convolutions", {DEFORM: False, CONVS: 4}, "39.2 44.9 30.8 29.4 39.9"),
            Row("deformable, 3 convolutions", {DEFORM: True, CONVS: 3}, "39.9 45.0 32.4 29.9 41.2"),
        ),
    ),
    "fcn-coordinates": Study(
        title="Table 2: coordinates for the kernel head and for the feature encoder",
        preset=PRESET,
        small=SMALL,
        begins="ImageNet",
        columns=COLUMNS,
        rows=(
            Row("neither", PLAIN, "39.9 45.0 32.4 29.9 41.2"),
            Row("kernel head", {KERNEL: True, ENCODER: False}, "39.9 45.0 32.2 30.0 41.1"),
            Row("feature encoder", {KERNEL: False, ENCODER: True}, "40.2 45.3 32.5 30.4 41.6"),
            Row("both", {KERNEL: True, ENCODER: True}, "41.3 46.9 32.9 32.1 41.7"),
        ),
    ),
    "fcn-fusion": Study(
        title="Table 3: similarity threshold of kernel fusion",
        preset=PRESET,
        small=SMALL,
        begins="ImageNet",
        columns=COLUMNS,
        rows=(
            Row("0.80", {}, "39.7 44.3 32.9 29.9 41.7", fusion(0.80, True)),
            Row("0.85", {}, "40.8 46.1 32.9 31.5 41.7", fusion(0.85, True)),
            Row("0.90", {}, "41.3 46.9 32.9 32.1 41.7", fusion(0.90, True)),
            Row("0.95", {}, "41.3 47.0 32.9 31.1 41.7", fusion(0.95, True)),
            Row("0.90, any class", {}, "41.2 46.7 32.9 30.9 41.7", fusion(0.90, False)),
        ),
        note="One training for all rows of a seed: they differ while the model is evaluated.",
    ),
    "fcn-channels": Study(
        title="Table 4: channels of the feature encoder",
        preset=PRESET,
        small=SMALL,
        begins="ImageNet",
        columns=COLUMNS,
        rows=(
            Row("16", {CHANNELS: 16}, "39.9 45.0 32.1 30.8 41.3"),
            Row("32", {CHANNELS: 32}, "40.8 46.3 32.5 31.7 41.6"),
            Row("64", {CHANNELS: 64}, "41.3 46.9 32.9 32.1 41.7"),
            Row("128", {CHANNELS: 128}, "41.3 47.0 32.6 32.6 41.7"),
        ),
    ),
    "fcn-feature": Study(
        title="Table 5: the high-resolution feature",
        preset=PRESET,
        small=SMALL,
        begins="ImageNet",
        columns=COLUMNS,
        rows=(
            Row("FPN P2", {FEATURE: "p2"}, "40.6 46.0 32.4 31.6 41.3"),
            Row("FPN summed", {FEATURE: "summed"}, "40.5 46.0 32.1 31.7 41.1"),
            Row("semantic FPN", {FEATURE: "semantic_fpn"}, "41.3 46.9 32.9 32.1 41.7"),
        ),
    ),
    "fcn-points": Study(
        title="Table 6: weighted dice loss",
        preset=PRESET,
        small=SMALL,
        begins="ImageNet",
        columns=COLUMNS,
        rows=(
            Row("not weighted", {POINTS: 0}, "40.2 45.5 32.4 31.0 41.3"),
            Row("1 point", {POINTS: 1}, "40.0 45.1 32.4 30.9 41.4"),
            Row("3 points", {POINTS: 3}, "41.0 46.4 32.7 31.6 41.4"),
            Row("5 points", {POINTS: 5}, "41.0 46.5 32.9 32.1 41.7"),
            Row("7 points", {POINTS: 7}, "41.3 46.9 32.9 32.1 41.7"),
            Row("9 points", {POINTS: 9}, "41.3 46.8 32.9 32.1 41.8"),
        ),
    ),
    "fcn-schedule": Study(
        title="Table 7: training schedule",
        preset=PRESET,
        small=SMALL,
        begins="ImageNet",
        columns=COLUMNS,
        recipe={"train.steps": 90_000},
        rows=(
            Row("90,000 steps", {"train.steps": 90_000}, "41.3 46.9 32.9 32.1 41.7"),
            Row("180,000 steps", {"train.steps": 180_000}, "43.2 48.8 34.7 34.3 43.4"),
            Row("270,000 steps", {"train.steps": 270_000}, "43.6 49.3 35.0 34.5 43.8"),
        ),
    ),
    "fcn-star": Study(
        title="Table 8: a deformable, wider feature encoder, 270,000 steps",
        preset="panoptic-fcn-r50-coco-3x",
        small=SMALL,
        begins="ImageNet",
        columns=COLUMNS,
        rows=(
            Row("plain, 64", {"model.encoder_deform": False, CHANNELS: 64}, "43.6 49.3 35.0 34.5 43.8"),
            Row("deformable, 256", {"model.encoder_deform": True, CHANNELS: 256}, "44.3 50.0 35.6 35.5 44.0"),
        ),
    ),
    "fcn-merge": Study(
        title="Future work: a panoptic map by argmax in place of the greedy merge",
        preset="panoptic-fcn-r50-coco-3x",
        small=SMALL,
        columns=COLUMNS,
        begins="ImageNet",
        rows=(
            Row("greedy", {}, "43.6 49.3 35.0 34.5 43.8", {"model.merge": "greedy"}),
            Row("argmax", {}, "", {"model.merge": "argmax"}),
        ),
        note='The slides: "Currently, using argmax for panoptic generation brings 1.4% PQ drop". One training.',
    ),
    "fcn-centres": Study(
        title="Future work: centres for things and stuff, in place of regions for stuff",
        preset=PRESET,
        small=SMALL,
        columns=COLUMNS,
        begins="ImageNet",
        rows=(
            Row("regions", {"model.stuff_positions": "regions"}, "41.3 46.9 32.9 32.1 41.7"),
            Row("centres", {"model.stuff_positions": "centres"}),
        ),
        note="The slides name it and give no figure.",
    ),
    "fcn-oracle": Study(
        title="Table 9: true positions and classes, 270,000 steps",
        preset="panoptic-fcn-r50-coco-3x",
        small=SMALL,
        columns=COLUMNS,
        begins="ImageNet",
        rows=(
            Row("neither", {}, "43.6 49.3 35.0 34.5 43.8", true=()),
            Row("positions", {}, "49.8 52.2 46.1 38.2 54.6", true=("position",)),
            Row("positions and classes", {}, "65.9 64.1 68.7 45.5 86.6", true=("position", "class")),
            Row("both over neither", {}, "+22.3 +14.8 +33.7 +11.0 +42.8", quoted=True),
        ),
        note="One training for all rows of a seed: they differ while the model is evaluated. jobs/oracle.py "
        "prints this table of a model that was trained already.",
    ),
    "fcn-methods": Study(
        title="Table 10: methods beside each other on COCO val",
        preset="panoptic-fcn-r50-coco-3x",
        small=SMALL,
        columns=(*ALL_QUALITIES, "FPS"),
        begins="ImageNet",
        recipe=THRICE,
        rows=TABLE_10,
        note="Box-based methods come first. The paper's FPS are of single images on a V100 (CIAE: 2080 Ti, "
        "PCV: 1080 Ti); ours of all actors of an evaluation together. At 1x Panoptic FPN's rate falls in "
        "proportion to the 3x schedule.",
    ),
    "fcn-test-dev": Study(
        title="Table 11: deeper backbones on COCO test-dev (ours: the validation split)",
        preset="panoptic-fcn-r50-coco-3x",
        small=SMALL,
        begins="ImageNet",
        rows=TABLE_11,
        note="Of test-dev only COCO's server has the truth: jobs/predict.py writes what it takes. ‡: trained "
        "on val too.",
    ),
    "fcn-cityscapes": Study(
        title="Table 12: methods beside each other on Cityscapes val",
        preset="panoptic-fcn-r50-cityscapes",
        small=SMALL,
        begins="ImageNet",
        rows=TABLE_12,
        note="Panoptic-DeepLab is trained as its PyTorch code, which reached 59.0 (`deeplab-cityscapes`).",
    ),
    "fcn-mapillary": Study(
        title="Table 13: methods beside each other on Mapillary Vistas val",
        preset="panoptic-fcn-r50-mapillary",
        small=SMALL,
        begins="ImageNet",
        rows=TABLE_13,
    ),
}
