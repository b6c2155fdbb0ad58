"""Shards that were changed after they were written, with and without a manifest that agrees."""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from panoptic.transforms import Resize
from pipelines.data import shard_file
from pipelines.data.loader import evaluation_batches
from pipelines.data.manifest import Manifest
from pipelines.data.shard_file import Encoded, Span
from pipelines.data.shard_index import load_index
from pipelines.data.shard_reader import Rows
from tests.support.shards import change_manifest, forge, read_table, write_shards


def read_all(manifest: Manifest) -> int:
    """The number of images that an evaluation gets."""
    return sum(len(samples) for _, _, samples in evaluation_batches(manifest, Resize(), 2, threads=1))


def refused(manifest: Manifest, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        read_all(manifest)
    text = str(error.value)
    assert "\n" not in text and "again" in text and len(text) < 500


def flip(data: bytes) -> bytes:
    return data[:2000] + bytes([data[2000] ^ 1]) + data[2001:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"", "has 0 bytes where the manifest says"),
        (lambda data: data[: len(data) // 2], r"has \d+ bytes where the manifest says"),
        (lambda data: bytes(len(data)), "cannot be read as a shard"),
        (flip, "row 0 has another checksum"),
        (lambda data: b"text instead", "has 12 bytes where"),
    ],
)
def test_bytes_that_changed(change: Callable[[bytes], bytes], words: str, tmp_path: Path) -> None:
    out = write_shards(tmp_path)
    manifest = Manifest.load(out)
    assert read_all(manifest) == 8
    file = out / "shard-00000.arrow"
    file.write_bytes(change(file.read_bytes()))
    refused(manifest, rf"shard-00000\.arrow: {words}")


@pytest.mark.parametrize("place", range(0, 6000, 101))
def test_no_byte_of_a_row_changes_unseen(place: int, tmp_path: Path) -> None:
    out = write_shards(tmp_path)
    manifest = Manifest.load(out)
    file = out / "shard-00000.arrow"
    data = bytearray(file.read_bytes())
    first, last = load_index(manifest.shard_set).span(0), load_index(manifest.shard_set).span(3)
    place += first.offset
    if place >= last.offset + last.length:
        pytest.skip("behind the last row")
    data[place] ^= 64
    file.write_bytes(data)
    refused(manifest, "another checksum")


def test_a_shard_that_is_cut_while_it_is_open(tmp_path: Path) -> None:
    out = write_shards(tmp_path)
    reader = Rows(Manifest.load(out).shard_set)
    assert reader.row(0)["name"] == "000.jpg"
    with open(out / "shard-00000.arrow", "r+b") as file:
        file.truncate(3000)
    with pytest.raises(ValueError, match=r"shard-00000\.arrow: row 3 ends too early: the file was cut"):
        reader.row(3)


def test_shards_that_changed_places(tmp_path: Path) -> None:
    out = write_shards(tmp_path)
    manifest = Manifest.load(out)
    shutil.copy(out / "shard-00001.arrow", out / "shard-00000.arrow")
    refused(manifest, r"shard-00000\.arrow: (row 0 has another checksum|has \d+ bytes where)")
    (out / "shard-00000.arrow").unlink()
    refused(manifest, r"shard-00000\.arrow: the shard is missing")
    (out / "shard-00000.arrow").mkdir()
    with pytest.raises(ValueError, match=r"shard-00000\.arrow is missing from the folder"):
        Manifest.load(out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"", "has another sha256 than the manifest says"),
        (flip, "has another sha256 than the manifest says"),
        (None, "the index of the shards is missing"),
    ],
)
def test_an_index_that_changed(change: Callable[[bytes], bytes] | None, words: str, tmp_path: Path) -> None:
    out = write_shards(tmp_path)
    manifest, file = Manifest.load(out), out / "_index.arrow"
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))
    refused(manifest, rf"_index\.arrow: {words}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.slice(1), "lists other rows than the manifest"),
        (lambda t: with_column(t, "shard", [0] * 8), "lists other rows than the manifest"),
        (lambda t: with_column(t, "offset", [*t["offset"].to_pylist()[1:], 0]), "one after the other"),
        (lambda t: with_column(t, "length", [10**15, *t["length"].to_pylist()[1:]]), "one after the other"),
        (lambda t: with_column(t, "length", [-1] * 8), "one after the other"),
        (lambda t: with_column(t, "length", [*t["length"].to_pylist()[:7], 10**7]), "one after the other"),
        (lambda t: with_column(t, "crc32", [None] * 8), "has no value in some of its rows"),
        (lambda t: t.drop_columns(["crc32"]), "its columns are not those of an index"),
    ],
)
def test_a_manifest_that_agrees_does_not_make_an_index(
    change: Callable[[pa.Table], pa.Table], words: str, tmp_path: Path
) -> None:
    out = write_shards(tmp_path)
    file = out / "_index.arrow"
    table = change(pa.ipc.open_file(file.read_bytes()).read_all())
    with pa.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table)
    change_manifest(out, lambda content: content.update(index=hashlib.sha256(file.read_bytes()).hexdigest()))
    refused(Manifest.load(out), rf"_index\.arrow: .*{words}")


