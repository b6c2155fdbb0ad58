"""Augmentation: image and map stay aligned, every draw follows the generator, sizes follow the published rules.

Shapes: H x W pixels.
"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panoptic.ranges import check_ranges
from panoptic.segmentation import Sample, Segmentation
from panoptic.transforms import Augment, Resize, evaluation_view, generator, training_view
from panoptic.transforms import views as transforms
from panoptic.transforms.geometry import Window

POLICIES = {
    "nothing": Augment(flip=0.0),
    "standalone": Augment(scale="factor", crop=(65, 97)),
    "standalone-coco": Augment(fit=(65, 65), scale="factor", factors=(0.5, 1.5, 0.1), crop=(65, 65)),
    "detectron2": Augment(scale="short", sides=(32, 48, 64, 96), longest=120, crop=(64, 128), pad="none"),
    "end": Augment(scale="factor", crop=(101, 203), pad="end", flip=1.0),
    "fixed": Augment(size=(60, 60)),
}


def encoded(height: int = 80, width: int = 112) -> Sample:
    """A sample whose colour tells the segment: segment k is painted (10 k, 255 - 10 k, 5 k)."""
    rows, columns = np.mgrid[:height, :width]
    segments = (1 + rows // 20 * 6 + columns // 20).astype(np.int32)
    segments[:7, :9] = 0
    count = int(segments.max())
    image = np.stack([10 * segments, 255 - 10 * segments, 5 * segments], -1).astype(np.uint8)
    crowd = np.arange(count) % 5 == 0
    return Sample(image, Segmentation(segments, np.arange(count, dtype=np.int64), crowd), "encoded")


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 2, width // 4 + 2, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height))


@pytest.mark.parametrize("name", POLICIES)
def test_the_colour_of_a_pixel_still_tells_its_segment(name: str) -> None:
    sample, policy = encoded(), POLICIES[name]
    for epoch in range(8):
        view = training_view(sample, policy, generator(0, epoch, 0))
        # labels are the source's numbers, so they survive the renumbering
        number = np.concatenate([[0], view.truth.labels + 1])[view.truth.segments]
        expected = np.stack([10 * number, 255 - 10 * number, 5 * number], -1).astype(int)
        # void of the source is (0, 255, 0); padding has its own colour
        padding = (view.image == np.array(policy.pad_value)).all(-1)
        kernel, plane = np.ones((5, 5), np.uint8), number.astype(np.float32)
        plane = cv2.copyMakeBorder(plane, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=-1)  # what the crop cut off blends in
        flat = (cv2.erode(plane, kernel) == cv2.dilate(plane, kernel))[2:-2, 2:-2]
        inside = flat & (view.truth.segments > 0) & ~padding
        assert inside.sum() > 100
        assert np.abs(view.image[inside].astype(int) - expected[inside]).max() <= 1
        assert (view.truth.segments[padding] == 0).all()
        assert np.array_equal(view.truth.is_crowd(), view.truth.labels % 5 == 0)
        assert (view.truth.areas() > 0).all()


def test_borders_of_image_and_map_coincide() -> None:
    """An image that is white where the map is 1 turns half grey where the map changes; only corners round off."""
    segments = np.zeros((61, 83), np.int32)
    segments[20:41, 31:60] = 1
    image = np.repeat(255 * segments[..., None], 3, -1).astype(np.uint8)
    sample = Sample(image, Segmentation(segments, np.zeros(1, np.int64)), "rectangle")
    policy = Augment(scale="factor", crop=(49, 55), pad_value=(0, 0, 0))
    for epoch in range(12):
        view = training_view(sample, policy, generator(1, epoch, 0))
        grey, inside = view.image[..., 0].astype(int), view.truth.segments > 0
        assert inside.any()
        differs = ((grey > 127) != inside) & (np.abs(grey - 127.5) > 2)
        assert differs.sum() <= 4 * 2


def test_same_draw_same_pixels_other_draw_other_pixels() -> None:
    sample = replace(encoded(), image=smooth(80, 112))
    policy = replace(POLICIES["standalone"], colour="ssd")
    views = [
        training_view(sample, policy, generator(*key))
        for key in [(3, 1, 7), (3, 1, 7), (3, 2, 7), (3, 1, 8), (4, 1, 7)]
    ]
    assert np.array_equal(views[0].image, views[1].image) and views[0].drawn == views[1].drawn
    assert np.array_equal(views[0].truth.segments, views[1].truth.segments)
    assert len({tuple(view.drawn.items()) for view in views}) == 4


@pytest.mark.parametrize("antialias", [False, True])
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_windowed_resize_equals_resize_then_crop(antialias: bool, data: st.DataObject) -> None:
    side = st.integers(3, 90)
    size = data.draw(st.tuples(side, side))
    scaled = tuple(data.draw(st.integers(max(1, s // 3), 3 * s)) for s in size)
    start = tuple(data.draw(st.integers(0, s - 1)) for s in scaled)
    stop = tuple(data.draw(st.integers(a + 1, s)) for a, s in zip(start, scaled, strict=True))
    window = Window(scaled, start, stop, (0, 0), (stop[0] - start[0], stop[1] - start[1]))
    whole = Window(scaled, (0, 0), scaled, (0, 0), scaled)
    image = smooth(*size)
    crop = np.s_[start[0] : stop[0], start[1] : stop[1]]
    full = transforms.resize_image(image, whole, antialias)[crop].astype(int)
    assert np.abs(transforms.resize_image(image, window, antialias) - full).max() <= 3
    segments = np.random.default_rng(0).integers(0, 9, size).astype(np.int32)
    assert np.array_equal(transforms.resize_map(segments, window), transforms.resize_map(segments, whole)[crop])


def test_a_window_whose_size_stays_is_not_copied() -> None:
    """Of a scale near 1 a small part rounds to its own size, which OpenCV copies though its pixels lie elsewhere."""
    image = smooth(12, 3)
    whole, part = Window((13, 3), (0, 0), (13, 3), (0, 0), (13, 3)), Window((13, 3), (0, 0), (3, 1), (0, 0), (3, 1))
    expected = transforms.resize_image(image, whole)[:3, :1].astype(int)
    assert np.abs(transforms.resize_image(image, part) - expected).max() <= 3


def test_the_whole_image_is_what_opencv_gives() -> None:
    image, window = smooth(37, 53), Window((61, 40), (0, 0), (61, 40), (0, 0), (61, 40))
    assert np.array_equal(transforms.resize_image(image, window), cv2.resize(image, (40, 61)))


def test_flip_twice_is_the_identity() -> None:
    sample, policy = encoded(), Augment(flip=1.0)
    once = training_view(sample, policy, generator(0, 0, 0))
    twice = training_view(once, policy, generator(0, 0, 0))
    assert np.array_equal(once.image[:, ::-1], sample.image)
    assert np.array_equal(twice.image, sample.image)
    assert np.array_equal(twice.truth.segments, sample.truth.segments)


def test_padding_is_part_of_the_image_and_void() -> None:
    sample = Sample(
        np.full((10, 20, 3), 9, np.uint8), Segmentation(np.ones((10, 20), np.int32), np.zeros(1, np.int64)), "x"
    )
    corners = set()
    for epoch in range(60):
        view = training_view(sample, Augment(crop=(13, 21), pad_value=(1, 2, 3)), generator(0, epoch, 0))
        assert view.image.shape == (13, 21, 3)
        assert view.truth.areas().tolist() == [200]
        assert (view.image[view.truth.segments == 0] == (1, 2, 3)).all()
        corners.add(tuple(np.argwhere(view.truth.segments)[0].tolist()))
    assert corners == {(top, left) for top in range(4) for left in range(2)}
    end = training_view(sample, Augment(crop=(13, 21), pad="end", flip=0), generator(0, 0, 0))
    assert np.argwhere(end.truth.segments)[0].tolist() == [0, 0]
    none = training_view(sample, Augment(crop=(13, 15), pad="none"), generator(0, 0, 0))
    assert none.image.shape == (10, 15, 3)


def test_lost_segments_are_dropped_as_compact_does() -> None:
    sample = encoded()
    for epoch in range(10):
        view = training_view(sample, Augment(crop=(21, 25), flip=0), generator(0, epoch, 0))
        crop = sample.truth.crop(int(view.drawn["top"]), int(view.drawn["left"]), 21, 25).compact()
        assert np.array_equal(view.truth.segments, crop.segments) and view.truth.segments.dtype == np.int32
        assert np.array_equal(view.truth.labels, crop.labels)
        assert np.array_equal(view.truth.is_crowd(), crop.is_crowd())
        assert len(crop.labels) < len(sample.truth.labels)


def test_more_segments_than_a_byte_holds() -> None:
    segments = np.arange(1, 401, dtype=np.int32).reshape(20, 20)
    sample = Sample(np.zeros((20, 20, 3), np.uint8), Segmentation(segments, np.arange(400)), "many")
    view = training_view(sample, Augment(crop=(20, 11), flip=0), generator(0, 0, 0))
    left = int(view.drawn["left"])
    assert np.array_equal(view.truth.labels[view.truth.segments - 1], segments[:, left : left + 11] - 1)


def test_an_image_without_segments() -> None:
    sample = Sample(smooth(30, 40), Segmentation(np.zeros((30, 40), np.int32), np.zeros(0, np.int64)), "empty")
    view = training_view(sample, replace(POLICIES["standalone"], colour="ssd"), generator(0, 0, 0))
    assert view.image.shape == (65, 97, 3) and not view.truth.segments.any() and len(view.truth.labels) == 0


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 640), (481, 641)), ((427, 640), (449, 641)), ((640, 640), (641, 641)), ((100, 2000), (33, 641))],
)
def test_fit_rounds_up_to_a_multiple_of_32_and_one(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert transforms.fit_size(size, 641, 641) == expected


def test_every_factor_and_every_side_is_drawn() -> None:
    rng = generator(0, 0, 0)
    factor = Augment(scale="factor")
    assert {transforms.draw_scale((100, 200), factor, rng)[0] for _ in range(400)} == set(range(50, 201, 10))
    short = Augment(scale="short", sides=(32, 64), longest=100)
    assert {transforms.draw_scale((100, 200), short, rng) for _ in range(50)} == {(32, 64), (50, 100)}


def test_evaluation_keeps_the_source_truth() -> None:
    sample = encoded()
    view = evaluation_view(sample, Resize(short=40))
    assert view.image.shape == (40, 56, 3) and view.truth.size == (40, 56)
    assert view.original is sample.truth
    assert evaluation_view(sample, Resize(fit=(97, 97))).truth.size == (97, 97)
    assert evaluation_view(sample, Resize(size=(50, 40))).truth.size == (50, 40)
    same = evaluation_view(sample, Resize())
    assert np.array_equal(same.image, sample.image) and np.array_equal(same.truth.segments, sample.truth.segments)


def test_colour_never_touches_map_or_padding() -> None:
    sample = replace(encoded(), image=smooth(80, 112))
    plain, jittered = (
        [training_view(sample, replace(POLICIES["end"], colour=colour), generator(0, k, 0)) for k in range(6)]
        for colour in ("none", "ssd")
    )
    assert any(not np.array_equal(a.image, b.image) for a, b in zip(plain, jittered, strict=True))
    for a, b in zip(plain, jittered, strict=True):
        assert np.array_equal(a.truth.segments, b.truth.segments)
        below = int(a.drawn["height"])  # padding is at the end, so everything below is padding
        assert np.array_equal(a.image[below:], b.image[below:])


@pytest.mark.parametrize(
    "wrong",
    [
        {"flip": 1.5},
        {"factors": (0.0, 1.0, 0.1)},
        {"sides": ()},
        {"crop": (-1, 4)},
        {"fit": (641, 0)},
        {"size": (0, 9)},
    ],
)
def test_a_wrong_option_is_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        check_ranges(Augment(**wrong))


def test_a_fixed_size_ignores_the_aspect() -> None:
    view = training_view(encoded(), Augment(size=(48, 40), flip=0.0), generator(0, 0, 0))
    assert view.image.shape == (48, 40, 3) and view.truth.size == (48, 40)
    with pytest.raises(ValueError, match=r"resize.size \(400, 0\)"):
        Resize(size=(400, 0))


def test_a_turned_image_takes_its_map_along() -> None:
    """By 90 degrees anticlockwise on a square it is NumPy's, and what comes in at the corners is void."""
    sample = encoded(80, 80)
    image, numbers = transforms.rotated(sample.image, transforms.narrow(sample.truth), 90.0, (1, 2, 3))
    assert (image == np.rot90(sample.image)).all() and (numbers == np.rot90(sample.truth.segments)).all()
    assert numbers.dtype == np.uint8
    image, numbers = transforms.rotated(sample.image, sample.truth.segments + 70_000, 45.0, (1, 2, 3))
    assert numbers.dtype == np.int32 and set(np.unique(numbers)) <= {0, *range(70_000, 70_100)}
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert numbers[row, column] == 0 and image[row, column].tolist() == [1, 2, 3]
    assert numbers[40, 40] == sample.truth.segments[40, 40] + 70_000


def test_rotation_is_drawn_where_it_is_asked_for_only() -> None:
    sample, still = encoded(), Augment(scale="short", sides=(32, 48), crop=(24, 24))
    plain = training_view(sample, still, generator(0, 0, 0))
    assert "rotation" not in plain.drawn
    angles, labels = [], []
    for epoch in range(40):
        view = training_view(sample, replace(still, rotation=20.0), generator(0, epoch, 0))
        angles.append(view.drawn["rotation"])
        labels.append(len(view.truth.labels))
        number = np.concatenate([[0], view.truth.labels + 1])[view.truth.segments]
        middle = view.image[12, 12].astype(int), number[12, 12]
        around = number[9:16, 9:16]
        if middle[1] and (around == middle[1]).all():
            assert abs(middle[0] - [10 * middle[1], 255 - 10 * middle[1], 5 * middle[1]]).max() <= 1
    assert -20 <= min(angles) < -10 and 10 < max(angles) <= 20 and min(labels) > 0
    with pytest.raises(ValueError, match="rotation"):
        check_ranges(Augment(rotation=181.0))
