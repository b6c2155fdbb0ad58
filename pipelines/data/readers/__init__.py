"""Readers of annotated data sets, a file a format: a folder in, a light table of rows out; no image is opened here.

A reader is a function `(root, split, ...) -> Source` in `READERS`. It checks everything that can be
checked without pixels and gives what it finds wrong as `problems`; `prepare` opens the images,
checks the rest and reports both together.
"""

from collections.abc import Callable

from pipelines.data.readers.ade20k import ade20k
from pipelines.data.readers.bdd100k import bdd100k
from pipelines.data.readers.cityscapes import cityscapes
from pipelines.data.readers.coco_instances import coco_instances
from pipelines.data.readers.coco_panoptic import coco_panoptic
from pipelines.data.readers.kitti_step import kitti_step
from pipelines.data.readers.mapillary import mapillary
from pipelines.data.readers.source import Source

READERS: dict[str, Callable[..., Source]] = {
    "coco": coco_panoptic,
    "coco-instances": coco_instances,
    "cityscapes": cityscapes,
    "mapillary": mapillary,
    "bdd100k": bdd100k,
    "ade20k": ade20k,
    "kitti-step": kitti_step,
}
"""The formats that `jobs/prepare.py` reads, by name."""
