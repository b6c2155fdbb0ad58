"""A feed alone in a fresh process: `python -m tests.support.feeding FOLDER MICRO_BATCHES`, printed as JSON."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from panoptic.transforms import Augment
from pipelines.data.loader import Feed, evaluation_batches
from pipelines.data.manifest import Manifest
from pipelines.data.sampler import Stream
from pipelines.data.shard_reader import Rows
from pipelines.presets import PRESETS
from tests.support.processes import usage
from tests.support.shards import store

BATCH = 2


def enlarge(manifest: Manifest, root: Path, count: int, per_shard: int = 256) -> Manifest:
    """Shards of so many rows: copies of the rows of `manifest` under names of their own."""
    reader = Rows(manifest.shard_set)
    drawn = [reader.row(k) for k in range(manifest.rows)]
    rows = [{**drawn[k % len(drawn)], "name": f"{k}.jpg", "image_id": k} for k in range(count)]
    root.mkdir(parents=True)
    shards, index = store(root, [rows[k : k + per_shard] for k in range(0, count, per_shard)])
    larger = replace(manifest, rows=count, shards=shards, index=index, uri=str(root))
    (root / "manifest.json").write_bytes(larger.to_json())
    return larger


def memory() -> float:
    """MiB that are this process's own, and those of what it has started."""
    return sum(process.memory for process in usage().values()) / 2**20


def main(folder: str, batches: int) -> dict[str, float]:
    """MiB after a twentieth of the micro-batches, after all and after an evaluation's batches; CPU ms an image."""
    torch.set_num_threads(1)
    manifest = Manifest.load(folder)
    with Feed(manifest, Stream(0, manifest.rows, BATCH, batches), Augment()) as feed:
        early, begin = 0.0, 0.0
        for number, _ in enumerate(feed, 1):
            if number == batches // 20:
                early, begin = memory(), time.process_time()
        late, cpu = memory(), time.process_time() - begin
    for _ in evaluation_batches(manifest, PRESETS["demo"]().resize, BATCH, rows=range(1024)):
        pass
    images = BATCH * (batches - batches // 20)
    return {"early": early, "late": late, "evaluation": memory(), "cpu": 1e3 * cpu / images}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
