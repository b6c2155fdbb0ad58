"""Oracles: some outputs of a network swapped for what the ground truth would have said, to see which ones cost most.

Panoptic-DeepLab ("Panoptic-DeepLab in PyTorch", table 2) has four such outputs and sixteen rows, Panoptic FCN (table 9)
has three, of which a class says nothing without a position. What can be swapped is what a model's `truth` gives; its
keys `position.things` and `position.p3` are parts of one output, `position`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import torch

from panoptic.metrics.report import Evaluation, metrics
from panoptic.models.base import Outputs, PanopticModel
from panoptic.segmentation import Frame, Targets

COLUMNS = {
    "pq": "PQ",
    "sq": "SQ",
    "rq": "RQ",
    "ap": "AP",
    "miou": "mIoU",
    "pq_things": "PQ things",
    "pq_stuff": "PQ stuff",
}
"""Of the table, by their names in `metrics.report`: first those of Panoptic-DeepLab's, in its order. What was not
counted is left out."""


def output_name(key: str) -> str:
    """The output that a key of `truth` is, or is a part of."""
    return key.split(".")[0]


def truth_names(model: PanopticModel) -> tuple[str, ...]:
    """The outputs of a model in evaluation mode that the truth can stand for, in its order; tried on a grey image."""
    device = next(model.parameters()).device
    images = torch.full((1, 3, 64, 64), 127, dtype=torch.uint8, device=device)
    nothing = torch.zeros(1, 64, 64, dtype=torch.int32, device=device)
    labels = torch.full((1, 1), -1, device=device)
    targets = Targets(nothing, labels, labels > 0, Frame.full(images), ("grey",))
    with torch.inference_mode():
        truth = model.truth(targets, model.network(images, targets.frame))
    return tuple(dict.fromkeys(output_name(key) for key in truth))


def subsets(names: Sequence[str], needs: Mapping[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Every choice of outputs to swap, the empty one first, without those that lack what one of them needs."""
    every = [chosen for count in range(len(names) + 1) for chosen in combinations(names, count)]
    return [chosen for chosen in every if not missing_needs(chosen, needs)]


def missing_needs(chosen: Iterable[str], needs: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The outputs without which a choice says nothing."""
    chosen = set(chosen)
    return sorted({need for name in chosen for need in needs.get(name, ()) if need not in chosen})


def swap(outputs: Outputs, truth: Outputs, names: Iterable[str]) -> Outputs:
    """`outputs` with those named replaced by the truth.

    Raises:
        ValueError: the truth cannot stand for one of them.
    """
    wanted, known = set(names), dict.fromkeys(output_name(key) for key in truth)
    if unknown := sorted(wanted - known.keys()):
        raise ValueError(f"swap: the truth does not stand for {', '.join(unknown)}; it does for {', '.join(known)}")
    return outputs | {key: value for key, value in truth.items() if output_name(key) in wanted}


def table(names: Sequence[str], rows: Sequence[tuple[Sequence[str], Evaluation]]) -> str:
    """One line a choice as Markdown: which outputs are true (x), then PQ, SQ, RQ, AP, mean IoU in percent.

    A figure that is not defined, as AP where no true thing is, is "-".
    """
    values = [(chosen, metrics(evaluation, "")) for chosen, evaluation in rows]
    columns = [name for name in COLUMNS if any(f"/{name}" in found for _, found in values)]
    cells = [[*names, *(COLUMNS[name] for name in columns)]]
    for chosen, found in values:
        marks = ["x" if name in chosen else "" for name in names]
        cells.append([*marks, *(_figure(found.get(f"/{name}", float("nan"))) for name in columns)])
    widths = [max(len(line[k]) for line in cells) for k in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _figure(value: float) -> str:
    return "-" if value != value else f"{value:.1f}"
