"""Trained models on photographs, in three lines.

    model = panoptic.load("runs/street")
    result = model("photo.jpg")
    result.save("photo-segmented.jpg")

A checkpoint says everything that is needed: the architecture, the classes, the size at which it was evaluated, the
precision. Sources that are no file of this machine are opened by whoever registers an entry point of the group
`panoptic.sources` for their scheme: the pipeline does so for `models:/` and `runs:/` (MLflow) and `s3://`.
`hub:NAME` is a published model, which is downloaded once (`panoptic.convert.hub`).

Shapes: H x W pixels of a photograph, N segments.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from panoptic.convert import hub
from panoptic.evaluation.step import evaluation_step
from panoptic.models.base import PanopticModel
from panoptic.png import decode_image, encode_image, encode_jpeg, to_coco
from panoptic.segmentation import Categories, Sample, Segmentation, collate
from panoptic.training.checkpoint import CHECKPOINT, LISTING, best_listed, build_model
from panoptic.training.checkpoint import load as read
from panoptic.training.config import Engine
from panoptic.training.device import prepare
from panoptic.training.plain import from_plain
from panoptic.transforms import Resize, evaluation_view
from panoptic.visualization import overlay

SOURCES = "panoptic.sources"
"""The group of entry points that open other sources: a function of a URI that gives (model, resize, options)."""

JPEG_QUALITY = 92

Photograph = str | os.PathLike[str] | bytes | np.ndarray | Image.Image
"""A path, the bytes of an image file, uint8 [H, W, 3] (RGB) or [H, W], or an image of Pillow."""


@dataclass(frozen=True, eq=False, repr=False)
class SegmentedPhotograph(Segmentation):
    """The panoptic map of a photograph, at its size, with what it takes to name, draw and store it."""

    image: np.ndarray = None  # type: ignore[assignment]
    """uint8 [H, W, 3], RGB: the photograph."""
    categories: Categories = None  # type: ignore[assignment]
    """The classes that `labels` count."""
    name: str = "photograph"
    """Name of the file, where it has one."""

    @property
    def names(self) -> tuple[str, ...]:
        """The class of each segment by its name, [N]."""
        return tuple(self.categories.names[label] for label in self.labels.tolist())

    def draw(self, names: bool = True) -> np.ndarray:
        """The map over the photograph, uint8 [H, W, 3] RGB.

        Args:
            names: write the class on every segment that is large enough.
        """
        return overlay(self.image, self, self.categories, names)

    def to_coco(self, image_id: int | str | None = None) -> tuple[bytes, dict[str, Any]]:
        """The map as COCO-panoptic has it.

        Args:
            image_id: of the annotation; the photograph's name without its ending by default.

        Returns:
            the PNG of segment ids, and the entry of `annotations`, in which each segment has its class's name, too.
        """
        stem = Path(self.name).stem
        png, record = to_coco(self, self.categories, stem if image_id is None else image_id, f"{stem}.png")
        name_segments(record, self.categories)
        return png, record

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write a picture (.jpg, .png), or COCO-panoptic (.json, and the PNG of ids beside it under the same name).

        Raises:
            ValueError: another ending.
        """
        path = Path(file)
        match path.suffix.lower():
            case ".jpg" | ".jpeg":
                path.write_bytes(encode_jpeg(self.draw(), JPEG_QUALITY))
            case ".png":
                path.write_bytes(encode_image(self.draw()))
            case ".json":
                png, record = self.to_coco()
                record["file_name"] = f"{path.stem}.png"
                height, width = self.size
                image = {"id": record["image_id"], "file_name": self.name, "height": height, "width": width}
                content = {"images": [image], "annotations": [record], "categories": self.categories.to_coco()}
                path.with_suffix(".png").write_bytes(png)
                path.write_text(json.dumps(content))
            case _:
                raise ValueError(f"{path}: save writes .jpg and .png (a picture) and .json (COCO-panoptic)")

    def __repr__(self) -> str:
        height, width = self.size
        counts = Counter(self.names)
        things = set(np.array(self.categories.names)[list(self.categories.things)].tolist())
        listed = [f"{count} {name}" if name in things else name for name, count in counts.items()]
        return f"<{self.name}, {height} x {width}: {', '.join(listed) or 'nothing found'}>"

    def _repr_png_(self) -> bytes:
        """The picture that a notebook shows."""
        return encode_image(self.draw())


