"""Readers of annotated data sets, a file a format: a folder in, a light table of rows out; no image is opened here.

A reader is a function `(root, split, ...) -> Source` in `READERS`. It checks everything that can be
checked without pixels and gives what it finds wrong as `problems`; `prepare` opens the images,
checks the rest and reports both together.
"""

from collections.abc import Callable

from pipelines.data.readers.cityscapes import cityscapes
from pipelines.data.readers.coco_panoptic import coco_panoptic
from pipelines.data.readers.source import Source

READERS: dict[str, Callable[..., Source]] = {
    "coco": coco_panoptic,
    "cityscapes": cityscapes,
}
"""The formats that `jobs/prepare.py` reads, by name."""
