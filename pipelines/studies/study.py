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
    "RQ": "val/rq",
    "AP": "val/ap",
    "AP50": "val/ap50",
    "mIoU": "val/miou",
    "recall": "val/proposal_recall",
    "loss": "val/loss/total",
}
"""Metric of an evaluation by the column of the papers' tables."""

QUALITIES = ("PQ", "things", "stuff")

SMALL: dict[str, dict[Any, Any]] = {
    "model.backbone.name": {
        **{"resnet50": "resnet18", "resnet101": "resnet34", "convnext_tiny": "convnext_femto"},
        "vit_small_patch14_reg4_dinov2": "vit_tiny_patch16_224",
    },
    "model.rates": {(3, 6, 9): (1, 2, 3), (6, 12, 18): (2, 4, 6), (12, 24, 36): (4, 8, 12)},
    "augment.sides": {(400,): (160,), (500,): (200,), (600,): (240,), (700,): (280,)},
    "augment.longest": {400: 320, 500: 400, 600: 480, 700: 560},
    "resize.short": {400: 160, 500: 200, 600: 240, 700: 280},
    "resize.longest": {400: 320, 500: 400, 600: 480, 700: 560},
}
"""Value on the small presets by option and published value: smaller backbones, dilations and sides in one ratio."""


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    label: str
    change: Mapping[str, Any]
    """Options in which it differs from the other rows."""
    paper: tuple[float | None, ...] = ()
    """The paper's figures in the order of the study's columns; None where it gives none."""
    evaluate_with: Mapping[str, Any] = field(default_factory=dict)
    """Options of the model that differ only while it is evaluated; rows that differ in nothing else train once."""
    preset: str = ""
    """Its preset, where it is not the study's."""


@dataclass(frozen=True)
class Study:
    """A table of a paper."""

    title: str
    preset: str
    """The preset with the paper's recipe."""
    small: str
    """The preset of --small: two CPU cores, from scratch."""
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
    note: str = ""
    """A remark below the table: what the paper leaves open."""
