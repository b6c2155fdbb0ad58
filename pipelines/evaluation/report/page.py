"""`report.html`: figures, plots and pictures of an evaluation in one file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from panoptic.metrics.bootstrap import LEAST, Counts, Interval, differences, intervals
from panoptic.metrics.report import Evaluation
from panoptic.visualization import ERROR_COLOURS
from pipelines.evaluation.report import charts
from pipelines.evaluation.report.charts import number
from pipelines.report.parts import document, panels, section, table, tiles

ERROR_KEY = ("right", "missed", "made up", "outline elsewhere")
"""Names of the colours, in the order of `visualization.ERROR_COLOURS`."""


@dataclass(frozen=True)
class Model:
    """One evaluated model."""

    title: str
    """Short, for lists and plots."""
    evaluation: Evaluation
    counts: Counts


@dataclass(frozen=True)
class Example:
    """One image as the report shows it."""

    name: str
    pq: float
    """PQ of this image alone, in percent."""
    panels: Mapping[str, bytes]
    """Title to JPEG: image, truth, prediction, errors."""
    sentence: str = ""
    """A sentence on the errors of its prediction; "" = no errors."""


def page(
    model: Model,
    others: Sequence[Model],
    worst: Sequence[Example],
    typical: Sequence[Example],
    facts: Mapping[str, str],
    oracle: Sequence[Sequence[str]] = (),
) -> str:
    """The report of `model`, compared with each of `others`.

    Args:
        worst, typical: images to show.
        facts: identity of model, data and evaluation.
        oracle: cells of the model's oracle table on the same data, the head first; () where nobody made one.
    """
    evaluation, categories = model.evaluation, model.evaluation.quality.categories
    parts = [
        f"<h1>{escape(model.title)}</h1><p>{escape(_header(evaluation, facts))}</p>",
        tiles(_tiles(evaluation, intervals(model.counts, categories)["all"])),
        charts.headline(evaluation),
        "<p>In percent. AP is that of the instances before merging, against the things of the panoptic truth, which "
        "never overlap: it compares with other figures “against panoptic masks” only. To AP, as to COCO, void is "
        "background; PQ leaves it out.</p>",
        *(_comparison(model, other) for other in others),
        section("Classes", "What each class scores and to what it loses; in front the one that costs the average "
                 "most. The last column is how much of the mean PQ it takes away.", charts.class_bars(evaluation)),
        section("Size of segments", "Matched and missed segments by the area of the truth, made-up ones by their own. "
                 "Pixels of the original image.", charts.size_table(evaluation)),
        _confusion(evaluation),
        section("Speed", f"{facts.get('device', '')}. Milliseconds an image of one process; images a second of all "
                 "together, reading and counting included.", _speed(model, others)),
        _oracle(oracle),
        _examples("Worst images", "Lowest PQ of the image alone.", worst),
        _examples("Typical images", "Those around the median of all images, by the PQ of each alone.", typical),
        section("What was evaluated", "", table([[k, v] for k, v in facts.items() if v], "facts")),
    ]  # fmt: skip
    return document(f"{model.title}: {number(evaluation.quality.all.pq)} PQ", parts)


def _header(evaluation: Evaluation, facts: Mapping[str, str]) -> str:
    """The data set and the date, which say what the figures are of."""
    said = facts.get("data") or f"{evaluation.images} images"
    return f"{said}. {facts['date']}" if facts.get("date") else said


def _tiles(evaluation: Evaluation, interval: Interval) -> list[tuple[str, str]]:
    spread = f"{number(interval.low)} to {number(interval.high)}"
    entries = [(f"PQ, 95 % within {spread}", number(evaluation.quality.all.pq, 2))]
    if evaluation.boundary is not None:
        entries.append(("boundary PQ", number(evaluation.boundary.all.pq)))
    if evaluation.regions is not None:
        entries.append(("mIoU", number(evaluation.regions.mean_iou)))
        entries.append(("pixel accuracy", number(evaluation.regions.pixel_accuracy)))
    if evaluation.precision is not None:
        entries.append(("AP against panoptic masks", number(evaluation.precision.mean_ap)))
    entries.append(("mean of the images' own PQ, which is not PQ", number(evaluation.image_pq)))
    if "images_per_second" in evaluation.timings:
        entries.append(("images a second, end to end", number(evaluation.timings["images_per_second"])))
    return entries


def _comparison(model: Model, other: Model) -> str:
    categories = model.evaluation.quality.categories
    gains = differences(other.counts, model.counts, categories)
    verdict = "The difference is within chance."
    if math.isnan(gains["all"].value):
        verdict = "One of them has no PQ, so there is nothing to compare."
    elif gains["all"].certain:
        verdict = f"This model is {'better' if gains['all'].value > 0 else 'worse'} by more than chance."
    elif gains["all"].images < LEAST:
        verdict = f"Fewer than {LEAST} images cannot tell a difference from chance."
    text = (
        f"PQ of {model.title} minus PQ of {other.title} ({number(other.evaluation.quality.all.pq, 2)}), on the same "
        f"images. {verdict} The lines hold 95 % of {len(model.counts.names)} images drawn again and again; a dot is "
        "coloured where they leave out 0."
    )
    return section(f"Against {other.title}", text, charts.difference_bars(gains, categories))


def _confusion(evaluation: Evaluation) -> str:
    if evaluation.confusion is None:
        return ""
    text = "Segments matched by IoU alone, whatever their classes; “nothing” are those missed and those made up."
    return section(
        "Who is taken for what", text, charts.confusions(evaluation.confusion, evaluation.quality.categories)
    )


def _oracle(cells: Sequence[Sequence[str]]) -> str:
    if not cells:
        return ""
    text = (
        "What the figures would be were some outputs of the network the truth (x), from jobs/oracle.py: the row that "
        "gains most says what to improve first."
    )
    return section("Oracle", text, table(cells))


def _speed(model: Model, others: Sequence[Model]) -> str:
    rows, points = [["", "network ms", "post-processing ms", "images/s", "PQ"]], []
    for one in (model, *others):
        speed, pq = one.evaluation.timings, one.evaluation.quality.all.pq
        network, postprocess = (speed.get(f"{name}_ms", float("nan")) for name in ("network", "postprocess"))
        rate = speed.get("images_per_second", float("nan"))
        rows.append([one.title, number(network), number(postprocess), number(rate, 2), number(pq)])
        points.append((one.title, network + postprocess, pq))
    return table(rows) + charts.speed_plot(points)


def _examples(title: str, text: str, examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    colours = zip(ERROR_KEY, ERROR_COLOURS.values(), strict=True)
    key = "".join(f'<span><i style="background:rgb{colour}"></i>{name}</span>' for name, colour in colours)
    figures = []
    for example in examples:
        caption = f"<figcaption><b>{number(example.pq)}</b> {escape(example.name)}</figcaption>"
        below = f'<p class="sentence">{escape(example.sentence)}</p>' if example.sentence else ""
        figures.append(f"<figure>{caption}{panels(example.name, example.panels)}{below}</figure>")
    return section(title, text, f'<div class="key">{key}</div>{"".join(figures)}')
