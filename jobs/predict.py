"""Segment images: `python jobs/predict.py MODEL IMAGES --out FOLDER`.

MODEL is a run's or a checkpoint's folder, a .pt file, models:/name@alias, runs:/id/model or hub:NAME. IMAGES is a
folder of photographs, one photograph, an s3:// prefix, or a folder of shards. An image that cannot be read or written
is named in a line, and the others are predicted.

The ids of a COCO submission are those of the shards' data set; of photographs those of --images-json, which also says
which of them are wanted (image_info_test-dev2017.json, say); without it the file names, where each is a number of its
own (000000000139.jpg is 139); else 1, 2, ... in the order of the names.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.common import TRACKING, command
from panoptic.ranges import ThreadCount
from pipelines.config import Actors, Images, Model, Store, parse_options
from pipelines.evaluation.config import FORMATS
from pipelines.tracking.config import Tracking

if TYPE_CHECKING:
    from pipelines.evaluation.predict import Predicted


@dataclass(frozen=True)
class Options:
    """The images that are predicted, and the files that are written."""

    model: Model
    """Folder of a run (its best checkpoint) or of a checkpoint, .pt file, models:/name@alias, runs:/id/model or
    hub:NAME (published weights, whose names the list of presets ends with)."""
    images: Images
    """Folder of photographs or of shards, one photograph, or an s3:// prefix."""
    out: str
    """Folder or s3:// prefix that is written to."""
    formats: tuple[str, ...] = ("coco", "overlay")
    """Formats to write: coco, rle (one JSON with the mask of each segment), cityscapes, overlay."""
    images_json: str = ""
    """File with the ids of the photographs, see above."""
    map_prediction: str = ""
    """Class map (JSON, infra/REFERENCE.md) on the model's classes; the files hold its target classes."""
    actors: Actors = -1
    """Processes; -1 = one a GPU or core, 0 = none beside this one, without Ray."""
    threads: ThreadCount = 0
    """Torch threads of each; 0 = one."""
    tracking: Store = field(default_factory=Store)
    """MLflow."""


def main(arguments: Sequence[str] | None = None) -> list[Predicted]:
    """Predict and write; a line for each image that could not be read or written.

    Raises:
        ValueError: no image could be predicted, or the arguments do not fit.
    """
    given = sys.argv[1:] if arguments is None else arguments
    options: Options = parse_options(Options, given, str(__doc__), TRACKING)
    unknown = [name for name in options.formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"--formats {' '.join(unknown)}: unknown; there are {', '.join(FORMATS)}")

    # what follows takes seconds to import: help and mistakes on the command line need none of it
    from pipelines.cluster import storage
    from pipelines.cluster.actor_pool import Pool
    from pipelines.data.class_map import load
    from pipelines.data.manifest import Manifest, is_shards
    from pipelines.evaluation.evaluate import assign_images
    from pipelines.evaluation.inputs import photographs, rows
    from pipelines.evaluation.predict import Output, predict
    from pipelines.presets import PRESETS
    from pipelines.tracking.runs import resolve_uri

    storage.check_lasting(options.out, "--out")
    manifest = Manifest.load(options.images) if is_shards(options.images) else None
    if manifest is not None and options.images_json:
        raise ValueError("--images-json is for photographs; shards have the ids of their data set")
    images = rows(manifest) if manifest is not None else photographs(options.images, options.images_json)
    class_map = load(options.map_prediction) if options.map_prediction else None
    tracking_uri = resolve_uri(Tracking(uri=options.tracking.uri), "runs")
    task = assign_images(options.model, manifest, PRESETS["demo"](), tracking_uri, class_map)
    pool = Pool(options.actors, options.threads)
    results = list(predict(task, images, Output(options.out, options.formats), pool))
    for result in results:
        if result.problem:
            print(f"{result.image.file_name}: left out: {result.problem}")
    done = sum(not result.problem for result in results)
    print(f"{done} of {len(results)} images predicted: {', '.join(options.formats)} in {options.out}")
    if not done:
        raise ValueError(f"{options.images}: no image could be predicted")
    return results


if __name__ == "__main__":
    command(main)
