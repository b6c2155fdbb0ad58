"""Evaluate a stored model: `python jobs/evaluate.py MODEL --data ROOT --split val`.

MODEL is a checkpoint folder, a .pt file, models:/name@alias or runs:/id/model. Prints the tables, writes
report.html and records both in an MLflow run.

`--once` is for cron, a systemd timer or a Kubernetes CronJob: it does nothing where this version was evaluated on
these images before, or is being evaluated, and exits with 0. With `--reference models:/name@champion` it exits with 1
where PQ is lower than the reference's by more than `--margin`; `--promote` moves the alias to a model that is better
by more than the bootstrap noise. A verdict is given once for each version of the reference and margin: the next call
exits with 0, so Kubernetes must not repeat one that failed (backoffLimit: 0, restartPolicy: Never).

Exit codes: 0, 1 = worse than the reference, 2 = not done, for the reason that is printed; most go away by themselves.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from panoptic.evaluation.tally import Measures
from panoptic.metrics.report import Evaluation
from pipelines.cluster import storage
from pipelines.cluster.actor_pool import Pool
from pipelines.data.prepare import ensure_shards
from pipelines.evaluation.evaluate import ask, evaluate, resolved
from pipelines.evaluation.record import Places, Worse, html, key_of, record, text
from pipelines.evaluation.scheduled import Reference, scheduled
from pipelines.presets import PRESETS
from pipelines.tracking.runs import Tracking, resolve_uri


def main(arguments: list[str] | None = None) -> Evaluation | None:
    """Print PQ and all other figures; the evaluation, None when it was scheduled."""
    given = _given(arguments)
    places = Places(resolve_uri(Tracking(uri=given.tracking_uri), "runs"), given.experiment, given.out)
    manifest = ensure_shards(given.data, given.split, given.shards)
    measures = Measures(boundary=not given.quick, instances=not given.quick, losses=False)
    pool = Pool(given.actors, given.threads)

    def task(uri: str):
        return ask(uri, manifest, PRESETS["demo"](), places.tracking_uri, measures)

    if given.once:
        scheduled(task, given.model, pool, places, Reference(given.reference, given.margin, given.promote))
        return None
    asked = [task(uri) for uri in (given.model, *given.against)]
    evaluated, *others = (evaluate(resolved(one), pool) for one in asked)
    print(f"{text(evaluated)}\n({given.model} on {manifest.rows} images of {given.split})")
    report = html(evaluated, others, given.examples)
    if given.no_log:
        place = storage.join(places.folder, f"{key_of(evaluated.task)}.html")
        storage.write_bytes(place, report.encode())
    else:
        run = record(evaluated, places, report, asked[0]).run
        place = f"{storage.join(places.folder, key_of(evaluated.task))}.html, and in MLflow run {run.run_id}"
    print(f"report: {place}")
    return evaluated.evaluation


def _given(arguments: list[str] | None) -> argparse.Namespace:
    """The options; one that would be ignored is refused."""
    parser = _parser()
    given = parser.parse_args(arguments)
    unset = {name for name, value in vars(given).items() if value is None or value is False}
    for name in () if given.once else ("reference", "margin", "promote"):
        if name not in unset:
            parser.error(f"--{name} needs --once")
    for name in ("no_log", "against", "examples") if given.once else ():
        if name not in unset:
            parser.error(f"--{name.replace('_', '-')} cannot be given with --once")
    for name in ("margin", "promote"):
        if name not in unset and given.reference is None:
            parser.error(f"--{name} needs --reference models:/NAME@ALIAS")
    if given.margin is not None and not (0 <= given.margin < math.inf):
        parser.error(f"--margin {given.margin:g}: give points of PQ, 0 or more")
    defaults = {"reference": "", "margin": 1.0, "against": [], "examples": 12}
    for name in defaults.keys() & unset:
        setattr(given, name, defaults[name])
    return given


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
    parser.add_argument("--against", nargs="+", metavar="MODEL", help="models to compare with")
    parser.add_argument("--examples", type=int, help="worst and typical images in the report, each; default: 12")
    parser.add_argument("--actors", type=int, default=-1, help="processes; default: one a GPU or core; 0: no Ray")
    parser.add_argument("--threads", type=int, default=0, help="torch threads of each; default: 1")
    parser.add_argument("--once", action="store_true", help="scheduled, see above")
    parser.add_argument("--reference", metavar="models:/NAME@ALIAS", help="to compare with")
    parser.add_argument("--margin", type=float, help="points of PQ that a model may lose; default: 1")
    parser.add_argument("--promote", action="store_true", help="move the reference's alias to a better model")
    return parser


def command(arguments: list[str] | None = None) -> None:
    """`main`, whose errors end the process with one line and an exit code."""
    try:
        main(arguments)
    except (ValueError, OSError) as error:  # a store that is away is an OSError
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, Worse) else 2)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command()
