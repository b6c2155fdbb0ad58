"""One evaluation as flat metrics, as text tables and as rows for a CSV file. All qualities are in percent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from panoptic.metrics.average_precision import Precision
from panoptic.metrics.panoptic_quality import Quality
from panoptic.metrics.semantic import SemanticQuality
from panoptic.metrics.text import metric_name, text_table


@dataclass(frozen=True)
class Evaluation:
    """Metrics, losses and times of one pass over a validation set."""

    quality: Quality
    regions: SemanticQuality | None = None
    """Mean IoU and pixel accuracy of the class maps; None if they were not counted."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Mean of each weighted term; `total` is their sum if it is not given."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds an image by name, and `images_per_second` of all workers together."""
    images: int = 0
    sizes: Mapping[str, Quality] = field(default_factory=dict)
    """PQ of small, medium and large segments (`metrics.image.SIZES`)."""
    boundary: Quality | None = None
    """Boundary PQ; None if it was not counted."""
    precision: Precision | None = None
    """AP of the instances before merging, against panoptic masks; None if it was not counted."""
    proposal_recall: float = float("nan")
    """The mean over images of the share of true things that some region proposal covers with IoU 0.5 (JSIS-Net's
    table 4), in percent; NaN if it was not counted."""
    image_pq: float = float("nan")
    """The mean over images of the PQ of each alone. Not PQ: a class counts only in the images in which it occurs."""
    confusion: np.ndarray | None = None
    """int64 [C + 1, C + 1], segments by true and by predicted class, matched by IoU alone; the last row counts false
    positives, the last column misses."""


FEW = 32
"""Classes up to which the PQ of each is a metric of its own; the table of classes has it for any number."""


def metrics(evaluation: Evaluation, prefix: str = "val") -> dict[str, float]:
    """A flat dict for a tracker: `val/pq`, `val/pq_things`, `val/miou`, `val/loss/total`, `val/time/...`.

    Names hold only characters that MLflow admits. Qualities are in percent, a group without a class is NaN.
    """
    quality, flat = evaluation.quality, {}
    for suffix, group in (("", quality.all), ("_things", quality.things), ("_stuff", quality.stuff)):
        flat |= {f"pq{suffix}": group.pq, f"sq{suffix}": group.sq, f"rq{suffix}": group.rq}
    counts = quality.counts
    flat |= {"tp": counts.tp.sum(), "fp": counts.fp.sum(), "fn": counts.fn.sum(), "mean_image_pq": evaluation.image_pq}
    flat |= {f"pq_{name}": sized.all.pq for name, sized in evaluation.sizes.items()}
    if len(quality.categories) <= FEW:
        scores = zip(quality.categories.names, quality.pq.tolist(), strict=True)
        flat |= {f"class_pq/{name}": value for name, value in scores if not math.isnan(value)}
    flat |= {f"pq_things_{name}": sized.things.pq for name, sized in evaluation.sizes.items()}
    if evaluation.boundary is not None:
        groups = evaluation.boundary.all, evaluation.boundary.things, evaluation.boundary.stuff
        flat |= {f"boundary_pq{s}": g.pq for s, g in zip(("", "_things", "_stuff"), groups, strict=True)}
    if evaluation.precision is not None:
        flat |= {"ap": evaluation.precision.mean_ap, "ap50": evaluation.precision.mean_ap50}
    if not math.isnan(evaluation.proposal_recall):
        flat["proposal_recall"] = evaluation.proposal_recall
    if evaluation.regions is not None:
        everything, things, stuff = evaluation.regions.by_kind(quality.categories)
        flat |= {"miou": everything, "miou_things": things, "miou_stuff": stuff}
        flat["pixel_accuracy"] = evaluation.regions.pixel_accuracy
    if evaluation.losses:
        total = sum(evaluation.losses.values())
        flat |= {f"loss/{k}": v for k, v in ({"total": total} | dict(evaluation.losses)).items()}
    flat |= {f"time/{k}": v for k, v in evaluation.timings.items()}
    flat["images"] = evaluation.images
    return {metric_name(f"{prefix}/{name}"): float(value) for name, value in flat.items()}


def table(evaluation: Evaluation) -> str:
    """PQ, SQ and RQ (and mean IoU if counted) of all, things and stuff as text; `-` where no class occurs."""
    quality, regions = evaluation.quality, evaluation.regions
    header = ["", "PQ", "SQ", "RQ", "classes"]
    rows = [
        [name, number(group.pq), number(group.sq), number(group.rq), str(group.classes)]
        for name, group in (("all", quality.all), ("things", quality.things), ("stuff", quality.stuff))
    ]
    if regions is not None:
        header.append("mIoU")
        for row, value in zip(rows, regions.by_kind(quality.categories), strict=True):
            row.append(number(value))
    if evaluation.boundary is not None:
        header.append("boundary PQ")
        groups = evaluation.boundary.all, evaluation.boundary.things, evaluation.boundary.stuff
        for row, group in zip(rows, groups, strict=True):
            row.append(number(group.pq))
    return text_table([header, *rows])


def details(evaluation: Evaluation) -> str:
    """The figures that the table has no column for, a line each: PQ by size, AP, pixel accuracy, counts, speed."""
    counts, lines = evaluation.quality.counts, {}
    if evaluation.sizes:
        lines["PQ by size"] = ", ".join(f"{name} {number(q.all.pq)}" for name, q in evaluation.sizes.items())
        lines["of things"] = ", ".join(f"{name} {number(q.things.pq)}" for name, q in evaluation.sizes.items())
    if evaluation.precision is not None:
        precision = evaluation.precision
        lines["AP, AP50"] = (
            f"{number(precision.mean_ap)}, {number(precision.mean_ap50)} (things, against panoptic masks)"
        )
    if not math.isnan(evaluation.proposal_recall):
        lines["recall of proposals"] = f"{number(evaluation.proposal_recall)} (boxes at IoU 0.5, mean over images)"
    if evaluation.regions is not None:
        lines["pixel accuracy"] = number(evaluation.regions.pixel_accuracy)
    lines["mean of images' PQ"] = f"{number(evaluation.image_pq)} (each image alone, which is not PQ)"
    lines["segments"] = f"{counts.tp.sum()} matched, {counts.fp.sum()} made up, {counts.fn.sum()} missed"
    speed = evaluation.timings
    if "network_ms" in speed:
        lines["speed"] = (
            f"network {speed['network_ms']:.1f} ms, post-processing {speed['postprocess_ms']:.1f} ms an image"
        )
        if "images_per_second" in speed:
            lines["speed"] += f"; {speed['images_per_second']:.2f} images/s end to end over {evaluation.images} images"
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {text}" for name, text in lines.items())


def class_rows(evaluation: Evaluation) -> list[dict[str, str | int | float]]:
    """One row per class for a CSV file: class, kind, pq, sq, rq, tp, fp, fn, iou, boundary_pq, ap, ap50.

    `iou` is that of the class maps. NaN marks a class that never occurs; what was not counted has no column.
    """
    quality, counts = evaluation.quality, evaluation.quality.counts
    iou = np.full(len(quality.pq), np.nan) if evaluation.regions is None else evaluation.regions.iou
    more = {} if evaluation.boundary is None else {"boundary_pq": evaluation.boundary.pq}
    if evaluation.precision is not None:
        more |= {"ap": evaluation.precision.ap, "ap50": evaluation.precision.ap50}
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
            **{key: float(values[c]) for key, values in more.items()},
        }
        for c, (name, thing) in enumerate(zip(quality.categories.names, quality.categories.is_thing, strict=True))
    ]


def class_table(evaluation: Evaluation, worst: int | None = None) -> str:
    """`class_rows` as text: every class in order, or the `worst` classes by PQ among those that occur."""
    rows = class_rows(evaluation)
    if worst is not None:
        rows = sorted((row for row in rows if not math.isnan(row["pq"])), key=lambda row: row["pq"])[:worst]  # type: ignore
    names = {"iou": "IoU", "boundary_pq": "boundary", "class": "class", "kind": "kind"}
    header = [names.get(key, key.upper()) for key in (rows or class_rows(evaluation))[0]]
    return text_table([header, *([_cell(value) for value in row.values()] for row in rows)], words=("kind",))


def _cell(value: str | int | float) -> str:
    return number(value) if isinstance(value, float) else str(value)


def number(value: float) -> str:
    """A figure in percent with two digits; `-` for NaN."""
    return "-" if math.isnan(value) else f"{value:.2f}"
