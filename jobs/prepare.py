"""Check a dataset and write it as shards: `python jobs/prepare.py coco ROOT --split train --out DIR`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipelines.data.prepare import Manifest, prepare
from pipelines.data.readers import READERS


def main(arguments: list[str] | None = None) -> Manifest:
    """Prepare one split and print what it holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=READERS, help="format of the dataset")
    parser.add_argument("root", help="folder of the dataset, local or s3://")
    parser.add_argument("--split", required=True, help="e.g. train, val, train2017")
    parser.add_argument("--out", required=True, help="folder of its own for the shards, local or s3://")
    parser.add_argument("--json", dest="json_file", help="annotation file, where it is not found by itself")
    parser.add_argument("--pngs", help="folder of PNG id maps, likewise")
    parser.add_argument("--images", help="folder of images, likewise")
    parser.add_argument("--rows-per-shard", type=int, help="default: shards of about 64 MiB, and at least eight")
    parser.add_argument("--shuffle", action=argparse.BooleanOptionalAction, help="default: if the split is train...")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle")
    parser.add_argument("--on-invalid", choices=("stop", "skip"), default="stop", help="images that fail validation")
    given = parser.parse_args(arguments)
    places = {key: value for key in ("json_file", "pngs", "images") if (value := getattr(given, key))}
    source = READERS[given.reader](given.root, given.split, **places)
    manifest = prepare(
        source,
        given.out,
        rows_per_shard=given.rows_per_shard,
        shuffle=given.shuffle,
        seed=given.seed,
        on_invalid=given.on_invalid,
    )
    print(manifest.summary())
    return manifest


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
