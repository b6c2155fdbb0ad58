"""Judge a stored model: `python jobs/evaluate.py MODEL --data ROOT --split val`.

MODEL is a checkpoint folder, a .pt file, models:/name@alias or runs:/id/model. Prints the tables, writes
report.html and records both in an MLflow run.

`--once` is for cron, a systemd timer or a Kubernetes CronJob: it does nothing where this version was judged on
these images before, or is being judged, and exits with 0. With `--reference models:/name@champion` it exits with 1
where PQ falls by more than `--margin` below the reference; `--promote` moves the alias to a model that is better by
more than the bootstrap noise.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from panoptic.evaluation import Measures
from panoptic.metrics.report import Evaluation
from pipelines import storage
from pipelines.actors import Pool
from pipelines.evaluate import assign, evaluate
from pipelines.judging import Places, html, key_of, record, text
from pipelines.presets import PRESETS
from pipelines.scheduled import Reference, scheduled
from pipelines.shards import ensure_shards
from pipelines.tracking import Tracking, resolve_uri


def main(arguments: list[str] | None = None) -> Evaluation | None:
    """Print PQ and all other figures; the evaluation, None when it was scheduled."""
    given = _parser().parse_args(arguments)
    places = Places(resolve_uri(Tracking(uri=given.tracking_uri), "runs"), given.experiment, given.out)
    manifest = ensure_shards(given.data, given.split, given.shards)
    measures = Measures(boundary=not given.quick, instances=not given.quick, losses=False)
    pool = Pool(given.actors, given.threads)

    def task(uri: str):
        return assign(uri, manifest, PRESETS["demo"](), places.tracking_uri, measures)

    if given.once:
        scheduled(task, given.model, pool, places, Reference(given.reference, given.margin, given.promote))
        return None
    judged, *others = (evaluate(task(uri), pool) for uri in (given.model, *given.against))
    print(f"{text(judged)}\n({given.model} on {manifest.rows} images of {given.split})")
    report = html(judged, others, given.examples)
    if given.no_log:
        place = storage.join(places.folder, f"{key_of(judged.task)}.html")
        storage.write_bytes(place, report.encode())
    else:
        run = record(judged, places, report).run
        place = f"{storage.join(places.folder, key_of(judged.task))}.html, and in MLflow run {run.run_id}"
    print(f"report: {place}")
    return judged.evaluation


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder, .pt file, models:/name@alias or runs:/id/model")
    parser.add_argument("--data", required=True, help="COCO-panoptic folder or shards, local or s3://")
    parser.add_argument("--split", default="val", help="which split of it")
    parser.add_argument("--shards", default="runs/shards", help="where shards go when the data is not prepared")
    parser.add_argument("--out", default="runs/evaluations", help="folder or s3:// prefix of reports and leases")
    parser.add_argument("--tracking-uri", default="", help="default: MLFLOW_TRACKING_URI, else the store in runs")
    parser.add_argument("--experiment", default="evaluation", help="of MLflow")
    parser.add_argument("--no-log", action="store_true", help="leave MLflow alone")
    parser.add_argument("--quick", action="store_true", help="without boundary PQ and AP")
    parser.add_argument("--against", nargs="*", default=[], metavar="MODEL", help="models to compare with")
    parser.add_argument("--examples", type=int, default=12, help="worst and typical images in the report, each")
    parser.add_argument("--actors", type=int, default=-1, help="processes; default: one a GPU or core; 0: no Ray")
    parser.add_argument("--threads", type=int, default=0, help="torch threads of each; default: cores shared out")
    parser.add_argument("--once", action="store_true", help="scheduled, see above")
    parser.add_argument("--reference", default="", metavar="models:/NAME@ALIAS", help="to compare with")
    parser.add_argument("--margin", type=float, default=1.0, help="points of PQ that a model may lose")
    parser.add_argument("--promote", action="store_true", help="move the reference's alias to a better model")
    return parser


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except (ValueError, ConnectionError) as error:
        sys.exit(f"error: {error}")
