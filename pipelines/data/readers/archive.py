"""Files inside zip archives (and plain tar files), addressed and read one by one, without unpacking.

The address of a member is text, so that it travels in a column beside plain paths:

    zip:CONTAINER!/PATH#length of CONTAINER,offset,packed bytes,bytes,method,CRC

It says where in the container the member lies, so a worker reads it with one range request and never lists the archive.
A zip that is stored in a zip is a range of bytes of the outer file, and its members are addressed in the outer file;
one that is compressed is unpacked once a machine into the folder for temporary files.

Format: PKWARE, APPNOTE.TXT (.ZIP File Format Specification), sections 4.3.7 (local header) and 4.4.5 (methods).
"""

from __future__ import annotations

import bz2
import hashlib
import io
import json
import os
import struct
import tarfile
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.cluster import storage
from pipelines.data.readers.faults import Fault
from pipelines.data.shard_file import Span, decode_row

_PREFIX = "zip:"
_CELL = "parquet:"
_ROW = "shard:"
_HEADER = struct.Struct("<4s5H3I2H")  # a local header up to its name
_SPARE = 256  # bytes read beyond a member, for the extra field of its local header
_CHUNK = 8 << 20
_LARGE, _DENSEST = 256 << 20, 100  # a member of more bytes than this, packed more densely, is a trap
_STORED, _DEFLATED, _BZIP2 = 0, 8, 12
_BARE = -1  # a range of bytes without a header of its own and without a CRC, as in a tar file
_ENCRYPTED = 1  # bit of the general purpose flags

COPY_ARCHIVE = "copy the archive again from its source"
"""Remedy for a broken archive."""

JUNK = ("__MACOSX", ".DS_Store", "Thumbs.db")
"""Files and folders that file managers leave; those that begin with `._` are such, too."""


class Member(NamedTuple):
    """The place of a file in its container."""

    container: str
    """A path, a URI, or the address of a compressed zip in a zip."""
    offset: int
    """First byte of the local header; in a tar file, of the content."""
    packed: int
    """Bytes in the container."""
    size: int
    """Bytes when unpacked."""
    method: int
    crc: int

    def address(self, path: str) -> str:
        """The address of this member, whose name for messages is `path`."""
        numbers = [len(self.container), *self[1:]]
        return f"{_PREFIX}{self.container}!/{path}#{','.join(map(str, numbers))}"


def is_junk(path: str) -> bool:
    """True if a part of a path is what a file manager leaves beside the files of a person."""
    return any(part in JUNK or part.startswith("._") for part in path.split("/"))


def read_file(address: storage.Uri) -> bytes:
    """The bytes of a file: of a member of an archive, of a local path or of S3.

    Raises:
        OSError: it cannot be read.
        ValueError: the archive is damaged there, or packs the file by a method that is not read; names both.
    """
    text = os.fspath(address)
    if text.startswith(_CELL):
        return _read_cell(text)
    if text.startswith(_ROW):
        return _read_row(text)
    if not text.startswith(_PREFIX):
        return storage.read_bytes(text)
    member, _ = _parse(text)
    return b"".join(_unpacked(member, _contained(member.container), readable(text)))


class Stream:
    """A file read from its beginning on, in pieces: `read_file` for what is too large to be held."""

    def __init__(self, address: storage.Uri) -> None:
        text = os.fspath(address)
        if text.startswith(_PREFIX):
            member, _ = _parse(text)
            self._pieces = _unpacked(member, _contained(member.container), readable(text))
        else:
            self._pieces = _pieces(storage.open_file(text))
        self._rest = b""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, none only at the end."""
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._rest = piece
        data, self._rest = self._rest[:size], self._rest[size:]
        return data


def _pieces(file: pa.NativeFile) -> Iterator[bytes]:
    with file:
        while piece := file.read(_CHUNK):
            yield piece


def readable(address: storage.Uri) -> str:
    """An address as messages show it: `/data/train2017.zip!/train2017/000000000009.jpg`."""
    text = os.fspath(address)
    if text.startswith(_CELL):
        file, _, place = text.removeprefix(_CELL).rpartition("#")
        return f"{file}, row {place.split(',')[1]} of group {place.split(',')[0]}"
    if text.startswith(_ROW):
        file, _, place = text.removeprefix(_ROW).rpartition("#")
        return f"{file}, column {place.split(',')[3]} of the row at byte {place.split(',')[0]}"
    if not text.startswith(_PREFIX):
        return text
    member, path = _parse(text)
    return f"{readable(member.container)}!/{path}"


def cell(file: str, group: int, row: int, column: str) -> str:
    """The address of an image that a Parquet file holds, as the `bytes` of a struct."""
    return f"{_CELL}{file}#{group},{row},{column}"


def row_column(file: str, span: Span, column: str) -> str:
    """The address of a value of a shard's row: bytes as they are, lists as JSON."""
    return f"{_ROW}{file}#{span.offset},{span.length},{span.crc32},{column}"


