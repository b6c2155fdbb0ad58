"""Data sets in folders and in zips: the same paths, the same bytes, and words for archives that cannot be read."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from pipelines.data.readers import archive
from pipelines.data.readers.archive import list_members, read_file, readable
from pipelines.data.readers.tree import Folder, Tree

FILES = {
    "train2017/000000000009.jpg": os.urandom(4000),
    "train2017/000000000025.jpg": b"a" * 40_000,
    "annotations/panoptic_train2017.json": b"{}",
    "annotations/panoptic_train2017/000000000009.png": os.urandom(300),
}
JUNK = ("__MACOSX/train2017/._000000000009.jpg", "train2017/.DS_Store", "train2017/Thumbs.db", "annotations/._x.json")


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for path, data in files.items():
            file.writestr(path, data)
    return buffer.getvalue()


def of(folder: str, files: dict[str, bytes] = FILES) -> dict[str, bytes]:
    return {path: data for path, data in files.items() if path.startswith(f"{folder}/")}


def put(root: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def nested(method: int) -> dict[str, bytes]:
    """COCO's own zips: that of the annotations holds one of the id maps."""
    maps = {path.removeprefix("annotations/"): data for path, data in of("annotations/panoptic_train2017").items()}
    annotations = {
        "annotations/panoptic_train2017.json": b"{}",
        "annotations/panoptic_train2017.zip": zipped(maps),
        **dict.fromkeys(JUNK, b"junk"),
    }
    return {
        "train2017.zip": zipped({**of("train2017"), **dict.fromkeys(JUNK, b"junk")}, method),
        "panoptic_annotations_trainval2017.zip": zipped(annotations, method),
    }


