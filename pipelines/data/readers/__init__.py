"""Readers of annotated data sets, a file a format: a folder in, a light table of rows out; photographs stay closed.

A reader is a function `(root, split, ...) -> Source` in `READERS`. It checks everything that can be
checked without pixels and gives what it finds wrong as `problems`; `prepare` opens the images,
checks the rest and reports both together. The source says how a row's label files are decoded.
"""

from collections.abc import Callable, Mapping
from typing import Any

from pipelines.cluster import storage
from pipelines.data.config import AUTO, ReaderOptions
from pipelines.data.readers import options as reader_options
from pipelines.data.readers.ade20k import ade20k
from pipelines.data.readers.bdd100k import bdd100k
from pipelines.data.readers.cityscapes import cityscapes
from pipelines.data.readers.cityscapes_vps import cityscapes_vps, vps_files
from pipelines.data.readers.coco_instances import coco_instances, instance_files
from pipelines.data.readers.coco_panoptic import coco_panoptic
from pipelines.data.readers.coconut import coconut, json_files
from pipelines.data.readers.cvat import FILE as CVAT_FILE
from pipelines.data.readers.cvat import cvat
from pipelines.data.readers.cvat_masks import LABEL_MAP, cvat_masks
from pipelines.data.readers.huggingface import huggingface
from pipelines.data.readers.kitti_step import kitti_step, motchallenge_step
from pipelines.data.readers.label_studio import label_studio
from pipelines.data.readers.mapillary import SPLITS as MAPILLARY_SPLITS
from pipelines.data.readers.mapillary import mapillary
from pipelines.data.readers.segments_ai import segments_ai
from pipelines.data.readers.source import Source

__all__ = ["AUTO", "EVIDENCE", "READERS", "ReaderOptions", "read_source"]

READERS: dict[str, Callable[..., Source]] = {
    "coco": coco_panoptic,
    "coco-instances": coco_instances,
    "cityscapes": cityscapes,
    "mapillary": mapillary,
    "bdd100k": bdd100k,
    "ade20k": ade20k,
    "kitti-step": kitti_step,
    "cityscapes-vps": cityscapes_vps,
    "coconut": coconut,
    "motchallenge-step": motchallenge_step,
    "cvat": cvat,
    "cvat-masks": cvat_masks,
    "label-studio": label_studio,
    "segments-ai": segments_ai,
    "huggingface": huggingface,
}
"""The formats that `jobs/prepare.py` reads, by name."""


def _mapillary(split: str) -> list[str]:
    split = MAPILLARY_SPLITS.get(split, split)
    return [f"{split}/{part}" for part in ("v2.0", "v1.2", "panoptic", "instances")]


def _ade20k(split: str) -> list[str]:
    names = {"train": "training", "val": "validation"}
    short = {name: key for key, name in names.items()}
    return [f"annotations_instance/{names.get(split, split)}", f"ade20k_panoptic_{short.get(split, split)}.json"]


EVIDENCE: dict[str, Callable[[str], list[str]]] = {
    "coco": lambda split: [f"annotations/panoptic_{split}.json", f"panoptic_{split}.json"],
    "cityscapes": lambda split: [f"gtFine/{split}", f"gtCoarse/{split}", f"leftImg8bit/{split}"],
    "bdd100k": lambda split: [f"labels/pan_seg/bitmasks/{split}", f"pan_seg/bitmasks/{split}"],
    "motchallenge-step": lambda split: [f"MOTS/{split}", f"motchallenge-step/panoptic_maps/{split}"],
    "kitti-step": lambda split: [f"panoptic_maps/{split}"],
    "ade20k": _ade20k,
    "coconut": json_files,  # and Parquet files, see `options.detect`
    "mapillary": _mapillary,
    "cityscapes-vps": vps_files,
    "coco-instances": instance_files,
    "cvat": lambda split: [CVAT_FILE],
    "cvat-masks": lambda split: [LABEL_MAP],
}
"""Paths by which the format of a split is known where no reader is named, the preferred format first."""


def read_source(
    reader: str, root: storage.Uri, split: str, options: ReaderOptions | Mapping[str, Any] | None = None
) -> Source:
    """Read the annotations of a split.

    Args:
        reader: a key of `READERS`, or "auto": the folder's content tells it.
        root: the data set.
        split: the name of the split.
        options: of the reader.

    Raises:
        ValueError: there is no such reader, it has no such option, or it refuses the data set.
    """
    spelt = options.given() if isinstance(options, ReaderOptions) else options or {}
    return reader_options.read_source(READERS, EVIDENCE, reader, root, split, spelt)
