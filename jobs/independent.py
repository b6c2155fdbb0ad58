"""Joint against independent training: `python jobs/independent.py JOINT SEMANTIC INSTANCES --data ROOT`.

Each is a checkpoint folder, a .pt file, models:/name@alias or runs:/id/model of a JSIS-Net: trained whole, with
--model.branches semantic, and with --model.branches instances. The last two are merged as one model, and mIoU, AP50
(against panoptic masks) and PQ of both are printed.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from panoptic.metrics.report import Evaluation
from pipelines.cluster import session
from pipelines.data.prepare import ensure_shards
from pipelines.evaluation.evaluate import load
from pipelines.evaluation.merge_branches import compare, merge, save, table
from pipelines.presets import PRESETS
from pipelines.tracking.runs import Tracking, resolve_uri


def main(arguments: list[str] | None = None) -> dict[str, Evaluation]:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("joint", "semantic", "instances"):
        parser.add_argument(name, help="checkpoint folder, .pt file, models:/name@alias or runs:/id/model")
    parser.add_argument("--data", required=True, help="COCO-panoptic folder or shards, local or s3://")
    parser.add_argument("--split", default="val", help="which split of it")
    parser.add_argument("--out", default="", help="write the merged model here, as a checkpoint")
    parser.add_argument("--shards", default="runs/shards", help="where shards go when the data is not prepared")
    parser.add_argument("--tracking-uri", default="", help="default: MLFLOW_TRACKING_URI, else the store in runs")
    given = parser.parse_args(arguments)
    store = resolve_uri(Tracking(uri=given.tracking_uri), "runs")
    merged = merge(load(given.semantic, store), load(given.instances, store))
    if given.out:
        print(f"merged model: {save(merged, given.out)}")
    session.connect()
    manifest = ensure_shards(given.data, given.split, given.shards)
    found = compare({"joint": load(given.joint, store), "merged": merged}, manifest, PRESETS["demo"]())
    print(f"{manifest.rows} images of {given.split}\n{table(found['joint'], found['merged'])}")
    return found


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
