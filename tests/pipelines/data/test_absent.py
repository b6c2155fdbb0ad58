"""The classes that a set never annotates, through class maps and joins."""

from __future__ import annotations

from panoptic.segmentation import Categories
from pipelines.data.absent import absent_labels, absent_of, joined_absent, mapped_absent
from pipelines.data.class_mapping import ClassMapping


def named(*names: str) -> Categories:
    return Categories(names, (True,) * len(names), tuple(range(len(names))), ((0, 0, 0),) * len(names))


AB, ABC = named("a", "b"), named("a", "b", "c")


def test_a_class_is_absent_where_all_that_become_it_are() -> None:
    own = ClassMapping(ABC, (0, 1), (False, False), (None, None))
    assert mapped_absent(AB, own, {}) == {"": ["c"]}
    merged = ClassMapping(named("ab", "c"), (0, 0, 1), (False,) * 3, (None,) * 3)
    before = {"x": ["a"], "y": ["a", "b"], "z": ["c"]}
    assert mapped_absent(ABC, merged, before) == {"x": [], "y": ["ab"], "z": ["c"]}
    assert joined_absent({"s": {"": ["c"], "x": []}, "t": {}}) == {"s": ["c"], "s/x": []}


def test_the_longest_beginning_of_a_name_counts() -> None:
    source = {"absent": {"s": ["c"], "s/x": [], "t": ["a", "gone"]}}
    names = ["s/1.png", "s/x/1.png", "t/s/1.png", "u/1.png"]
    assert absent_labels(source, ABC, names) == [{2}, set(), {0}, set()]
    assert absent_labels({}, ABC, names) == [set()] * 4


def test_manifests_of_earlier_versions_say_it_by_their_class_map() -> None:
    record = {
        "classes": ABC.to_coco(),
        "sets": {"s": {"targets": {"7": 0, "8": -1}}, "t": {"targets": {"1": 1, "2": 2}}},
    }
    assert absent_of({"class_map": record}) == {"s": ["b", "c"], "t": ["a"]}
    assert absent_of({"class_map": {**record, "sets": {"s": record["sets"]["s"]}}}) == {"": ["b", "c"]}
    assert absent_of({"reader": "coco"}) == {}