class Predictor:
    """A trained model that takes photographs.

    Args:
        model: in evaluation mode.
        resize: of a photograph before the network.
        engine: precision and memory format of the network.
    """

    def __init__(self, model: PanopticModel, resize: Resize | None = None, engine: Engine | None = None) -> None:
        self.model, self.resize, self.engine = model, resize or Resize(), engine or Engine()

    @property
    def categories(self) -> Categories:
        """The classes that the model knows."""
        return self.model.categories

    @overload
    def __call__(self, photographs: Photograph, batch: int = ...) -> SegmentedPhotograph: ...
    @overload
    def __call__(self, photographs: Sequence[Photograph], batch: int = ...) -> list[SegmentedPhotograph]: ...
    def __call__(
        self, photographs: Photograph | Sequence[Photograph], batch: int = 8
    ) -> SegmentedPhotograph | list[SegmentedPhotograph]:
        """Segment a photograph, or each of a list.

        Args:
            photographs: one, or a list or tuple of them, of any sizes.
            batch: most photographs that pass the network at once; only those of one size do.

        Returns:
            the map of the photograph, or the list of all maps in their order.

        Raises:
            ValueError: a file is no image, or an array is not uint8 [H, W, 3]; names it.
            OSError: a file cannot be read.
        """
        if not isinstance(photographs, list | tuple):
            return self([photographs], batch)[0]  # type: ignore[list-item]
        samples = [_sample(photograph, place) for place, photograph in enumerate(photographs)]
        maps = segment(self.model, samples, self.resize, self.engine, batch)
        return [
            SegmentedPhotograph(
                m.segments, m.labels, m.crowd, m.scores, image=s.image, categories=self.categories, name=s.name
            )
            for m, s in zip(maps, samples, strict=True)
        ]

    def __repr__(self) -> str:
        device = next(self.model.parameters()).device
        return f"<{type(self.model).__name__} of {len(self.categories)} classes on {device}>"


def load(
    source: str | os.PathLike[str],
    device: str = "auto",
    precision: Literal["float32", "bfloat16", ""] = "",
) -> Predictor:
    """A trained model, ready for photographs.

    Args:
        source: a run's folder (its best checkpoint), a checkpoint's folder (`step_001200`) or file (.pt), `hub:NAME`
            for a published model, or where the pipeline is installed too `models:/name@alias` and `runs:/id/model` of
            MLflow, or a run or a checkpoint on s3://.
        device: "cuda", "cuda:1", "cpu"; auto = a GPU where there is one.
        precision: of the network; by default that in which it was trained and validated.

    Raises:
        ValueError: there is no such file, it is no checkpoint, nothing opens such a source, or a published model
            cannot be downloaded.
    """
    name = os.fspath(source)
    if name.startswith(hub.PREFIX):
        name = str(hub.find(name))
    scheme, separator, _ = name.partition(":/")
    model, resize, options = _open_source(name, scheme) if separator and len(scheme) > 1 else _read(Path(name))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = Engine(precision=precision or options.get("engine.precision", "float32"))
    return Predictor(prepare(model, device, engine), resize, engine)


