"""One evaluation as flat metrics, as text tables and as rows for a CSV file. All qualities are in percent."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from panoptic.metrics.quality import Quality
from panoptic.metrics.regions import Regions


@dataclass(frozen=True)
class Evaluation:
    """Everything that one pass over a validation set found."""

    quality: Quality
    regions: Regions | None = None
    """Mean IoU and pixel accuracy of the class maps; None if they were not counted."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Mean of each weighted term; `total` is their sum if it is not given."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds by name."""
    images: int = 0


def metrics(evaluation: Evaluation, prefix: str = "val") -> dict[str, float]:
    """A flat dict for a tracker: `val/pq`, `val/pq_things`, `val/miou`, `val/loss/total`, `val/time/...`.

    Names hold only characters that MLflow admits. Qualities are in percent, a group without a class is NaN.
    """
    quality, flat = evaluation.quality, {}
    for suffix, group in (("", quality.all), ("_things", quality.things), ("_stuff", quality.stuff)):
        flat |= {f"pq{suffix}": group.pq, f"sq{suffix}": group.sq, f"rq{suffix}": group.rq}
    if evaluation.regions is not None:
        everything, things, stuff = evaluation.regions.by_kind(quality.categories)
        flat |= {"miou": everything, "miou_things": things, "miou_stuff": stuff}
        flat["pixel_accuracy"] = evaluation.regions.pixel_accuracy
    if evaluation.losses:
        total = sum(evaluation.losses.values())
        flat |= {f"loss/{k}": v for k, v in ({"total": total} | dict(evaluation.losses)).items()}
    flat |= {f"time/{k}": v for k, v in evaluation.timings.items()}
    flat["images"] = evaluation.images
    return {safe_name(f"{prefix}/{name}"): float(value) for name, value in flat.items()}


def safe_name(name: str) -> str:
    """`name` with every character that MLflow refuses in a metric's name replaced by an underscore."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


def table(evaluation: Evaluation) -> str:
    """PQ, SQ and RQ (and mean IoU if counted) of all, things and stuff as text; `-` where no class occurs."""
    quality, regions = evaluation.quality, evaluation.regions
    header = ["", "PQ", "SQ", "RQ", "classes"]
    rows = [
        [name, _number(group.pq), _number(group.sq), _number(group.rq), str(group.classes)]
        for name, group in (("all", quality.all), ("things", quality.things), ("stuff", quality.stuff))
    ]
    if regions is not None:
        header.append("mIoU")
        for row, value in zip(rows, regions.by_kind(quality.categories), strict=True):
            row.append(_number(value))
    return _text([header, *rows])


def class_rows(evaluation: Evaluation) -> list[dict[str, str | int | float]]:
    """One row per class for a CSV file: class, kind, pq, sq, rq, tp, fp, fn, iou.

    `iou` is that of the class maps (NaN where they were not counted); NaN marks a class that never occurs.
    """
    quality, counts = evaluation.quality, evaluation.quality.counts
    iou = np.full(len(quality.pq), np.nan) if evaluation.regions is None else evaluation.regions.iou
    return [
        {
            "class": name,
            "kind": "thing" if thing else "stuff",
            "pq": float(quality.pq[c]),
            "sq": float(quality.sq[c]),
            "rq": float(quality.rq[c]),
            "tp": int(counts.tp[c]),
            "fp": int(counts.fp[c]),
            "fn": int(counts.fn[c]),
            "iou": float(iou[c]),
        }
        for c, (name, thing) in enumerate(zip(quality.categories.names, quality.categories.is_thing, strict=True))
    ]


def class_table(evaluation: Evaluation, worst: int | None = None) -> str:
    """`class_rows` as text: every class in order, or the `worst` classes by PQ among those that occur."""
    rows = class_rows(evaluation)
    if worst is not None:
        rows = sorted((row for row in rows if not math.isnan(row["pq"])), key=lambda row: row["pq"])[:worst]  # type: ignore
    header = ["class", "kind", "PQ", "SQ", "RQ", "TP", "FP", "FN", "IoU"]
    return _text([header, *([_cell(value) for value in row.values()] for row in rows)])


def _cell(value: str | int | float) -> str:
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _text(rows: Sequence[Sequence[str]]) -> str:
    """Columns separated by two spaces; words left-aligned, figures right-aligned."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    words = [k == 0 or rows[0][k] == "kind" for k in range(len(widths))]
    lines = (
        "  ".join(cell.ljust(w) if word else cell.rjust(w) for cell, w, word in zip(row, widths, words, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
