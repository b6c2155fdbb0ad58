"""The data structures: numbering, windows, errors, and what a batch is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from panoptic.segmentation import (
    IGNORE,
    Categories,
    Frame,
    Sample,
    Segmentation,
    collate,
    default_colour,
    renumber,
)

ENTRIES = [
    {"id": 7, "name": "sky", "isthing": 0, "color": [1, 2, 3]},
    {"id": 90, "name": "person", "isthing": 1},
    {"id": 2, "name": "road", "isthing": 0, "color": [4, 5, 6]},
]


def segmentation(rows: list[list[int]], labels: list[int], crowd: list[bool] | None = None) -> Segmentation:
    return Segmentation(
        np.array(rows, np.int32), np.array(labels, np.int64), None if crowd is None else np.array(crowd, bool)
    )


def test_categories_keep_the_order_of_the_file_and_survive_a_round_trip() -> None:
    categories = Categories.from_coco(ENTRIES)
    assert categories.names == ("sky", "person", "road")
    assert (categories.things, categories.stuff) == ((1,), (0, 2))
    assert categories.ids == (7, 90, 2)
    assert categories.colours == ((1, 2, 3), default_colour(1), (4, 5, 6))
    assert len(categories) == 3
    assert Categories.from_coco(categories.to_coco()) == categories


def test_default_colours_are_bytes_and_differ() -> None:
    colours = [default_colour(i) for i in range(30)]
    assert len(set(colours)) == 30
    assert all(0 <= channel <= 255 for colour in colours for channel in colour)


@pytest.mark.parametrize("key", ["id", "name", "isthing"])
def test_a_category_that_lacks_a_key_is_named(key: str) -> None:
    broken = [ENTRIES[0], {k: v for k, v in ENTRIES[1].items() if k != key}]
    with pytest.raises(ValueError, match=rf"val\.json: categories\[1\].*has no {key}"):
        Categories.from_coco(broken, "val.json")


def test_empty_and_repeated_categories_are_refused() -> None:
    with pytest.raises(ValueError, match=r"val\.json.*empty"):
        Categories.from_coco([], "val.json")
    with pytest.raises(ValueError, match=r"the id 7 of categories appears more than once"):
        Categories.from_coco([ENTRIES[0], {**ENTRIES[1], "id": 7}])
    with pytest.raises(ValueError, match=r"^val\.json: the name 'sky' of categories appears more than once"):
        Categories.from_coco([ENTRIES[0], {**ENTRIES[1], "name": "sky "}], "val.json")
    with pytest.raises(ValueError, match="differ in length"):
        Categories(("a", "b"), (True,), (1, 2), ((0, 0, 0), (0, 0, 0)))


@pytest.mark.parametrize("things", [(False, True), (0.0, 1.0), ("0", "1"), ("false", "true"), (" False", "TRUE ")])
def test_what_is_meant_by_isthing_is_read(things: tuple[object, object]) -> None:
    repairs: dict[str, int] = {}
    entries = [{**entry, "isthing": things[entry["isthing"]]} for entry in ENTRIES]
    assert Categories.from_coco(entries, repairs=repairs) == Categories.from_coco(ENTRIES)
    kind = {str: "text", float: "a decimal number"}.get(type(things[0]))
    assert repairs == ({f"categories.isthing given as {kind}": 3} if kind else {})


def test_other_spellings_of_categories_are_read_and_counted() -> None:
    repairs: dict[str, int] = {}
    entries = [{**entry, "id": str(entry["id"]), "name": f"{entry['name']} "} for entry in ENTRIES]
    entries[0].update(id=7.0, color=[1.0, 2.0, 3.0])
    entries[1].update(color=None)
    assert Categories.from_coco(entries, repairs=repairs) == Categories.from_coco(ENTRIES)
    assert repairs == {
        "categories.id given as a decimal number": 1,
        "categories.id given as text": 2,
        "categories.name stripped of spaces": 3,
    }


def test_colours_of_text_and_with_alpha_are_replaced_and_counted() -> None:
    repairs: dict[str, int] = {}
    entries = [{**ENTRIES[0], "color": [1, 2, 3, 255]}, {**ENTRIES[1], "color": "#2080c0"}, *ENTRIES[2:]]
    expected = Categories.from_coco([{**ENTRIES[0], "color": [1, 2, 3]}, {**ENTRIES[1], "color": None}, *ENTRIES[2:]])
    assert Categories.from_coco(entries, repairs=repairs) == expected
    assert list(repairs.values()) == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"isthing": None}, r" \('person'\)\.isthing is null; it must be 0 or 1"),
        ({"isthing": "thing"}, r" \('person'\)\.isthing is 'thing'; it must be 0 or 1"),
        ({"isthing": 2}, r" \('person'\)\.isthing is 2; it must be 0 or 1"),
        ({"isthing": []}, r" \('person'\)\.isthing is \[\]; it must be 0 or 1"),
        ({"id": 4.5}, r" \('person'\)\.id is 4\.5; it must be a whole number"),
        ({"id": 1e300}, r"\.id is 1e\+300; it must be a whole number"),
        ({"id": True}, r"\.id is true; it must be a whole number"),
        ({"id": "person"}, r"\.id is 'person'; it must be a whole number"),
        ({"name": None}, r"\.name is null; each category needs a name"),
        ({"name": " "}, r"\.name is ' '; each category needs a name"),
        ({"color": [1, 2]}, r"\.color is \[1, 2\]; give \[red"),
        ({"color": [900, -1, 3]}, r"\.color is \[900, -1, 3\]; give \[red"),
        ({"color": [1, 2, "x"]}, r"\.color is \[1, 2, 'x'\]; give \[red"),
    ],
)
def test_categories_that_mean_nothing_are_refused_by_place(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r"^val\.json: categories\[1\].*" + message):
        Categories.from_coco([ENTRIES[0], {**ENTRIES[1], **change}], "val.json")


def test_every_wrong_category_has_a_line() -> None:
    wrong = [{**entry, "isthing": None} for entry in ENTRIES]
    with pytest.raises(ValueError) as caught:
        Categories.from_coco([*wrong, None], "val.json")
    lines = str(caught.value).splitlines()
    assert len(lines) == 4 and all(line.startswith(f"val.json: categories[{k}]") for k, line in enumerate(lines))
    for value in (None, "sky", 3, {"id": 1}):
        with pytest.raises(ValueError, match=r"^val\.json: categories is .*; it must be a list"):
            Categories.from_coco(value, "val.json")  # pyright: ignore[reportArgumentType]


@settings(max_examples=40, deadline=None)
@given(
    ids=st.lists(st.integers(1, 2**24 - 1), min_size=1, max_size=12, unique=True),
    unlisted=st.lists(st.integers(1, 2**24 - 1), max_size=3, unique=True),
    data=st.data(),
)
def test_renumber_puts_each_listed_id_at_its_place(ids: list[int], unlisted: list[int], data: st.DataObject) -> None:
    strangers = [i for i in unlisted if i not in ids]
    pool = np.array([0, *ids, *strangers], np.int32)
    id_map = pool[data.draw(hnp.arrays(np.int64, (4, 5), elements=st.integers(0, len(pool) - 1)))]
    segments, listed, _ = renumber(id_map, ids)
    assert segments.dtype == np.int32
    assert segments.shape == id_map.shape
    for k, i in enumerate(ids):
        np.testing.assert_array_equal(segments == k + 1, id_map == i)
    present = sorted(set(id_map.ravel().tolist()) & set(strangers))
    assert listed.tolist() == present
    assert (segments[np.isin(id_map, present)] == 0).all()


@settings(max_examples=40, deadline=None)
@given(
    data=hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=7), elements=st.integers(0, 6)),
    labels=hnp.arrays(np.int64, 6, elements=st.integers(0, 3)),
)
def test_compact_drops_only_what_has_no_pixel(data: np.ndarray, labels: np.ndarray) -> None:
    crowd, scores = np.arange(6) % 2 == 0, np.linspace(0, 1, 6, dtype=np.float32)
    full = Segmentation(data, labels, crowd, scores)
    compact = full.compact()
    assert (compact.areas() > 0).all()
    assert compact.areas().sum() == full.areas().sum()
    alive = np.flatnonzero(full.areas())
    np.testing.assert_array_equal(compact.labels, labels[alive])
    np.testing.assert_array_equal(compact.crowd, crowd[alive])
    np.testing.assert_array_equal(compact.scores, scores[alive])
    np.testing.assert_array_equal(compact.semantic(), full.semantic())
    assert compact.compact() is compact


def test_crop_keeps_the_entries_of_segments_that_vanish() -> None:
    truth = segmentation([[1, 1, 2], [0, 3, 3]], [5, 6, 7], [False, True, False])
    window = truth.crop(0, 1, 2, 2)
    assert window.size == (2, 2)
    np.testing.assert_array_equal(window.segments, [[1, 2], [3, 3]])
    corner = truth.crop(1, 0, 1, 2)
    assert corner.areas().tolist() == [0, 0, 1]
    assert corner.labels.tolist() == [5, 6, 7]
    assert corner.compact().labels.tolist() == [7]


def test_areas_and_classes_come_from_pixels() -> None:
    truth = segmentation([[1, 1, 2], [0, 3, 3]], [5, 6, 5])
    assert truth.areas().tolist() == [2, 1, 2]
    np.testing.assert_array_equal(truth.semantic(), [[5, 5, 6], [IGNORE, 5, 5]])
    assert truth.is_crowd().tolist() == [False] * 3


def test_a_map_without_segments_is_valid() -> None:
    empty = segmentation([[0, 0]], [])
    assert empty.areas().tolist() == []
    assert empty.compact() is empty
    assert (empty.semantic() == IGNORE).all()


def test_frame_marks_what_lies_inside_each_image() -> None:
    frame = Frame((3, 4), torch.tensor([[2, 4], [3, 1]]), torch.tensor([[2, 4], [3, 1]]))
    valid = frame.valid()
    assert valid.shape == (2, 3, 4)
    assert valid[0].tolist() == [[True] * 4, [True] * 4, [False] * 4]
    assert valid[1].tolist() == [[True, False, False, False]] * 3


def test_full_frame_has_no_padding() -> None:
    frame = Frame.full(torch.zeros(2, 3, 5, 6))
    assert frame.canvas == (5, 6)
    assert frame.sizes.tolist() == [[5, 6], [5, 6]] == frame.output_sizes.tolist()
    assert frame.valid().all()
    assert Frame.full(torch.zeros(0, 3, 5, 6)).sizes.shape == (0, 2)


def test_collate_pads_bottom_and_right_to_the_divisor() -> None:
    rng = np.random.default_rng(0)
    first = Sample(
        rng.integers(0, 256, (5, 9, 3), np.uint8),
        Segmentation(rng.integers(0, 4, (5, 9), np.int32), np.array([4, 5, 6]), np.array([False, True, False])),
        "first",
    )
    second = Sample(
        rng.integers(0, 256, (7, 3, 3), np.uint8),
        Segmentation(rng.integers(0, 2, (7, 3), np.int32), np.array([1])),
        "second",
        original=segmentation([[1] * 8] * 11, [1]),
    )
    images, targets = collate([first, second], divisor=4)
    assert images.shape == (2, 3, 8, 12)
    assert images.dtype == torch.uint8
    assert targets.frame.canvas == (8, 12)
    for b, sample in enumerate((first, second)):
        height, width = sample.image.shape[:2]
        np.testing.assert_array_equal(images[b, :, :height, :width].permute(1, 2, 0).numpy(), sample.image)
        np.testing.assert_array_equal(targets.segments[b, :height, :width].numpy(), sample.truth.segments)
        outside = ~targets.frame.valid()[b]
        assert not images[b][:, outside].any()
        assert not targets.segments[b][outside].any()
    assert targets.labels.tolist() == [[4, 5, 6], [1, IGNORE, IGNORE]]
    assert targets.crowd.tolist() == [[False, True, False], [False] * 3]
    assert targets.countable is not None and targets.countable.tolist() == [[4, IGNORE, 6], [1, IGNORE, IGNORE]]
    assert targets.names == ("first", "second")
    assert targets.frame.sizes.tolist() == [[5, 9], [7, 3]]
    assert targets.frame.output_sizes.tolist() == [[5, 9], [11, 8]]


def test_collate_of_an_image_without_segments_keeps_one_empty_entry() -> None:
    sample = Sample(np.zeros((2, 2, 3), np.uint8), segmentation([[0, 0], [0, 0]], []), "empty")
    _, targets = collate([sample])
    assert targets.labels.tolist() == [[IGNORE]]
    assert targets.crowd.tolist() == [[False]]


def test_collate_takes_views_and_targets_move() -> None:
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)[:, ::-1]
    sample = Sample(image, segmentation([[1, 1, 0, 0], [0, 0, 1, 1]], [0]).crop(0, 0, 2, 4), "flipped")
    images, targets = collate([sample])
    np.testing.assert_array_equal(images[0].permute(1, 2, 0).numpy(), image)
    moved = targets.to("cpu")
    assert torch.equal(moved.segments, targets.segments)
    assert moved.frame is targets.frame and moved.countable is targets.countable
    assert targets.countable is not None and targets.countable.tolist() == [[0]]
