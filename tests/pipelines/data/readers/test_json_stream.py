"""JSON in pieces: the same values as json.loads gives, wherever the chunks are cut, and what is no JSON is refused."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from pipelines.data.readers import json_stream
from pipelines.data.readers.json_stream import NotAnObject, NotJson, chunks, members

AWKWARD: dict[str, Any] = {
    'a "key" \\': 'text with ] } , " \\ and a straße 猫',
    "images": [{"id": 1, "x": ["[", {"y": [1, 2]}]}, 'a,"]', [], 7, None, {"deep": [[[{}]]]}],
    "info": {"images": [1, 2], "n": [3]},
    "annotations": [],
    "backslashes": ["\\", "\\\\", '\\"'],
    "one": [1],
}


def read(text: bytes, size: int, lists: tuple[str, ...] = ("images", "annotations", "one")) -> dict[str, Any]:
    """The object, from chunks of a few bytes."""
    content: dict[str, Any] = {}
    for key, value, position in members((text[k : k + size] for k in range(0, len(text), size)), lists):
        if position is None:
            content[key] = json.loads(value)
        else:
            assert len(content.setdefault(key, [])) == position
            content[key] += json.loads(value)
    return content


@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}], ids=str)
def test_every_cut_gives_what_json_gives(options: dict) -> None:
    text = json.dumps(AWKWARD, **options).encode()
    for size in (*range(1, 40), len(text)):
        assert read(b"\n " + text + b" \n", size) == AWKWARD
    assert read(b"{}", 1) == {}


def test_a_list_comes_in_pieces_of_the_size_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", 1000)
    text = json.dumps({"images": [{"id": k} for k in range(2000)]}).encode()
    pieces = list(members(chunks(io.BytesIO(text)), ("images",)))
    assert max(len(piece.text) for piece in pieces) < 1100 and len(pieces) > 15
    assert [entry["id"] for piece in pieces for entry in json.loads(piece.text)] == list(range(2000))


def test_all_bytes_are_seen_and_encodings_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", 7)
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32-le"):
        text, seen = json.dumps(AWKWARD, ensure_ascii=False).encode(encoding), bytearray()
        assert json.loads(b"".join(chunks(io.BytesIO(text), seen.extend))) == AWKWARD and seen == text


BROKEN = {
    "": "it is empty",
    "{": "1 brackets are open",
    '{"images": [1, 2': "2 brackets are open",
    '{"images": [1, 2}': "brackets are open",
    '{"images": [1, 2}]': "has no end",
    '{"images": [1, ]}': "ends with a comma",
    '{"images": [1],}': "no key or no value",
    '{"images": [1]]': "the object ends with",
    '{"images": [1]} x': "something follows",
    '{"images": [1]}{}': "something follows",
    '{"images": }': "no key or no value",
    "{images: [1]}": "no key or no value",
    '{"images": [1], "x': "brackets are open",
}


@pytest.mark.parametrize("text", BROKEN)
def test_broken_brackets_are_refused(text: str) -> None:
    for size in (1, 3, 100):
        with pytest.raises(NotJson, match=BROKEN[text]):
            read(text.encode(), size)


def test_what_is_no_object_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("[]", "null", '"text"', "-7"):
        with pytest.raises(NotAnObject) as caught:
            read(text.encode(), 100)
        assert str(caught.value) == text
    pointer = "version https://git-lfs.github.com/spec/v1"
    for text, words in (
        (pointer, "pointer of Git LFS, which `git lfs pull`"),
        ("<!DOCTYPE html>\n", "'<!DOCTYPE html>'"),
    ):
        with pytest.raises(NotJson, match=f"^it begins with .*{words}"):
            read(text.encode(), 100)
    monkeypatch.setattr(json_stream, "CHUNK", 5)
    with pytest.raises(NotJson, match="save it in UTF-8"):
        list(chunks(io.BytesIO('{"x": "stra\u00dfe"}'.encode("latin-1"))))
