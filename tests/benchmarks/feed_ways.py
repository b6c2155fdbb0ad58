"""One way of feeding a training, run alone in a process: `python -m tests.benchmarks.feed_ways WAY WORK FOLDER`.

Every way brings the same rows (JPEG, map as a grey PNG, classes) in an order of its own, in micro-batches. The work is
`views`: decoded and augmented by the same functions, or `bytes`: as they are stored. The last line printed is JSON with
images a second, CPU milliseconds an image (the process and all that it started) and bytes read for each byte used.

Peers are used as their documentation shows for a shuffled training, with as many processes as our feed has threads.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from panoptic.segmentation import collate
from panoptic.transforms import Augment, generator, training_view
from pipelines.data.loader import Feed, FeedConfig, read_ahead
from pipelines.data.manifest import Manifest
from pipelines.data.prepare import read_row
from pipelines.data.ray_source import Reading
from pipelines.data.sampler import Stream
from pipelines.data.shard_reader import single_threaded
from tests.support.processes import Usage, usage

Row = dict[str, Any]
Batch = Any

BATCH = 8
WORKERS = 2
SHUFFLE = 500
"""Rows in the shuffle buffers of those that have one; a quarter of smaller data sets."""
SKIPPED = 8
"""Micro-batches before the clock starts: processes start, buffers fill."""


NOTHING = Usage("", 0, 0.0, 0)


def buffered(folder: Path) -> int:
    """Rows of a shuffle buffer."""
    return min(SHUFFLE, json.loads((folder / "stored.json").read_text())["rows"] // 4)


def augmentation(side: int) -> Augment:
    """The training view: a random scale, a crop of side x side, a flip."""
    return Augment(scale="factor", factors=(0.5, 2.0, 0.1), crop=(side, side))


def ours(folder: Path, work: str, side: int) -> Iterable[Batch]:
    """This project's feed."""
    manifest = Manifest.load(folder / "shards")
    stream = Stream(0, manifest.rows, BATCH, manifest.rows // BATCH)
    config = FeedConfig(threads=WORKERS)
    if work == "bytes":
        return read_ahead(Reading(stream, manifest.shard_set, None), config)
    return Feed(manifest, stream, augmentation(side), config)


class Files(Dataset):
    """JPEG and PNG files, as most code bases read them."""

    def __init__(self, folder: Path, finish: Callable[[Row, int], Any]) -> None:
        self.folder, self.finish = folder, finish
        self.rows = json.loads((folder / "rows.json").read_text())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        row = self.rows[number]
        image, segments = ((self.folder / f"{row['name']}.{kind}").read_bytes() for kind in ("jpg", "png"))
        return self.finish({**row, "image": image, "segments": segments}, number)


def files(folder: Path, work: str, side: int) -> Iterable[Batch]:
    """A DataLoader over files."""
    return _loader(Files(folder / "files", _Finish(work, side)), work, batch_size=BATCH, shuffle=True)


def webdataset(folder: Path, work: str, side: int) -> Iterable[Batch]:
    """WebDataset: tar files in random order, a shuffle buffer, a DataLoader."""
    import webdataset as wds  # pyright: ignore[reportMissingImports]

    finish = _Finish(work, side)

    def row(sample: dict[str, Any]) -> Any:
        known = json.loads(sample["json"])
        return finish({**known, "image": sample["jpg"], "segments": sample["png"]}, int(sample["__key__"]))

    urls = sorted(map(str, (folder / "tar").glob("*.tar")))
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls))
        .shuffle(buffered(folder))
        .map(row)
        .batched(BATCH, collation_fn=None)
    )
    return _loader(dataset, "batches" if work == "bytes" else "lists", batch_size=None)


