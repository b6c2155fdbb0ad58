"""Encoded image and map to augmented tensors: ours against straightforward pipelines (row 4).

All sides apply the same drawn scale, crop and flip. The peers do it as their documentation shows: decode, resize the
whole image, then crop.

Shapes: H x W pixels of the result.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from panoptic.png import encode_segments
from panoptic.segmentation import Targets, collate
from panoptic.transforms import Augment, generator, training_view
from panoptic.transforms.geometry import Window
from panoptic.transforms.views import draw_geometry
from pipelines.data.prepare import read_row
from tests.benchmarks import inputs, peers
from tests.benchmarks.timing import Case, same_partition

IMAGES = 12
"""Of a round, each with a draw of its own."""

FILL = (123, 116, 103)

GREYS = 4.0
"""Mean difference of the blurred images in grey levels: decoders round differently, PIL averages when it shrinks."""

Tensors = tuple[Tensor, Tensor]
"""uint8 [3, H, W] and int32 ids [H, W]."""


@dataclass(frozen=True)
class Drawn:
    """A photograph in both forms of storage, and what is to be done to it."""

    row: dict[str, Any]
    """As a shard has it."""
    png: bytes
    """The map as COCO has it."""
    window: Window
    flip: bool


def case(size: tuple[int, int], side: int, peers_folder: Path | None) -> Case:
    """Row 4: images of `size` (H, W) to tensors of `side` pixels."""
    augment = Augment(scale="factor", factors=(0.5, 2.0, 0.1), crop=(side, side), pad="end", pad_value=FILL)
    rng = np.random.default_rng(4)
    classes = inputs.categories(80, 53)
    drawn = [_draw(rng, size, classes, augment, k) for k in range(IMAGES)]

    def ours(k: int) -> tuple[Tensor, Targets]:
        return collate([training_view(read_row(drawn[k].row), augment, generator(0, 0, k))])

    pipelines: dict[str, Callable[[Drawn], Tensors]] = {}
    resizing = peers.transforms(peers_folder)
    if resizing is not None:
        pipelines["detectron2 (PIL)"] = lambda photo: _detectron2(resizing, photo)
    pipelines |= {"torchvision v2": _torchvision, "OpenCV": _opencv}
    work = f"JPEG + id PNG, random scale, crop, flip: {size[1]}x{size[0]} to {side}x{side} tensors"
    theirs = {name: _numbered(pipeline, drawn) for name, pipeline in pipelines.items()}
    return Case("4", work, ours, theirs, dict.fromkeys(theirs, _compare), IMAGES)


def _numbered(pipeline: Callable[[Drawn], Tensors], drawn: list[Drawn]) -> Callable[[int], Tensors]:
    return lambda k: pipeline(drawn[k])


def _draw(rng: np.random.Generator, size: tuple[int, int], classes: Any, augment: Augment, k: int) -> Drawn:
    truth = inputs.draw_truth(rng, size, 14, 7, classes)
    ids = truth.segments.astype(np.int32) * 70_001  # such ids use all three channels, as COCO's do
    png = io.BytesIO()
    Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)).save(png, "PNG")
    row = {
        "name": f"{k}.jpg",
        "image": inputs.encode_jpeg(inputs.draw_image(rng, truth)),
        "segments": encode_segments(truth.segments),
        "labels": truth.labels.tolist(),
        "crowd": truth.is_crowd().tolist(),
        "height": truth.size[0],
        "width": truth.size[1],
    }
    draws = generator(0, 0, k)
    window, _ = draw_geometry(size, augment, draws)
    return Drawn(row, png.getvalue(), window, bool(draws.random() < augment.flip))


def _compare(mine: tuple[Tensor, Targets], other: Tensors) -> None:
    images, targets = mine
    if images[0].shape != other[0].shape:
        raise ValueError(f"the image is {tuple(images[0].shape)} here and {tuple(other[0].shape)} there")
    blurred = [cv2.blur(image.permute(1, 2, 0).numpy().astype(np.float32), (9, 9)) for image in (images[0], other[0])]
    difference = float(np.abs(blurred[0] - blurred[1]).mean())
    if difference > GREYS:
        raise ValueError(f"image: differs by {difference:.1f} grey levels on average, at most {GREYS:g} may")
    segments = targets.segments[0].numpy()
    contour = (segments[:, 1:] != segments[:, :-1]).mean() + (segments[1:] != segments[:-1]).mean()
    # positions that fall between two pixels of the source go either way, so contours may move by one
    same_partition(segments, other[1].numpy(), contour, "map")


def _opencv(photo: Drawn) -> Tensors:
    window = photo.window
    image, colours = (
        cv2.cvtColor(np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)), cv2.COLOR_BGR2RGB)
        for data in (photo.row["image"], photo.png)
    )
    size = window.scaled[::-1]
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    colours = cv2.resize(colours, size, interpolation=cv2.INTER_NEAREST_EXACT)
    below, right = (max(0, window.result[k] - window.scaled[k]) for k in (0, 1))
    if below or right:
        image = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT, value=FILL)
        colours = cv2.copyMakeBorder(colours, 0, below, 0, right, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    (top, left), (height, width) = window.start, window.result
    image, colours = (array[top : top + height, left : left + width] for array in (image, colours))
    if photo.flip:
        image, colours = cv2.flip(image, 1), cv2.flip(colours, 1)
    return _chw(image), torch.from_numpy(_ids(colours))


def _torchvision(photo: Drawn) -> Tensors:
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    window = photo.window
    image = decode_image(_bytes(photo.row["image"]), ImageReadMode.RGB)
    colours = decode_image(_bytes(photo.png), ImageReadMode.RGB)
    size = list(window.scaled)
    # without antialiasing, like ours; with it the time is the same
    image = functional.resize(image, size, InterpolationMode.BILINEAR, antialias=False)
    colours = functional.resize(colours, size, InterpolationMode.NEAREST_EXACT)
    below, right = (max(0, window.result[k] - window.scaled[k]) for k in (0, 1))
    if below or right:
        image = functional.pad(image, [0, 0, right, below], fill=list(FILL))
        colours = functional.pad(colours, [0, 0, right, below], fill=0)
    corner = (*window.start, *window.result)
    image, colours = functional.crop(image, *corner), functional.crop(colours, *corner)
    if photo.flip:
        image, colours = functional.horizontal_flip(image), functional.horizontal_flip(colours)
    red, green, blue = colours.int()
    return image.contiguous(), red + 256 * green + 65536 * blue


def _detectron2(module: ModuleType, photo: Drawn) -> Tensors:
    """Its dataset mapper's order: PIL reads, `ResizeTransform` resizes both, NumPy crops and flips."""
    window = photo.window
    image, colours = (
        np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        for data in (photo.row["image"], photo.png)
    )
    resize = module.ResizeTransform(*image.shape[:2], *window.scaled)
    image, colours = resize.apply_image(image), resize.apply_segmentation(colours)
    (top, left), (height, width) = window.start, window.result
    image, colours = (array[top : top + height, left : left + width] for array in (image, colours))
    if photo.flip:
        image, colours = np.flip(image, 1), np.flip(colours, 1)
    tensor, ids = _chw(image), torch.from_numpy(_ids(colours))
    if tuple(ids.shape) == window.result:
        return tensor, ids
    # what its batching does; a flipped image lies at the other side of the padding
    canvas = torch.tensor(FILL, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
    map_canvas = torch.zeros(height, width, dtype=torch.int32)
    start = width - ids.shape[1] if photo.flip else 0
    canvas[:, : ids.shape[0], start : start + ids.shape[1]] = tensor
    map_canvas[: ids.shape[0], start : start + ids.shape[1]] = ids
    return canvas, map_canvas


def _chw(image: np.ndarray) -> Tensor:
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _ids(colours: np.ndarray) -> np.ndarray:
    """int32 [H, W] from the three channels, as panopticapi's rgb2id."""
    wide = colours.astype(np.int32)
    return wide[..., 0] + 256 * wide[..., 1] + 65536 * wide[..., 2]


def _bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())
