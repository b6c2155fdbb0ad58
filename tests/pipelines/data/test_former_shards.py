"""Shards of schema version 1, which were Parquet files: prepared again where their data set is there, else refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data import prepare as prepare_module
from pipelines.data.manifest import Manifest, former_manifest
from pipelines.data.prepare import ensure_shards, prepare
from pipelines.data.readers import coco_panoptic
from pipelines.data.readers.source import Source
from pipelines.data.shard_writer import Report, write_shard
from pipelines.data.verify import verify
from pipelines.training.preflight import check_continuation
from tests.support.coco_folder import write_folder


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards are written in this process."""

    def write_all(rows: pa.Table, out: str, rows_per_shard: int, source: Source, about: dict) -> Sequence[Report]:
        rows = rows.append_column("shard", pa.array([k // rows_per_shard for k in range(rows.num_rows)]))
        parts = [rows.slice(first, rows_per_shard) for first in range(0, rows.num_rows, rows_per_shard)]
        return [Report(**json.loads(write_shard(p, out, source.categories)["report"][0].as_py())) for p in parts]

    monkeypatch.setattr(prepare_module, "_write_all", write_all)


def as_version_1(folder: Path, **changes: object) -> None:
    """Make a set of shards what schema version 1 had for the same rows."""
    content = json.loads((folder / "manifest.json").read_bytes())
    for shard in content["shards"]:
        file = folder / shard["path"]
        table = pa.ipc.open_file(file.read_bytes()).read_all()
        file.unlink()
        shard["path"] = shard["path"].replace(".arrow", ".parquet")
        pq.write_table(table, folder / shard["path"], row_group_size=16, compression="none")
        del shard["size"]
    (folder / "_index.arrow").unlink()
    del content["index"]
    (folder / "manifest.json").write_text(json.dumps({**content, "schema_version": 1, **changes}))


def test_those_in_the_cache_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path / "data", "train", count=3)
    first = ensure_shards(tmp_path / "data", "train", tmp_path / "cache")
    as_version_1(Path(first.uri))
    with caplog.at_level(logging.WARNING):
        again = ensure_shards(tmp_path / "data", "train", tmp_path / "cache")
    assert "shards of schema version 1, while this software reads 2. Preparing them again from" in caplog.text
    assert again == first == verify(first.uri)
    names = sorted(file.name for file in Path(first.uri).iterdir())
    assert names == ["_index.arrow", "_photographs.txt", "manifest.json", "shard-00000.arrow"]


def test_those_that_are_given_stay_and_are_prepared_elsewhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path / "data", "train", count=3)
    given = prepare(coco_panoptic(tmp_path / "data", "train"), tmp_path / "shards/train")
    as_version_1(tmp_path / "shards/train")
    before = {file: file.read_bytes() for file in (tmp_path / "shards/train").iterdir()}
    for root in ("shards", "shards/train"):
        with caplog.at_level(logging.WARNING):
            made = ensure_shards(tmp_path / root, "train", tmp_path / "cache")
        assert made.hash == given.hash and made.uri.startswith(str(tmp_path / "cache"))
    assert "Preparing them again" in caplog.text and "other content" not in caplog.text
    assert {file: file.read_bytes() for file in (tmp_path / "shards/train").iterdir()} == before
    with pytest.raises(ValueError, match="these are shards of split 'train', not of 'val'"):
        ensure_shards(tmp_path / "shards/train", "val", tmp_path / "cache")


def test_another_content_is_said_and_a_run_does_not_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those shards were shuffled with another seed than would be used now."""
    write_folder(tmp_path / "data", "train", count=20)
    old = prepare(coco_panoptic(tmp_path / "data", "train"), tmp_path / "shards/train", seed=5)
    as_version_1(tmp_path / "shards/train")
    with caplog.at_level(logging.WARNING):
        made = ensure_shards(tmp_path / "shards", "train", tmp_path / "cache")
    assert made.hash != old.hash and "a run that began on those cannot go on with these" in caplog.text
    before = {"options": {}, "train_hash": old.hash}
    with pytest.raises(ValueError, match=r"the data changed \(train_hash\), .* schema version 1 .* reads 2"):
        check_continuation(before, {}, {"train_hash": made.hash}, "old")
    check_continuation(before, {}, {"train_hash": old.hash}, "old")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({}, "the data set they were prepared from is unknown"),
        (
            {"reader": "coco", "root": "/nowhere/data", "split": "train"},
            "/nowhere/data that they were prepared from is not there",
        ),
        ({"reader": "other", "root": "/tmp", "split": "train"}, "is not there"),
    ],
)
def test_those_of_an_absent_data_set_are_refused_in_a_line(tmp_path: Path, source: dict, words: str) -> None:
    write_folder(tmp_path / "data", "train", count=2)
    prepare(coco_panoptic(tmp_path / "data", "train"), tmp_path / "shards/train")
    as_version_1(tmp_path / "shards/train", source={"split": "train", **source})
    with pytest.raises(ValueError, match="schema version 1, while this software reads 2") as error:
        ensure_shards(tmp_path / "shards", "train", tmp_path / "cache")
    assert words in str(error.value)
    assert "prepare the shards again" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="schema_version is 1, this software reads 2"):
        Manifest.load(tmp_path / "shards/train")


@pytest.mark.parametrize("text", ["", "[]", '{"schema_version": 2}', '{"schema_version": 3}', '{"schema_version": 1}'])
def test_what_is_no_former_manifest(tmp_path: Path, text: str) -> None:
    assert former_manifest(tmp_path) is None
    (tmp_path / "manifest.json").write_text(text)
    assert former_manifest(tmp_path) is None
