"""Judge a stored model: `python jobs/evaluate.py MODEL --data ROOT --split val`.

MODEL is a checkpoint folder, a .pt file, models:/name@alias or runs:/id/model.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from panoptic.metrics.report import Evaluation, class_table, table
from pipelines import runtime
from pipelines.evaluate import evaluate, load, options_of
from pipelines.presets import PRESETS
from pipelines.shards import ensure_shards
from pipelines.tracking import Tracking, resolve_uri


def main(arguments: list[str] | None = None) -> Evaluation:
    """Print PQ, SQ and RQ of all, things and stuff, and of each class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder, .pt file, models:/name@alias or runs:/id/model")
    parser.add_argument("--data", required=True, help="COCO-panoptic folder or shards, local or s3://")
    parser.add_argument("--split", default="val", help="which split of it")
    parser.add_argument("--shards", default="runs/shards", help="where shards go when the data is not prepared")
    parser.add_argument("--tracking-uri", default="", help="default: MLFLOW_TRACKING_URI, else the store in runs")
    given = parser.parse_args(arguments)
    stored = load(given.model, resolve_uri(Tracking(uri=given.tracking_uri), "runs"))
    runtime.connect()
    manifest = ensure_shards(given.data, given.split, given.shards)
    evaluation = evaluate(stored, manifest, options_of(stored, PRESETS["demo"]()))
    print(f"{class_table(evaluation)}\n\n{given.model} on {manifest.rows} images of {given.split}\n{table(evaluation)}")
    return evaluation


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
