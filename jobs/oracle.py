"""The score that a model would have if parts of its output were true: `python jobs/oracle.py MODEL --data.root ROOT`.

MODEL is a run's or a checkpoint's folder, a .pt file, models:/name@alias, runs:/id/model or hub:NAME. Every choice of
outputs is evaluated unless some are named: `--swap none position position+class`. With `--any-stuff-area` a last row
has everything true and keeps stuff of any size. Each row has PQ, SQ, RQ, AP (of the instances before merging, against
panoptic masks) and mean IoU; "-" stands where a figure is not defined, as AP of images without a thing. The table goes
to MLflow, and into the report of every later evaluation of this model on these images."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.common import SPELLINGS, command
from panoptic.ranges import ThreadCount
from pipelines.config import Actors, Model, Split, parse_options
from pipelines.tracking.config import Tracking

if TYPE_CHECKING:
    from panoptic.metrics.report import Evaluation


USUAL = (
    *("model", "data.root", "data.split", "data.reader", "data.shards", "data.limit", "data.class_map"),
    *("swap", "any_stuff_area", "no_ap", "actors", "no_log", "tracking.uri"),
)
"""Options that most calls name, in the order of use: those of --help."""


@dataclass(frozen=True)
class Records:
    """The record of the table in MLflow, where the report of an evaluation finds it."""

    uri: str = ""
    """MLflow tracking URI; by default MLFLOW_TRACKING_URI, else the SQLite file in `runs`."""
    experiment: str = "evaluation"
    """MLflow experiment: that of the evaluations."""


@dataclass(frozen=True)
class Options:
    """The model, the images, and the outputs that are swapped."""

    model: Model
    """Folder of a run (its best checkpoint) or of a checkpoint, .pt file, models:/name@alias, runs:/id/model or
    hub:NAME (published weights, whose names the list of presets ends with)."""
    data: Split
    """The images."""
    swap: tuple[str, ...] = ()
    """Outputs to swap, a row each, joined by + where a row swaps several; by default every choice."""
    any_stuff_area: bool = False
    """One more row: everything true, and stuff of any size is kept."""
    no_ap: bool = False
    """Leave out AP, which takes time where instances are many."""
    actors: Actors = -1
    """Processes; -1 = one a GPU or core, 0 = none beside this one, without Ray."""
    threads: ThreadCount = 0
    """Torch threads of each; 0 = one."""
    no_log: bool = False
    """Leave MLflow alone."""
    tracking: Records = field(default_factory=Records)
    """MLflow."""


def main(arguments: Sequence[str] | None = None) -> list[tuple[tuple[str, ...], Evaluation]]:
    """Evaluate every choice and print the table."""
    given = sys.argv[1:] if arguments is None else arguments
    options: Options = parse_options(Options, given, str(__doc__), SPELLINGS, USUAL)

    # what follows takes seconds to import: help and mistakes on the command line need none of it
    from panoptic.evaluation.oracle import cells, table, truth_names
    from pipelines.cluster.actor_pool import Pool
    from pipelines.data.prepare import ensure_shards
    from pipelines.evaluation.evaluate import identify, in_classes_of, load, options_of
    from pipelines.evaluation.oracle import choices_of, oracle, record, without_stuff_area
    from pipelines.presets import PRESETS
    from pipelines.tracking.runs import check_answers, check_store, resolve_uri

    tracking = Tracking(options.tracking.uri, options.tracking.experiment, f"oracle {options.model}"[-250:])
    uri, identity = identify(options.model, resolve_uri(tracking, "runs"))
    stored = load(uri, resolve_uri(tracking, "runs"))
    if not options.no_log:
        check_store(tracking, "runs")
        check_answers(tracking, "runs")
    stored.model.eval()
    names = truth_names(stored.model)
    choices = choices_of(stored.model, options.swap)
    any_area = without_stuff_area(stored) if options.any_stuff_area else None  # or refused before anything is evaluated
    data = options.data
    manifest = ensure_shards(data.root, data.split, data.shards, data.reader, class_map=data.class_map, options=data)
    manifest = data.part_of(manifest)
    manifest = in_classes_of(stored, manifest, "" if data.class_map else data.shards)
    pool = Pool(options.actors, options.threads)
    experiment = options_of(stored, PRESETS["demo"]())
    rows = list(oracle(stored, manifest, experiment, choices, not options.no_ap, pool))
    if any_area is not None:
        rows += oracle(any_area, manifest, experiment, [names], not options.no_ap, pool)
    print(f"{options.model} on {manifest.rows} images of {data.split}; x: the truth in place of the network's output")
    print(table(names, rows))
    if not options.no_log:
        print(f"MLflow run {record(uri, identity, manifest, cells(names, rows), tracking).run_id}")
    return rows


if __name__ == "__main__":
    command(main)
