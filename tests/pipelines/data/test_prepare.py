"""Preparing shards: what they hold, that they do not depend on chance, and what stops them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from jobs.prepare import main
from panoptic.png import encode_ids, from_coco
from panoptic.segmentation import Categories
from pipelines.cluster import disk, lease
from pipelines.data import prepare as preparation
from pipelines.data import resume
from pipelines.data.join import Roots
from pipelines.data.prepare import Manifest, ensure_shards, is_shards, prepare, read_row
from pipelines.data.readers import read_source
from pipelines.data.readers.coco_panoptic import coco_panoptic
from pipelines.data.readers.source import Problem
from pipelines.data.verify import verify
from tests.support.coco_folder import CATEGORIES, write_folder, write_json
from tests.support.full_disk import on_a_full_disk

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(120)]


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    write_folder(tmp_path / "data", "val", count=40)
    source, out = coco_panoptic(tmp_path / "data", "val"), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(preparation, "_write_or_tell", on_a_full_disk)
        with pytest.raises(
            disk.DiskFull, match=rf"^{out}: the disk is full; the shards of split val need \d+ MiB, "
        ) as told:
            prepare(source, out)
    assert "\n" not in str(told.value) and str(told.value).endswith("Make room there, and the same command goes on")
    assert "Traceback" not in "".join(capfd.readouterr())
    assert not (out / "manifest.json").exists()
    assert prepare(source, out) == verify(out)


def test_a_disk_that_the_shards_will_fill_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "data", "val", count=4)
    source, out = coco_panoptic(tmp_path / "data", "val"), tmp_path / "out"
    monkeypatch.setattr(disk, "free_bytes", lambda uri: source.bytes - 1)
    with pytest.raises(
        disk.DiskFull, match=rf"^{out}: the shards of split val need \d+ MiB, \d+ MiB are free\. Make room"
    ):
        prepare(source, out)
    assert not out.exists()
    monkeypatch.setattr(disk, "free_bytes", lambda uri: source.bytes)
    assert prepare(source, out).rows == 4


def rows_of(manifest: Manifest) -> list[dict]:
    return [row for file in manifest.files for row in pa.ipc.open_file(file).read_all().to_pylist()]


def test_content(tmp_path: Path) -> None:
    content = write_folder(tmp_path / "data", "val", count=40)
    content["annotations"][5]["segments_info"][0]["area"] = 1
    content["images"].append({"id": 7, "file_name": "x.jpg", "height": 20, "width": 30})
    write_json(tmp_path / "data", "val", content)
    manifest = prepare(coco_panoptic(tmp_path / "data", "val"), tmp_path / "out")

    assert [shard.rows for shard in manifest.shards] == [16, 16, 8]
    assert (manifest.rows, manifest.maximum_height, manifest.maximum_width) == (40, 20, 30)
    assert manifest.segments == (78, 39, 0) and manifest.crowds == 39
    assert (manifest.empty, manifest.unannotated, manifest.area_mismatches) == (1, 1, 1)
    assert manifest.categories == CATEGORIES
    assert Manifest.load(tmp_path / "out") == verify(tmp_path / "out") == manifest

    rows = rows_of(manifest)
    assert [row["name"] for row in rows] == [f"{k:03d}.jpg" for k in range(40)]  # evaluation keeps the JSON's order
    for row, annotation in zip(rows, content["annotations"], strict=True):
        assert row["image"] == (tmp_path / "data/images/val" / row["name"]).read_bytes()
        png = (tmp_path / "data/annotations/panoptic_val" / annotation["file_name"]).read_bytes()
        truth, sample = from_coco(png, annotation, CATEGORIES, row["name"]), read_row(row)
        np.testing.assert_array_equal(sample.truth.segments, truth.segments)
        np.testing.assert_array_equal(sample.truth.labels, truth.labels)
        np.testing.assert_array_equal(sample.truth.is_crowd(), truth.is_crowd())
        assert sample.image.shape == (row["height"], row["width"], 3) and sample.name == row["name"]
        assert row["image_id"] == annotation["image_id"]

    metadata = pa.ipc.open_file(manifest.files[0]).schema.metadata
    assert Categories.from_coco(json.loads(metadata[b"panoptic.categories"])) == CATEGORIES
    assert metadata[b"panoptic.schema_version"] == b"2"


def test_content_depends_on_nothing_but_source_and_seed(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", "train", count=40)
    source = coco_panoptic(tmp_path / "data", "train")
    first = prepare(source, tmp_path / "a")
    again = prepare(source, tmp_path / "b")
    assert first.shards == again.shards and first.hash == again.hash
    assert prepare(source, tmp_path / "c", rows_per_shard=7).hash == first.hash
    assert prepare(source, tmp_path / "d", seed=1).hash != first.hash
    names = [row["name"] for row in rows_of(first)]
    assert names != sorted(names) and sorted(names) == [f"{k:03d}.jpg" for k in range(40)]
    kept = prepare(source, tmp_path / "e", shuffle=False)
    assert [row["name"] for row in rows_of(kept)] == sorted(names)


def test_many_segments_take_16_bits(tmp_path: Path) -> None:
    content = write_folder(tmp_path, "val", count=1)
    ids = (np.arange(600, dtype=np.int32) + 70000).reshape(20, 30)
    (tmp_path / "annotations/panoptic_val/000.png").write_bytes(encode_ids(ids))
    content["annotations"][0]["segments_info"] = [{"id": int(i), "category_id": 24} for i in ids.ravel()[::-1]]
    write_json(tmp_path, "val", content)
    sample = read_row(rows_of(prepare(coco_panoptic(tmp_path, "val"), tmp_path / "out"))[0])
    np.testing.assert_array_equal(sample.truth.segments.ravel(), np.arange(600, 0, -1))  # in the record's order


def broken_folder(root: Path) -> None:
    """Six good images and one of each fault that needs the pixels, and one that does not."""
    content = write_folder(root, "val", count=12)
    images, pngs, records = root / "images/val", root / "annotations/panoptic_val", content["annotations"]
    (images / "000.jpg").write_bytes(b"\xff\xd8 no JPEG")
    content["images"][1]["height"] = 21
    records[2]["segments_info"].append({"id": 9, "category_id": 24})
    records[3]["segments_info"].pop()
    (pngs / "004.png").unlink()
    small = cv2.imencode(".jpg", np.zeros((8, 9, 3), np.uint8))[1].tobytes()
    (images / "005.jpg").write_bytes(small)
    write_json(root, "val", content)


def test_problems_stop_the_job_with_a_table(tmp_path: Path) -> None:
    broken_folder(tmp_path / "data")
    source = coco_panoptic(tmp_path / "data", "val")
    with pytest.raises(ValueError, match="6 of 12 images failed validation") as error:
        prepare(source, tmp_path / "out")
    lines = {line.split()[0]: line for line in str(error.value).splitlines()}
    assert "JPEG ends before" in lines["000.jpg"] or "cannot be decoded" in lines["000.jpg"]
    assert "map is 20x30 but the JSON says 21x30" in lines["001.jpg"]
    assert "9" in lines["002.jpg"] and "3" in lines["003.jpg"]
    assert "004.png is missing" in lines["004.jpg"]
    assert "map is 20x30 but the photograph 8x9" in lines["005.jpg"]
    assert "--data.on-invalid skip" in str(error.value)
    assert not is_shards(tmp_path / "out") and not list((tmp_path / "out").iterdir())


def test_problems_can_be_skipped(tmp_path: Path) -> None:
    broken_folder(tmp_path / "data")
    manifest = prepare(coco_panoptic(tmp_path / "data", "val"), tmp_path / "out", on_invalid="skip")
    assert manifest.rows == 6 and len(rows_of(manifest)) == 6
    assert sorted(problem.name for problem in manifest.skipped) == [f"{k:03d}.jpg" for k in range(6)]
    assert "6 images failed validation and were skipped" in manifest.summary()
    assert Manifest.load(tmp_path / "out") == manifest
    listed = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [Problem(**entry) for entry in listed] == list(manifest.skipped)
    assert verify(tmp_path / "out") == manifest


def test_a_check_says_the_same_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken_folder(tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    command = ["--data.root", str(tmp_path / "data"), "--data.split", "val", "--check"]
    with pytest.raises(ValueError, match="6 of 12 images failed validation"):
        main(command)
    manifest = main([*command, "--data.on-invalid", "skip"])
    assert sorted(tmp_path.rglob("*")) == before
    written = prepare(coco_panoptic(tmp_path / "data", "val"), tmp_path / "out", on_invalid="skip")
    assert (manifest.rows, manifest.skipped, manifest.statistics) == (6, written.skipped, written.statistics)
    assert "6 images were left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--out DIR: missing"):
        main(command[:-1])


def test_long_tables_are_cut(tmp_path: Path) -> None:
    content = write_folder(tmp_path, "val", count=30)
    for image in content["images"]:
        image["width"] = 31
    write_json(tmp_path, "val", content)
    with pytest.raises(ValueError, match=r"30 of 30 images(.|\n)*and 10 more"):
        prepare(coco_panoptic(tmp_path, "val"), tmp_path / "out", on_invalid="skip")


def test_finished_shards_are_reused(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", "train", count=3)
    manifest = prepare(coco_panoptic(tmp_path / "data", "train"), tmp_path / "out")
    before = (tmp_path / "out/shard-00000.arrow").stat().st_mtime_ns
    assert prepare(coco_panoptic(tmp_path / "data", "train"), tmp_path / "out") == manifest
    assert (tmp_path / "out/shard-00000.arrow").stat().st_mtime_ns == before
    (tmp_path / "out/shard-00000.arrow").unlink()
    assert prepare(coco_panoptic(tmp_path / "data", "train"), tmp_path / "out") == manifest
    assert verify(tmp_path / "out") == manifest


def test_unfinished_shards_are_written_afresh(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", "train", count=3)
    out = tmp_path / "out"
    out.mkdir()
    for name in ("shard-00000.arrow", "shard-00009.arrow", ".shard-00001.arrow.1234.tmp"):
        (out / name).write_bytes(b"left by an interrupted job")
    assert not is_shards(out)
    with pytest.raises(ValueError, match="did not finish"):
        ensure_shards(out, "train", tmp_path / "cache")
    prepare(coco_panoptic(tmp_path / "data", "train"), out)
    verify(out)
    names = ["_index.arrow", "_photographs.txt", "manifest.json", "shard-00000.arrow"]
    assert sorted(path.name for path in out.iterdir()) == names


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WRITE = preparation._write_or_tell


def dies_at_the_second(rows: pa.Table, out: str, categories: Categories, **how) -> pa.Table:
    """What a worker does that is lost with its machine after two of three shards, the first without its report."""
    number = rows["shard"][0].as_py()
    if number == 2:
        deadline = time.monotonic() + 60  # the other two are written at the same time
        others = Path(out, ".prepare", "shard-00001.json"), Path(out).with_name("first")
        while not all(file.exists() for file in others) and time.monotonic() < deadline:
            time.sleep(0.05)
        raise MemoryError("lost")
    done = WRITE(rows, out, categories, **how)
    if number == 0:
        Path(out, ".prepare", "shard-00000.json").unlink()
        Path(out).with_name("first").touch()
    return done


def test_an_interrupted_preparation_is_finished_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "data", "train", count=40)
    source, out = coco_panoptic(tmp_path / "data", "train"), tmp_path / "out"
    prepare(source, tmp_path / "undisturbed")
    with monkeypatch.context() as patched:
        patched.setattr(preparation, "_write_or_tell", dies_at_the_second)
        with pytest.raises(Exception, match="lost"):
            prepare(source, out)
    (out / ".shard-00002.arrow.12345678.tmp").write_bytes(b"begun")
    finished, unreported = (out / f"shard-0000{k}.arrow" for k in (1, 0))
    before, lost = finished.stat().st_mtime_ns, unreported.stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"other options \(seed was 0 and is now 7\); give the same ones"):
        prepare(source, out, seed=7)
    prepare(source, out)
    assert finished.stat().st_mtime_ns == before and unreported.stat().st_mtime_ns != lost
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_a_shard_that_was_cut_or_whose_inputs_changed_is_written_again(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", "val", count=20)
    source, out = coco_panoptic(tmp_path / "data", "val"), str(tmp_path / "out")
    rows = source.rows.append_column("shard", pa.array([3] * 20))

    def write(inputs: str = "a", rows: pa.Table = rows) -> bool:
        return json.loads(preparation._write_or_tell(rows, out, CATEGORIES, inputs=inputs)["report"][0].as_py())[
            "before"
        ]

    assert [write(), write(), write("b"), write("b"), write("b", rows.slice(1))] == [False, True, False, True, False]
    assert write("b", rows.slice(1))
    with (tmp_path / "out/shard-00003.arrow").open("r+b") as file:
        file.truncate(1000)
    assert [write("b", rows.slice(1)), write("b", rows.slice(1))] == [False, True]
    (tmp_path / "out/.prepare/shard-00003.json").write_bytes(b'{"key": ')
    assert [write("b", rows.slice(1)), write("b", rows.slice(1))] == [False, True]


def test_a_finished_set_is_not_mixed_with_other_options(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", "val", count=3)
    source, out = coco_panoptic(tmp_path / "data", "val"), tmp_path / "out"
    manifest = prepare(source, out)
    before = contents(out)
    with pytest.raises(
        ValueError, match=r"rows_per_shard was its default and is now 2; on_invalid was stop and is now skip"
    ):
        prepare(source, out, rows_per_shard=2, on_invalid="skip")
    with pytest.raises(ValueError, match=r"other options \(data\.things was its default and is now \['person'\]\)"):
        prepare(read_source("coco", tmp_path / "data", "val", {"things": ("person",)}), out)
    assert contents(out) == before
    assert len(prepare(source, out, rows_per_shard=2, replace_others=True).shards) == 2
    (tmp_path / "data/images/val/000.jpg").write_bytes((tmp_path / "data/images/val/001.jpg").read_bytes())
    assert prepare(coco_panoptic(tmp_path / "data", "val"), out, rows_per_shard=2).hash != manifest.hash


def test_of_two_at_once_one_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "data", "val", count=3)
    roots = Roots.of(str(tmp_path / "data"), "coco")
    source, out = coco_panoptic(tmp_path / "data", "val"), tmp_path / roots.folder / "val"
    monkeypatch.setattr(preparation, "PATIENCE", 0.1)
    with lease.hold(resume.lease_folder(str(out)), "the folder"):
        with pytest.raises(lease.Busy, match=rf"the folder {out} is in use by .*, or give another folder with --out"):
            prepare(source, out)
        assert [path.name for path in out.iterdir()] == [resume.STATE]
        later = threading.Thread(target=preparation._prepare_in_cache, args=(roots, "val", tmp_path, 0, "stop", None))
        later.start()
        time.sleep(0.5)
        assert later.is_alive()
    later.join(60)
    assert is_shards(out)


def test_other_content_is_never_overwritten(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", "train", count=2)
    write_folder(tmp_path / "data", "val", count=2)
    prepare(coco_panoptic(tmp_path / "data", "train"), tmp_path / "out")
    with pytest.raises(ValueError, match="holds the shards of split train"):
        prepare(coco_panoptic(tmp_path / "data", "val"), tmp_path / "out")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"holds other files \(letter\.txt\)"):
        prepare(coco_panoptic(tmp_path / "data", "val"), tmp_path / "home")


def test_manifests_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no finished shards; run jobs/prepare\.py"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match="schema_version is 99"):
        Manifest.load(tmp_path)


def test_ensure_shards(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", "train", count=2)
    made = ensure_shards(tmp_path / "data", "train", tmp_path / "cache")
    assert made.uri.startswith(str(tmp_path / "cache"))
    assert ensure_shards(tmp_path / "data", "train", tmp_path / "cache") == made
    assert ensure_shards(made.uri, "train", tmp_path / "cache").files == made.files
    assert ensure_shards(Path(made.uri).parent, "train", tmp_path / "cache").files == made.files
    with pytest.raises(ValueError, match="shards of split 'train', not of 'val'"):
        ensure_shards(made.uri, "val", tmp_path / "cache")
    with pytest.raises(ValueError, match=r"data\.reader x: unknown; there are coco"):
        ensure_shards(tmp_path / "data", "train", tmp_path / "cache", reader="x")


def test_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "data", "train", count=2)
    manifest = main(["coco", str(tmp_path / "data"), "--split", "train", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "2 images of split train in 1 shards" in printed and manifest.hash[:16] in printed
    assert ["person", "thing", "2"] in [line.split()[:3] for line in printed.splitlines()]


def test_real_photographs(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """A crowd, void, 133 classes, a PNG among the photographs; and a subset of a split."""
    manifest = prepare(coco_panoptic(shared("data/coco_sample"), "sample"), tmp_path / "coco")
    assert manifest.rows == 4 and manifest.crowds >= 1 and manifest.area_mismatches == 0
    novel = prepare(coco_panoptic(shared("data/pedestrians"), "val_novel"), tmp_path / "novel")
    assert novel.rows == 58 and (novel.maximum_height, novel.maximum_width) == (376, 672)
