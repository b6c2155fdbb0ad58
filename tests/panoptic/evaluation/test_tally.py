"""Tallies: the same figures however the images are shared out, and no image counted twice."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from panoptic import rle
from panoptic.evaluation.tally import Batch, Measures, Tally, evaluate_batches, summarise
from panoptic.metrics.report import details, metrics
from panoptic.models.base import Outputs, Prediction, Wanted
from panoptic.segmentation import Frame, Instances, Segmentation
from panoptic.training.device import Engine
from tests.support.tiny import Tiny, TinyConfig, tiny_batch, tiny_categories


def model() -> Tiny:
    torch.manual_seed(0)
    return TinyConfig().build(tiny_categories()).eval()


class Reader(Tiny):
    """Reads the class off the first channel of a tiny batch, so that some of it is right."""

    def network(self, images: Tensor, frame: Frame | None = None) -> Outputs:
        label = images[:, :1].float() // 60
        return {"semantic": -((label - torch.arange(3)[None, :, None, None]) ** 2)}


def batches(rows: Sequence[int]) -> list[Batch]:
    """One batch of one image for each row."""
    collected = []
    for row in rows:
        images, targets = tiny_batch(row, batch=1)
        truth = Segmentation(targets.segments[0].numpy(), targets.labels[0].numpy(), targets.crowd[0].numpy())
        collected.append(Batch(images, targets, [truth], [row]))
    return collected


def test_figures_do_not_depend_on_who_counted_what() -> None:
    network, rows = model(), list(range(12))
    whole = summarise([evaluate_batches(network, batches(rows), Engine())], network.categories)
    parts = [evaluate_batches(network, batches(part), Engine()) for part in (rows[7:], rows[2:7], [], rows[:2])]
    shared = summarise(parts, network.categories)
    expected = {name: value for name, value in metrics(whole).items() if "time/" not in name}
    figures = {name: value for name, value in metrics(shared).items() if "time/" not in name}
    np.testing.assert_equal(figures, expected)
    assert expected["val/images"] == 12 and 0 < expected["val/miou"] < 100
    assert expected["val/loss/total"] == pytest.approx(expected["val/loss/semantic"] + expected["val/loss/size"])


def test_everything_can_be_counted_and_adds_up() -> None:
    network, rows = Reader(TinyConfig(), tiny_categories()).eval(), list(range(6))
    plain = summarise([evaluate_batches(network, batches(rows), Engine())], network.categories)
    halves = [evaluate_batches(network, batches(part), Engine(), Measures(True, True)) for part in (rows[3:], rows[:3])]
    whole = summarise(halves, network.categories)
    assert plain.boundary is None and plain.precision is None
    assert whole.boundary is not None and whole.precision is not None and whole.confusion is not None
    flat = metrics(whole)
    assert flat["val/pq"] == metrics(plain)["val/pq"] >= flat["val/boundary_pq"] >= 0
    assert flat["val/ap"] == 0  # it finds no instance
    counts = whole.quality.counts
    assert flat["val/tp"] == counts.tp.sum() and flat["val/fp"] == counts.fp.sum() and flat["val/fn"] == counts.fn.sum()
    assert whole.confusion[:-1].sum() == counts.tp.sum() + counts.fn.sum()
    single = [
        summarise([evaluate_batches(network, batches([row]), Engine())], network.categories).quality.all.pq
        for row in rows
    ]
    assert whole.image_pq == pytest.approx(np.mean(single)) != flat["val/pq"]
    assert {"network_ms", "postprocess_ms", "loss_ms", "metric_ms", "data_ms"} <= set(whole.timings)
    assert "against panoptic masks" in details(whole) and "AP" not in details(plain)


class Everywhere(Tiny):
    """Sees class 1 everywhere, as one segment and as one instance."""

    def postprocess(self, outputs: Outputs, frame: Frame, want: Collection[Wanted] = ("maps",)) -> Prediction:
        sizes = [(height, width) for height, width in frame.output_sizes.tolist()]
        instances = Instances(rle.encode_masks(np.ones((1, *sizes[0]), np.uint8)), *SCORED) if sizes else None
        return Prediction(
            maps=[Segmentation(np.ones(size, np.int32), np.array([1])) for size in sizes],
            instances=[instances] * len(sizes) if instances and "instances" in want else None,
            semantics=[np.full(size, 1, np.int32) for size in sizes],
        )


SCORED = (np.array([1]), np.array([0.9], np.float32), np.array([[0, 0, 8, 8]], np.float32))


def test_predictions_of_classes_that_nobody_annotated_are_neither_right_nor_wrong() -> None:
    network, everything = Everywhere(TinyConfig(), tiny_categories()).eval(), Measures(boundary=True, instances=True)
    assert network.categories.is_thing == (False, True, False)
    truth = Segmentation(np.ones((16, 16), np.int32), np.array([0]))  # a stuff class, and nothing of class 1
    (batch,) = batches([0])
    batch = batch._replace(truths=[truth])
    batch.targets.frame.output_sizes[:] = 16
    plain = summarise([evaluate_batches(network, [batch], Engine(), everything)], network.categories)
    freed = batch._replace(absent=[frozenset([1])])
    tally = evaluate_batches(network, [freed], Engine(), everything)
    mapped = summarise([tally], network.categories)
    assert plain.quality.counts.fp[1] == 1 and mapped.quality.counts.fp.sum() == 0
    assert plain.quality.counts.fn[0] == mapped.quality.counts.fn[0] == 1  # what it covers is missed all the same
    assert np.isnan(mapped.quality.pq[1]) and plain.quality.pq[1] == 0
    assert plain.regions is not None and mapped.regions is not None
    assert np.isnan(mapped.regions.iou[1]) and plain.regions.iou[1] == 0 == mapped.regions.iou[0]
    matches = tally.images[0].instances
    assert matches is not None and not len(matches.labels)


class Proposing(Tiny):
    """Proposes the left half of every image."""

    def postprocess(self, outputs: Outputs, frame: Frame, want: Collection[Wanted] = ("maps",)) -> Prediction:
        sizes = frame.output_sizes.tolist()
        boxes = [torch.tensor([[0.0, 0.0, width / 2, float(height)]]) for height, width in sizes]
        prediction = super().postprocess(outputs, frame, want)
        return replace(prediction, proposals=boxes if "proposals" in want else None)


def test_recall_of_proposals_is_the_mean_over_images_that_hold_things() -> None:
    network, rows = Proposing(TinyConfig(), tiny_categories()).eval(), list(range(12))
    evaluation = summarise(
        [evaluate_batches(network, batches(rows), Engine(), Measures(instances=True))], network.categories
    )
    shares = []
    for batch in batches(rows):
        (truth,) = batch.truths  # two halves; class 1 is the thing
        things = truth.labels == 1
        if things.any():
            shares.append(100 * things[0] / things.sum())
    assert 0 < len(shares) < 12
    assert evaluation.proposal_recall == metrics(evaluation)["val/proposal_recall"] == pytest.approx(np.mean(shares))
    assert "recall of proposals" in details(evaluation)
    plain = summarise([evaluate_batches(network, batches(rows), Engine())], network.categories)
    assert np.isnan(plain.proposal_recall) and "val/proposal_recall" not in metrics(plain)


def test_no_row_counts_twice_and_nothing_is_no_result() -> None:
    network = model()
    with pytest.raises(ValueError, match=r"more than once: \[3\]"):
        evaluate_batches(network, batches([2, 3, 3]), Engine())
    with pytest.raises(ValueError, match="nothing was evaluated"):
        summarise([Tally()], network.categories)
    with pytest.raises(ValueError, match="training mode"):
        evaluate_batches(network.train(), batches([1]), Engine())  # type: ignore[arg-type]
