"""The JSON of COCO-panoptic: every wrong type anywhere gives one line with the file, the place and the remedy."""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import pytest

from pipelines.data.readers.coco_json import parse

CONTENT: dict[str, Any] = {
    "images": [{"id": k, "file_name": f"{k}.jpg", "height": 4, "width": 5} for k in range(2)],
    "annotations": [
        {"image_id": k, "file_name": f"{k}.png", "segments_info": [{"id": 3, "category_id": 7, "iscrowd": 0}]}
        for k in range(2)
    ],
    "categories": [{"id": 7, "name": "sky", "isthing": 0}],
}
JUNK = [None, True, -1, 0.5, 2**70, 10**400, "", "x", [], [[]], {}, {"a": None}]


def text(content: Any) -> bytes:
    return json.dumps(content).encode()


def places(content: Any, place: tuple = ()) -> list[tuple]:
    """The keys and positions that lead to every value of the lists."""
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place] + [found for key, value in inside for found in places(value, (*place, key))]


def replaced(place: tuple, value: Any) -> Any:
    content = copy.deepcopy(CONTENT)
    if not place:
        return value
    node = content
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return content


def test_a_sound_file_is_read_as_it_is() -> None:
    content = parse(text(CONTENT), "val.json")
    assert content.images == CONTENT["images"] and list(content.annotations) == CONTENT["annotations"]
    assert content.categories == CONTENT["categories"] and not content.faults and not content.repairs


@pytest.mark.parametrize("place", [place for place in places(CONTENT) if place[:1] != ("categories",)], ids=str)
def test_wrong_types_anywhere_are_refused_by_place(place: tuple) -> None:
    """Every kind of junk in every place: the value is accepted as it is, or one line names file and place."""
    for junk in JUNK:
        content = replaced(place, junk)
        try:
            parsed = parse(text(content), "val.json")
        except ValueError as error:
            lines = str(error).splitlines()
            assert len(lines) == 1 and lines[0].startswith("val.json: "), error
            assert len(lines[0]) < 300
            where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place).lstrip(".")
            assert where in lines[0] or not place, (place, junk, error)
        else:
            if parsed.faults:
                assert place[:1] == ("annotations",) and "segments_info" in place
                assert f"annotations[{place[1]}].segments_info" in parsed.faults[place[1]]
            else:
                assert parsed.images == content["images"]
                assert (
                    list(parsed.annotations)
                    == [
                        {key: value for key, value in a.items() if key in CONTENT["annotations"][0]}
                        for a in content["annotations"]
                    ]
                    or junk is True
                )  # the flag


@pytest.mark.parametrize("field", ["image_id", "segments_info"])
def test_a_missing_field_is_named(field: str) -> None:
    content = copy.deepcopy(CONTENT)
    del content["annotations"][1][field]
    if field == "segments_info":
        assert "annotations[1] has no segments_info" in parse(text(content), "val.json").faults[1]
    else:
        with pytest.raises(ValueError, match=r"^val\.json: annotations\[1\] has no image_id; it needs"):
            parse(text(content), "val.json")


def test_many_problems_are_not_all_spelt_out() -> None:
    content = {**CONTENT, "images": [None] * 50}
    with pytest.raises(ValueError) as caught:
        parse(text(content), "val.json")
    lines = str(caught.value).splitlines()
    assert len(lines) == 21 and lines[19].startswith("val.json: images[19] is null") and lines[20] == "and 30 more"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (text(CONTENT)[:-30], r"not valid JSON \(.*EOF"),
        ('{"x": "stra\u00dfe"}'.encode("latin-1"), "not valid JSON .*save it in UTF-8"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"x": 1' + b"0" * 5000 + b"}", "not valid JSON|has no images"),
        (b"[]", r"holds \[\]; COCO-panoptic is an object"),
        (b"null", "holds null"),
        (b'{"images": []}', "has no annotations, categories"),
    ],
)
def test_other_files_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^val\.json: .*({message})") as caught:
        parse(data, "val.json")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le"])
def test_encodings_of_unicode_are_read(encoding: str) -> None:
    content = {**CONTENT, "categories": [{"id": 7, "name": "straße 猫", "isthing": 0}]}
    data = json.dumps(content, ensure_ascii=False).encode(encoding)
    assert parse(data, "val.json").categories == content["categories"]


def test_parsing_takes_no_longer_than_json_alone_allows() -> None:
    """At most three times as long; 2.3 times on a busy machine, with boxes."""
    infos = [{"id": k + 1, "category_id": 7, "iscrowd": 0, "bbox": [1, 2, 30, 40], "area": 1200} for k in range(11)]
    content = {**CONTENT, "annotations": [{"image_id": k, "segments_info": infos} for k in range(2000)]}
    data = text(content)

    def seconds(read) -> float:
        taken = []
        for _ in range(3):
            mark = time.process_time()
            read()
            taken.append(time.process_time() - mark)
        return min(taken)

    assert seconds(lambda: parse(data, "val.json")) < 3 * seconds(lambda: json.loads(data))
