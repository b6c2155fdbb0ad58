"""Image Panoptic Segmentation Challenges using COCO Dataset: its tables 1 to 9."""

from pipelines.studies.study import ALL_QUALITIES, Row, Study

FREEZE, NAME, RATES, STEM = "model.backbone.freeze", "model.backbone.name", "model.rates", "model.backbone.stem"

DEEPLAB = {
    **{"optim.lr": 0.0025, "optim.optimiser": "adam", "train.batch": 5, "train.steps": 10_000},
    **{NAME: "resnet50", STEM: "conv7"},
}
"""Adam (its momentum of 0.9 is the first beta) and the rate of its section 3.2, batch of its table 6, the ordinary
ResNets of ImageNet of its section 3.1, where the preset has detectron2's ResNet-52 with a stem of three convolutions.

What the report leaves open stays as in detectron2, whose model it calls the default: output stride 16, multigrid,
separable convolutions, dropout, poly schedule with warm-up, images of 640 pixels ("re-sized to a fixed size")."""

FPN = {"optim.optimiser": "adam", "optim.lr": 0.0025, "optim.scale_lr": "none", "optim.milestones": ()}
"""Rate of its section 4.2, optimiser of its section 4 ("Adam based optimizers were used"); the report names no steps
at which the rate fell, and warm-up and weight decay stay detectron2's."""

FROZEN_101 = {NAME: "resnet101", FREEZE: 4}