def mosaicml(folder: Path, work: str, side: int) -> Iterable[Batch]:
    """MosaicML streaming from local MDS shards."""
    from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]

    finish = _Finish(work, side)

    class Rows(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            known = json.loads(sample["json"])
            return finish({**known, "image": sample["jpg"], "segments": sample["png"]}, int(at))

    dataset = Rows(local=str(folder / "mds"), shuffle=True, batch_size=BATCH)
    return _loader(dataset, work, batch_size=BATCH)


def ray_data(folder: Path, work: str, side: int) -> Iterable[Batch]:
    """Plain Ray Data: Parquet, decoding in map tasks, a local shuffle, one split of a streaming split."""
    import ray

    from pipelines.cluster import session

    session.connect(cpus=WORKERS)
    rows = ray.data.read_parquet(str(folder / "parquet"), shuffle="files")
    if work == "views":
        rows = rows.map_batches(_Packed(side), batch_size=BATCH, batch_format="pyarrow")
    (split,) = rows.streaming_split(1, equal=True)
    found = split.iter_batches(batch_size=BATCH, local_shuffle_buffer_size=buffered(folder), batch_format="pyarrow")
    if work == "bytes":
        return (table.to_pylist() for table in found)
    from pipelines.data.shard_reader import unpack

    return (collate([unpack(row) for row in table.to_pylist()], 1) for table in found)


WAYS = {
    "ours": ours,
    "DataLoader over files": files,
    "WebDataset": webdataset,
    "MosaicML streaming": mosaicml,
    "plain Ray Data": ray_data,
}


class _Packed:
    """Decodes and augments the rows of a table in a task of Ray Data's."""

    def __init__(self, side: int) -> None:
        self.finish = _Finish("views", side)

    def __call__(self, table: Any) -> Any:
        from pipelines.data.shard_reader import pack

        single_threaded()
        return pack([self.finish(row, k) for k, row in enumerate(table.to_pylist())])


class _Finish:
    """From a row to what a way brings of it."""

    def __init__(self, work: str, side: int) -> None:
        self.work, self.augment = work, augmentation(side)

    def __call__(self, row: Row, number: int) -> Any:
        if self.work == "bytes":
            return row
        return training_view(read_row(row), self.augment, generator(0, 0, number))


def _loader(dataset: Any, work: str, **options: Any) -> DataLoader:
    """A DataLoader whose processes stay, so that what they have read can be asked for at the end."""
    join = {"views": collate, "lists": collate, "bytes": list, "batches": list}[work]
    return DataLoader(
        dataset, num_workers=WORKERS, collate_fn=join, worker_init_fn=_start, persistent_workers=True, **options
    )


def _start(_: int) -> None:
    assert get_worker_info() is not None
    single_threaded()
    torch.set_num_threads(1)


def measure(way: str, work: str, folder: Path, side: int) -> dict[str, float]:
    """Images a second, CPU milliseconds an image, bytes read for each byte used.

    Measured from when all run until a shuffle buffer can no longer be filled, so that what was ready before and is
    left over weighs little.
    """
    single_threaded()
    torch.set_num_threads(1)
    stored = json.loads((folder / "stored.json").read_text())
    last = (stored["rows"] - buffered(folder)) // BATCH - 1
    here = os.getpid()
    first, second = usage(), usage()
    own = second[here].read - first[here].read  # looking at processes is reading, too
    batches: Iterator[Batch] = iter(WAYS[way](folder, work, side))
    for _ in range(SKIPPED):
        next(batches)
    before, clock = usage(), time.perf_counter()
    images = sum(len(next(batches) if work == "bytes" else next(batches)[0]) for _ in range(SKIPPED, last))
    seconds, after = time.perf_counter() - clock, usage()
    used = [(pid, use, before.get(pid, NOTHING)) for pid, use in after.items()]
    cpu = sum(now.cpu - then.cpu for _, now, then in used)
    # our threads read in the process itself, where others receive what their processes have read
    read = sum(now.read - then.read for pid, now, then in used if (pid == here) == (way == "ours"))
    read -= own if way == "ours" else 0
    return {
        "rate": images / seconds,
        "cpu": 1e3 * cpu / images,
        "read": read / images / stored["bytes"],
        "images": images,
    }


def write_mds(folder: Path) -> None:
    """The rows of `folder`/files as MosaicML's shards."""
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports]

    columns = {"json": "str", "jpg": "bytes", "png": "bytes"}
    with MDSWriter(out=str(folder / "mds"), columns=columns) as writer:
        for row in json.loads((folder / "files" / "rows.json").read_text()):
            image, segments = ((folder / "files" / f"{row['name']}.{kind}").read_bytes() for kind in ("jpg", "png"))
            writer.write({"json": json.dumps(row), "jpg": image, "png": segments})


def main() -> None:
    """Print the figures as JSON, or write MosaicML's shards."""
    way, work, folder, side = sys.argv[1:]
    if way == "write":
        write_mds(Path(folder))
    else:
        print(json.dumps(measure(way, work, Path(folder), int(side))))


if __name__ == "__main__":
    main()
