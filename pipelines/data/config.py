"""The options of readers and of the feed, which a command line reads without what reads the data."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from annotated_types import Interval

from panoptic.ranges import NonNegativeInt, PositiveFloat, PositiveInt

Orientation = Literal["stored", "applied"]
"""The frame of the maps where a photograph's EXIF turns or mirrors it within its size: its stored pixels, as in the
public data sets, or the upright image that people see."""

Overlap = Literal["smaller-wins", "later-wins", "earlier-wins", "void", "error"]

Uncovered = Literal["void", "crowd"]

Crowd = Literal["trust", "ignore"]

Unlisted = Literal["refuse", "void"]
"""The treatment of pixels whose id or colour nothing lists: the image is a problem, or they are void."""

OnInvalid = Literal["stop", "skip"]
"""The treatment of an image that fails validation: it stops the preparation, or is left out."""

AUTO = "auto"
"""Value of data.reader with which the reader is chosen by what the folder holds."""

READER_NAMES = (
    *("coco", "coco-instances", "cityscapes", "mapillary", "bdd100k", "ade20k", "kitti-step", "cityscapes-vps"),
    *("coconut", "motchallenge-step", "cvat", "cvat-masks", "label-studio", "segments-ai", "huggingface"),
)
"""The formats that are read: the keys of `pipelines.data.readers.READERS`."""


def check_readers(readers: str | Collection[str]) -> None:
    """Refuse formats that nothing reads.

    Args:
        readers: of one data set, or of several.

    Raises:
        ValueError: names it, near ones and all.
    """
    for name in [readers] if isinstance(readers, str) else readers:
        if name not in (AUTO, *READER_NAMES):
            near = get_close_matches(name, READER_NAMES)
            hint = f"near: {', '.join(near)}; " if near else ""
            raise ValueError(f"data.reader {name}: unknown; {hint}there are {', '.join(READER_NAMES)}, or {AUTO}")


@dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """The places of a data set's files and the meaning of its labels. Each reader takes some options, no others.

    In paths, `{split}` stands for the name of the split.
    """

    json_file: str = ""
    """Annotation file, where it is not found by itself."""
    pngs: str = ""
    """Folder or zip of the label PNGs, where it is not found by itself."""
    images: str = ""
    """Folder or zip of the photographs, where it is not found by itself."""
    version: Literal["auto", "1.2", "2.0"] = "auto"
    """Version of Mapillary Vistas, where a download holds two."""
    annotations: Literal["auto", "fine", "coarse"] = "auto"
    """Fine or coarse annotations of Cityscapes."""
    labels: Literal["auto", "instances", "panoptic"] = "auto"
    """Read the instance maps, or the panoptic JSON and its PNGs, where a data set has both."""
    overlap: Overlap = "smaller-wins"
    """The instance that has a pixel which several cover: the smaller, the later or earlier in the file, or none."""
    crowd: Crowd = "trust"
    """Trust iscrowd of an instance JSON, or ignore it where a tool sets it on single objects."""
    semantic: str = ""
    """Folder of semantic PNGs that lie under the instances of a JSON."""
    semantic_classes: str = ""
    """JSON with the meaning of the values of the semantic PNGs, or cocostuff (values label - 1, 255 void),
    cocostuff-challenge (92 to 182, 0 and 183 void) or panoptic-stuff (detectron2's 1 to 53, 0 and 255 void)."""
    uncovered: Uncovered = "void"
    """Pixels of a thing class in the semantic PNGs under no instance: void, or a crowd of the class."""
    background: str = ""
    """Name of a stuff class for all that no instance covers; by default that is void. A class of the data set that is
    called background is kept where it is named here."""
    things: tuple[str, ...] = ()
    """Names of the classes that are things, where the annotations do not say it or say it wrong."""
    label_set: str = ""
    """Label set of a release of Segments.ai; by default ground-truth, or the only one."""
    unlisted: Unlisted = "refuse"
    """Pixels of a map whose id or colour nothing lists: the image fails validation, or they are void, and counted."""
    merge_crowds: Literal["yes", "no"] = "no"
    """All crowds of a class in an image become one: evaluations of COCO's kind know one only, the last."""
    exif: Literal["auto"] | Orientation = "auto"
    """The maps lie over the stored pixels, or over the image that its EXIF orientation gives, where both have one size;
    by default over the stored ones in public data sets, else over the other."""

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        options = ((field.name, getattr(self, field.name), field.default) for field in fields(ReaderOptions))
        return {name: value for name, value, default in options if value != default}


@dataclass(frozen=True)
class FeedConfig:
    """The machinery that brings data to the workers."""

    decode: Literal["collate", "map"] = "collate"
    """Decode and augment in threads of the training process, or in Ray Data's tasks (spare CPUs, other machines)."""
    threads: Annotated[int, Interval(ge=1, le=1024)] = 2
    """Decoding threads of each worker (collate, evaluation)."""
    reads: NonNegativeInt = 0
    """Rows that each worker reads at a time (collate); 0 = 4 from a disk, 32 from S3."""
    prefetch: PositiveInt = 4
    """Micro-batches that wait ready for training."""
    tasks: PositiveInt = 1
    """Ray Data tasks of each worker at a time (map)."""
    cpus: PositiveFloat = 0.2
    """CPUs that each Ray Data task reserves; a cluster needs workers x (CPUs of a worker + tasks x this)."""
    ahead: PositiveInt = 128
    """MiB of rows of each worker that may be read before they are needed."""
    cache: NonNegativeInt = 256
    """Without effect: shards are read by rows, and nothing is read twice. Commands of earlier versions have it."""

    @property
    def reserved_cpus(self) -> float:
        """CPUs that Ray Data needs for each worker beside its own."""
        return self.tasks * self.cpus if self.decode == "map" else 0.0
