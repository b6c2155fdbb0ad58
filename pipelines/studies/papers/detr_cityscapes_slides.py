"""Panoptic Segmentation (research topic 12): what its slides vary around DETR on Cityscapes.

The slides print figures of two runs, version 119 (1200 frames of 400 pixels) and 125 (with augmentation), mean IoU on a
second data set, and validation losses of some more versions; of the other settings they say only which were tried, so
most rows have no figure beside them.
"""

from pipelines.studies.study import Row, Study

COLUMNS = ("PQ", "SQ", "RQ", "mIoU")
PRESET, SMALL = "detr-004-cityscapes", "detr-pedestrians"
FRAMES = 2975
"""Images of Cityscapes' training set, of which the preset's 1200 and the rows' lengths are shares."""
V119, V125 = "6.66 37.51 17.76 18.63", "5.48 36.38 15.06 16.22"
FIFTY = {"data.limit_val": 50}
"""Validation images of the slides; a smaller validation set is read whole."""
LR, CLIP, LIMIT, FREEZE = "optim.lr", "optim.clip_norm", "data.limit", "train.freeze"
CLASSES, DROP, COLOUR, DOUBLED = "model.class_hidden", "model.class_dropout", "augment.colour", "augment.doubled"
BACKBONE_LR, LONGEST, ROTATION = "optim.backbone_lr", "augment.longest", "augment.rotation"
BALANCE = "data.balance"
PLAIN, COLOURED = {COLOUR: "none", DOUBLED: False}, {COLOUR: "colour004", DOUBLED: True}


def side(pixels: int) -> dict[str, object]:
    """Options of an image size: the slides scale the short side to it, and the long side goes along; no crop."""
    views = {"augment.sides": (pixels,), LONGEST: pixels, "augment.scale": "short", "augment.crop": (0, 0)}
    return {**views, "resize.short": pixels, "resize.longest": pixels}


def longest(pixels: int, paper: str = "") -> Row:
    """A row of one short side whose long side is capped at some pixels; with --small at two fifths of them."""
    small = pixels * 2 // 5
    return Row(
        str(pixels),
        {LONGEST: pixels, "resize.longest": pixels},
        paper,
        small_change={LONGEST: small, "resize.longest": small},
    )


def rates(lr: float, backbone: float, paper: str = "") -> Row:
    """A row of two learning rates; the backbone's is an option as a factor of the other."""
    return Row(f"{lr:.0e}, backbone {backbone:.0e}", {LR: lr, BACKBONE_LR: backbone / lr}, paper)


def version(name: str, step: str, loss: str) -> Row:
    """The validation loss of a run that the slides do not describe."""
    return Row(f"version {name}, step {step}", {}, f"- - - - {loss}", quoted=True)


