"""The sentence that says what is wrong with a predicted map."""

from __future__ import annotations

import numpy as np

from panoptic.metrics.sentence import error_sentence
from panoptic.segmentation import Categories, Segmentation

CLASSES = Categories(("car", "bus", "road", "sky"), (True, True, False, False), (1, 2, 3, 4), ((0, 0, 0),) * 4)


def strips(*parts: tuple[int, int]) -> Segmentation:
    """Columns beside each other: (class or -1 for void, width), 10 rows high."""
    columns, labels = [], []
    for label, width in parts:
        if label >= 0:
            labels.append(label)
        columns += [len(labels) if label >= 0 else 0] * width
    return Segmentation(np.repeat([columns], 10, 0).astype(np.int32), np.array(labels, np.int64))


def test_the_largest_lost_segments_come_first_with_what_lies_on_them() -> None:
    truth = strips((0, 4), (1, 30), (2, 50), (3, 16))
    found = strips((2, 4), (0, 30), (2, 50), (-1, 16))
    assert error_sentence(truth, found, CLASSES) == (
        "Lost: bus, 30.0 % of the image, taken for car; sky, 16.0 % of the image, where nothing was found; "
        "car, 4.0 % of the image, taken for road. Made up: car, 30.0 %; road, 4.0 %."
    )


def test_of_many_the_largest_are_named_and_the_others_counted() -> None:
    truth = strips(*((0, width) for width in (1, 2, 3, 4, 5)), (2, 85))
    found = Segmentation(np.ones((10, 100), np.int32), np.array([2]))
    text = error_sentence(truth, found, CLASSES)
    assert text.startswith("Lost: car, 5.0 % of the image, taken for road; car, 4.0 %") and "; 2 more." in text


def test_a_segment_that_misses_its_outline_by_half_is_lost_to_its_own_class() -> None:
    text = error_sentence(strips((0, 40), (2, 60)), strips((0, 18), (-1, 22), (2, 60)), CLASSES)
    assert text.startswith("Lost: car, 40.0 % of the image, where nothing was found")
    text = error_sentence(strips((0, 30), (0, 10), (2, 60)), strips((0, 40), (2, 60)), CLASSES)
    assert text == "Lost: car, 10.0 % of the image, of which too little or too much was found."


def test_maps_without_errors_of_segments() -> None:
    truth = strips((0, 40), (2, 60))
    assert error_sentence(truth, truth, CLASSES) == ""
    text = error_sentence(truth, strips((0, 50), (2, 50)), CLASSES)
    assert text == "Every segment has a match; the worst outline is that of car, IoU 80 %."
    assert error_sentence(strips((-1, 100)), truth, CLASSES) == ""  # void forgives
