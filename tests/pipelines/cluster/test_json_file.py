"""JSON that this package wrote, cut short, emptied and edited: one line with the file, the fault and the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import convert
from pipelines.cluster.json_file import read_json
from pipelines.evaluation.inputs import photographs
from pipelines.training.checkpoints import METRICS, read_metrics
from pipelines.training.record import RECORD, read_record
from pipelines.tuning import progress, resume

JUNK = [b"", b" \n", b"{", b"junk", b"\xff\xfe\x00", b"[" * 100_000, b"null", b"[]", b"3", b'"text"', b'{"a": 1}']

READERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "run": (RECORD, read_record),
    "sweep": (resume.RECORD, lambda folder: resume.read_record(folder, "x", {}, True)),
    "trials": (progress.TRIALS, progress.read),
    "metrics": (METRICS, read_metrics),
    "listed": ("listed.json", lambda folder: photographs(folder, f"{folder}/listed.json")),
    "categories": (
        "categories.json",
        lambda folder: convert.main(
            [f"{folder}/no.pth", "--source", "detr", "--categories", f"{folder}/categories.json", "--out", "x"]
        ),
    ),
}

MEANT = {("trials", b"[]"), ("metrics", b'{"a": 1}'), ("metrics", b"{}")}
"""Content that means something."""


@pytest.mark.parametrize("data", JUNK, ids=lambda data: repr(data[:8]))
@pytest.mark.parametrize("kind", READERS)
def test_junk_is_one_line_with_the_file_and_a_remedy(kind: str, data: bytes, tmp_path: Path) -> None:
    name, read = READERS[kind]
    (tmp_path / "x.jpg").write_bytes(b"")
    (tmp_path / name).write_bytes(data)
    if (kind, data) in MEANT:
        read(str(tmp_path))
        return
    with pytest.raises(ValueError, match=name) as caught:
        read(str(tmp_path))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600 and "pydantic" not in text
    assert any(word in text for word in ("restore", "resume", "remove", "give", "categories is empty")), text


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"run_id": 7, "options": {}}, "run_id: input should be a valid string"),
        ({"run_id": "7"}, "options: field required"),
        ({"run_id": "7", "options": []}, "options: input should be a valid dictionary"),
    ],
)
def test_the_place_of_a_fault_is_told(content: Any, told: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"run.json: {told}; restore the file, or give another --name"):
        read_record(str(tmp_path))


def test_what_is_right_is_read_with_all_that_stands_beside(tmp_path: Path) -> None:
    content = {"run_id": "7", "options": {"a": 1}, "train_hash": "x"}
    (tmp_path / RECORD).write_text(json.dumps(content))
    assert read_record(str(tmp_path)) == content and read_record(str(tmp_path / "none")) == {}
    (tmp_path / "nan.json").write_text('{"a": NaN, "b": 1}')
    assert list(read_json(tmp_path / "nan.json", dict[str, float], "")) == ["a", "b"]


@pytest.mark.parametrize(
    "entry",
    [
        {"id": 1.5, "file_name": "x.jpg"},
        {"id": True, "file_name": "x.jpg"},
        {"id": None, "file_name": "x.jpg"},
        {"id": 2**70, "file_name": "x.jpg"},
        {"id": [1], "file_name": "x.jpg"},
        {"id": 1, "file_name": 5},
        {"file_name": "x.jpg"},
        "x.jpg",
    ],
)
def test_ids_of_photographs_that_are_none(entry: Any, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"")
    (tmp_path / "listed.json").write_text(json.dumps({"images": [entry]}))
    with pytest.raises(ValueError, match=r"listed\.json: images\.0.*no JSON with COCO's images"):
        photographs(str(tmp_path), str(tmp_path / "listed.json"))