def segment(
    model: PanopticModel, samples: Sequence[Sample], resize: Resize, engine: Engine, batch: int = 1
) -> list[Segmentation]:
    """The maps of photographs, each at its own size.

    Only photographs of one size pass the network together: padding would change what a network that pools over the
    whole canvas says, and so would the choice of the others.

    Args:
        model: unwrapped, in evaluation mode, on any device.
        samples: their truth is not looked at.
        resize: of a photograph before the network.
        engine: precision and memory format of the network.
        batch: most photographs at once.
    """
    views = [evaluation_view(sample, resize) for sample in samples]
    alike: dict[tuple[int, ...], list[int]] = {}
    for place, view in enumerate(views):
        alike.setdefault((*view.image.shape[:2], *samples[place].image.shape[:2]), []).append(place)
    maps: dict[int, Segmentation] = {}
    for places in alike.values():
        for start in range(0, len(places), batch):
            chosen = places[start : start + batch]
            images, targets = collate([views[place] for place in chosen], model.divisor, resize.canvas)
            prediction = evaluation_step(model, images, targets, engine, ("maps",), losses=False).prediction
            assert prediction.maps is not None
            maps |= {place: found.compact() for place, found in zip(chosen, prediction.maps, strict=True)}
    return [maps[place] for place in range(len(samples))]


def name_segments(record: Mapping[str, Any], categories: Categories) -> list[dict[str, Any]]:
    """The segments of an annotation, each with its class's name ("category") and kind ("isthing") added."""
    for entry in record["segments_info"]:
        index = categories.ids.index(entry["category_id"])
        entry["category"], entry["isthing"] = categories.names[index], int(categories.is_thing[index])
    return record["segments_info"]


def as_sample(image: np.ndarray, name: str) -> Sample:
    """A photograph uint8 [H, W, 3] without any truth."""
    return Sample(image, Segmentation(np.zeros(image.shape[:2], np.int32), np.zeros(0, np.int64)), name)


def stored_resize(options: Mapping[str, Any]) -> Resize:
    """The resizing of evaluation that the flat options of a run have."""
    prefix = "resize."
    own = {key.removeprefix(prefix): value for key, value in options.items() if key.startswith(prefix)}
    return from_plain(Resize, own, "resize")


def _read(path: Path) -> tuple[PanopticModel, Resize, Mapping[str, Any]]:
    """The model of a run's folder, or of a checkpoint's folder or file, with its view and the options of its run."""
    file = path / CHECKPOINT if path.is_dir() else path
    if (path / LISTING).is_file() and not file.is_file():
        file = path / best_listed((path / LISTING).read_bytes()) / CHECKPOINT
    if not file.is_file():
        raise ValueError(
            f"{path}: no checkpoint there, or none yet; name a run's folder, a folder step_* in it, or a .pt file"
            + (f" (the folder holds {', '.join(sorted(os.listdir(path))[:5])})" if path.is_dir() else "")
        )
    record = read(str(file), str(file))
    return build_model(record), stored_resize(record["experiment"]), record["experiment"]


def _open_source(uri: str, scheme: str) -> tuple[PanopticModel, Resize, Mapping[str, Any]]:
    """Model, resize and options of a URI, as the entry point of its scheme opens it.

    Raises:
        ValueError: there is none.
    """
    found = [point for point in entry_points(group=SOURCES) if point.name == scheme]
    if not found:
        known = ", ".join(sorted({f"{point.name}:/" for point in entry_points(group=SOURCES)})) or "none is installed"
        raise ValueError(f"{uri}: nothing opens {scheme}:/ ({known}); give a checkpoint's file or folder")
    return found[0].load()(uri)


def _sample(photograph: Photograph, place: int) -> Sample:
    """A photograph in any of its forms, as RGB.

    Raises:
        ValueError: it is none; names the file or its place in the list.
    """
    name = f"photograph {place}"
    if isinstance(photograph, str | os.PathLike):
        path = Path(photograph)
        return as_sample(decode_image(path.read_bytes(), str(path)), path.name)
    if isinstance(photograph, bytes):
        return as_sample(decode_image(photograph, name), name)
    if isinstance(photograph, Image.Image):
        file = Path(getattr(photograph, "filename", "") or name).name
        return as_sample(np.asarray(ImageOps.exif_transpose(photograph).convert("RGB")), file)
    image = np.asarray(photograph.cpu() if isinstance(photograph, Tensor) else photograph)
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, 2)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"{name}: an array of {image.dtype} {list(image.shape)}; photographs are uint8 [H, W, 3], RGB from 0 to 255"
        )
    return as_sample(np.ascontiguousarray(image), name)
