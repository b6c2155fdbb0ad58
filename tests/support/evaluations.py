"""Maps evaluated without a network, for tests of what an evaluation says and of how it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from panoptic.evaluation.tally import Tally, summarise
from panoptic.metrics.average_precision import match_instances
from panoptic.metrics.image import ImageRecords, count_image
from panoptic.metrics.report import Evaluation
from panoptic.metrics.semantic import confusion
from panoptic.rle import encode_segments
from panoptic.segmentation import Categories, Instances, Segmentation

Pair = tuple[Segmentation, Segmentation]
"""Truth and prediction of one image."""


def tally_of(pairs: Iterable[Pair], categories: Categories) -> Tally:
    """Everything that is counted of some maps; the instances are the things of the predictions."""
    tally, classes = Tally(), len(categories)
    for row, (truth, prediction) in enumerate(pairs):
        scored = match_instances(truth, things_of(prediction, categories), categories)
        counts = count_image(truth, prediction, classes, True, scored, name=f"image {row}")
        tally.add(Tally(ImageRecords({row: counts}), confusion(truth.semantic(), prediction.semantic(), classes)))
    return tally


def evaluation_of(pairs: Iterable[Pair], categories: Categories) -> Evaluation:
    """The figures of some maps."""
    return summarise([tally_of(pairs, categories)], categories)


def things_of(prediction: Segmentation, categories: Categories) -> Instances:
    """The things of a map as instances, scored 1 where the map has no scores."""
    entries = np.flatnonzero(np.array(categories.is_thing, bool)[prediction.labels] & (prediction.areas() > 0))
    scores = np.ones(len(prediction.labels), np.float32) if prediction.scores is None else prediction.scores
    masks = encode_segments(prediction.segments, entries + 1)
    return Instances(masks, prediction.labels[entries], scores[entries], np.zeros((len(entries), 4), np.float32))


def moved(truth: Segmentation, rng: np.random.Generator, classes: int) -> Segmentation:
    """A prediction: the truth shifted, some segments relabelled, each with a score of its own."""
    labels = np.where(rng.random(len(truth.labels)) < 0.2, rng.integers(0, classes, len(truth.labels)), truth.labels)
    shifted = np.roll(truth.segments, rng.integers(0, 4, 2), (0, 1))
    return Segmentation(shifted, labels, scores=rng.random(len(labels)).astype(np.float32)).compact()


def moved_pairs(draw: Callable[..., Segmentation], categories: Categories, count: int) -> list[Pair]:
    """Drawn truths with crowds and void, and predictions of them."""
    pairs = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        truth = draw(rng, 48, 64, categories, things=6, crowd=True)
        pairs.append((truth, moved(truth, rng, len(categories))))
    return pairs