def _read_row(address: str) -> bytes:
    place, _, column = address.removeprefix(_ROW).rpartition(",")
    value = _row(place)[column]
    return value if isinstance(value, bytes) else json.dumps(value).encode()


@lru_cache(maxsize=16)
def _row(place: str) -> dict[str, Any]:
    """A row of a shard, whose columns are asked for one after the other.

    Raises:
        ValueError: it is not what was written.
    """
    file, _, numbers = place.rpartition("#")
    offset, length, crc32 = map(int, numbers.split(","))
    with storage.open_file(file) as stream:
        data = stream.read_at(length, offset)
    if zlib.crc32(data) != crc32:
        raise Fault(f"{file}: the row at byte {offset} is not what was written", "prepare these shards again")
    return decode_row(data, _schema(file), 1 << 31)


@lru_cache(maxsize=64)
def _schema(file: str) -> pa.Schema:
    with storage.open_file(file) as stream:
        return pa.ipc.open_file(stream).schema


def _read_cell(address: str) -> bytes:
    file, _, place = address.removeprefix(_CELL).rpartition("#")
    group, row, column = place.split(",", 2)
    return _column(file, int(group), column)[int(row)].as_py()


@lru_cache(maxsize=4)
def _column(file: str, group: int, column: str) -> Sequence[pa.Scalar]:
    """A column of a row group: neighbours in a file are read one after the other."""
    with storage.open_file(file) as stream:
        table = pq.ParquetFile(stream).read_row_group(group, columns=[column])
    return table.select([column]).flatten()[f"{column}.bytes"]


def list_members(container: str) -> dict[str, Member]:
    """Every file of an archive by its path, without what file managers left.

    The central directory is walked to its end, whatever count the end record states: archivers that write more than
    65 535 files without zip64 wrap it.

    Args:
        container: the archive: a path, a URI or the address of a member.

    Raises:
        ValueError: it is no complete zip archive, or holds encrypted files; names it and the file.
    """
    base, name = 0, readable(container)
    member = _parse(container)[0] if container.startswith(_PREFIX) else None
    if member and is_stored(member):
        container = member.container
        file = _contained(container)
        base = member.offset + _header_length(file.read_at(_HEADER.size, member.offset), name)
        stream = _as_file(file, base, member.size)
    else:
        file = _contained(container)
        stream = _as_file(file, 0, file.size())
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OverflowError, struct.error) as error:
        raise ValueError(
            f"{name}: is not a complete zip archive ({error}); is the download complete, and are all "
            "parts of a split archive joined?"
        ) from error
    members = {}
    for entry in entries:
        path = _clean(entry.filename)
        if entry.is_dir() or not path:
            continue
        if entry.flag_bits & _ENCRYPTED:
            raise ValueError(f"{name}: {path} is encrypted; unpack it with its password")
        members[path] = Member(
            container, base + entry.header_offset, entry.compress_size, entry.file_size, entry.compress_type, entry.CRC
        )
    return members


def list_tar(container: str) -> dict[str, Member]:
    """Every file of a tar archive that is not compressed, as `list_members` gives those of a zip.

    Raises:
        ValueError: it is no complete tar archive.
    """
    file = _contained(container)
    members = {}
    try:
        with tarfile.open(fileobj=_as_file(file, 0, file.size()), mode="r:") as archive:
            for entry in archive:
                path = _clean(entry.name)
                if entry.isreg() and path:
                    members[path] = Member(container, entry.offset_data, entry.size, entry.size, _BARE, 0)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"{readable(container)}: is not a complete tar archive ({error}); is the download complete, and not "
            "compressed?"
        ) from error
    return members


def _clean(path: str) -> str:
    """The path of a member in one spelling, "" of one that is not wanted."""
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]
    return "" if ".." in parts or is_junk("/".join(parts)) else "/".join(parts)


def is_stored(member: Member) -> bool:
    """True where the bytes of a member lie in its container as they are."""
    return member.method == _STORED


def is_zip(uri: storage.Uri) -> bool:
    """True if a file has the end of a zip archive."""
    file = storage.open_file(uri)
    return zipfile.is_zipfile(_as_file(file, 0, file.size()))


def _parse(address: str) -> tuple[Member, str]:
    """The member and its path."""
    body, _, numbers = address.removeprefix(_PREFIX).rpartition("#")
    length, *rest = map(int, numbers.split(","))
    return Member(body[:length], *rest), body[length + 2 :]


