"""Fully Convolutional Networks for Panoptic Segmentation: its tables 1 to 8, on COCO."""

from pipelines.studies.study import Row, Study

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


STUDIES = {
    "fcn-kernels": Study(
        title="Table 1: the kernel generator",
        preset=PRESET,
        small=SMALL,
        columns=COLUMNS,
        setting=PLAIN,
        rows=(
            Row("plain, 1 convolution", {DEFORM: False, CONVS: 1}, (38.4, 43.4, 31.0, 28.3, 39.9)),
            Row("plain, 2 convolutions", {DEFORM: False, CONVS: 2}, (38.9, 44.1, 31.1, 28.9, 40.1)),
            Row("plain, 3 convolutions", {DEFORM: False, CONVS: 3}, (39.2, 44.7, 31.0, 29.6, 40.2)),
            Row("plain, 4 convolutions", {DEFORM: False, CONVS: 4}, (39.2, 44.9, 30.8, 29.4, 39.9)),
            Row("deformable, 3 convolutions", {DEFORM: True, CONVS: 3}, (39.9, 45.0, 32.4, 29.9, 41.2)),
        ),
    ),
    "fcn-coordinates": Study(
        title="Table 2: coordinates for the kernel head and for the feature encoder",
        preset=PRESET,
        small=SMALL,
        columns=COLUMNS,
        rows=(
            Row("neither", PLAIN, (39.9, 45.0, 32.4, 29.9, 41.2)),
            Row("kernel head", {KERNEL: True, ENCODER: False}, (39.9, 45.0, 32.2, 30.0, 41.1)),
            Row("feature encoder", {KERNEL: False, ENCODER: True}, (40.2, 45.3, 32.5, 30.4, 41.6)),
            Row("both", {KERNEL: True, ENCODER: True}, (41.3, 46.9, 32.9, 32.1, 41.7)),
        ),
    ),
    "fcn-fusion": Study(
        title="Table 3: similarity threshold of kernel fusion",
        preset=PRESET,
        small=SMALL,
        columns=COLUMNS,
        rows=(
            Row("0.80", {}, (39.7, 44.3, 32.9, 29.9, 41.7), fusion(0.80, True)),
            Row("0.85", {}, (40.8, 46.1, 32.9, 31.5, 41.7), fusion(0.85, True)),
            Row("0.90", {}, (41.3, 46.9, 32.9, 32.1, 41.7), fusion(0.90, True)),
            Row("0.95", {}, (41.3, 47.0, 32.9, 31.1, 41.7), fusion(0.95, True)),
            Row("0.90, any class", {}, (41.2, 46.7, 32.9, 30.9, 41.7), fusion(0.90, False)),
        ),
        note="One training for all rows of a seed: they differ while the model is evaluated.",
    ),
    "fcn-channels": Study(
        title="Table 4: channels of the feature encoder",
        preset=PRESET,
        small=SMALL,
        columns=COLUMNS,
        rows=(
            Row("16", {CHANNELS: 16}, (39.9, 45.0, 32.1, 30.8, 41.3)),
            Row("32", {CHANNELS: 32}, (40.8, 46.3, 32.5, 31.7, 41.6)),
            Row("64", {CHANNELS: 64}, (41.3, 46.9, 32.9, 32.1, 41.7)),
            Row("128", {CHANNELS: 128}, (41.3, 47.0, 32.6, 32.6, 41.7)),
        ),
    ),
    "fcn-feature": Study(
        title="Table 5: the high-resolution feature",
        preset=PRESET,
        small=SMALL,
        columns=COLUMNS,
        rows=(
            Row("FPN P2", {FEATURE: "p2"}, (40.6, 46.0, 32.4, 31.6, 41.3)),
            Row("FPN summed", {FEATURE: "summed"}, (40.5, 46.0, 32.1, 31.7, 41.1)),
            Row("semantic FPN", {FEATURE: "semantic_fpn"}, (41.3, 46.9, 32.9, 32.1, 41.7)),
        ),
    ),
    "fcn-points": Study(
        title="Table 6: weighted dice loss",
        preset=PRESET,
        small=SMALL,
        columns=COLUMNS,
        rows=(
            Row("not weighted", {POINTS: 0}, (40.2, 45.5, 32.4, 31.0, 41.3)),
            Row("1 point", {POINTS: 1}, (40.0, 45.1, 32.4, 30.9, 41.4)),
            Row("3 points", {POINTS: 3}, (41.0, 46.4, 32.7, 31.6, 41.4)),
            Row("5 points", {POINTS: 5}, (41.0, 46.5, 32.9, 32.1, 41.7)),
            Row("7 points", {POINTS: 7}, (41.3, 46.9, 32.9, 32.1, 41.7)),
            Row("9 points", {POINTS: 9}, (41.3, 46.8, 32.9, 32.1, 41.8)),
        ),
    ),
    "fcn-schedule": Study(
        title="Table 7: training schedule",
        preset=PRESET,
        small=SMALL,
        columns=COLUMNS,
        recipe={"train.steps": 90_000},
        rows=(
            Row("90,000 steps", {"train.steps": 90_000}, (41.3, 46.9, 32.9, 32.1, 41.7)),
            Row("180,000 steps", {"train.steps": 180_000}, (43.2, 48.8, 34.7, 34.3, 43.4)),
            Row("270,000 steps", {"train.steps": 270_000}, (43.6, 49.3, 35.0, 34.5, 43.8)),
        ),
    ),
    "fcn-star": Study(
        title="Table 8: a deformable, wider feature encoder, 270,000 steps",
        preset="panoptic-fcn-r50-coco-3x",
        small=SMALL,
        columns=COLUMNS,
        rows=(
            Row("plain, 64", {"model.encoder_deform": False, CHANNELS: 64}, (43.6, 49.3, 35.0, 34.5, 43.8)),
            Row("deformable, 256", {"model.encoder_deform": True, CHANNELS: 256}, (44.3, 50.0, 35.6, 35.5, 44.0)),
        ),
    ),
}
