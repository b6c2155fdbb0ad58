"""Tallies: the same figures however the images are shared out, and no image counted twice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from panoptic.engine import Engine
from panoptic.evaluation import Batch, Tally, judge, summarise
from panoptic.metrics.report import metrics
from panoptic.segmentation import Segmentation
from tests.panoptic.tiny import Tiny, TinyConfig, tiny_batch, tiny_categories


def model() -> Tiny:
    import torch

    torch.manual_seed(0)
    return TinyConfig().build(tiny_categories()).eval()


def batches(rows: Sequence[int]) -> list[Batch]:
    """One batch of one image for each row."""
    found = []
    for row in rows:
        images, targets = tiny_batch(row, batch=1)
        truth = Segmentation(targets.segments[0].numpy(), targets.labels[0].numpy(), targets.crowd[0].numpy())
        found.append(Batch(images, targets, [truth], [row]))
    return found


def test_figures_do_not_depend_on_who_counted_what() -> None:
    network, rows = model(), list(range(12))
    whole = summarise([judge(network, batches(rows), Engine())], network.categories)
    parts = [judge(network, batches(part), Engine()) for part in (rows[7:], rows[2:7], [], rows[:2])]
    shared = summarise(parts, network.categories)
    expected = {name: value for name, value in metrics(whole).items() if "time/" not in name}
    found = {name: value for name, value in metrics(shared).items() if "time/" not in name}
    np.testing.assert_equal(found, expected)
    assert expected["val/images"] == 12 and 0 < expected["val/miou"] < 100
    assert expected["val/loss/total"] == pytest.approx(expected["val/loss/semantic"] + expected["val/loss/size"])


def test_no_row_counts_twice_and_nothing_is_no_result() -> None:
    network = model()
    with pytest.raises(ValueError, match=r"more than once: \[3\]"):
        judge(network, batches([2, 3, 3]), Engine())
    with pytest.raises(ValueError, match="nothing was evaluated"):
        summarise([Tally()], network.categories)
    with pytest.raises(ValueError, match="training mode"):
        judge(network.train(), batches([1]), Engine())  # type: ignore[arg-type]