STUDIES = {
    "detr-lr": Study(
        title="Learning rate",
        preset=PRESET,
        small=SMALL,
        columns=COLUMNS,
        images=FRAMES,
        recipe=FIFTY,
        begins="COCO",
        rows=(Row("1e-5", {LR: 1e-5}), Row("1e-4", {LR: 1e-4}, V119), Row("1e-3", {LR: 1e-3})),
    ),
    "detr-rates": Study(
        title="Learning rate and learning rate of the backbone, crossed",
        preset=PRESET,
        small=SMALL,
        columns=COLUMNS,
        images=FRAMES,
        recipe=FIFTY,
        begins="COCO",
        rows=tuple(
            rates(lr, backbone, V119 if lr == backbone == 1e-4 else "")
            for lr in (1e-5, 1e-4, 1e-3)
            for backbone in (1e-5, 1e-4, 1e-3)
        ),
        note="The slides looked at these values for both rates and print the figures of one combination.",
    ),
    "detr-clip": Study(
        title="Gradient clipping",
        preset=PRESET,
        small=SMALL,
        columns=COLUMNS,
        images=FRAMES,
        recipe=FIFTY,
        begins="COCO",
        rows=(Row("0.1", {CLIP: 0.1}, V119), Row("1.0", {CLIP: 1.0})),
        note='The slides: "1.0 produced unfavorable results while 0.1 increased training stability".',
    ),
    "detr-head": Study(
        title="Classification head",
        preset=PRESET,
        small=SMALL,
        columns=(*COLUMNS, "loss"),
        images=FRAMES,
        recipe=FIFTY,
        begins="COCO",
        rows=(
            Row("128, 64 with ReLU", {CLASSES: (128, 64), DROP: 0.2}, f"{V119} 3.111"),
            Row("linear", {CLASSES: (), DROP: 0.0}, "- - - - 2.812"),
        ),
        note="The slides call ReLU worse by validation loss (version 72 against 80, whose curves have no "
        "figures) and yet list hidden units 128, 64 for version 119. 3.111 is the loss of version 119 at "
        "step 8249, 2.812 that of version 80 at step 7499, which had another collate function as well.",
    ),
    "detr-size": Study(
        title="Image size",
        preset=PRESET,
        small=SMALL,
        columns=COLUMNS,
        images=FRAMES,
        recipe=FIFTY,
        begins="COCO",
        rows=(Row("400", side(400), V119), Row("500", side(500)), Row("600", side(600)), Row("700", side(700))),
    ),
    "detr-longest": Study(
        title="Maximum image size, at one size of the short side",
        preset=PRESET,
        small=SMALL,
        columns=COLUMNS,
        images=FRAMES,
        recipe=FIFTY,
        begins="COCO",
        setting=side(400),
        rows=(longest(400, V119), longest(500), longest(600), longest(700), longest(800)),
        note='The slides: "several maximum picture sizes", without values; these are ours. A frame of '
        "Cityscapes is twice as wide as high, so below 800 the long side decides.",
    ),
    "detr-length": Study(
        title="Length of the data set",
        preset=PRESET,
        small=SMALL,
        columns=COLUMNS,
        images=FRAMES,
        recipe=FIFTY,
        begins="COCO",
        rows=(Row("1000", {LIMIT: 1000}), Row("1200", {LIMIT: 1200}, V119), Row("2975", {LIMIT: 2975})),
        note="Equal steps; on another data set the same shares of it.",
    ),
    "detr-batch": Study(
        title="Batch size",
        preset=PRESET,
        small=SMALL,
        columns=COLUMNS,
        images=FRAMES,
        recipe=FIFTY,
        begins="COCO",
        rows=(Row("4", {"train.batch": 4}, V119), Row("6", {"train.batch": 6}), Row("8", {"train.batch": 8})),
    ),
    "detr-augmentation": Study(
        title="Colour augmentation",
        preset=PRESET,
        small=SMALL,
        columns=(*COLUMNS, "loss"),
        images=FRAMES,
        recipe=FIFTY,
        begins="COCO",
        rows=(
            Row("none", PLAIN, f"{V119} 3.101"),
            Row("a second copy in other colours", COLOURED, f"{V125} 3.15"),
            version("120", "500", "3.485"),
            version("121", "5.399k", "3.621"),
            version("124", "2.624k", "3.267"),
        ),
        note="The slides give epochs, 100 of version 119 and 50 of version 125 with augmentation; ours are "
        "equal steps, as those are where the second copy doubles an epoch. Losses are of the last logged "
        "step; what versions 120 to 124 were, they do not say.",
    ),
    "detr-rotation": Study(
        title="Rotation, which the slides name as geometric augmentation and as future work",
        preset=PRESET,
        small=SMALL,
        columns=COLUMNS,
        images=FRAMES,
        recipe=FIFTY,
        begins="COCO",
        rows=(
            Row("none", {ROTATION: 0.0}, V119),
            Row("10 degrees", {ROTATION: 10.0}),
            Row("30 degrees", {ROTATION: 30.0}),
        ),
        note="The slides give no figure; the angles are ours.",
    ),
    "detr-balance": Study(
        title="Class-balanced sampling, which the slides miss under class imbalance",
        preset=PRESET,
        small=SMALL,
        columns=COLUMNS,
        images=FRAMES,
        recipe=FIFTY,
        begins="COCO",
        rows=(Row("every frame once", {BALANCE: 0.0}, V119), Row("repeat factors, 0.5", {BALANCE: 0.5})),
        note='The slides: "Focal loss is being used but it could have been used with better class distribution". '
        "No figure; the threshold is ours: classes that fewer than half of the frames have come more often.",
    ),
    "detr-datasets": Study(
        title="Mean IoU on Cityscapes and on the IKA data set",
        preset=PRESET,
        small=SMALL,
        columns=("mIoU",),
        images=FRAMES,
        recipe=FIFTY,
        begins="COCO",
        rows=(Row("Cityscapes", {}, "18.63"), Row("IKA", {}, "26.56", quoted=True)),
        note="IKA has fewer classes than Cityscapes and is not public; --data.root FOLDER trains on another "
        "data set, and --data.class-map joins its classes.",
    ),
    "detr-freezing": Study(
        title="Freezing backbone, encoder, decoder",
        preset=PRESET,
        small="detr-pedestrians-imagenet",
        columns=(*COLUMNS, "loss"),
        images=FRAMES,
        recipe=FIFTY,
        begins="COCO",
        rows=(
            Row("nothing", {"model.backbone.freeze": 0, FREEZE: ()}),
            Row("backbone", {"model.backbone.freeze": 0, FREEZE: ("backbone.*",)}),
            Row("encoder", {"model.backbone.freeze": 0, FREEZE: ("encoder.*",)}),
            Row("decoder", {"model.backbone.freeze": 0, FREEZE: ("decoder.*", "queries.*")}),
            Row("encoder and decoder", {"model.backbone.freeze": 0, FREEZE: ("encoder.*", "decoder.*", "queries.*")}),
            version("109_v2", "899", "4.649"),
            version("110_v2", "99", "4.462"),
            version("112_v2", "849", "4.353"),
            version("109_v2", "751", "4.595"),
            version("112_v2", "751", "4.538"),
        ),
        note="The slides show losses of three runs, in two tables, without saying what each froze.",
    ),
}
