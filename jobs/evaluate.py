"""Evaluate a stored model: `python jobs/evaluate.py MODEL --data.root ROOT --data.split val`.

MODEL is a run's or a checkpoint's folder, a .pt file, models:/name@alias, runs:/id/model or hub:NAME. Prints the
tables, writes report.html and records both in an MLflow run.

`--once` is for cron, a systemd timer or a Kubernetes CronJob: it does nothing where this version was evaluated on
these images before, or is being evaluated, and exits with 0. With `--reference models:/name@champion` it exits with 1
where PQ is lower than the reference's by more than `--margin`; `--promote` moves the alias to a model that is better
by more than the bootstrap noise. A verdict is given once for each version of the reference and margin: the next call
exits with 0, so Kubernetes must not repeat one that failed (backoffLimit: 0, restartPolicy: Never).

Exit codes: 0, 1 = worse than the reference, 2 = not done, for the reason that is printed; most go away by themselves.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.common import SPELLINGS, command
from panoptic.ranges import NonNegativeFloat, NonNegativeInt, ThreadCount
from pipelines.config import Actors, Model, Split, parse_options
from pipelines.tracking.config import Tracking

if TYPE_CHECKING:
    from panoptic.metrics.report import Evaluation

FORMER = {**SPELLINGS, "--experiment": "--tracking.experiment"}


USUAL = (
    *("model", "data.root", "data.split", "data.reader", "data.shards", "data.limit", "data.skip", "data.class_map"),
    *("out", "quick", "against", "examples", "map_prediction", "actors", "no_log", "tracking.uri"),
    *("once", "reference", "margin", "promote"),
)
"""Options that most calls name, in the order of use: those of --help."""


@dataclass(frozen=True)
class Records:
    """The record of the evaluation in MLflow."""

    uri: str = ""
    """MLflow tracking URI; by default MLFLOW_TRACKING_URI, else the SQLite file in `runs`."""
    experiment: str = "evaluation"
    """MLflow experiment."""


@dataclass(frozen=True)
class Options:
    """The model, the images, and the use of the figures."""

    model: Model
    """Folder of a run (its best checkpoint) or of a checkpoint, .pt file, models:/name@alias, runs:/id/model or
    hub:NAME (published weights, whose names the list of presets ends with)."""
    data: Split
    """The images."""
    out: str = "runs/evaluations"
    """Folder or s3:// prefix of reports and leases."""
    no_log: bool = False
    """Leave MLflow alone."""
    quick: bool = False
    """Without boundary PQ and AP."""
    against: tuple[str, ...] | None = None
    """Models to compare with."""
    examples: NonNegativeInt | None = None
    """Number of worst and of typical images in the report, each; by default 12."""
    actors: Actors = -1
    """Processes; -1 = one a GPU or core, 0 = none beside this one, without Ray."""
    threads: ThreadCount = 0
    """Torch threads of each; 0 = one."""
    map_prediction: str = ""
    """Class map (JSON, infra/REFERENCE.md) that makes the data's classes of the model's."""
    once: bool = False
    """Scheduled, see above."""
    reference: str | None = None
    """models:/NAME@ALIAS to compare with."""
    margin: NonNegativeFloat | None = None
    """Points of PQ that a model may lose against the reference; by default 1."""
    promote: bool = False
    """Move the reference's alias to a better model."""
    tracking: Records = field(default_factory=Records)
    """MLflow."""


def main(arguments: Sequence[str] | None = None) -> Evaluation | None:
    """Print PQ and all other figures; the evaluation, None when it was scheduled."""
    given = sys.argv[1:] if arguments is None else arguments
    options: Options = parse_options(Options, given, str(__doc__), FORMER, USUAL)
    check(options)

    # what follows takes seconds to import: help and mistakes on the command line need none of it
    from panoptic.evaluation.tally import Measures
    from pipelines.cluster import storage
    from pipelines.cluster.actor_pool import Pool
    from pipelines.data.class_map import load
    from pipelines.data.prepare import ensure_shards
    from pipelines.evaluation.evaluate import ask, evaluate, resolved
    from pipelines.evaluation.record import Places, html, key_of, record, text
    from pipelines.evaluation.scheduled import Reference, scheduled
    from pipelines.presets import PRESETS
    from pipelines.tracking.runs import check_answers, check_store, resolve_uri

    storage.check_lasting(options.out, "--out")
    if not options.no_log:
        check_store(Tracking(uri=options.tracking.uri), "runs", options.out)
        check_answers(Tracking(uri=options.tracking.uri), "runs")
    tracking_uri = resolve_uri(Tracking(uri=options.tracking.uri), "runs")
    places = Places(tracking_uri, options.tracking.experiment, options.out)
    data = options.data
    class_map = load(options.map_prediction) if options.map_prediction else None
    manifest = ensure_shards(data.root, data.split, data.shards, data.reader, class_map=data.class_map, options=data)
    manifest = data.part_of(manifest)
    measures = Measures(boundary=not options.quick, instances=not options.quick, losses=False)
    pool = Pool(options.actors, options.threads)

    def task(uri: str):
        cache = "" if data.class_map else data.shards
        return ask(uri, manifest, PRESETS["demo"](), places.tracking_uri, measures, class_map, cache)

    if options.once:
        margin = 1.0 if options.margin is None else options.margin
        scheduled(task, options.model, pool, places, Reference(options.reference or "", margin, options.promote))
        return None
    asked = [task(uri) for uri in (options.model, *(options.against or ()))]
    outcome, *others = (evaluate(resolved(one), pool) for one in asked)
    print(f"{text(outcome)}\n({options.model} on {manifest.rows} images of {data.split})")
    shown = 12 if options.examples is None else options.examples
    page = html(outcome, others, shown, None if options.no_log else places)
    if options.no_log:
        place = storage.join(places.folder, f"{key_of(outcome.task)}.html")
        storage.write_bytes(place, page.encode())
    else:
        run = record(outcome, places, page, asked[0]).run
        place = f"{storage.join(places.folder, key_of(outcome.task))}.html, and in MLflow run {run.run_id}"
    print(f"report: {place}")
    return outcome.evaluation


def check(options: Options) -> None:
    """Refuse an option that would be ignored.

    Raises:
        ValueError: names it, and what it needs or excludes.
    """
    given = [name for name, value in vars(options).items() if value is not None and value is not False]
    for name in () if options.once else ("reference", "margin", "promote"):
        if name in given:
            raise ValueError(f"--{name} needs --once")
    for name in ("no_log", "against", "examples") if options.once else ():
        if name in given:
            raise ValueError(f"--{name.replace('_', '-')} cannot be given with --once")
    for name in ("margin", "promote"):
        if name in given and options.reference is None:
            raise ValueError(f"--{name} needs --reference models:/NAME@ALIAS")
    if options.margin is not None and not (0 <= options.margin < math.inf):
        raise ValueError(f"--margin {options.margin:g}: give points of PQ, 0 or more")


if __name__ == "__main__":
    command(main)
