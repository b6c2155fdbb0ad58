"""Panoptic Segmentation with a Joint Semantic and Instance Segmentation Network: its tables 3 and 4."""

from pipelines.studies.study import Row, Study

BRANCHES = "model.branches"

STUDIES = {
    "joint": Study(
        title="Table 3: both branches trained jointly, or each alone, 17 epochs of Mapillary Vistas",
        preset="jsis-net-r50-mapillary",
        small="jsis-net-pedestrians",
        columns=("mIoU", "AP50", "PQ"),
        recipe={"train.steps": 153_000},
        rows=(
            Row("joint", {BRANCHES: "both"}, (34.7, 8.4, 17.4)),
            Row("semantic only", {BRANCHES: "semantic"}, (33.6, None, 15.0)),
            Row("instances only", {BRANCHES: "instances"}, (None, 6.5, 15.0)),
        ),
        merged=(1, 2),
        note="The PQ of the last two rows is that of the two single branches merged, in the paper as here.",
    ),
    "rpn-recall": Study(
        title="Table 4: mean recall of the region proposals at IoU 0.5",
        preset="jsis-net-r50-coco",
        small="jsis-net-pedestrians",
        columns=("recall", "PQ"),
        rows=(
            Row("COCO's recipe", {}, (82.7, 26.9)),
            Row("Mapillary's recipe", {}, (36.3, 17.6), preset="jsis-net-r50-mapillary"),
        ),
        note="The paper compares two data sets; on one data set the rows compare the two recipes. PQ is of its "
        "table 1. With --small both rows are one.",
    ),
}