def tarred(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for path, data in files.items():
            entry = tarfile.TarInfo(f"./{path}")
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


FORMS = {
    "folder": {**FILES, **dict.fromkeys(JUNK, b"junk")},
    "one zip": {"all.zip": zipped(FILES)},
    "a zip in a folder": {"downloads/coco/all.zip": zipped(FILES)},
    "deflated": nested(zipfile.ZIP_DEFLATED),
    "stored": nested(zipfile.ZIP_STORED),
    "bzip2": nested(zipfile.ZIP_BZIP2),
    "tar": {**nested(zipfile.ZIP_STORED), "train2017.zip": b"cut", "photographs.tar": tarred(of("train2017"))},
    "half unpacked": {**of("train2017"), "annotations.zip": zipped(of("annotations"))},
    "wrapped": {f"coco/2017/{path}": data for path, data in FILES.items()},
    "wrapped in a zip": {"all.zip": zipped({f"coco/{path}": data for path, data in FILES.items()})},
    "without a folder": {
        "train2017.zip": zipped({path.rsplit("/", 1)[-1]: data for path, data in of("train2017").items()}),
        "annotations.zip": zipped(of("annotations")),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_files_in_every_form(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive.tempfile, "gettempdir", lambda: str(tmp_path / "spool"))
    tree = Tree(put(tmp_path / "root", FORMS[form]))
    for folder in ("train2017", "annotations/panoptic_train2017"):
        path = tree.one([folder], "folder", "--data.images")
        found = Folder(tree, path)
        assert {f"{folder}/{name}" for name in found.stamps} == set(of(folder))
        for name in found.stamps:
            assert read_file(found.address(name)) == FILES[f"{folder}/{name}"]
            assert found.stamps[name][0] == len(FILES[f"{folder}/{name}"])
    assert tree.read(tree.one(["annotations/panoptic_train2017.json"], "file", "--data.json-file")) == b"{}"
    spooled = list((tmp_path / "spool").rglob("*.zip"))
    assert len(spooled) == (form in ("deflated", "bzip2"))  # a zip in a zip that is compressed is unpacked once


def test_a_zip_may_be_the_root_and_members_are_read_alone(tmp_path: Path) -> None:
    file = put(tmp_path, {"all.bin": zipped(FILES)}) / "all.bin"
    tree = Tree(file)
    assert tree.find(["train2017"]) == ["train2017"] and tree.is_file("train2017/000000000009.jpg")
    address = tree.address("train2017/000000000009.jpg")
    assert readable(address) == f"{file}!/train2017/000000000009.jpg"
    assert read_file(address) == FILES["train2017/000000000009.jpg"]


def test_unpacked_files_count_before_members(tmp_path: Path) -> None:
    tree = Tree(put(tmp_path, {"all.zip": zipped(FILES), "train2017/000000000009.jpg": b"mine"}))
    tree.mount()
    assert tree.read("train2017/000000000009.jpg") == b"mine"
    assert set(tree.files("train2017")) == {"000000000009.jpg", "000000000025.jpg"}


def test_two_candidates_are_both_named(tmp_path: Path) -> None:
    tree = Tree(put(tmp_path, {f"{above}/{path}": data for above in "ab" for path, data in FILES.items()}))
    with pytest.raises(ValueError, match=rf"2 places hold a (.|\n)*{tmp_path}/a/train2017\n(.|\n)*/b/train2017\n.*--x"):
        tree.one(["train2017"], "folder of images", "--x")


def wrapped_count(path: Path, count: int) -> None:
    """A zip of `count` empty files whose end record holds the count modulo 65536, as some archivers write it."""
    names = [b"panoptic/%06d.png" % k for k in range(count)]
    local = b"".join(struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 33, 0, 0, 0, 19, 0) + name for name in names)
    entry = struct.Struct("<4s6H3I5H2I")
    central = b"".join(
        entry.pack(b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, 0, 0, 19, 0, 0, 0, 0, 0, 49 * k) + name
        for k, name in enumerate(names)
    )
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count & 0xFFFF, count & 0xFFFF, len(central), len(local), 0)
    path.write_bytes(local + central + end)


def test_more_members_than_sixteen_bits_count(tmp_path: Path) -> None:
    wrapped_count(tmp_path / "maps.zip", 70_000)
    members = list_members(str(tmp_path / "maps.zip"))
    assert len(members) == 70_000 and "panoptic/069999.png" in members


def test_archives_that_cannot_be_read_are_named_where_nothing_is_found(tmp_path: Path) -> None:
    whole = zipped(FILES)
    put(tmp_path, {"cut.zip": whole[: len(whole) // 2], "page.zip": b"<html>"})
    with pytest.raises(ValueError, match=r"no folder; (.|\n)*cut\.zip: is not a complete zip(.|\n)*page\.zip: is not"):
        Tree(tmp_path).one(["train2017"], "folder", "--x")
    with pytest.raises(ValueError, match="neither a folder nor a zip"):
        Tree(tmp_path / "page.zip")
    with pytest.raises(ValueError, match="no such file"):
        Tree(tmp_path / "gone")


def test_what_a_crafted_member_says_of_itself_is_not_believed(tmp_path: Path) -> None:
    """Half a megabyte that unpacks to 512: refused before a byte of it is unpacked."""
    bomb = bytearray(zipped({"a.png": bytes(1 << 20)}))
    place = bomb.rindex(b"PK\x01\x02") + 24
    bomb[place : place + 4] = (512 << 20).to_bytes(4, "little")
    tree = Tree(put(tmp_path, {"x.zip": bytes(bomb)}) / "x.zip")
    with pytest.raises(ValueError, match=r"x\.zip!/a\.png: \d+ bytes are said to unpack to 536870912"):
        tree.read("a.png")
    place = bomb.rindex(b"PK\x01\x02") + 24
    bomb[place : place + 4] = (1 << 19).to_bytes(4, "little")
    tree = Tree(put(tmp_path / "less", {"x.zip": bytes(bomb)}) / "x.zip")
    with pytest.raises(ValueError, match=r"x\.zip!/a\.png: does not have the size and CRC"):
        tree.read("a.png")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_dense_member_is_unpacked_in_small_pieces(
    method: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One packed chunk may hold a thousand unpacked ones; they are never in memory together."""
    monkeypatch.setattr(archive, "_CHUNK", 1 << 16)
    content = bytes(5 << 20) + os.urandom(1000) + bytes(1 << 20)
    tree = Tree(put(tmp_path, {"x.zip": zipped({"a.json": content}, method)}) / "x.zip")
    member, name = archive._parse(tree.address("a.json"))
    pieces = list(archive._unpacked(member, archive._contained(member.container), name))
    assert b"".join(pieces) == content and max(map(len, pieces)) <= 1 << 16
    assert tree.read("a.json") == content


def test_members_that_lead_outside_are_left_out(tmp_path: Path) -> None:
    names = ["../../etc/x.png", "a/../../x.png", "..\\..\\x.png", "/x.png", "a/good.png"]
    tree = Tree(put(tmp_path, {"x.zip": zipped({name: b"x" for name in names})}) / "x.zip")
    assert set(tree.files()) == {"x.png", "a/good.png"}, "an absolute path is one below the archive"


def test_encrypted_members_are_named(tmp_path: Path) -> None:
    data = bytearray(zipped({"secret.png": b"x" * 99}))
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    put(tmp_path, {"a.zip": bytes(data)})
    with pytest.raises(ValueError, match=r"a\.zip: secret\.png is encrypted"):
        list_members(str(tmp_path / "a.zip"))


def test_a_damaged_member_is_named(tmp_path: Path) -> None:
    data = bytearray(zipped({"a/good.png": b"g" * 50, "a/bad.png": os.urandom(500)}, zipfile.ZIP_STORED))
    data[data.index(b"bad.png") + 100] ^= 1
    tree = Tree(put(tmp_path, {"x.zip": bytes(data)}) / "x.zip")
    assert tree.read("a/good.png") == b"g" * 50
    with pytest.raises(ValueError, match=r"x\.zip!/a/bad\.png: does not have the size and CRC"):
        tree.read("a/bad.png")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("b/001.jpg", "b/001.jpg"),
        ("b\\001.JPG", "b/001.jpg"),
        ("/home/anna/set/b/001.jpg", "b/001.jpg"),
        ("001.png", "b/001.jpg"),
        ("http://host/001.jpg", "b/001.jpg"),
        ("u\u0308.jpg", "\u00fc.jpg"),
        ("002.jpg", None),  # two files are like it
        ("003.jpg", None),
    ],
)
def test_names_that_are_written_otherwise(tmp_path: Path, name: str, match: str | None) -> None:
    files = dict.fromkeys(("b/001.jpg", "a/002.jpg", "b/002.jpg", "\u00fc.jpg", "001.txt"), b"")
    assert Folder(Tree(put(tmp_path, files))).match(name) == match