def _contained(container: str) -> pa.NativeFile:
    """The open file that holds a container's bytes."""
    if container.startswith(_PREFIX):
        return storage.open_file(_spooled(container))
    return _remote(container) if container.startswith("s3://") else storage.open_file(container)


@lru_cache(maxsize=16)
def _remote(uri: str) -> pa.NativeFile:
    """An open object: opening it asks the store for its size, which one file after another need not repeat."""
    return storage.open_file(uri)


@lru_cache(maxsize=16)
def _spooled(address: str) -> str:
    """The path of a member unpacked into the folder for temporary files: once a machine, as its name is its address."""
    folder = os.path.join(tempfile.gettempdir(), f"panoptic-ray-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    path = os.path.join(folder, f"{hashlib.sha256(address.encode()).hexdigest()[:32]}.zip")
    member, _ = _parse(address)
    if not os.path.exists(path) or os.path.getsize(path) != member.size:
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(temporary, "xb") as file:
                for chunk in _unpacked(member, _contained(member.container), readable(address)):
                    file.write(chunk)
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)
    return path


def _as_file(file: pa.NativeFile, start: int, size: int) -> io.BufferedReader:
    """A range of bytes of a file, as a file of its own."""
    return io.BufferedReader(_Range(file, start, size), 1 << 16)


class _Range(io.RawIOBase):
    """A range of bytes of a file, as a file."""

    def __init__(self, file: pa.NativeFile, start: int, size: int) -> None:
        super().__init__()
        self._file, self._start, self._size, self._place = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(f"seek to {base + offset}")
        self._place = base + offset
        return self._place

    def readinto(self, buffer) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._size - self._place))
        data = self._file.read_at(count, self._start + self._place) if count else b""
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def _header_length(header: bytes, name: str) -> int:
    """The length of a local header with its name and extra field."""
    if len(header) < _HEADER.size or header[:4] != b"PK\3\4":
        raise Fault(f"{name}: the archive is damaged there", COPY_ARCHIVE)
    *_, path, extra = _HEADER.unpack(header[: _HEADER.size])
    return _HEADER.size + path + extra


def _inflated(machine: Any, packed: bytes, most: int) -> Iterator[bytes]:
    """The decompressed bytes of packed ones, in pieces of at most `_CHUNK` bytes and of at most `most` + 1.

    Eight packed megabytes may be eight gigabytes, which must not be in memory at once.
    """
    limit = min(_CHUNK, most + 1)
    data = machine.decompress(packed, limit)
    while data:
        yield data
        if machine.eof:
            return
        data = machine.decompress(getattr(machine, "unconsumed_tail", b""), limit)  # bz2 keeps the rest itself


def _unpacked(member: Member, file: pa.NativeFile, name: str) -> Iterator[bytes]:
    """The content of a member, piece by piece, compared with its size and CRC at the end."""
    if member.method not in (_BARE, _STORED, _DEFLATED, _BZIP2):
        raise Fault(f"{name}: is packed by the zip method {member.method}, which is not read", "unpack the archive")
    if member.size > max(_LARGE, _DENSEST * member.packed):
        raise Fault(f"{name}: {member.packed} bytes are said to unpack to {member.size}", COPY_ARCHIVE)
    # one request where the member is small: header, name, extra field and content
    first = file.read_at(_HEADER.size + len(name.encode()) + _SPARE + min(member.packed, _CHUNK), member.offset)
    bare = member.method == _BARE
    start = 0 if bare else _header_length(first, name)
    crc = size = 0
    unpack = {_DEFLATED: lambda: zlib.decompressobj(-15), _BZIP2: bz2.BZ2Decompressor}.get(member.method)
    machine = unpack() if unpack else None
    place = 0
    while place < member.packed:
        piece = first[start : start + member.packed] if not place else b""
        if not piece:
            piece = file.read_at(min(_CHUNK, member.packed - place), member.offset + start + place)
        if not piece:
            break
        place += len(piece)
        try:
            for data in _inflated(machine, piece, member.size) if machine else [piece]:
                crc, size = zlib.crc32(data, crc), size + len(data)
                if size > member.size:
                    break
                yield data
        except (zlib.error, EOFError, OSError) as error:
            raise Fault(f"{name}: the archive is damaged there ({error})", COPY_ARCHIVE) from error
        if size > member.size:  # no more than the directory states, so that a crafted archive cannot fill the memory
            break
    if size != member.size or (crc != member.crc and not bare):
        raise Fault(f"{name}: does not have the size and CRC that its archive states", COPY_ARCHIVE)
