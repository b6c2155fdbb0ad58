"""What a model would score if parts of its output were true: `python jobs/oracle.py MODEL --data ROOT --split val`.

MODEL is a checkpoint folder, a .pt file, models:/name@alias or runs:/id/model. Every choice of outputs is evaluated
unless some are named: `--swap none position position+class`. With `--any-stuff-area` a last row has everything true
and keeps stuff of any size. Each row has PQ, SQ, RQ, AP (of the instances before merging, against panoptic masks) and
mean IoU; "-" stands where a figure is not defined, as AP of images without a thing.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from panoptic.evaluation.oracle import table, truth_names
from panoptic.metrics.report import Evaluation
from pipelines.cluster import session
from pipelines.data.prepare import ensure_shards
from pipelines.evaluation.evaluate import load, options_of
from pipelines.evaluation.oracle import choices_of, oracle, without_stuff_area
from pipelines.presets import PRESETS
from pipelines.tracking.runs import Tracking, resolve_uri


def main(arguments: list[str] | None = None) -> list[tuple[tuple[str, ...], Evaluation]]:
    """Evaluate every choice and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder, .pt file, models:/name@alias or runs:/id/model")
    parser.add_argument("--data", required=True, help="COCO-panoptic folder or shards, local or s3://")
    parser.add_argument("--split", default="val", help="which split of it")
    parser.add_argument(
        "--swap", nargs="+", default=[], metavar="A+B", help="outputs to swap, a row each; default: all"
    )
    parser.add_argument("--any-stuff-area", action="store_true", help="one more row, see above")
    parser.add_argument("--no-ap", action="store_true", help="leave out AP, which takes time where instances are many")
    parser.add_argument("--shards", default="runs/shards", help="where shards go when the data is not prepared")
    parser.add_argument("--tracking-uri", default="", help="default: MLFLOW_TRACKING_URI, else the store in runs")
    given = parser.parse_args(arguments)
    stored = load(given.model, resolve_uri(Tracking(uri=given.tracking_uri), "runs"))
    stored.model.eval()
    names = truth_names(stored.model)
    choices = choices_of(stored.model, given.swap)
    session.connect()
    manifest = ensure_shards(given.data, given.split, given.shards)
    experiment = options_of(stored, PRESETS["demo"]())
    rows = list(oracle(stored, manifest, experiment, choices, not given.no_ap))
    if given.any_stuff_area:
        rows += oracle(without_stuff_area(stored), manifest, experiment, [names], not given.no_ap)
    print(f"{given.model} on {manifest.rows} images of {given.split}; x: the truth in place of the network's output")
    print(table(names, rows))
    return rows


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
