"""Class maps: the stored results of the sheet, each rule on the pixels, and each mistake of a file by its field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from panoptic.classes import classes
from panoptic.segmentation import IGNORE, Categories, Instances, Segmentation
from pipelines.data import class_maps
from pipelines.data.class_map import KEEP, ClassesOf, absolute, from_record, load, parse, resolve
from pipelines.data.class_mapping import ClassMapping

ENTRIES = [
    {"id": 7, "name": "road", "isthing": 0, "color": [128, 64, 128]},
    {"id": 8, "name": "sidewalk", "isthing": 0, "color": [244, 35, 232]},
    {"id": 17, "name": "pole", "isthing": 0, "color": [153, 153, 153]},
    {"id": 24, "name": "person", "isthing": 1, "color": [220, 20, 60]},
    {"id": 25, "name": "rider", "isthing": 1, "color": [255, 0, 0]},
    {"id": 26, "name": "Traffic-Light", "isthing": 0, "color": [250, 170, 30]},
]
STREET = Categories.from_coco(ENTRIES)


def mapping(content: dict[str, Any], categories: Categories = STREET) -> ClassMapping:
    class_map = parse(json.dumps({"version": 1, **content}).encode(), "classes.json")
    return resolve(class_map, [ClassesOf("street", categories)]).mappings[0]


def as_set(segmentation: Segmentation) -> set[tuple[int, bool, bytes]]:
    """The segments without their order."""
    rows = enumerate(zip(segmentation.labels.tolist(), segmentation.is_crowd().tolist(), strict=True), 1)
    return {(label, crowd, (segmentation.segments == k).tobytes()) for k, (label, crowd) in rows}


def test_the_stored_result_on_cityscapes(shared: Callable[[str], Path]) -> None:
    root = shared("fixtures/datasets")
    source = json.loads((root / "expected/cityscapes_train.json").read_text())
    expected = json.loads((root / "expected/class_map.json").read_text())
    class_map = load(root / "class_maps/classes.json")
    made = resolve(class_map, [ClassesOf("cityscapes", Categories.from_coco(source["categories"]))]).mappings[0]
    entries = [{key: entry[key] for key in ("id", "name", "isthing")} for entry in made.categories.to_coco()]
    assert entries == expected["categories"]
    with np.load(root / "expected/cityscapes_train.npz") as a, np.load(root / "expected/class_map.npz") as b:
        for k, image in enumerate(expected["images"]):
            pair = [Segmentation(z[f"{k}_segments"], z[f"{k}_labels"], z[f"{k}_crowd"]) for z in (a, b)]
            mapped = made.segmentation(pair[0])
            assert as_set(mapped) == as_set(pair[1]) and len(mapped.labels) == image["n"]
            assert mapped.segments.dtype == np.int32


VISTAS = ("Road", "Manhole", "Traffic Sign (Back)", "Person", "Bicyclist", "On Rails")


@pytest.mark.parametrize(
    ("name", "own", "target"),
    [
        ("cityscapes-categories", "cityscapes", ""),
        ("coco-things", "coco", ""),
        ("cocostuff-to-coco", "cocostuff", "coco"),
        ("vistas1.2-to-cityscapes", "mapillary_v1.2", "cityscapes"),
    ],
)
def test_maps_that_are_ready_fit_the_classes_of_their_set(name: str, own: str, target: str) -> None:
    source = classes(own)
    made = resolve(load(name), [ClassesOf("x", source)]).mappings[0]
    assert not made.absent
    if target:
        same = ("names", "is_thing", "colours")
        assert [getattr(made.categories, f) for f in same] == [getattr(classes(target), f) for f in same]
    of = dict(zip(source.names, made.targets, strict=True))
    if name == "cityscapes-categories":
        assert made.categories.names == ("flat", "construction", "object", "nature", "sky", "human", "vehicle")
        assert sum(made.categories.is_thing) == 2 and -1 not in made.targets
    elif name == "coco-things":
        assert len(made.categories) == 80 and all(made.categories.is_thing) and made.targets.count(-1) == 53
    elif name == "cocostuff-to-coco":
        assert made.targets.count(-1) == 12 and of["fog"] == of["clouds"] == made.categories.names.index(
            "sky-other-merged"
        )
    else:
        assert [made.categories.names[of[one]] if of[one] >= 0 else "" for one in VISTAS] == [
            *("road", "road", "", "person", "rider", "train"),
        ]


def test_the_map_of_vistas_2_fits_its_configuration(shared: Callable[[str], Path]) -> None:
    labels = json.loads((shared("data/classes") / "mapillary_vistas_v2.0_config.json").read_text())["labels"]
    kept = [label for label in labels if label["evaluate"]]
    entries = [{"id": k, "name": one["readable"], "isthing": int(one["instances"])} for k, one in enumerate(kept)]
    made = resolve(load("vistas2.0-to-cityscapes"), [ClassesOf("x", Categories.from_coco(entries))]).mappings[0]
    assert made.categories.names == classes("cityscapes").names and not made.absent


def test_a_file_comes_before_the_name_of_a_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("coco-things") == "coco-things" and "coco-things" in class_maps.NAMES
    (tmp_path / "coco-things").write_text('{"version": 1, "classes": [], "rest": "keep"}')
    assert absolute("coco-things") == str(tmp_path / "coco-things")
    assert load("coco-things").content.rest == "keep"
    with pytest.raises(ValueError, match=r"no such class map; .* name one of cityscapes-categories, coco-things"):
        load("coco-thing")


SCENE = Segmentation(
    segments=np.array([[1, 1, 2, 3, 0, 3], [4, 4, 2, 0, 0, 0], [5, 5, 6, 6, 0, 3]], np.int32),
    labels=np.array([0, 1, 2, 3, 3, 4], np.int64),  # road, sidewalk, pole in three parts, two persons, a rider
    crowd=np.array([False, False, False, False, True, False]),
)


def test_stuff_is_united_things_stay_apart_and_void_is_void() -> None:
    made = mapping(
        {
            "classes": [{"name": "human", "from": ["person", "rider"]}, {"name": "flat", "from": ["road", "sidewalk"]}],
            "void": ["pole"],
            "rest": "void",
        }
    )
    mapped = made.segmentation(SCENE)
    assert mapped.segments.tolist() == [[1, 1, 1, 0, 0, 0], [2, 2, 1, 0, 0, 0], [3, 3, 4, 4, 0, 0]]
    assert mapped.labels.tolist() == [1, 0, 0, 0] and mapped.is_crowd().tolist() == [False, False, True, False]
    assert made.categories.is_thing == (True, False) and made.categories.colours == ((220, 20, 60), (128, 64, 128))
    assert made.absent == ()


def test_things_that_become_stuff_are_one_segment_and_no_crowd() -> None:
    made = mapping({"classes": [{"name": "busy", "thing": False, "from": ["person", "rider", "road"]}], "rest": "void"})
    mapped = made.segmentation(SCENE)
    assert mapped.segments.tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert mapped.labels.tolist() == [0] and mapped.crowd is None


@pytest.mark.parametrize(
    ("rule", "expected", "crowd"),
    [
        ({"split": "components"}, [[0, 0, 0, 1, 0, 2], [0] * 6, [0, 0, 0, 0, 0, 3]], [False] * 3),
        ({"split": "components", "min_area": 2}, [[0] * 6] * 3, []),
        ({"split": "whole"}, [[0, 0, 0, 1, 0, 1], [0] * 6, [0, 0, 0, 0, 0, 1]], [False]),
        ({"split": "crowd"}, [[0, 0, 0, 1, 0, 1], [0] * 6, [0, 0, 0, 0, 0, 1]], [True]),
    ],
    ids=["components", "small", "whole", "crowd"],
)
def test_stuff_becomes_a_thing_by_a_rule(rule: dict, expected: list, crowd: list) -> None:
    made = mapping({"classes": [{"name": "pole", "thing": True, "from": [{"name": "pole", **rule}]}], "rest": "void"})
    mapped = made.segmentation(SCENE)
    assert mapped.segments.tolist() == expected and mapped.is_crowd().tolist() == crowd
    assert mapped.labels.tolist() == [0] * len(crowd)


def test_components_touch_over_corners() -> None:
    pole = Segmentation(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]], np.int32), np.array([2]))
    made = mapping({"classes": [{"name": "pole", "from": [{"id": 17, "split": "components"}]}], "rest": "void"})
    assert made.segmentation(pole).labels.tolist() == [0]


@pytest.mark.parametrize("name", ["person", "human"])
def test_crowds_become_void_by_the_name_of_source_or_target(name: str) -> None:
    made = mapping(
        {"classes": [{"name": "human", "from": ["person", "rider"]}], "rest": "void", "crowd_to_void": [name]}
    )
    assert made.segmentation(SCENE).segments.tolist() == [[0] * 6, [1, 1, 0, 0, 0, 0], [0, 0, 2, 2, 0, 0]]


def test_rest_keeps_classes_and_changes_nothing() -> None:
    made = mapping({"classes": [], "rest": "keep"})
    assert (made.categories.names, made.categories.is_thing) == (STREET.names, STREET.is_thing)
    assert as_set(made.segmentation(SCENE)) == as_set(SCENE)


def test_names_are_compared_without_case_and_signs() -> None:
    made = mapping({"classes": [{"name": "light", "from": [" traffic_light"]}], "rest": "void"})
    assert made.targets == (-1, -1, -1, -1, -1, 0)


def test_outputs_of_a_model_follow() -> None:
    made = mapping({"classes": [{"name": "flat", "from": ["road", "sidewalk"]}, {"name": "rider"}], "rest": "void"})
    assert made.semantic(np.array([[0, 1, 2], [4, IGNORE, 3]])).tolist() == [[0, 0, IGNORE], [1, IGNORE, IGNORE]]
    masks = [{"size": [1, 1], "counts": bytes([k])} for k in range(3)]
    scored = Instances(masks, np.array([3, 4, 0]), np.array([0.9, 0.8, 0.7], np.float32), np.zeros((3, 4), np.float32))
    kept = made.instances(scored)
    assert kept.masks == masks[1:2] and kept.labels.tolist() == [1] and kept.boxes.shape == (1, 4)
    predicted = Segmentation(SCENE.segments, SCENE.labels, None, np.arange(1, 7, dtype=np.float32) / 10)
    mapped = made.segmentation(predicted)
    assert mapped.scores is not None and mapped.scores.tolist() == pytest.approx([0.2, 0.6])


WRONG = {
    "twice": (
        {"classes": [{"name": "a", "from": ["road"]}, {"name": "b", "from": ["road"]}], "rest": "void"},
        "classes[1] (b).from[0]",
    ),
    "twice, void": ({"classes": [{"name": "road"}], "void": ["road"], "rest": "void"}, "void[0]: road stands in"),
    "unknown": ({"classes": [{"name": "a", "from": ["raod"]}], "rest": "void"}, "is road meant?"),
    "unknown id": ({"classes": [{"name": "a", "from": [{"id": 1}]}], "rest": "void"}, "no class has the id 1"),
    "unknown crowd": ({"classes": [{"name": "road"}], "crowd_to_void": ["cor"], "rest": "void"}, "crowd_to_void[0]"),
    "flip": ({"classes": [{"name": "pole", "thing": True}], "rest": "void"}, '"components" (each'),
    "mixed": (
        {"classes": [{"name": "a", "from": ["road", "person"]}], "rest": "void"},
        "person is thing, road is stuff",
    ),
    "empty": ({"classes": [{"name": "a", "from": []}], "rest": "void"}, "is empty"),
    "names": ({"classes": [{"name": "Road"}, {"name": "road", "from": ["pole"]}], "rest": "void"}, "must be unique"),
    "rest": ({"classes": [{"name": "road"}]}, "no entry names sidewalk, pole"),
    "kept name": ({"classes": [{"name": "pole", "from": ["road"]}], "rest": "keep"}, "has this name"),
    "split of stuff": (
        {"classes": [{"name": "pole", "thing": 0, "from": [{"name": "pole", "split": "whole"}]}], "rest": "void"},
        "split makes things",
    ),
    "nothing": ({"classes": [], "rest": "void"}, "none is left"),
    "version": ({"version": 2, "classes": []}, "version: Input should be 1"),
    "field": ({"classes": [{"name": "a", "form": ["road"]}]}, "classes[0].form"),
    "both": ({"classes": [{"name": "a", "from": [{"name": "road", "id": 7}]}]}, "either name or id"),
    "area": ({"classes": [{"name": "a", "from": [{"name": "road", "min_area": 3}]}]}, "min_area belongs"),
    "colour": ({"classes": [{"name": "road", "color": [0, 0, 300]}]}, "classes[0].color[2]"),
    "rest word": ({"classes": [{"name": "road"}], "rest": "drop"}, "rest: Input should be"),
    "no name": ({"classes": [{"from": ["road"]}]}, "classes[0].name"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_with_its_field(case: str) -> None:
    content, words = WRONG[case]
    with pytest.raises(ValueError) as error:
        class_map = parse(json.dumps({"version": 1, **content}).encode(), "classes.json")
        resolve(class_map, [ClassesOf("street", STREET)])
    (line,) = str(error.value).splitlines()
    assert line.startswith("classes.json: ") and words in line


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"null", b"\xff\xfe"])
def test_a_file_that_is_no_class_map(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^x\.json: "):
        parse(data, "x.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no\.json: no such class map"):
        load(tmp_path / "no.json")


# Several sets

YARD = Categories.from_coco(
    [
        {"id": 1, "name": "Person", "isthing": 1},
        {"id": 2, "name": "traffic light", "isthing": 0},
        {"id": 3, "name": "dog", "isthing": 1},
    ]
)


def test_sets_are_joined_by_the_names_and_kinds_of_their_classes() -> None:
    resolved = resolve(KEEP, [ClassesOf("street", STREET), ClassesOf("yard", YARD)])
    street, yard = resolved.mappings
    assert street.categories == yard.categories
    assert street.categories.names == (*STREET.names, "dog")
    assert street.targets == (0, 1, 2, 3, 4, 5) and yard.targets == (3, 5, 6)
    assert street.absent == ("dog",) and yard.absent == ("road", "sidewalk", "pole", "rider")
    assert "street annotates no dog" in resolved.notes[0] and set(resolved.record["sets"]) == {"street", "yard"}


def test_a_class_that_is_a_thing_in_one_set_only_is_named_with_both_ways() -> None:
    other = Categories.from_coco([{"id": 1, "name": "person", "isthing": 0}])
    with pytest.raises(ValueError, match="person of street is thing, person of yard is stuff") as error:
        resolve(KEEP, [ClassesOf("street", STREET), ClassesOf("yard", other)])
    assert '"thing": false' in str(error.value) and '"split"' in str(error.value)


def test_an_entry_may_be_for_one_set() -> None:
    text = {
        "version": 1,
        "classes": [{"name": "animal", "from": ["dog", {"name": "rider", "set": "street"}]}, {"name": "person"}],
        "rest": "void",
    }
    class_map = parse(json.dumps(text).encode(), "classes.json")
    street, yard = resolve(class_map, [ClassesOf("street", STREET), ClassesOf("yard", YARD)]).mappings
    assert street.targets == (-1, -1, -1, 1, 0, -1) and yard.targets == (1, -1, 0)
    with pytest.raises(ValueError, match="is street meant"):
        resolve(parse(json.dumps(text).replace("street", "stret").encode(), "x"), [ClassesOf("street", STREET)])
    alone = resolve(class_map, [ClassesOf("yard", YARD)])
    assert alone.mappings[0].targets == (1, -1, 0) and "for the set street" in alone.notes[0]


def test_an_id_needs_its_set_where_several_are_joined() -> None:
    class_map = parse(b'{"version": 1, "classes": [{"name": "a", "from": [{"id": 1}]}], "rest": "void"}', "x")
    with pytest.raises(ValueError, match="add set"):
        resolve(class_map, [ClassesOf("street", STREET), ClassesOf("yard", YARD)])


def test_the_record_changes_with_the_meaning_only() -> None:
    texts = [{"classes": [{"name": "road"}], "rest": rest} for rest in ("void", "void", "keep")]
    maps = [parse(json.dumps({"version": 1, **text}, indent=k).encode(), "x") for k, text in enumerate(texts)]
    hashes = [resolve(one, [ClassesOf("street", STREET)]).record["sha256"] for one in maps]
    assert hashes[0] == hashes[1] != hashes[2]


MAP = {
    "version": 1,
    "classes": [
        {"name": "flat", "from": ["road", "sidewalk"]},
        {"name": "pole", "thing": True, "from": [{"name": "pole", "split": "components", "min_area": 3}]},
        {"name": "human", "from": ["person", "rider"]},
        {"name": "boat", "thing": True, "from": [{"name": "boat", "set": "lake"}]},
    ],
    "void": ["Traffic-Light"],
    "crowd_to_void": ["person"],
}
LAKE = Categories.from_coco([{"id": 1, "name": "boat", "isthing": 1}, {"id": 2, "name": "road", "isthing": 0}])


def recorded(*sets: ClassesOf, content: dict[str, Any] = MAP) -> dict[str, Any]:
    class_map = parse(json.dumps(content).encode(), "classes.json")
    return json.loads(json.dumps(resolve(class_map, sets).record))  # as a manifest or a checkpoint keeps it


def test_a_record_gives_the_mapping_again() -> None:
    sets = ClassesOf("street", STREET), ClassesOf("lake", LAKE)
    record = recorded(*sets)
    wanted = resolve(parse(json.dumps(MAP).encode(), "x"), sets).mappings
    assert tuple(from_record(record, one) for one in sets) == wanted
    # other ids, order and spelling, another name
    order = [4, 5, 0, 3, 2, 1]
    entries = [{**ENTRIES[k], "id": k + 50, "name": str(ENTRIES[k]["name"]).upper()} for k in order]
    again = from_record(record, ClassesOf("val", Categories.from_coco(entries)))
    assert again.targets == tuple(wanted[0].targets[k] for k in order)
    assert again.splits == tuple(wanted[0].splits[k] for k in order) and again.categories == wanted[0].categories
    assert again.crowd_to_void == tuple(wanted[0].crowd_to_void[k] for k in order)


def test_a_record_without_the_set_is_applied_as_the_file_said() -> None:
    content = {**MAP, "rest": "void", "classes": MAP["classes"][:3], "void": [], "crowd_to_void": []}
    record = recorded(ClassesOf("street", STREET), content=content)
    more = Categories.from_coco([*ENTRIES, {"id": 99, "name": "tram", "isthing": 1}])
    made = from_record(record, ClassesOf("x", more))
    assert made.targets == (0, 0, 1, 2, 2, -1, -1) and made.categories.names == ("flat", "pole", "human")
    with pytest.raises(ValueError, match="no class is called 'sidewalk'"):
        from_record(record, ClassesOf("x", LAKE))


def test_records_that_do_not_say_what_becomes_of_the_classes() -> None:
    joined = json.loads(json.dumps(resolve(KEEP, [ClassesOf("a", STREET), ClassesOf("b", LAKE)]).record))
    assert from_record(joined, ClassesOf("x", LAKE)).absent == ("sidewalk", "pole", "person", "rider", "Traffic-Light")
    other = Categories.from_coco([{"id": 1, "name": "tree", "isthing": 0}])
    with pytest.raises(ValueError, match="trained on a, b joined, none of which has the classes of x"):
        from_record(joined, ClassesOf("x", other))
    same = {**MAP, "classes": [{"name": "n", "from": [{"name": "boat", "set": "a"}, {"name": "boat", "set": "b"}]}]}
    same |= {"void": [{"name": "road", "set": "a"}], "crowd_to_void": [], "rest": "keep"}
    twice = recorded(ClassesOf("a", LAKE), ClassesOf("b", LAKE), content=same)
    assert from_record(twice, ClassesOf("a", LAKE)).targets == (0, -1)
    with pytest.raises(ValueError, match="knows the classes of a, b, which are those of c, and maps them differently"):
        from_record(twice, ClassesOf("c", LAKE))
    for broken in ({}, {**joined, "names": {}}, {**joined, "sets": 3}, {**joined, "classes": []}):
        with pytest.raises(ValueError, match=r"cannot be read .* with --data.class-map"):
            from_record(broken, ClassesOf("x", LAKE))
