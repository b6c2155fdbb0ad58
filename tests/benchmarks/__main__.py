"""Measure us against the published implementations: `make benchmark [ROWS="1a 2b"] [PEERS=DIR]`.

DIR holds clones of the peers: DIR/panopticapi, DIR/cityscapesScripts, DIR/detectron2, DIR/detr and DIR/Mask2Former;
DIR/site-packages (`pip install --target`) holds hotcoco, webdataset and mosaicml-streaming; Hugging Face's transformers
and faster-coco-eval are taken where they are installed. Where a peer is missing, the row is
absolute. Times are CPU milliseconds of one thread, the median of rounds that alternate between ours and theirs on the
same inputs, after both gave the same result. Rows feed, feeds, feeds-bytes and workers are wall-clock
time: let nothing else run.

Training steps on a GPU have a table of their own: `make benchmark GPU=1`, or `python -m tests.benchmarks.gpu`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import cv2
import torch

from tests.benchmarks import (
    deeplab,
    detection,
    detr,
    evaluating,
    fcn,
    feeds,
    freezing,
    hosting,
    loading,
    metric,
    precision,
    preparing,
    queries,
    reading,
    scaling,
    stepping,
    throughput,
)
from tests.benchmarks.timing import Case, Row, hardware, measure, table

WITH_RAY = ("feed", "feeds", "feeds-bytes", "workers")
ROWS = (
    *("1a", "1b", "1c", "1d", "2a", "2b", "3a", "3b", "4", "5", "7a", "7b", "7c", "7d"),
    *("detr", "maskformer", "mask2former", "matching", "fpn", "fpn-semantic", "fcn", "evaluate", "step", "host"),
    *("frozen", "prepare", "read", *WITH_RAY),
)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measure the rows, print them as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROWS", help=f"of {', '.join(ROWS)}; default: all")
    parser.add_argument("--peers", type=Path, help="folder with clones of the peers, see above")
    parser.add_argument("--repeat", type=int, default=15, help="rounds of which the median counts")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the sides of all maps, to try it out")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args(arguments)
    names = given.rows or list(ROWS)
    if unknown := sorted(set(names) - set(ROWS)):
        raise ValueError(f"no row is called {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if given.peers and not given.peers.is_dir():
        raise ValueError(f"--peers {given.peers}: no such folder; clone panopticapi and detectron2 into it")
    machine = hardware()
    print(machine, flush=True)
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        rows = _rows(names, given)
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
    print(table(rows))
    if given.json:
        given.json.write_text(json.dumps({"hardware": machine, "rows": [asdict(row) for row in rows]}, indent=1))
    return rows


def _rows(names: list[str], given: argparse.Namespace) -> list[Row]:
    def side(pixels: int) -> int:
        return max(48, round(pixels * given.scale))

    photograph = side(480), side(640)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        cases: list[Case] = [
            *metric.cases(names, photograph, Path(folder), given.peers),
            *precision.cases(names, photograph),
            *deeplab.cases(names, given.scale, given.peers),
            *detection.cases(names, given.scale, given.peers),
            *detr.cases(names, given.scale, given.peers),
            *queries.cases(names, given.scale, given.peers),
            *fcn.cases(names, given.scale),
            *([stepping.case(given.scale)] if "step" in names else []),
            *([loading.case(photograph, side(640), given.peers)] if "4" in names else []),
        ]
        for case in cases:
            rows += measure(case, given.repeat)
            print(f"measured {case.name}", file=sys.stderr, flush=True)
        if "1d" in names:
            pairs = Path(folder) / "pairs"
            pairs.mkdir()
            rows += metric.data_set_rows(photograph, pairs, given.peers, given.repeat)
        if "evaluate" in names:
            rows += evaluating.rows(photograph)
        if "frozen" in names:
            rows += freezing.rows(given.scale, given.repeat)
        if "host" in names:
            pause = 0.1 * min(1.0, given.scale)
            rows += hosting.rows(Path(folder) / "host", max(20, round(300 * given.scale)), pause)
        if "prepare" in names:
            rows += preparing.rows(Path(folder) / "prepare", photograph)
        if "read" in names:
            rows += reading.rows(Path(folder) / "read", 64 * max(2, round(20 * given.scale)))
        if "feed" in names:
            count = max(16, round(100 * given.scale))
            shards = Path(folder) / "feed"
            rows += throughput.rows(shards, photograph, side(512), count, count, min(3, given.repeat), 0.1)
        if "workers" in names:
            rows += scaling.rows(Path(folder) / "workers", max(6, round(240 * given.scale)))
        if beside := [name for name in names if name in feeds.WORKS]:
            count, rounds = max(200, round(1600 * given.scale)), min(3, given.repeat)
            rows += feeds.rows(beside, Path(folder) / "feeds", given.peers, photograph, side(512), count, rounds)
    return rows


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