def test_an_index_is_not_inflated(tmp_path: Path) -> None:
    """A compressed index of some kilobytes may hold any number of rows; it is refused before a row is read."""
    out = write_shards(tmp_path)
    file = out / "_index.arrow"
    table = pa.ipc.open_file(file.read_bytes()).read_all()
    with pa.ipc.new_file(str(file), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    change_manifest(out, lambda content: content.update(index=hashlib.sha256(file.read_bytes()).hexdigest()))
    refused(Manifest.load(out), r"_index\.arrow: its columns are compressed, which those of an index are not")


def test_the_footer_of_an_index_is_left_alone(tmp_path: Path) -> None:
    """It may list one batch a million times, which would multiply the rows; the messages are read as they follow."""
    out = write_shards(tmp_path)
    file = out / "_index.arrow"
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[-10:-6], "little")
    data[-10 - size : -10] = os.urandom(size)
    file.write_bytes(data)
    change_manifest(out, lambda content: content.update(index=hashlib.sha256(file.read_bytes()).hexdigest()))
    assert len(load_index(Manifest.load(out).shard_set).offsets) == 8


def encoded(table: pa.Table, compression: str | None = None, rows: int = 1) -> Encoded:
    """A shard of the rows of a table, whatever its columns are."""
    sink, ends = pa.BufferOutputStream(), []
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        for batch in table.combine_chunks().to_batches(rows):
            writer.write_batch(batch)
            ends.append(sink.tell())
    data = memoryview(sink.getvalue())
    starts = [shard_file._header_size(data), *ends[:-1]]
    return Encoded(data, [Span(a, b - a, zlib.crc32(data[a:b])) for a, b in zip(starts, ends, strict=True)])


def with_column(table: pa.Table, name: str, values: list) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))


def scrambled(table: pa.Table) -> Encoded:
    """The offsets of a row's binary column lead out of its buffer."""
    data, spans = encoded(table)
    content = bytearray(data)
    size = len(table["image"][0].as_py())
    first = spans[0]
    place = content.index(size.to_bytes(4, "little"), first.offset, first.offset + first.length)
    while place > 0:
        content[place : place + 4] = (2**31 - 1).to_bytes(4, "little")
        place = content.find(size.to_bytes(4, "little"), place, first.offset + first.length)
    row = bytes(content[first.offset : first.offset + first.length])
    return Encoded(memoryview(bytes(content)), [Span(first.offset, first.length, zlib.crc32(row)), *spans[1:]])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda t: encoded(t.drop_columns(["crowd"])), "columns are not those of a shard .crowd is missing"),
        (lambda t: encoded(t.rename_columns([*t.column_names[:-1], "id"])), "image_id is missing, not int64"),
        (lambda t: encoded(t.append_column("more", t["name"])), "more is unknown"),
        (lambda t: encoded(t.set_column(3, "labels", t["height"])), "labels is int32, not list"),
        (lambda t: encoded(t.select([*t.column_names[1:], "name"])), "their order is image, segments"),
        (lambda t: encoded(t, compression="zstd"), "row 0 its columns are compressed"),
        (scrambled, "row 0 cannot be read as a row of a shard"),
        (lambda t: encoded(with_column(t, "name", ["a", None, "b", "c"])), "row 1 has no value in the column name"),
        (lambda t: encoded(with_column(t, "image", [None] * 4)), "no value in the column image"),
        (lambda t: encoded(with_column(t, "labels", [[1], [None], [0], []])), "no value in the column labels"),
        (lambda t: encoded(with_column(t, "labels", [[1], [3], [0], []])), "labels from 3 to 3, the manifest has 3"),
        (lambda t: encoded(with_column(t, "labels", [[-1], [0], [0], []])), "labels from -1 to -1"),
        (lambda t: encoded(with_column(t, "crowd", [[]] * 4)), r"3 labels and 0 marks of crowds"),
        (lambda t: encoded(with_column(t, "labels", [[]] * 4)), r"0 labels and 3 marks of crowds"),
        (lambda t: encoded(with_column(t, "height", [21] * 4)), r"the image is 20x30 but the record says 21x30"),
        (lambda t: encoded(with_column(t, "image", [b"junk"] * 4)), r"000\.jpg: cannot be decoded as an image"),
        (lambda t: encoded(with_column(t, "segments", [b""] * 4)), r"000\.jpg: not a PNG file: it is empty"),
    ],
)
def test_a_manifest_that_agrees_does_not_make_a_shard(
    make: Callable[[pa.Table], Encoded], words: str, tmp_path: Path
) -> None:
    out = write_shards(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        read_all(forge(out, make(read_table(out))))
    assert "\n" not in str(error.value)


def test_an_entry_of_the_index_is_one_row(tmp_path: Path) -> None:
    out = write_shards(tmp_path)
    table = read_table(out)
    data, spans = encoded(pa.concat_tables([table, table]), rows=2)
    refused(forge(out, Encoded(data, spans)), "row 0 is a record batch of 2 rows, not of one; .* again")
    with pytest.raises(ValueError, match=r"lists other rows than the manifest \(8 in 2 shards\)"):
        read_all(forge(out, encoded(pa.concat_tables([table, table]))))


def test_any_arrow_tool_reads_a_set_as_a_table(tmp_path: Path) -> None:
    import pandas as pd
    from pyarrow import dataset

    out = write_shards(tmp_path)
    reader = Rows(Manifest.load(out).shard_set)
    table = dataset.dataset(out, format="ipc", exclude_invalid_files=True).to_table()
    assert table.to_pylist() == [reader.row(k) for k in range(8)]
    frame = pd.read_feather(out / "shard-00001.arrow")
    assert frame["name"].tolist() == [f"{k:03d}.jpg" for k in range(4, 8)] and frame["height"].tolist() == [20] * 4
    with pa.memory_map(str(out / "shard-00001.arrow")) as file:
        assert pa.ipc.open_file(file).get_batch(2)["name"].to_pylist() == ["006.jpg"]
    index = pd.read_feather(out / "_index.arrow")
    assert index["name"].tolist() == [f"{k:03d}.jpg" for k in range(8)] and index["shard"].tolist() == [0] * 4 + [1] * 4
