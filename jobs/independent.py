"""Joint against independent training: `python jobs/independent.py JOINT SEMANTIC INSTANCES --data.root ROOT`.

Each is a checkpoint folder, a .pt file, models:/name@alias or runs:/id/model of a JSIS-Net: trained whole, with
--model.branches semantic, and with --model.branches instances. The last two are merged as one model, and mIoU, AP50
(against panoptic masks) and PQ of both are printed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.common import SPELLINGS, command
from panoptic.ranges import ThreadCount
from pipelines.config import Actors, Model, Split, Store, parse_options
from pipelines.tracking.config import Tracking

if TYPE_CHECKING:
    from panoptic.metrics.report import Evaluation


USUAL = (
    *("joint", "semantic", "instances", "data.root", "data.split", "data.reader", "data.shards", "data.limit"),
    *("out", "actors", "tracking.uri"),
)
"""Options that most calls name, in the order of use: those of --help."""


@dataclass(frozen=True)
class Options:
    """The models and the images."""

    joint: Model
    """The model that was trained whole."""
    semantic: Model
    """The one of the semantic branch alone."""
    instances: Model
    """The one of the instance branch alone."""
    data: Split
    """The images."""
    out: str = ""
    """Write the merged model here, as a checkpoint; empty = nowhere."""
    actors: Actors = -1
    """Processes; -1 = one a GPU or core, 0 = none beside this one, without Ray."""
    threads: ThreadCount = 0
    """Torch threads of each; 0 = one."""
    tracking: Store = field(default_factory=Store)
    """MLflow."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Evaluation]:
    """Print the table."""
    given = sys.argv[1:] if arguments is None else arguments
    options: Options = parse_options(Options, given, str(__doc__), SPELLINGS, USUAL)

    # what follows takes seconds to import: help and mistakes on the command line need none of it
    from pipelines.cluster.actor_pool import Pool
    from pipelines.data.prepare import ensure_shards
    from pipelines.evaluation.evaluate import load
    from pipelines.evaluation.merge_branches import compare, merge, save, table
    from pipelines.presets import PRESETS
    from pipelines.tracking.runs import resolve_uri

    store = resolve_uri(Tracking(uri=options.tracking.uri), "runs")
    merged = merge(load(options.semantic, store), load(options.instances, store))
    if options.out:
        print(f"merged model: {save(merged, options.out)}")
    data = options.data
    manifest = ensure_shards(data.root, data.split, data.shards, data.reader, class_map=data.class_map, options=data)
    manifest = data.part_of(manifest)
    models = {"joint": load(options.joint, store), "merged": merged}
    evaluations = compare(models, manifest, PRESETS["demo"](), Pool(options.actors, options.threads))
    print(f"{manifest.rows} images of {data.split}\n{table(evaluations['joint'], evaluations['merged'])}")
    return evaluations


if __name__ == "__main__":
    command(main)
