"""Oracles: some outputs of a network replaced by the ground truth, to see which of them cost most quality.

Panoptic-DeepLab ("Panoptic-DeepLab in PyTorch", table 2) has four such outputs and sixteen rows, Panoptic FCN (table 9)
has three, of which a class says nothing without a position. A model's `truth` gives the outputs that can be replaced;
its keys `position.things` and `position.p3` are parts of one output, `position`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import torch

from panoptic.metrics.report import Evaluation, metrics
from panoptic.metrics.text import markdown_table
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
"""Columns of the table, by their metrics' names in `metrics.report`: first those of Panoptic-DeepLab's table, in its
order. Metrics that were not counted are left out."""


def output_name(key: str) -> str:
    """The output that a key of `truth` is, or is a part of."""
    return key.split(".")[0]


def truth_names(model: PanopticModel) -> tuple[str, ...]:
    """The outputs that the truth can stand for, in the model's order, read off a grey image.

    Args:
        model: in evaluation mode.
    """
    device = next(model.parameters()).device
    images = torch.full((1, 3, 64, 64), 127, dtype=torch.uint8, device=device)
    nothing = torch.zeros(1, 64, 64, dtype=torch.int32, device=device)
    labels = torch.full((1, 1), -1, device=device)
    targets = Targets(nothing, labels, labels > 0, Frame.full(images), ("grey",))
    with torch.inference_mode():
        truth = model.truth(targets, model.network(images, targets.frame))
    return tuple(dict.fromkeys(output_name(key) for key in truth))


def subsets(names: Sequence[str], needs: Mapping[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Every choice of outputs to replace, the empty one first, without those that say nothing.

    Args:
        names: of the outputs.
        needs: the outputs without which an output says nothing.
    """
    every = [chosen for count in range(len(names) + 1) for chosen in combinations(names, count)]
    return [chosen for chosen in every if not missing_needs(chosen, needs)]


def missing_needs(chosen: Iterable[str], needs: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The outputs that a choice needs and lacks, sorted."""
    chosen = set(chosen)
    return sorted({need for name in chosen for need in needs.get(name, ()) if need not in chosen})


def swap(outputs: Outputs, truth: Outputs, names: Iterable[str]) -> Outputs:
    """The outputs of a network with some of them replaced by the truth.

    Args:
        outputs: of the network.
        truth: what the model's `truth` made of the targets.
        names: of the outputs to replace, each with all of its parts.

    Raises:
        ValueError: the truth cannot stand for one of them.
    """
    chosen, known = set(names), dict.fromkeys(output_name(key) for key in truth)
    if unknown := sorted(chosen - known.keys()):
        raise ValueError(f"swap: the truth does not stand for {', '.join(unknown)}; it does for {', '.join(known)}")
    return outputs | {key: value for key, value in truth.items() if output_name(key) in chosen}


def table(names: Sequence[str], rows: Sequence[tuple[Sequence[str], Evaluation]]) -> str:
    """`cells` as a Markdown table."""
    return markdown_table(cells(names, rows))


def cells(names: Sequence[str], rows: Sequence[tuple[Sequence[str], Evaluation]]) -> list[list[str]]:
    """A table, a line each choice: x for the outputs that are true, then the metrics of `COLUMNS` in percent.

    A figure that is not defined, as AP where no true thing is, is "-".

    Args:
        names: of all outputs, a column each.
        rows: choices of outputs, and their evaluations.
    """
    evaluated = [(chosen, metrics(evaluation, "")) for chosen, evaluation in rows]
    columns = [name for name in COLUMNS if any(f"/{name}" in figures for _, figures in evaluated)]
    lines = [[*names, *(COLUMNS[name] for name in columns)]]
    for chosen, figures in evaluated:
        marks = ["x" if name in chosen else "" for name in names]
        lines.append([*marks, *(_figure(figures.get(f"/{name}", float("nan"))) for name in columns)])
    return lines


def _figure(value: float) -> str:
    return "-" if value != value else f"{value:.1f}"
