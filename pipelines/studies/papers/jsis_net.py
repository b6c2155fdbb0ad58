"""Panoptic Segmentation with a Joint Semantic and Instance Segmentation Network: its tables 1, 3 and 4."""

from pipelines.studies.study import ALL_QUALITIES, Row, Study

BRANCHES = "model.branches"

STUDIES = {
    "jsis-results": Study(
        title="Table 1: the best results on Mapillary Vistas and COCO",
        preset="jsis-net-r50-coco",
        small="jsis-net-pedestrians",
        columns=ALL_QUALITIES,
        begins="ImageNet",
        rows=(
            Row(
                "Mapillary Vistas val",
                {},
                "17.6 55.9 23.5 10.0 47.6 14.1 27.5 66.9 35.8",
                preset="jsis-net-r50-mapillary",
            ),
            Row("COCO test-dev", {}, "27.2 71.9 35.9 29.6 71.6 39.4 23.4 72.3 30.6", quoted=True),
            Row("COCO val", {}, "26.9 72.4 35.7 29.3 72.1 39.2 23.3 73.0 30.4"),
        ),
        note="Of test-dev only COCO's server has the truth: jobs/predict.py writes what it takes. On one data "
        "set the rows compare the two recipes; with --small they are one.",
    ),
    "joint": Study(
        title="Table 3: both branches trained jointly, or each alone, 17 epochs of Mapillary Vistas",
        preset="jsis-net-r50-mapillary",
        small="jsis-net-pedestrians",
        columns=("mIoU", "AP50", "PQ"),
        begins="ImageNet",
        recipe={"train.steps": 153_000},
        rows=(
            Row("joint", {BRANCHES: "both"}, "34.7 8.4 17.4"),
            Row("semantic only", {BRANCHES: "semantic"}, "33.6 - 15.0"),
            Row("instances only", {BRANCHES: "instances"}, "- 6.5 15.0"),
        ),
        merged=(1, 2),
        note="The PQ of the last two rows is that of the two single branches merged, in the paper as here.",
    ),
    "rpn-recall": Study(
        title="Table 4: mean recall of the region proposals at IoU 0.5",
        preset="jsis-net-r50-coco",
        small="jsis-net-pedestrians",
        columns=("recall", "PQ"),
        begins="ImageNet",
        rows=(
            Row("COCO's recipe", {}, "0.827 26.9"),
            Row("Mapillary's recipe", {}, "0.363 17.6", preset="jsis-net-r50-mapillary"),
        ),
        note="The paper compares two data sets; on one data set the rows compare the two recipes. PQ is of its "
        "table 1. With --small both rows are one.",
    ),
}
