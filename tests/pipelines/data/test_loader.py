"""The feed: the same micro-batches for any layout and machinery, in an order that is checked.

Shapes: B images of a micro-batch, H x W pixels.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from panoptic.png import encode_segments
from panoptic.segmentation import Categories, Targets
from panoptic.transforms import Augment, Resize
from pipelines.cluster import storage
from pipelines.data import ray_source, shard_reader
from pipelines.data.loader import Feed, FeedConfig, evaluation_batches, rows_of
from pipelines.data.manifest import Manifest
from pipelines.data.ray_source import Reading
from pipelines.data.sampler import Stream
from pipelines.data.shard_index import load_index
from pipelines.data.shard_reader import Rows
from tests.support.shards import store

ROWS = 23
AUGMENT = Augment(scale="factor", factors=(0.5, 1.5, 0.25), crop=(33, 47), colour="ssd")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, small_categories: Categories) -> Manifest:
    """23 images of mixed sizes in shards of 9, 9 and 5 rows. The name tells the row."""
    root = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(ROWS):
        height, width = int(rng.integers(30, 60)), int(rng.integers(30, 60))
        count = number % 4  # every fourth image has no segment
        segments = np.zeros((height, width), np.int32)
        for k in range(count):
            segments[5 * k : 5 * k + 9, k : k + 20] = k + 1
        pixels = cv2.resize(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8), (width, height))
        rows.append(
            {
                "name": f"{number}.jpg",
                "image": cv2.imencode(".jpg", pixels)[1].tobytes(),
                "segments": encode_segments(segments),
                "labels": list(range(count)),
                "crowd": [k == 2 for k in range(count)],
                "height": height,
                "width": width,
                "image_id": number,
            }
        )
    shards, index = store(root, [rows[:9], rows[9:18], rows[18:]])
    return Manifest(
        schema_version=2,
        split="train",
        rows=ROWS,
        hash="",
        categories=small_categories,
        shards=shards,
        index=index,
        maximum_height=60,
        maximum_width=60,
        segments=(0,) * 5,
        crowds=0,
        empty=0,
        unannotated=0,
        skipped=(),
        area_mismatches=0,
        source={},
        uri=str(root),
    )


def local(reading: Reading, config: FeedConfig) -> Generator[list[dict]]:
    """The rows, one after another in this process; for `map`, what Ray Data's tasks do with them."""
    reader = Rows(reading.shards)
    if reading.augment is not None:
        for table in reading.tables(range(len(reading.stream))):
            yield table.to_pylist()
        return
    for index in range(len(reading.stream)):
        positions = reading.stream[index]
        yield [reader.row(reading.stream.locate(p)[1]) | {"position": p} for p in positions]


def stream(
    steps: int = 5, batch: int = 6, start: int = 0, world: int = 1, rank: int = 0, accumulation: int = 1
) -> Stream:
    return Stream(3, ROWS, batch, steps, start, world, rank, accumulation)


def images(batch: tuple[torch.Tensor, Targets]) -> Iterator[tuple[str, bytes, bytes, list[int]]]:
    """Of each image in a micro-batch, independent of its batch: name, pixels, map, labels."""
    pixels, targets = batch
    for b, name in enumerate(targets.names):
        height, width = targets.frame.sizes[b].tolist()
        labels = [k for k in targets.labels[b].tolist() if k >= 0]
        yield (
            name,
            pixels[b, :, :height, :width].numpy().tobytes(),
            targets.segments[b, :height, :width].numpy().tobytes(),
            labels,
        )


def everything(
    manifest: Manifest, config: FeedConfig, source: Callable, world: int = 1, accumulation: int = 1, **limits: int
) -> list:
    """All images of the stream in order of position, gathered over ranks."""
    ranks = []
    for rank in range(world):
        with Feed(
            manifest,
            stream(world=world, rank=rank, accumulation=accumulation, **limits),
            AUGMENT,
            config,
            source=source,
        ) as feeding:
            ranks.append([list(images(batch)) for batch in feeding])
    found = []
    for first in range(0, len(ranks[0]), accumulation):
        found += [image for rank in ranks for batch in rank[first : first + accumulation] for image in batch]
    return found


@pytest.fixture(scope="module")
def reference(manifest: Manifest) -> list:
    return everything(manifest, FeedConfig(threads=1), local)


