"""Panoptic-DeepLab in PyTorch: its tables 1 and 2, its reasons for the gap to the original, its foreground branch."""

from pipelines.studies.study import Row, Study

PRESET = "panoptic-deeplab-r50-cityscapes"
FROM_SCRATCH = "panoptic-deeplab-pedestrians"
"""The small preset of rows that differ in the stem of a ResNet, of which no package has a small one's weights."""
SMALL = f"{FROM_SCRATCH}-imagenet"
STRIDE, RATES, STEM, BATCH = "model.backbone.output_stride", "model.rates", "model.backbone.stem", "train.batch"

REPORT = {BATCH: 4, "model.stuff_area": 4096}
"""Options of the report (section 2.2.2, caption of table 2); the preset has 8 images and 2048 pixels, as the code."""

STRIDE_32, STRIDE_16 = {STRIDE: 32, RATES: (3, 6, 9)}, {STRIDE: 16, RATES: (6, 12, 18)}
"""Output strides, and the dilations that the pyramid pooling is published with at each."""


def oracle(parts: str, paper: str, label: str = "", **changes: object) -> Row:
    """A row of the oracle table: the outputs that are true, joined by "+", or "none".

    Args:
        parts: of "semantic", "foreground", "centre", "offset".
        paper: PQ, SQ, RQ, AP, mIoU.
        label: where the outputs do not tell the row from another.
        changes: options of the model while it is evaluated.
    """
    true = () if parts == "none" else tuple(parts.split("+"))
    evaluate_with = {f"model.{name}": value for name, value in changes.items()}
    return Row(label or parts, {}, paper, evaluate_with=evaluate_with, true=true)


ORACLES = (
    oracle("none", "59.0 80.0 72.4 24.5 79.1"),
    oracle("semantic", "78.1 91.5 84.4 38.4 100.0"),
    oracle("foreground", "62.0 82.3 74.4 35.0 79.1"),
    oracle("centre", "59.9 80.1 73.5 27.0 79.1"),
    oracle("offset", "62.9 83.6 74.4 42.2 79.1"),
    oracle("semantic+foreground", "80.6 93.3 85.6 42.0 100.0"),
    oracle("semantic+centre", "79.7 91.7 86.1 44.0 100.0"),
    oracle("semantic+offset", "87.3 95.5 91.3 68.1 100.0"),
    oracle("foreground+centre", "63.2 82.5 75.7 39.7 79.1"),
    oracle("foreground+offset", "69.3 86.5 79.4 59.5 79.1"),
    oracle("centre+offset", "65.9 84.0 77.7 46.5 79.1"),
    oracle("foreground+centre+offset", "71.1 87.5 80.5 70.1 79.1"),
    oracle("semantic+centre+offset", "90.1 96.7 93.1 83.5 100.0"),
    oracle("semantic+foreground+offset", "91.6 98.0 93.5 77.4 100.0"),
    oracle("semantic+foreground+centre", "82.6 93.8 87.6 49.4 100.0"),
    oracle("semantic+foreground+centre+offset", "96.5 100.0 96.5 100.0 100.0"),
    oracle("semantic+foreground+centre+offset", "100.0 100.0 100.0 100.0 100.0", "all, any stuff area", stuff_area=0),
)
"""The seventeen rows of table 2, in its order."""

STUDIES = {
    "deeplab-cityscapes": Study(
        title="Table 1: the reimplementation beside the original, ResNet-50, Cityscapes",
        preset=PRESET,
        small=SMALL,
        columns=("PQ", "SQ", "RQ", "AP", "mIoU", "network ms", "merging ms"),
        begins="ImageNet",
        recipe=REPORT,
        rows=(
            Row("TensorFlow (original)", {}, "59.8 - - - - 117 -", quoted=True),
            Row("PyTorch", {}, "59.0 80.0 72.4 24.5 79.1 126 107"),
        ),
        note="The original's 117 ms (V100) include the merging (~2 ms); the reimplementation was timed on a "
        "1080 Ti, its AP was not tuned. Ours: milliseconds an image on the hardware at hand.",
    ),
    "deeplab-oracle": Study(
        title="Table 2: outputs replaced by the truth, ResNet-50, Cityscapes",
        preset=PRESET,
        small=SMALL,
        columns=("PQ", "SQ", "RQ", "AP", "mIoU"),
        begins="ImageNet",
        recipe=REPORT,
        rows=ORACLES,
        note="One training for all rows of a seed: they differ while the model is evaluated. The last row "
        "keeps stuff of any area. jobs/oracle.py prints this table of a model that was trained already.",
    ),
    "deeplab-gap": Study(
        title="Section 3.1: the three reasons for 0.8 PQ less than the original, one by one",
        preset=PRESET,
        small=FROM_SCRATCH,
        begins="ImageNet",
        rows=(
            Row("as reimplemented", {**STRIDE_32, BATCH: 4, STEM: "conv7"}, "59.0 - -"),
            Row("output stride 16", {**STRIDE_16, BATCH: 4, STEM: "conv7"}),
            Row("batch 32", {**STRIDE_32, BATCH: 32, STEM: "conv7"}),
            Row("3x3 stem", {**STRIDE_32, BATCH: 4, STEM: "deeplab"}),
            Row("all three", {**STRIDE_16, BATCH: 32, STEM: "deeplab"}, "59.8 - -"),
        ),
        note="The report names the reasons and measures none of them. Equal steps, so batch 32 has seen eight "
        "times as many images; its original's stem has two 3x3 convolutions, the one here three, as "
        "detectron2's.",
    ),
    "deeplab-foreground": Study(
        title="Section 4: a foreground branch that keeps instances off ignored regions",
        preset=PRESET,
        small=SMALL,
        columns=("PQ", "SQ", "RQ", "things", "stuff"),
        begins="ImageNet",
        recipe=REPORT,
        rows=(Row("without", {"model.foreground": False}), Row("with", {"model.foreground": True})),
        note="The report proposes the branch for Cityscapes' ego car and gives no figure.",
    ),
}
