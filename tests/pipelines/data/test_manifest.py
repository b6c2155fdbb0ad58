"""A manifest is checked before anything is read: against its schema, itself and its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.manifest import Manifest
from tests.support.shards import change_manifest, write_shards


def test_what_was_written_is_read(tmp_path: Path) -> None:
    out = write_shards(tmp_path)
    manifest = Manifest.load(out)
    assert (manifest.rows, [shard.rows for shard in manifest.shards]) == (8, [4, 4])
    assert manifest.categories.names == ("person", "sky", "car") and manifest.uri == str(out)
    assert manifest.to_json() == (out / "manifest.json").read_bytes()
    assert manifest.shard_set.files[1].uri == f"{out}/shard-00001.arrow"


def shard(number: int, **values: Any) -> Callable[[dict], Any]:
    return lambda content: content["shards"][number].update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shard(0, path="../other/shard-00000.arrow"), r"shards\[0\]\.path: .*is '\.\./other"),
        (shard(0, path="/tmp/shard-00000.arrow"), r"shards\[0\]\.path: "),
        (shard(0, path="s3://bucket/x.arrow"), r"shards\[0\]\.path: "),
        (shard(0, path="shard-00000.arrow\n"), r"shards\[0\]\.path: "),
        (shard(1, path="shard-00000.arrow"), r"lists the path shard-00000\.arrow 2 times"),
        (lambda content: content["shards"].append(content["shards"][0]), "rows is 8, but the shards have 12"),
        (lambda content: content.update(shards=[], rows=0), "rows: .*shards: "),
        (shard(0, rows=5), "rows is 8, but the shards have 9"),
        (
            lambda content: (shard(0, rows=10**12)(content), content.update(rows=10**12 + 4)),
            r"shards\[0\]\.rows: 1000000000000 rows cannot lie in shard-00000\.arrow \(\d+ bytes\)",
        ),
        (shard(0, rows=-4), r"shards\[0\]\.rows: .*\(is -4\)"),
        (shard(0, rows="4"), r"shards\[0\]\.rows: .*\(is '4'\)"),
        (shard(0, rows=4.5), r"shards\[0\]\.rows: "),
        (shard(0, sha256=""), r"shards\[0\]\.sha256: "),
        (shard(0, path="shard-00007.arrow"), r"shards\[0\]\.path: shard-00007\.arrow is missing from the folder"),
        (lambda content: content.pop("hash"), "hash: Field required"),
        (lambda content: content.update(hash=None, rows=None), "rows: .*hash: "),
        (lambda content: content.update(shard=1), "shard: "),
        (lambda content: content.update(segments=[1, 2]), "segments counts 2 classes, but categories lists 3"),
        (lambda content: content.update(categories={}), "categories: "),
        (lambda content: content["categories"][1].update(isthing="0"), r"categories\[1\]\.isthing: "),
        (lambda content: content["categories"][1].pop("name"), r"categories\[1\]\.name: Field required"),
        (
            lambda content: content["categories"][1].update(id=24),
            r"categories: .*the id 24 .* appears more than once",
        ),
        (lambda content: content.update(maximum_height=10**30, split=3), "split: "),
        (lambda content: content.update(schema_version=1), "schema_version is 1, this software reads 2"),
        (lambda content: content.update(schema_version="1"), "schema_version: "),
    ],
)
def test_what_is_no_manifest(change: Callable[[dict], Any], words: str, tmp_path: Path) -> None:
    out = write_shards(tmp_path)
    change_manifest(out, change)
    with pytest.raises(ValueError, match=words) as refused:
        Manifest.load(out)
    text = str(refused.value)
    assert text.startswith(f"{out}/manifest.json: ") and "prepare the shards again" in text and "\n" not in text


@pytest.mark.parametrize("data", [b"", b"junk", b"[]", b"null", b"\xff\xfe", b"[" * 100000, b'{"schema_version": 1'])
def test_what_is_no_json(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"manifest\.json: .*prepare the shards again") as refused:
        Manifest.load(tmp_path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
