"""Shards that were changed after they were written, with and without a manifest that agrees."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from panoptic.transforms import Resize
from pipelines.data import shard_file
from pipelines.data.loader import evaluation_batches
from pipelines.data.manifest import Manifest
from pipelines.data.shard_file import open_shard
from tests.support.shards import forge, write_shards


def read_all(manifest: Manifest) -> int:
    """The number of images that an evaluation gets."""
    return sum(len(samples) for _, _, samples in evaluation_batches(manifest, Resize(), 2, threads=1))


def refused(manifest: Manifest, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        read_all(manifest)
    text = str(error.value)
    assert "\n" not in text and "again" in text and len(text) < 500


def flip(data: bytes) -> bytes:
    return data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"", "has another sha256"),
        (lambda data: data[: len(data) // 2], "has another sha256"),
        (flip, "has another sha256"),
        (lambda data: b"text instead", "has another sha256"),
    ],
)
def test_bytes_that_changed(change: Callable[[bytes], bytes], words: str, tmp_path: Path) -> None:
    out = write_shards(tmp_path)
    manifest = Manifest.load(out)
    assert read_all(manifest) == 8
    file = out / "shard-00000.parquet"
    file.write_bytes(change(file.read_bytes()))
    refused(manifest, rf"shard-00000\.parquet: {words}")


def test_shards_that_changed_places(tmp_path: Path) -> None:
    out = write_shards(tmp_path)
    shutil.copy(out / "shard-00001.parquet", out / "shard-00000.parquet")
    refused(Manifest.load(out), r"shard-00000\.parquet: has another sha256")
    (out / "shard-00000.parquet").unlink()
    (out / "shard-00000.parquet").mkdir()
    with pytest.raises(ValueError, match=r"shard-00000\.parquet is missing from the folder"):
        Manifest.load(out)


def parquet(table: pa.Table, **options: object) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **{"compression": "none", "row_group_size": 16, **options})  # type: ignore[arg-type]
    return sink.getvalue().to_pybytes()


def with_column(table: pa.Table, name: str, values: list) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda t: b"PAR1" + bytes(1000) + b"PAR1", "cannot be read as a shard"),
        (lambda t: bytes(2000), "cannot be read as a shard"),
        (lambda t: parquet(t.drop_columns(["crowd"])), "columns are not those of a shard .crowd is missing"),
        (lambda t: parquet(t.rename_columns([*t.column_names[:-1], "id"])), "image_id is missing, not int64"),
        (lambda t: parquet(t.append_column("more", t["name"])), "more is unknown"),
        (lambda t: parquet(t.set_column(3, "labels", t["height"])), "labels is int32, not list"),
        (lambda t: parquet(pa.concat_tables([t, t])), "has 8 rows where the manifest says 4"),
        (lambda t: parquet(t, compression="zstd"), "has compressed columns"),
        (lambda t: parquet(with_column(t, "name", ["a", None, "b", "c"])), "no value in a row of the column name"),
        (lambda t: parquet(with_column(t, "image", [None] * 4)), "no value in a row of the column image"),
        (lambda t: parquet(with_column(t, "labels", [[1], [None], [0], []])), "no value in a row of the column labels"),
        (lambda t: parquet(with_column(t, "labels", [[1], [3], [0], []])), "labels from 0 to 3, the manifest has 3"),
        (lambda t: parquet(with_column(t, "labels", [[-1], [0], [0], []])), "labels from -1 to 0"),
        (lambda t: parquet(with_column(t, "crowd", [[]] * 4)), r"3 labels and 0 marks of crowds"),
        (lambda t: parquet(with_column(t, "labels", [[]] * 4)), r"0 labels and 3 marks of crowds"),
        (lambda t: parquet(with_column(t, "height", [21] * 4)), r"the image is 20x30 but the record says 21x30"),
        (lambda t: parquet(with_column(t, "image", [b"junk"] * 4)), r"000\.jpg: cannot be decoded as an image"),
        (lambda t: parquet(with_column(t, "segments", [b""] * 4)), r"000\.jpg: not a PNG file: it is empty"),
    ],
)
def test_a_manifest_that_agrees_does_not_make_a_shard(
    make: Callable[[pa.Table], bytes], words: str, tmp_path: Path
) -> None:
    out = write_shards(tmp_path)
    table = pq.read_table(out / "shard-00000.parquet")
    with pytest.raises(ValueError, match=words) as error:
        read_all(forge(out, make(table)))
    assert "\n" not in str(error.value)


def test_a_row_group_is_bounded_by_the_file(tmp_path: Path) -> None:
    """A dictionary would let a small file of one row group become any number of equal pictures."""
    out = write_shards(tmp_path)
    row = pq.read_table(out / "shard-00000.parquet").slice(0, 1)
    data = parquet(pa.concat_tables([row] * 1000), row_group_size=1000)
    file = out / "shard-00000.parquet"
    file.write_bytes(data)
    shard = Manifest.load(out).shard_files[0]._replace(rows=1000, sha256=shard_file.hashlib.sha256(data).hexdigest())
    with pytest.raises(ValueError, match="row groups of more than 16 rows"):
        open_shard(shard)


def test_a_process_hashes_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Manifest.load(write_shards(tmp_path)).shard_files[0]
    hashed = []
    digest = shard_file.hashlib.file_digest
    monkeypatch.setattr(shard_file.hashlib, "file_digest", lambda *given: hashed.append(1) or digest(*given))
    for _ in range(3):
        open_shard(shard)
    assert hashed == [1]
    Path(shard.uri).write_bytes(b"other")
    with pytest.raises(ValueError, match="another sha256"):
        open_shard(shard)
