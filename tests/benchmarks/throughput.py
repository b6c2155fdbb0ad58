"""Our feed against a plain DataLoader, and whether it ever holds a step back (row feed).

Both decode and augment the same shard rows with the same functions in the same order, so the machinery alone differs.
These are wall-clock figures of the whole machine: nothing else should run.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from panoptic.png import to_coco
from panoptic.segmentation import Sample, Segmentation, collate
from panoptic.transforms import Augment
from pipelines.cluster import session
from pipelines.data.loader import Feed, FeedConfig
from pipelines.data.prepare import Manifest, prepare
from pipelines.data.readers import READERS
from pipelines.data.sampler import Stream
from pipelines.data.shard_reader import Rows, single_threaded, view
from tests.benchmarks import inputs
from tests.benchmarks.timing import Row

BATCH = 8
SKIPPED = 4
"""Micro-batches before the clock starts."""
WORKERS = 2
"""Threads of the feed, processes of the DataLoader."""


def rows(
    folder: Path, size: tuple[int, int], side: int, images: int, batches: int, rounds: int, step: float
) -> list[Row]:
    """Images a second of both, in turn, and the longest wait for the feed.

    Args:
        folder: for the data set and its shards.
        size: (H, W) of the images.
        side: of the crop.
        images: in the data set.
        batches: taken in a round, after the skipped ones.
        rounds: of each.
        step: seconds of a step of training, for the wait.

    Raises:
        ValueError: the two do not give the same tensors.
    """
    session.connect(cpus=4)
    manifest = write_shards(folder, size, images)
    augment = Augment(scale="factor", factors=(0.5, 2.0, 0.1), crop=(side, side))
    stream = Stream(0, manifest.rows, BATCH, SKIPPED + batches)
    _agree(manifest, replace(stream, steps=2), augment)
    ways = {
        "ours": lambda: _feed_rate(manifest, stream, augment),
        f"torch DataLoader, {WORKERS} processes": lambda: _loader_rate(manifest, stream, augment, WORKERS),
        "torch DataLoader, no process": lambda: _loader_rate(manifest, stream, augment, 0),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            rates[name].append(way())
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ours = medians.pop("ours")
    work = f"feed: decode, augment {size[1]}x{size[0]} to {side}x{side}, batch {BATCH}"
    table = [Row("feed", work, ours, "img/s", name, theirs, ours / theirs) for name, theirs in medians.items()]
    longest = 1e3 * longest_wait(manifest, side, batches, step)
    work = f"feed without decoding: longest wait in {batches} steps of {1e3 * step:.0f} ms"
    return [*table, Row("feed", work, longest, "ms")]


def write_shards(folder: Path, size: tuple[int, int], count: int) -> Manifest:
    """A drawn COCO-panoptic data set as shards."""
    write_folder(folder, size, count)
    return prepare(READERS["coco"](str(folder), "train"), folder / "shards")


def write_folder(folder: Path, size: tuple[int, int], count: int) -> None:
    """A drawn COCO-panoptic data set, named 000000 and so on."""
    rng = np.random.default_rng(5)
    classes = inputs.categories(8, 11)
    images, annotations = [], []
    (folder / "images" / "train").mkdir(parents=True, exist_ok=True)
    (folder / "annotations" / "panoptic_train").mkdir(parents=True, exist_ok=True)
    for k in range(count):
        truth = inputs.draw_truth(rng, size, 14, 7, classes)
        png, record = to_coco(truth, classes, k, f"{k:06d}.png")
        (folder / "images" / "train" / f"{k:06d}.jpg").write_bytes(inputs.encode_jpeg(inputs.draw_image(rng, truth)))
        (folder / "annotations" / "panoptic_train" / record["file_name"]).write_bytes(png)
        images.append({"id": k, "file_name": f"{k:06d}.jpg", "height": size[0], "width": size[1]})
        annotations.append(record)
    content = {"images": images, "annotations": annotations, "categories": classes.to_coco()}
    (folder / "annotations" / "panoptic_train.json").write_text(json.dumps(content))


class ShardRows(Dataset):
    """Positions of a stream as augmented samples: what one would write without Ray."""

    def __init__(self, manifest: Manifest, stream: Stream, augment: Augment) -> None:
        self.shards = manifest.shard_set
        self.stream, self.augment = stream, augment
        self.reader: Rows | None = None

    def __len__(self) -> int:
        return self.stream.batch * self.stream.steps

    def __getitem__(self, position: int) -> Sample:
        if self.reader is None:  # open files do not go to another process
            self.reader = Rows(self.shards)
        row = self.reader.row(self.stream.locate(position)[1])
        return view(row | {"position": position}, self.stream, self.augment)


def _loader(manifest: Manifest, stream: Stream, augment: Augment, workers: int) -> DataLoader:
    single_threaded()
    return DataLoader(
        ShardRows(manifest, stream, augment),
        batch_size=stream.batch,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_start_worker,
        # a fork of a process with Ray's threads can hang
        multiprocessing_context="spawn" if workers else None,
    )


def _start_worker(_: int) -> None:
    single_threaded()
    torch.set_num_threads(1)


def _agree(manifest: Manifest, stream: Stream, augment: Augment) -> None:
    loader = _loader(manifest, stream, augment, 0)
    with Feed(manifest, stream, augment, FeedConfig(threads=WORKERS)) as feed:
        for (images, targets), (their_images, their_targets) in zip(feed, loader, strict=True):
            same = torch.equal(images, their_images) and torch.equal(targets.segments, their_targets.segments)
            if not same or targets.names != their_targets.names:
                raise ValueError("feed: other tensors than the DataLoader's; no ratio counts before they agree")


def _feed_rate(manifest: Manifest, stream: Stream, augment: Augment) -> float:
    with Feed(manifest, stream, augment, FeedConfig(threads=WORKERS)) as feed:
        return _rate(feed, stream)


def _loader_rate(manifest: Manifest, stream: Stream, augment: Augment, workers: int) -> float:
    return _rate(_loader(manifest, stream, augment, workers), stream)


def _rate(batches: Iterable[Any], stream: Stream) -> float:
    """Images a second once it runs."""
    begin = 0.0
    for k, _ in enumerate(batches):
        if k == SKIPPED - 1:
            begin = time.perf_counter()
    return stream.batch * (stream.steps - SKIPPED) / (time.perf_counter() - begin)


class _Undecoded(Feed):
    """The feed with decoding and augmentation off: every row becomes the same sample."""

    sample: Sample

    def _decode(self, row: dict[str, Any]) -> Sample:
        return replace(self.sample, name=row["name"], position=row["position"])


def longest_wait(manifest: Manifest, side: int, batches: int, step: float) -> float:
    """Seconds that the feed held back the slowest of so many steps, when rows need no decoding."""
    truth = Segmentation(np.zeros((side, side), np.int32), np.zeros(0, np.int64))
    _Undecoded.sample = Sample(np.zeros((side, side, 3), np.uint8), truth, "blank")
    with _Undecoded(manifest, Stream(0, manifest.rows, BATCH, 1 + batches), Augment()) as feed:
        return max(_waits(feed, step))


def _waits(feed: Feed, step: float) -> Iterator[float]:
    """The wait before each micro-batch but the first."""
    found = iter(feed)
    next(found)
    for _ in range(len(feed) - 1):
        time.sleep(step)
        begin = time.perf_counter()
        next(found)
        yield time.perf_counter() - begin
