"""Nothing depends on this: in which order images come and how segments are numbered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from panoptic.metrics.report import Evaluation, class_rows, metrics
from panoptic.segmentation import Categories, Segmentation
from tests.support.evaluations import evaluation_of, moved_pairs


def figures(evaluation: Evaluation) -> list[float]:
    """Every figure that is shown of an evaluation."""
    of_classes = [value for row in class_rows(evaluation) for value in row.values() if not isinstance(value, str)]
    assert evaluation.confusion is not None
    return [*metrics(evaluation).values(), *of_classes, *evaluation.confusion.ravel().tolist()]


def renumbered(image: Segmentation, rng: np.random.Generator) -> Segmentation:
    """The same segments under other numbers."""
    order = rng.permutation(len(image.labels))
    table = np.concatenate([[0], np.argsort(order) + 1]).astype(np.int32)
    scores = None if image.scores is None else image.scores[order]
    return Segmentation(table[image.segments], image.labels[order], image.is_crowd()[order], scores)


@pytest.fixture
def pairs(small_categories: Categories, random_segmentation: Callable[..., Segmentation]) -> list:
    return moved_pairs(random_segmentation, small_categories, 12)


def test_the_order_of_the_images_does_not_matter(pairs: list, small_categories: Categories) -> None:
    expected = figures(evaluation_of(pairs, small_categories))
    assert len(expected) > 90 and 0 < expected[0] < 100
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(pairs))
        permuted = figures(evaluation_of([pairs[k] for k in order], small_categories))
        np.testing.assert_allclose(permuted, expected, rtol=1e-12)  # sums of another order differ in the last bits


def test_the_numbers_of_the_segments_do_not_matter(pairs: list, small_categories: Categories) -> None:
    expected = figures(evaluation_of(pairs, small_categories))
    for seed in range(4):
        rng = np.random.default_rng(seed)
        again = evaluation_of([tuple(renumbered(image, rng) for image in pair) for pair in pairs], small_categories)
        np.testing.assert_allclose(figures(again), expected, rtol=1e-12)


def test_void_and_crowds_of_the_truth_earn_nothing(pairs: list, small_categories: Categories) -> None:
    """A prediction that fills void and crowds matches no more than one that leaves them alone."""
    ignored = [
        (truth.segments == 0) | np.isin(truth.segments, 1 + np.flatnonzero(truth.is_crowd())) for truth, _ in pairs
    ]
    alone = [(truth, replace(prediction, segments=np.where(mask, 0, prediction.segments)))
             for (truth, prediction), mask in zip(pairs, ignored, strict=True)]  # fmt: skip
    before, after = (
        evaluation_of(pairs, small_categories).quality.counts,
        evaluation_of(alone, small_categories).quality.counts,
    )
    assert (before.tp <= after.tp).all() and before.tp.sum() > 0
