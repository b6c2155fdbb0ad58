"""Stages of a backbone frozen that begins with ImageNet weights, and rates that decay towards its stem, on photographs.

Tables of ours. The first has the form of tables 2 and 3 of "Image Panoptic Segmentation Challenges using COCO Dataset",
with what a step takes beside what it learns. Any other preset with ImageNet weights may be given in place of theirs.
"""

from pipelines.studies.study import QUALITIES, Row, Study

FREEZE, DECAY = "model.backbone.freeze", "optim.stage_decay"

PRESET = "panoptic-deeplab-pedestrians-imagenet"

STUDIES = {
    "freezing-photographs": Study(
        title="Stages of a backbone with ImageNet weights frozen, on photographs",
        preset=PRESET,
        small=PRESET,
        columns=(*QUALITIES, "s/step", "MiB"),
        seeds=3,
        begins="ImageNet",
        rows=(
            Row("none frozen", {FREEZE: 0}, "6.351 4.259 9.510 - -"),
            Row("stem", {FREEZE: 1}),
            Row("up to stage 2", {FREEZE: 2}, "8.060 6.090 11.034 - -"),
            Row("up to stage 3", {FREEZE: 3}),
            Row("up to stage 4", {FREEZE: 4}, "16.016 15.349 17.021 - -"),
            Row("up to stage 5", {FREEZE: 5}, "14.856 13.261 17.263 - -"),
        ),
        note="The paper's figures are those of its table 2: Panoptic-DeepLab on ResNet-50, COCO, 10,000 steps of 5. "
        "s/step is the median of the log's lines by the clock, with --concurrent 1 undisturbed by other rows; MiB the "
        "peak of the first worker at the first of these lines.",
    ),
    "stage-decay-photographs": Study(
        title="Rates of a backbone with ImageNet weights that decay from stage to stage towards the stem",
        preset=PRESET,
        small=PRESET,
        seeds=3,
        begins="ImageNet",
        rows=(
            Row("1, one rate for all stages", {DECAY: 1.0}),
            Row("0.85", {DECAY: 0.85}),
            Row("0.7, the preset's", {DECAY: 0.7}),
            Row("0.5", {DECAY: 0.5}),
        ),
        note="The stem learns at the fourth power of the factor, res5 at the backbone's rate. Nobody printed figures.",
    ),
}
