"""Swapping outputs for the truth, and the table of what each is worth."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from panoptic.evaluation.oracle import missing_needs, subsets, swap, table, truth_names
from panoptic.evaluation.tally import Batch, Measures, evaluate_batches, summarise
from panoptic.metrics.panoptic_quality import QualityCounts, quality
from panoptic.metrics.report import Evaluation
from panoptic.models.base import PanopticModel
from panoptic.segmentation import Categories, Sample, Segmentation, collate
from panoptic.training.device import Engine
from tests.support.small import SMALL_DEEPLAB, SMALL_FCN

FCN_NEEDS = {"class": ("position",), "mask": ("class",)}


def test_subsets_leave_out_what_says_nothing() -> None:
    assert subsets(("a", "b"), {}) == [(), ("a",), ("b",), ("a", "b")]
    names = ("position", "class", "mask")
    assert subsets(names, FCN_NEEDS) == [names[:count] for count in range(4)]
    assert missing_needs(["mask", "position"], FCN_NEEDS) == ["class"]


def test_a_swap_takes_every_part_of_an_output_and_leaves_the_others() -> None:
    outputs = {"encoded": torch.zeros(1), "centre": torch.zeros(1)}
    truth = {"centre": torch.ones(1), "position.things": torch.ones(2), "position.p3": torch.ones(3)}
    assert swap(outputs, truth, []) == outputs
    swapped = swap(outputs, truth, ["position"])
    assert swapped.keys() == {"encoded", "centre", "position.things", "position.p3"}
    assert swapped["centre"] is outputs["centre"] and swap(outputs, truth, ["centre"])["centre"] is truth["centre"]
    with pytest.raises(ValueError, match=r"does not stand for offset; it does for centre, position"):
        swap(outputs, truth, ["offset"])


def small(name: str, categories: Categories) -> PanopticModel:
    torch.manual_seed(0)
    config = {"deeplab": SMALL_DEEPLAB, "fcn": SMALL_FCN}[name]
    return config.build(categories).eval()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("deeplab", ("semantic", "centre", "offset", "foreground")), ("fcn", ("position", "class", "mask"))],
)
def test_what_the_truth_stands_for(name: str, expected: tuple[str, ...], small_categories) -> None:
    assert truth_names(small(name, small_categories)) == expected


def batches(categories: Categories, draw) -> list[Batch]:
    truths = [draw(np.random.default_rng(k), 64, 96, categories, things=4, void=False) for k in range(3)]
    batches = []
    for row, truth in enumerate(truths):
        image = np.random.default_rng(row).integers(0, 256, (*truth.size, 3), np.uint8)
        images, targets = collate([Sample(image, truth, f"image {row}", original=truth)], 32)
        batches.append(Batch(images, targets, [truth], [row]))
    return batches


@pytest.mark.parametrize("name", ["deeplab", "fcn"])
def test_evaluated_with_more_and_more_of_the_truth(name: str, small_categories, random_segmentation) -> None:
    model = small(name, small_categories)
    names = truth_names(model)
    rows = []
    for chosen in (names[:count] for count in range(len(names) + 1)):
        measures = Measures(instances=True, true=chosen)
        tally = evaluate_batches(model, batches(small_categories, random_segmentation), Engine(), measures)
        rows.append((chosen, summarise([tally], small_categories)))
    qualities = [evaluation.quality.all.pq for _, evaluation in rows]
    assert qualities[0] < 50 and qualities[-1] == pytest.approx(100)
    losses = [dict(evaluation.losses) for _, evaluation in rows]
    assert all(other == losses[0] for other in losses)  # they are the network's, whatever is swapped
    lines = table(names, rows).splitlines()
    assert len(lines) == len(rows) + 2 and all(f" {name} " in lines[0] for name in names)
    assert lines[2].count(" x ") == 0 and lines[-1].count(" x ") == len(names) and "100.0" in lines[-1]
    assert [cell.strip() for cell in lines[0].split("|")[1 + len(names) : -3]] == ["PQ", "SQ", "RQ", "AP", "mIoU"]
    assert max(map(len, lines)) <= 110 and "-" not in "".join(lines[2:])  # every row has every figure


def test_ap_of_images_without_a_thing_is_a_dash(small_categories) -> None:
    sky = Segmentation(np.ones((64, 96), np.int32), np.array([small_categories.names.index("sky")]))
    image = np.zeros((64, 96, 3), np.uint8)
    images, targets = collate([Sample(image, sky, "sky", original=sky)], 32)
    batch = Batch(images, targets, [sky], [0])
    model = small("deeplab", small_categories)
    tally = evaluate_batches(model, [batch], Engine(), Measures(instances=True, true=truth_names(model)))
    header, _, row = table((), [((), summarise([tally], small_categories))]).splitlines()
    cells = dict(zip(*([cell.strip() for cell in line.split("|")[1:-1]] for line in (header, row)), strict=True))
    assert cells["AP"] == "-" and cells["PQ"] == cells["mIoU"] == "100.0"


def test_columns_that_were_not_counted_are_left_out() -> None:
    categories = Categories(("a", "b"), (True, False), (1, 2), ((0, 0, 0),) * 2)
    counts = replace(QualityCounts.zeros(2), iou=np.array([0.8, 0.0]), tp=np.array([1, 0]), fn=np.array([1, 0]))
    printed = table(("centre",), [((), Evaluation(quality(counts, categories)))])
    header, _, row = printed.splitlines()
    assert [cell.strip() for cell in header.split("|")[1:-1]] == [
        "centre",
        "PQ",
        "SQ",
        "RQ",
        "PQ things",
        "PQ stuff",
    ]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert math.isclose(float(cells[1]), 53.3) and cells[2:] == ["80.0", "66.7", "53.3", "-"]
