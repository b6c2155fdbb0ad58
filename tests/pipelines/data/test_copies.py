"""Augmented copies: what is written is what a training would have shown, and what is left to be done to it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow.dataset import dataset

from panoptic.png import decode_image, encode_raw
from panoptic.segmentation import Sample
from panoptic.transforms import POLICIES, Augment, generator, training_view
from pipelines.data.copies import Copies, check_copies, copies_of, copy_name, without
from pipelines.data.join import Roots, with_copies
from pipelines.data.prepare import read_row
from pipelines.data.sampler import Stream
from pipelines.data.shard_reader import view
from pipelines.data.shard_writer import write_shard
from tests.support.coco_folder import write_folder

JITTER = Augment(
    scale="factor", factors=(0.5, 1.5, 0.1), crop=(16, 24), flip=0.5, colour="colour004", colour_chance=1.0
)
SEED = 7


def written(root: Path, augment: Augment | None, count: int = 3) -> list[dict]:
    """The rows of one shard, with copies or without."""
    if not root.exists():
        write_folder(root, "train", count)
    source = Roots.of(root).open("train")
    if augment is not None:
        source = with_copies(source, Copies(augment, SEED))
    number = np.arange(source.rows.num_rows)
    rows = source.rows.append_column("shard", pa.array(0 * number)).append_column("number", pa.array(number))
    out = root.parent / f"out-{augment is None or augment.copies}"
    answer = write_shard(rows, str(out), source.categories, source.decode, source.orientation, source.copies)
    report = json.loads(answer["report"][0].as_py())
    assert not report["problems"]
    file = out / report["path"]
    return dataset(file, format="parquet" if file.suffix == ".parquet" else "ipc").to_table().to_pylist()


@pytest.mark.parametrize("policy", [JITTER, replace(POLICIES["lsj"], crop=(32, 32)), POLICIES["colour004"]])
@pytest.mark.parametrize("originals", [True, False])
def test_a_copy_is_what_training_would_show_in_that_epoch(tmp_path: Path, policy: Augment, originals: bool) -> None:
    plain = written(tmp_path / "data", None)
    copied = written(tmp_path / "data", replace(policy, copies=2, originals=originals))
    assert len(copied) == 3 * (2 + originals)
    stream = Stream(SEED, rows=3, batch=1, steps=100)
    streamed = {}
    for position in range(6):
        epoch, number = stream.locate(position)
        streamed[number, epoch] = view({**plain[number], "position": position}, stream, policy)
    for place, row in enumerate(copied):
        number, own = divmod(place, 2 + originals)
        if originals and own == 0:
            assert row == plain[number]
            continue
        expected, made = streamed[number, own - originals], read_row(row)
        assert row["name"] == copy_name(plain[number]["name"], own - originals)
        assert row["image_id"] == plain[number]["image_id"]
        np.testing.assert_array_equal(made.image, expected.image)
        np.testing.assert_array_equal(made.truth.segments, expected.truth.segments)
        np.testing.assert_array_equal(made.truth.labels, expected.truth.labels)
        np.testing.assert_array_equal(made.truth.is_crowd(), expected.truth.is_crowd())


def test_training_augments_no_copy_twice(tmp_path: Path) -> None:
    policy = replace(JITTER, copies=1)
    copied = written(tmp_path / "data", policy)
    copies = Copies(policy, SEED)
    stream = Stream(0, rows=6, batch=1, steps=6)
    for position in range(6):
        epoch, number = stream.locate(position)
        shown = view({**copied[number], "position": position}, stream, policy, copies)
        if number % 2:  # a copy
            np.testing.assert_array_equal(shown.image, read_row(copied[number]).image)
        else:
            expected = training_view(read_row(copied[number]), policy, generator(0, epoch, number))
            np.testing.assert_array_equal(shown.image, expected.image)


def test_kinds_that_were_not_done_are_left() -> None:
    done = Augment(flip=0.0, colour="colour004", copies=1)
    left = without(JITTER, done)
    assert left == replace(JITTER, colour="none")
    scaled = without(JITTER, Augment(scale="short", flip=0.5, copies=1))
    assert (scaled.scale, scaled.crop, scaled.flip, scaled.colour) == ("none", JITTER.crop, 0.0, "colour004")
    assert without(JITTER, JITTER).crop == (0, 0)
    assert without(JITTER, Augment(crop=(8, 8), flip=0.0)) == JITTER  # scaled still, so cropped still


@pytest.mark.parametrize(("stored", "off"), [("raw", 0), ("png", 0), ("jpeg", 24)])
def test_forms_of_pixels(stored: str, off: int) -> None:
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 256, (5, 7, 3), np.uint8), np.ones((4, 4, 1), np.uint8))
    copies = Copies(Augment(copies=1, stored=stored), 0)  # pyright: ignore[reportArgumentType]
    data = copies.encode(Sample(image, None, "x"))  # pyright: ignore[reportArgumentType]
    assert np.abs(decode_image(data, "x", (20, 28)).astype(int) - image).mean() <= off


def test_raw_pixels_of_any_size() -> None:
    for size in ((1, 1), (3, 5), (64, 1)):
        image = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
        np.testing.assert_array_equal(decode_image(encode_raw(image[:, ::-1]), "x", size), image[:, ::-1])


def test_the_record_is_read_back_and_compared() -> None:
    copies = Copies(replace(JITTER, copies=2), SEED)
    source = json.loads(json.dumps({"copies": copies.record()}))
    assert copies_of(source) == copies and copies_of({}) is None
    check_copies(Augment(), source, "u")
    check_copies(copies.augment, source, "u")
    with pytest.raises(ValueError, match=r"augment\.flip 0\.5, not 0\.0"):
        check_copies(replace(copies.augment, flip=0.0), source, "u")
    with pytest.raises(ValueError, match="hold no copies"):
        check_copies(copies.augment, {}, "u")
    with pytest.raises(ValueError, match=r"augment\.doubled to False"):
        check_copies(Augment(colour="ssd", doubled=True), source, "u")
    with pytest.raises(ValueError, match="cannot be read"):
        copies_of({"copies": {"seed": 0, "augment": {"later": 1}}})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--policy", "colour004"], "needs --augment.copies"),
        (["--augment.flip", "0"], "needs --augment.copies"),
        (["--policy", "x"], "there are none, colour004"),
    ],
)
def test_the_job_refuses_what_would_be_ignored(options: list[str], words: str, tmp_path: Path) -> None:
    from jobs.prepare import main

    with pytest.raises(ValueError, match=words):
        main(["--data.root", str(tmp_path), "--data.split", "train", "--out", str(tmp_path / "out"), *options])


def test_the_job_starts_from_a_policy() -> None:
    from jobs.prepare import Options, with_policy
    from pipelines.config import parse_options

    arguments = [
        "--data.root",
        "a",
        "b",
        "--data.split",
        "train",
        "--out",
        "o",
        "--policy=lsj",
        "--augment.copies",
        "2",
    ]
    options: Options = parse_options(with_policy(arguments), arguments, "", {})
    assert options.augment == replace(POLICIES["lsj"], copies=2) and options.data.root == ("a", "b")


def test_two_sets_under_a_class_map_with_copies(ray_cluster: None, tmp_path: Path) -> None:
    """The whole job; what Ray's workers write is what this process writes."""
    from jobs.prepare import main
    from pipelines.data.loader import Feed
    from pipelines.data.verify import verify

    for name in ("a", "b"):
        write_folder(tmp_path / name, "train", 3)
    content = {"version": 1, "classes": [{"name": "scene", "thing": False, "from": ["sky", "car"]}], "rest": "keep"}
    (tmp_path / "map.json").write_text(json.dumps(content))
    roots, class_map = [str(tmp_path / name) for name in "ab"], str(tmp_path / "map.json")
    arguments = ["--data.root", *roots, "--data.split", "train", "--data.class-map", class_map, "--shuffle", "False"]
    arguments += ["--out", str(tmp_path / "out"), "--augment.copies", "1", "--augment.crop", "16", "24", "--seed", "7"]
    manifest = main([*arguments, "--rows-per-shard", "4"])
    assert manifest.rows == 12 and manifest.categories.names == ("scene", "person")
    assert [one["name"] for one in manifest.source["sets"]] == ["a", "b"] and "sha256" in manifest.source["class_map"]
    copies = copies_of(manifest.source)
    assert copies is not None and copies == Copies(Augment(copies=1, crop=(16, 24)), SEED)
    assert verify(manifest.uri).rows == 12
    source = with_copies(Roots.of(roots, class_map=class_map).open("train"), copies)
    number = np.arange(6)
    rows = source.rows.append_column("shard", pa.array(number // 4)).append_column("number", pa.array(number))
    rest = (str(tmp_path / "here"), source.categories, source.decode, source.orientation, source.copies)
    for first, shard in zip((0, 4), manifest.shards, strict=True):
        report = json.loads(write_shard(rows.slice(first, 4), *rest)["report"][0].as_py())
        assert report["sha256"] == shard.sha256
    stream = Stream(0, rows=12, batch=4, steps=3)
    with Feed(manifest, stream, Augment(crop=(16, 24), pad="end", flip=0.0)) as feed:
        shapes = {tuple(images.shape[2:]) for images, _ in feed}
    assert shapes == {(16, 24)}