STUDIES = {
    "deeplab-default": Study(
        title="Table 1: the default Panoptic-DeepLab, ResNet-50, 10,000 steps",
        preset="panoptic-deeplab-r52-coco",
        small="panoptic-deeplab-pedestrians-imagenet",
        columns=ALL_QUALITIES,
        begins="ImageNet",
        recipe=DEEPLAB,
        rows=(
            Row(
                "default",
                {NAME: "resnet50", FREEZE: 0},
                "6.351 44.339 8.523 4.259 43.053 5.773 9.510 46.279 12.673",
            ),
        ),
    ),
    "freezing-r50": Study(
        title="Table 2: stages of ResNet-50 frozen, 10,000 steps",
        preset="panoptic-deeplab-r52-coco",
        small="panoptic-deeplab-pedestrians-imagenet",
        begins="ImageNet",
        recipe=DEEPLAB,
        rows=(
            Row("none frozen", {NAME: "resnet50", FREEZE: 0}, "6.351 4.259 9.510"),
            Row("up to stage 2", {NAME: "resnet50", FREEZE: 2}, "8.060 6.090 11.034"),
            Row("up to stage 4", {NAME: "resnet50", FREEZE: 4}, "16.016 15.349 17.021"),
            Row("up to stage 5", {NAME: "resnet50", FREEZE: 5}, "14.856 13.261 17.263"),
        ),
    ),
    "freezing-r101": Study(
        title="Table 3: stages of ResNet-101 frozen, 10,000 steps",
        preset="panoptic-deeplab-r52-coco",
        small="panoptic-deeplab-pedestrians-imagenet",
        begins="ImageNet",
        recipe=DEEPLAB,
        rows=(
            Row("up to stage 2", {NAME: "resnet101", FREEZE: 2}, "7.250 5.340 10.132"),
            Row("up to stage 4", {NAME: "resnet101", FREEZE: 4}, "19.484 19.691 19.172"),
            Row("up to stage 5", {NAME: "resnet101", FREEZE: 5}, "17.731 16.865 19.037"),
        ),
    ),
    "aspp": Study(
        title="Table 4: one pyramid pooling each or one shared, ResNet-101, four stages frozen",
        preset="panoptic-deeplab-r52-coco",
        small="panoptic-deeplab-pedestrians-imagenet",
        begins="ImageNet",
        recipe=DEEPLAB,
        setting=FROZEN_101,
        rows=(
            Row("dual ASPP", {"model.shared_aspp": False}, "19.484 19.691 19.172"),
            Row("single ASPP", {"model.shared_aspp": True}, "18.104 18.329 17.763"),
        ),
    ),
    "dilation": Study(
        title="Table 5: dilations of the pyramid pooling, ResNet-101, four stages frozen",
        preset="panoptic-deeplab-r52-coco",
        small="panoptic-deeplab-pedestrians-imagenet",
        begins="ImageNet",
        recipe=DEEPLAB,
        setting=FROZEN_101,
        rows=(
            Row("3, 6, 9", {RATES: (3, 6, 9)}, "19.356 19.513 19.120"),
            Row("6, 12, 18", {RATES: (6, 12, 18)}, "19.484 19.691 19.172"),
            Row("12, 24, 36", {RATES: (12, 24, 36)}, "18.677 18.879 18.371"),
        ),
    ),
    "batch": Study(
        title="Table 6: batch size, ResNet-101, four stages frozen",
        preset="panoptic-deeplab-r52-coco",
        small="panoptic-deeplab-pedestrians-imagenet",
        begins="ImageNet",
        recipe=DEEPLAB,
        setting=FROZEN_101,
        rows=(
            Row("batch 5", {"train.batch": 5}, "19.484 19.691 19.172"),
            Row("batch 8", {"train.batch": 8}, "22.502 23.011 21.734"),
        ),
        note="Equal steps, so batch 8 has seen 1.6 times as many images.",
    ),
    "weight-decay": Study(
        title="Section 3.3.5: a small weight decay, ResNet-101, four stages frozen",
        preset="panoptic-deeplab-r52-coco",
        small="panoptic-deeplab-pedestrians-imagenet",
        begins="ImageNet",
        recipe=DEEPLAB,
        setting=FROZEN_101,
        rows=(
            Row("none", {"optim.weight_decay": 0.0}, "19.484 19.691 19.172"),
            Row("1e-5", {"optim.weight_decay": 1e-5}),
            Row("1e-4", {"optim.weight_decay": 1e-4}),
        ),
        note='The paper gives no figure: "did not show promising improvements"; the values are ours, and with '
        "--small those of `SMALL`, which a short training can show.",
    ),
    "fpn-double3x3": Study(
        title="Table 7: Panoptic FPN, two 3x3 in each bottleneck, 270,000 steps",
        preset="panoptic-fpn-double3x3-coco",
        small="panoptic-fpn-pedestrians",
        columns=ALL_QUALITIES,
        recipe={**FPN, "optim.lr": 0.005, "train.batch": 4, "train.steps": 270_000},
        rows=(
            Row(
                "double 3x3",
                {NAME: "resnet50_double3x3"},
                "31.935 75.797 39.197 36.803 79.470 44.311 24.586 70.252 31.478",
            ),
            Row("single 3x3", {NAME: "resnet50"}, small_change={NAME: "resnet14"}),
        ),
        note="The paper has the first row only; the second is what it is to be compared with, from scratch as well.",
    ),
    "fpn-vgg": Study(
        title="Table 8: Panoptic FPN on VGG, batch 2",
        preset="panoptic-fpn-double3x3-coco",
        small="panoptic-fpn-pedestrians",
        columns=("PQ", "SQ", "RQ"),
        setting={NAME: "vgg16"},
        recipe={**FPN, "train.batch": 2, "train.steps": 250_000},
        rows=(
            Row("50,000 steps", {"train.steps": 50_000}, "- 75.797 39.197"),
            Row("100,000 steps", {"train.steps": 100_000}, "- 79.470 44.311"),
            Row("250,000 steps", {"train.steps": 250_000}, "- 70.252 31.478"),
        ),
        note="The paper prints no PQ, and its SQ and RQ are those of table 7: taken over by mistake, as it seems.",
    ),
    "fpn-res2net": Study(
        title="Table 9: Panoptic FPN on Res2Net",
        preset="panoptic-fpn-double3x3-coco",
        small="panoptic-fpn-pedestrians",
        setting={NAME: "res2net50_26w_4s"},
        recipe={**FPN, "train.steps": 10_000},
        rows=(
            Row("7,000 steps of 2", {"train.steps": 7000, "train.batch": 2}, "8.254 7.215 9.824"),
            Row("10,000 steps of 5", {"train.steps": 10_000, "train.batch": 5}, "19.082 21.148 15.964"),
        ),
    ),
}