def test_the_reference_crosses_epochs_and_augments_anew(manifest: Manifest, reference: list) -> None:
    names = [name for name, *_ in reference]
    assert len(names) == 30 and set(names[:ROWS]) == {f"{k}.jpg" for k in range(ROWS)}
    for image in reference[ROWS:]:
        first = next(other for other in reference if other[0] == image[0])
        assert first[1] != image[1]


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (3, 1), (1, 3), (3, 2)])
def test_any_layout_gives_the_same_bytes(manifest: Manifest, reference: list, world: int, accumulation: int) -> None:
    assert everything(manifest, FeedConfig(), local, world, accumulation) == reference


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("reads", [0, 1, 9])
def test_reading_ahead_gives_the_same_bytes(manifest: Manifest, reference: list, world: int, reads: int) -> None:
    assert everything(manifest, FeedConfig(reads=reads), rows_of, world) == reference


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.timeout(120)
def test_ray_data_gives_the_same_bytes(ray_cluster: None, manifest: Manifest, reference: list, world: int) -> None:
    assert everything(manifest, FeedConfig(decode="map", tasks=2), rows_of, world) == reference


@pytest.mark.timeout(120)
@pytest.mark.parametrize("window", [0, 4])
def test_ray_data_goes_on_from_a_position_with_other_workers_however_slow_they_are(
    ray_cluster: None, manifest: Manifest, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker's first steps, then two workers', of which each takes its time at first and then hurries.

    What waits for them is bounded: a tiny block for each task, one micro-batch ready.
    """
    monkeypatch.setattr("pipelines.data.ray_source.ROWS_PER_TASK", 2)
    config = FeedConfig(decode="map", ahead=1, prefetch=1)
    whole = replace(stream(steps=12), window=window)
    with Feed(manifest, whole, AUGMENT, source=local) as feeding:
        expected = [list(images(batch)) for batch in feeding]
    begun = replace(whole, steps=3)
    with Feed(manifest, begun, AUGMENT, config) as feeding:
        assert [list(images(batch)) for batch in feeding] == expected[:3]
        position = feeding.position
    found = []
    for rank in range(2):
        part = replace(whole, start=position, steps=9, world=2, rank=rank)
        with Feed(manifest, part, AUGMENT, config) as feeding:
            found.append([])
            for number, batch in enumerate(feeding):
                time.sleep(0.2 if number < 4 else 0)
                found[-1].append(list(images(batch)))
    assert [first + second for first, second in zip(*found, strict=True)] == expected[3:]


def test_a_position_resumes_the_stream(manifest: Manifest, reference: list) -> None:
    with Feed(manifest, stream(), AUGMENT, source=local) as feeding:
        batches = iter(feeding)
        next(batches), next(batches)
        position = feeding.position
    assert position == 12
    assert everything(manifest, FeedConfig(), local, start=position, steps=3) == reference[12:]


def test_pinned_batches_are_pinned_in_the_thread(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:  # there is no pinned memory without a GPU
        threads.append(threading.current_thread().name)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    with Feed(manifest, stream(), AUGMENT, source=local, pin=True) as feeding:
        taken = [entry for batch in feeding for entry in images(batch)]
    with Feed(manifest, stream(), AUGMENT, source=local) as feeding:
        assert taken == [entry for batch in feeding for entry in images(batch)]
    assert threads == ["feed"] * (4 * len(feeding))


def test_the_position_counts_whole_steps(manifest: Manifest) -> None:
    with Feed(manifest, stream(accumulation=3, world=2, rank=1), AUGMENT, source=local) as feeding:
        assert [feeding.position for _ in feeding] == [6 * (k // 3) for k in range(1, 16)]


def test_small_blocks_and_many_tasks_keep_the_order(
    ray_cluster: None, manifest: Manifest, reference: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.data.ray_source.ROWS_PER_TASK", 1)
    monkeypatch.setattr("pipelines.data.ray_source.BLOCK_BYTES", 1000)
    monkeypatch.setattr("pipelines.data.ray_source.MOST_TASKS", 3)  # so that there are two executions
    assert everything(manifest, FeedConfig(decode="map", tasks=3), rows_of) == reference


def test_a_limited_and_doubled_data_set(manifest: Manifest) -> None:
    """An epoch is each of the limited rows twice: as it is, and with colours that no epoch changes."""
    augment = Augment(flip=0.0, colour="colour004", doubled=True)
    part = Stream(3, ROWS, 10, 2, limit=5, copies=2)
    with Feed(manifest, part, augment, source=local) as feeding:
        first, second = (list(images(batch)) for batch in feeding)
    assert {image[:3] for image in first} == {image[:3] for image in second}
    names = [name for name, *_ in first]
    assert all(names.count(name) == 2 for name in names) and len(set(names)) == 5
    for name in names:
        one, other = (image for image in first if image[0] == name)
        assert one[1] != other[1] and one[2:] == other[2:]
    with Feed(manifest, part, augment, FeedConfig(decode="map"), source=local) as feeding:
        assert [list(images(batch)) for batch in feeding] == [first, second]
    with pytest.raises(ValueError, match=r"augment\.doubled"):
        Feed(manifest, part, replace(augment, doubled=False), source=local)


def swapped(reading: Reading, config: FeedConfig) -> Generator[list[dict]]:
    first, second, *rest = local(reading, config)
    yield from [second, first, *rest]


def shortened(reading: Reading, config: FeedConfig) -> Generator[list[dict]]:
    yield from list(local(reading, config))[:-1]


def duplicated(reading: Reading, config: FeedConfig) -> Generator[list[dict]]:
    for rows in local(reading, config):
        yield [rows[0], rows[0], *rows[2:]]


@pytest.mark.parametrize(
    ("source", "message"),
    [(swapped, "positions .* were due"), (duplicated, "were due"), (shortened, "ended before position 24")],
)
def test_rows_out_of_order_stop_the_run(manifest: Manifest, source: Callable, message: str) -> None:
    with Feed(manifest, stream(), AUGMENT, source=source) as feeding, pytest.raises(RuntimeError, match=message):
        for _ in feeding:
            pass


def test_an_error_in_the_background_reaches_the_consumer(manifest: Manifest, tmp_path: Path) -> None:
    missing = replace(manifest, uri=str(tmp_path))
    with Feed(missing, stream(), AUGMENT) as feeding:
        for _ in range(2):  # asking again does not wait for ever
            with pytest.raises(ValueError, match="the index of the shards is missing"):
                next(iter(feeding))


def test_an_error_in_ray_reaches_the_consumer(ray_cluster: None, manifest: Manifest, tmp_path: Path) -> None:
    missing = replace(manifest, uri=str(tmp_path))
    config = FeedConfig(decode="map")
    with Feed(missing, stream(), AUGMENT, config) as feeding, pytest.raises(Exception, match=r"_index\.arrow"):
        next(iter(feeding))


@pytest.mark.parametrize("open_files", [1, 128])
def test_rows_come_at_random(manifest: Manifest, open_files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "OPEN_FILES", open_files)
    numbers = np.random.default_rng(0).integers(0, ROWS, 60).tolist()
    reader = Rows(manifest.shard_set)
    opened = []
    monkeypatch.setattr(shard_reader, "check_schema", lambda shard, *given: opened.append(shard.uri))
    assert [reader.row(number)["name"] for number in numbers] == [f"{number}.jpg" for number in numbers]
    assert [row["name"] for row in reader.rows(numbers)] == [f"{number}.jpg" for number in numbers]
    assert len(opened) == len(set(opened)) == 3


def test_leaving_early_ends_the_thread_and_waiting_is_measured(manifest: Manifest) -> None:
    with Feed(manifest, stream(steps=400), AUGMENT, FeedConfig(prefetch=1)) as feeding:
        batches = iter(feeding)
        for _ in range(3):
            next(batches)
        assert feeding.startup > 0 and feeding.waited >= 0
        thread = feeding._thread
        assert thread.is_alive()
    assert not thread.is_alive()


def test_what_cannot_be_fed_is_refused_at_once(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        Feed(manifest, stream(batch=6, world=4), AUGMENT)
    with pytest.raises(ValueError, match="23 rows"):
        Feed(manifest, replace(stream(), rows=24), AUGMENT)


@pytest.mark.parametrize("world", [1, 2, 5, 30])
def test_evaluation_gives_every_row_once_with_its_truth(manifest: Manifest, world: int) -> None:
    names, sizes = [], Rows(manifest.shard_set).rows(range(ROWS))
    for rank in range(world):
        for pixels, targets, samples in evaluation_batches(
            manifest, Resize(short=24, longest=40, canvas=(41, 0)), 4, rank=rank, world=world, divisor=8
        ):
            names += targets.names
            assert len({sample.original.size for sample in samples if sample.original}) == 1, "sizes share a batch"
            assert pixels.shape[2] == 48 and pixels.shape[3] % 8 == 0
            for b, sample in enumerate(samples):
                assert sample.original is not None and sample.name == f"{sample.position}.jpg"
                size = [sizes[sample.position][axis] for axis in ("height", "width")]
                assert list(sample.original.size) == size == targets.frame.output_sizes[b].tolist()
                assert list(sample.truth.size) == targets.frame.sizes[b].tolist()
                assert max(sample.truth.size) <= 40
    assert sorted(names) == sorted(f"{k}.jpg" for k in range(ROWS))


class Counting:
    """A filesystem that counts what is read, takes some time for it, and fails where it is told to."""

    def __init__(self, filesystem: Any, failures: int = 0, pause: float = 0.0) -> None:
        self.filesystem, self.failures, self.pause = filesystem, failures, pause
        self.reads: list[tuple[str, int]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def open_input_file(self, path: str) -> Counted:
        return Counted(self, path, self.filesystem.open_input_file(path))

    def open_input_stream(self, path: str) -> Any:
        return self.filesystem.open_input_stream(path)

    def of_rows(self, manifest: Manifest) -> list[int]:
        """The lengths of the reads but for those of headers."""
        index = load_index(manifest.shard_set)
        headers = {index.header(shard) for shard in range(len(manifest.shards))}
        return [length for _, length in self.reads if length not in headers]


class Counted:
    def __init__(self, counting: Counting, path: str, file: Any) -> None:
        self.counting, self.path, self.file = counting, path, file

    def size(self) -> int:
        return self.file.size()

    def read_at(self, length: int, offset: int) -> bytes:
        counting = self.counting
        with counting.lock:
            counting.reads.append((self.path, length))
            counting.at_once += 1
            counting.most_at_once = max(counting.most_at_once, counting.at_once)
            failing, counting.failures = counting.failures > 0, counting.failures - 1
        time.sleep(counting.pause)
        with counting.lock:
            counting.at_once -= 1
        if failing:
            raise OSError("the connection was reset")
        return self.file.read_at(length, offset)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """All shards are read through it."""
    resolve, counting = storage.resolve, Counting(storage.resolve("/")[0])
    monkeypatch.setattr(storage, "resolve", lambda uri: (counting, resolve(uri)[1]))
    monkeypatch.setattr(shard_reader, "PAUSES", (0.0, 0.0))
    return counting


@pytest.mark.parametrize("world", [1, 2, 6])
def test_each_row_is_one_read_of_its_own_bytes(manifest: Manifest, counted: Counting, world: int) -> None:
    """Over 40 epochs, in an order that no cache would serve: what is read is what is used, and a header a shard."""
    index, used = load_index(manifest.shard_set), 0
    for rank in range(world):
        reading = Reading(stream(steps=153, batch=6, world=world, rank=rank), manifest.shard_set)
        rows = [row for rows in rows_of(reading, FeedConfig(reads=8)) for row in rows]
        used += sum(int(index.lengths[int(row["image_id"])]) for row in rows)
        assert len(rows) == 918 // world
    lengths = counted.of_rows(manifest)
    assert len(lengths) == 918 and sum(lengths) == used
    assert len(counted.reads) - 918 <= 8 * 3 * world  # the headers, which threads may read at once
    assert sum(length for _, length in counted.reads) < 1.1 * used


@pytest.mark.parametrize("world", [1, 2, 3])
def test_windows_take_few_requests_and_give_the_same_samples_for_any_workers(
    manifest: Manifest, counted: Counting, world: int
) -> None:
    names: dict[int, str] = {}
    for rank in range(world):
        reading = Reading(replace(stream(steps=46, world=world, rank=rank), window=4), manifest.shard_set)
        for rows in rows_of(reading, FeedConfig()):
            names |= {row["position"]: row["name"] for row in rows}
    whole = replace(stream(steps=46), window=4)
    assert names == {p: f"{whole.locate(p)[1]}.jpg" for p in range(276)}
    # 23 rows in lanes of 4: each lane begins and ends inside of a window, and a window may cross two shards
    assert len(counted.of_rows(manifest)) < 276 / 2


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, small_categories: Categories) -> Manifest:
    """1024 rows of 1.6 kB in 16 shards, which nobody decodes."""
    root = tmp_path_factory.mktemp("large")
    columns = {"image": bytes(900), "segments": b"", "labels": [], "crowd": [], "height": 1, "width": 1}
    parts = [[{**columns, "name": f"{64 * p + k}", "image_id": 64 * p + k} for k in range(64)] for p in range(16)]
    shards, index = store(root, parts)
    return Manifest(
        *(2, "train", 1024, "", small_categories, shards, index, 1, 1, (0,) * 5, 0, 0, 0, (), 0, {}), uri=str(root)
    )


def test_a_task_of_ray_data_reads_windows_too(manifest: Manifest, counted: Counting) -> None:
    reading = Reading(replace(stream(steps=12), window=4), manifest.shard_set, AUGMENT)
    tables = list(reading.tables(range(12)))
    assert [table["position"].to_pylist() for table in tables] == [list(reading.stream[k]) for k in range(12)]
    whole = [f"{reading.stream.locate(p)[1]}.jpg" for p in range(72)]
    assert [name for table in tables for name in table["name"].to_pylist()] == whole
    assert len(counted.of_rows(manifest)) <= 3


def test_large_windows_take_a_request_for_eight_rows_and_hardly_more_bytes(large: Manifest, counted: Counting) -> None:
    for rank in range(2):
        reading = Reading(Stream(0, 1024, 8, 256, world=2, rank=rank, window=16), large.shard_set)
        assert sum(len(rows) for rows in rows_of(reading, FeedConfig())) == 1024
    read = counted.of_rows(large)
    assert len(read) <= 2048 / 8
    assert sum(read) < 1.1 * 2 * load_index(large.shard_set).lengths.sum()


@pytest.mark.parametrize("start", [0, 40])
def test_tasks_of_ray_data_take_a_request_for_eight_rows_and_no_more_bytes(
    large: Manifest, counted: Counting, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Task by task, as Ray Data runs them; from position 40 each of them begins and ends inside of windows."""
    monkeypatch.setattr(ray_source, "view", lambda row, *_: row["image_id"])
    monkeypatch.setattr(ray_source, "pack", lambda numbers: numbers)
    whole, names = Stream(0, 1024, 8, 256, start, window=16), []
    for rank in range(2):
        reading = Reading(replace(whole, world=2, rank=rank), large.shard_set, AUGMENT)
        for chunk in ray_source.chunks_of(reading.stream, range(256)):
            names += [number for table in reading.tables(chunk) for number in table]
    assert sorted(names) == sorted(whole.locate(start + k)[1] for k in range(2048))
    read = counted.of_rows(large)
    assert len(read) <= 2048 / 8
    lengths = load_index(large.shard_set).lengths
    assert sum(read) < 1.1 * sum(int(lengths[number]) for number in names)


def test_a_stream_with_windows_goes_on_from_any_position(manifest: Manifest) -> None:
    def windows(steps: int, start: int = 0) -> Reading:
        return Reading(replace(stream(steps=steps, start=start), window=4), manifest.shard_set)

    whole = [row["name"] for rows in rows_of(windows(steps=20), FeedConfig()) for row in rows]
    for step in (1, 2, 7, 13):
        rest = [row["name"] for rows in rows_of(windows(steps=20 - step, start=6 * step), FeedConfig()) for row in rows]
        assert rest == whole[6 * step :]


def test_many_reads_are_under_way_and_their_rows_come_in_order(manifest: Manifest, counted: Counting) -> None:
    counted.pause = 0.005
    reading = Reading(stream(steps=20, batch=2), manifest.shard_set)
    names = [row["name"] for rows in rows_of(reading, FeedConfig(reads=16)) for row in rows]
    assert names == [f"{reading.stream.locate(p)[1]}.jpg" for p in range(40)]
    assert 12 <= counted.most_at_once <= 16


@pytest.mark.parametrize(("batch", "expected"), [(1, 1 + 4), (3, 3 + 6), (12, 12 + 12)])
def test_reading_goes_on_while_rows_are_used_but_no_further_than_may_wait(
    manifest: Manifest, counted: Counting, batch: int, expected: int
) -> None:
    """With two reads at a time: four rows beside those that are due, in whole micro-batches, at least one of them."""
    reading = Reading(stream(steps=100, batch=batch), manifest.shard_set)
    rows = rows_of(reading, FeedConfig(reads=2))
    next(rows)
    deadline = time.monotonic() + 20
    while len(counted.of_rows(manifest)) < expected and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(counted.of_rows(manifest)) == expected
    rows.close()


def test_a_read_that_fails_is_tried_again(manifest: Manifest, counted: Counting) -> None:
    counted.failures = 2
    assert Rows(manifest.shard_set).row(5)["name"] == "5.jpg"
    counted.failures = 3
    with pytest.raises(ValueError, match=r"shard-00000\.arrow: row 5 could not be read \(the connection was reset\)"):
        Rows(manifest.shard_set).row(5)
