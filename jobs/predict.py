"""Segment images: `python jobs/predict.py MODEL IMAGES --out FOLDER`.

MODEL is a checkpoint folder, a .pt file, models:/name@alias or runs:/id/model. IMAGES is a folder of photographs, one
photograph, an s3:// prefix, or a folder of shards. An image that cannot be read or written is named in a line, and
the others are predicted.

The ids of a COCO submission are those of the shards' dataset; of photographs those of --images-json, which also says
which of them are wanted (image_info_test-dev2017.json, say); without it the file names, where each is a number of its
own (000000000139.jpg is 139); else 1, 2, ... in the order of the names.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipelines.cluster.actor_pool import Pool
from pipelines.data.manifest import Manifest, is_shards
from pipelines.evaluation.evaluate import assign_images
from pipelines.evaluation.inputs import photographs, rows
from pipelines.evaluation.predict import FORMATS, Output, Predicted, predict
from pipelines.presets import PRESETS
from pipelines.tracking.runs import Tracking, resolve_uri


def main(arguments: list[str] | None = None) -> list[Predicted]:
    """Predict and write; a line for each image that could not be read or written.

    Raises:
        ValueError: no image could be predicted, or the arguments do not fit.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder, .pt file, models:/name@alias or runs:/id/model")
    parser.add_argument("images", help="folder of photographs or of shards, one photograph, or an s3:// prefix")
    parser.add_argument("--out", required=True, help="folder or s3:// prefix")
    parser.add_argument("--formats", nargs="+", default=["coco", "overlay"], choices=FORMATS, help="what to write")
    parser.add_argument("--images-json", default="", metavar="FILE", help="ids of photographs, see above")
    parser.add_argument("--tracking-uri", default="", help="default: MLFLOW_TRACKING_URI, else the store in runs")
    parser.add_argument("--actors", type=int, default=-1, help="processes; default: one a GPU or core; 0: no Ray")
    parser.add_argument("--threads", type=int, default=0, help="torch threads of each; default: 1")
    given = parser.parse_args(arguments)
    shards = is_shards(given.images)
    manifest = Manifest.load(given.images) if shards else None
    if manifest is not None and given.images_json:
        raise ValueError("--images-json is for photographs; shards have the ids of their dataset")
    images = rows(manifest) if manifest is not None else photographs(given.images, given.images_json)
    tracking_uri = resolve_uri(Tracking(uri=given.tracking_uri), "runs")
    task = assign_images(given.model, manifest, PRESETS["demo"](), tracking_uri)
    pool = Pool(given.actors, given.threads)
    results = list(predict(task, images, Output(given.out, tuple(given.formats)), pool))
    for one in results:
        if one.problem:
            print(f"{one.image.file_name}: left out: {one.problem}")
    done = sum(not one.problem for one in results)
    print(f"{done} of {len(results)} images predicted: {', '.join(given.formats)} in {given.out}")
    if not done:
        raise ValueError(f"{given.images}: no image could be predicted")
    return results


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
