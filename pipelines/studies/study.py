"""A study: a table of a paper, as options beside the paper's figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

METRICS = {
    "PQ": "val/pq",
    "things": "val/pq_things",
    "stuff": "val/pq_stuff",
    "SQ": "val/sq",
    "SQ things": "val/sq_things",
    "SQ stuff": "val/sq_stuff",
    "RQ": "val/rq",
    "RQ things": "val/rq_things",
    "RQ stuff": "val/rq_stuff",
    "AP": "val/ap",
    "AP50": "val/ap50",
    "mIoU": "val/miou",
    "recall": "val/proposal_recall",
    "loss": "val/loss/total",
    "network ms": "val/time/network_ms",
    "merging ms": "val/time/postprocess_ms",
    "FPS": "val/time/images_per_second",
    "s/step": "train/step_seconds",
    "MiB": "train/memory_mib",
}
"""Metric of an evaluation by the column of the papers' tables; of a training those of `COSTS`."""

COSTS = ("s/step", "MiB")
"""Columns of what a step of training takes, which the curves of a row's MLflow run tell: seconds, the median of the
lines of the log; and the peak memory of the first worker at the first of these lines, as a rule before it validates."""

DECIMALS = {"recall": 3, "s/step": 3, "MiB": 0}
"""Digits behind the point of our figures by column; 2 elsewhere."""

UNITS = {"recall": 0.01}
"""Factor by which our figure is multiplied, where a paper prints a column in another unit: recall as a fraction."""

QUALITIES = ("PQ", "things", "stuff")
ALL_QUALITIES = ("PQ", "SQ", "RQ", "things", "SQ things", "RQ things", "stuff", "SQ stuff", "RQ stuff")

NONE = "-"
"""A figure that a paper does not give."""

SMALL: dict[str, dict[Any, Any]] = {
    "model.backbone.name": {
        **{"resnet50": "resnet18", "resnet101": "resnet34", "convnext_tiny": "convnext_femto"},
        "vit_small_patch14_reg4_dinov2": "vit_tiny_patch16_224",
        "resnet50_double3x3": "resnet14_double3x3",
        "vgg16": "vgg11",
        "res2net50_26w_4s": "res2net14_26w_4s",
    },
    "model.rates": {(3, 6, 9): (1, 2, 3), (6, 12, 18): (2, 4, 6), (12, 24, 36): (4, 8, 12)},
    "optim.weight_decay": {1e-5: 0.05, 1e-4: 0.5},
    "augment.sides": {(400,): (160,), (500,): (200,), (600,): (240,), (700,): (280,)},
    "augment.longest": {400: 320, 500: 400, 600: 480, 700: 560},
    "resize.short": {400: 160, 500: 200, 600: 240, 700: 280},
    "resize.longest": {400: 320, 500: 400, 600: 480, 700: 560},
}
"""Value on the small presets by option and published value: smaller backbones, dilations and sides in one ratio.

Weight decay: AdamW multiplies a weight by 1 - rate x decay a step, so at a rate of 1.4e-3 a decay of 1e-4 takes 0.03 %
of it in 2300 steps, which no table can show; 0.05 and 0.5 take up to 15 % and 80 %, and are ten times apart as well."""

SMALL_WITH_WEIGHTS: dict[str, dict[Any, Any]] = {
    "model.backbone.name": {"resnet50": "tf_efficientnet_lite0", "resnet101": "tf_efficientnet_lite2"},
}
"""Values that go before `SMALL` on small presets that begin with ImageNet weights: backbones with a package of them."""


def small_value(path: str, value: Any, with_weights: bool) -> Any:
    """The value that an option has with --small.

    Args:
        path: of the option.
        value: the published one.
        with_weights: the small preset begins with ImageNet weights.
    """
    tables = (SMALL_WITH_WEIGHTS, SMALL) if with_weights else (SMALL,)
    return next((table[path][value] for table in tables if value in table.get(path, {})), value)


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    label: str
    change: Mapping[str, Any]
    """Options in which it differs from the other rows."""
    paper: str = ""
    """The paper's figures as it prints them, one for each of the study's columns, "-" where it gives none; "" where it
    gives none at all."""
    evaluate_with: Mapping[str, Any] = field(default_factory=dict)
    """Options of the model that differ only while it is evaluated; rows that differ in nothing else train once."""
    preset: str = ""
    """Preset of the row, where it is not the study's."""
    small: str = ""
    """Preset of the row with --small, where it is not the study's."""
    small_change: Mapping[str, Any] | None = None
    """`change` with --small, where `SMALL` does not turn one into the other."""
    true: tuple[str, ...] | None = None
    """Outputs of the network that the truth takes the place of while it is evaluated (an oracle); None = no oracle."""
    quoted: bool = False
    """A method or a test set that cannot be trained or evaluated here: the paper's figures stand alone."""

    def figures(self, columns: int) -> tuple[str, ...]:
        """The paper's figures, one a column."""
        return tuple(self.paper.split()) if self.paper else (NONE,) * columns


@dataclass(frozen=True)
class Study:
    """A table of a paper."""

    title: str
    preset: str
    """The preset with the paper's recipe."""
    small: str
    """The preset of --small, for two CPU cores."""
    rows: tuple[Row, ...]
    columns: tuple[str, ...] = QUALITIES
    """Keys of `METRICS`."""
    setting: Mapping[str, Any] = field(default_factory=dict)
    """Options of all rows, also with --small."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Options of all rows without --small: what the paper says beyond its preset."""
    images: int = 0
    """Images of the paper's training set, of which `data.limit` of preset and rows is a share. 0 = it is a number."""
    merged: tuple[int, ...] = ()
    """Rows (semantic, instances) of branches that are trained alone: their PQ is that of both models merged."""
    seeds: int = 1
    """Seeds of every row, where --seeds says nothing."""
    begins: str = ""
    """The weights with which the paper's models begin ("ImageNet's"), which a study without any says when it starts."""
    note: str = ""
    """A remark below the table: what the paper leaves open."""

    @property
    def trained(self) -> tuple[Row, ...]:
        """The rows that are trained or evaluated here: all that are not quoted."""
        return tuple(row for row in self.rows if not row.quoted)
