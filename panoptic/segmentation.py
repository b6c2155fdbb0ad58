"""The data structures that all other modules share.

One type, `Segmentation`, is ground truth, model output, metric input, drawing input and export input
alike. There is one class index, contiguous over things and stuff (`Categories`), and one segment
index, 1..N within an image with 0 for void. No label divisor, no second id space.

Shapes: B images of a batch, H x W pixels, N segments of an image.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:  # what runs exported models reads this module without torch
    import torch
    from torch import Tensor

VOID = 0
"""The segment index of pixels that belong to no segment."""

IGNORE = -1
"""The class of a pixel or of a padded segment entry that no loss counts."""


@dataclass(frozen=True)
class Categories:
    """The classes of a dataset, contiguous over things and stuff.

    Read from the dataset's own JSON and carried in every shard set and checkpoint; a model takes the
    sizes of its heads from it, so nobody types a class count.
    """

    names: tuple[str, ...]
    is_thing: tuple[bool, ...]
    ids: tuple[int, ...]
    """The dataset's category ids (sparse, any order), for reading and for export only."""
    colours: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        sizes = {len(self.names), len(self.is_thing), len(self.ids), len(self.colours)}
        if len(sizes) != 1:
            raise ValueError(f"Categories: fields differ in length: {sorted(sizes)}")
        if len(set(self.ids)) != len(self.ids):
            twice = sorted({i for i in self.ids if self.ids.count(i) > 1})
            raise ValueError(f"categories: the ids {twice} appear more than once; ids must be unique")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def things(self) -> tuple[int, ...]:
        """Contiguous indices of the thing classes, in order (RoI class k is `things[k]`)."""
        return tuple(i for i, thing in enumerate(self.is_thing) if thing)

    @property
    def stuff(self) -> tuple[int, ...]:
        """Contiguous indices of the stuff classes, in order."""
        return tuple(i for i, thing in enumerate(self.is_thing) if not thing)

    @classmethod
    def from_coco(
        cls, entries: Sequence[Mapping], source: str = "categories", repairs: MutableMapping[str, int] | None = None
    ) -> Categories:
        """Read the `categories` list of a COCO-panoptic JSON, in the file's order.

        Args:
            entries: each with `id`, `name`, `isthing` (0, 1, true, false, or one of them as text) and optionally
                `color` (three whole numbers from 0 to 255).
            source: of the list, for error messages.
            repairs: counts, by kind, the values that were read although they are not written as the format asks.

        Raises:
            ValueError: one line for each entry that cannot be read, and for ids and names that appear twice; each
                names `source`, the entry and what it must be.
        """
        repairs = {} if repairs is None else repairs
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            raise ValueError(f"{source}: categories is {shown(entries)}; it must be a list of categories")
        if not entries:
            raise ValueError(f"{source}: the list of categories is empty")
        read, problems = [], []
        for position, entry in enumerate(entries):
            try:
                read.append(_read_category(entry, position, repairs))
            except ValueError as error:
                problems.append(f"categories[{position}]{error}")
        ids, names, kinds, colours = zip(*read, strict=True) if read else ((),) * 4
        problems += [f"the id {i} of categories appears more than once; ids must be unique" for i in _repeated(ids)]
        problems += [
            f"the name {shown(name)} of categories appears more than once; names must be unique"
            for name in _repeated(names)
        ]
        if problems:
            rest = [f"{source}: and {len(problems) - SHOWN} more"] * (len(problems) > SHOWN)
            raise ValueError("\n".join([f"{source}: {problem}" for problem in problems[:SHOWN]] + rest))
        return cls(names=names, is_thing=kinds, ids=ids, colours=colours)

    def to_coco(self) -> list[dict]:
        """The `categories` list of a COCO-panoptic JSON; `from_coco` of it gives an equal object."""
        rows = zip(self.ids, self.names, self.is_thing, self.colours, strict=True)
        return [{"id": i, "name": n, "isthing": int(t), "color": list(c)} for i, n, t, c in rows]


SHOWN = 20
"""The most problems of a list that an error message spells out."""


def _read_category(
    entry: Mapping, position: int, repairs: MutableMapping[str, int]
) -> tuple[int, str, bool, tuple[int, int, int]]:
    """The id, name, kind and colour of one entry of `categories`."""
    if not isinstance(entry, Mapping):
        raise ValueError(f" is {shown(entry)}; each category is an object with id, name and isthing")
    label = f" ({shown(entry.get('name', '?'))})"
    missing = [key for key in ("id", "name", "isthing") if key not in entry]
    if missing:
        raise ValueError(
            f"{label} has no {', '.join(missing)}; "
            "each category needs id, name and isthing (1 for countable things, 0 for stuff)"
        )
    name = entry["name"]
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f".name is {shown(name)}; each category needs a name of its own, as text")
    if name != name.strip():
        count_repair(repairs, "categories.name stripped of spaces")
    try:
        key = "id"
        number = whole_number(entry["id"])
        key = "isthing"
        thing = flag(entry["isthing"])
        key = "color"
        colour = _read_colour(_respelt_colour(entry.get("color"), repairs), position)
    except ValueError as error:
        raise ValueError(f"{label}.{key} is {error}") from error
    count_respelt(repairs, "categories.id", entry["id"])
    count_respelt(repairs, "categories.isthing", entry["isthing"])
    return number, name.strip(), thing, colour


def _respelt_colour(value: object, repairs: MutableMapping[str, int]) -> object:
    """A colour without its alpha, and none in place of one that is written as text."""
    if isinstance(value, str):
        count_repair(repairs, "categories.color given as text, replaced by one of our own")
        return None
    if isinstance(value, list | tuple) and len(value) == 4:
        count_repair(repairs, "categories.color given with alpha")
        return value[:3]
    return value


def _read_colour(value: object, position: int) -> tuple[int, int, int]:
    """The colour of the category at `position`, whose JSON gives `value` or None."""
    if value is None:
        return default_colour(position)
    rule = f"{shown(value)}; give [red, green, blue], whole numbers from 0 to 255, or leave it out"
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ValueError(rule)
    try:
        red, green, blue = (whole_number(channel) for channel in value)
    except ValueError as error:
        raise ValueError(rule) from error
    if not all(0 <= channel <= 255 for channel in (red, green, blue)):
        raise ValueError(rule)
    return red, green, blue


def _repeated(values: Sequence) -> list:
    return [value for value, count in Counter(values).items() if count > 1]


def whole_number(value: object) -> int:
    """The whole number that a value of a JSON means: 7, 7.0 or "7".

    Raises:
        ValueError: it means none, or a float so large that its last digits are lost; begins with the value.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,19}(\.0*)?\s*", value):
        return int(value.partition(".")[0])
    raise ValueError(f"{shown(value)}; it must be a whole number")


def flag(value: object) -> bool:
    """A value of a JSON as a flag: 0, 1, true, false, or one of them as text.

    Raises:
        ValueError: it means neither; begins with the value.
    """
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    meaning = _FLAGS.get(value.strip().lower()) if isinstance(value, str) else None
    if meaning is None:
        raise ValueError(f"{shown(value)}; it must be 0 or 1")
    return meaning


_FLAGS = {"0": False, "1": True, "false": False, "true": True}


def shown(value: object, length: int = 40) -> str:
    """A value of a JSON as an error message shows it, shortened to some `length` characters."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= length else f"{text[: length - 2]} …"


def shown_ids(ids: Sequence[int], limit: int = 8) -> str:
    """The first ids, and how many more there are, for error messages."""
    rest = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(map(str, ids[:limit])) + rest


def shown_size(size: Sequence[int]) -> str:
    """`480x640` for the height and width with which a shape begins, for error messages."""
    return f"{size[0]}x{size[1]}"


def count_respelt(repairs: MutableMapping[str, int], field: str, value: object) -> None:
    """Count a value of `field` that was read as a whole number or a flag from text or from a decimal number."""
    kind = {str: "text", float: "a decimal number"}.get(type(value))
    if kind:
        count_repair(repairs, f"{field} given as {kind}")


def count_repair(repairs: MutableMapping[str, int], kind: str, count: int = 1) -> None:
    """Add to the count of a kind of repair."""
    repairs[kind] = repairs.get(kind, 0) + count


def default_colour(index: int) -> tuple[int, int, int]:
    """A colour for class `index` where the dataset names none: golden-ratio hues, so neighbours differ."""
    hue = (index * 0.618033988749895) % 1.0
    r, g, b = (0.5 + 0.5 * np.cos(2 * np.pi * (hue + k / 3)) for k in range(3))
    return int(55 + 200 * r), int(55 + 200 * g), int(55 + 200 * b)


@dataclass(frozen=True)
class Segmentation:
    """A panoptic map: a partition of the image into segments and void.

    Segment k (1..N) is entry k - 1 of `labels`, `crowd` and `scores`.
    """

    segments: np.ndarray
    """int32 [H, W], 0 = void, 1..N."""
    labels: np.ndarray
    """int64 [N], the contiguous class of each segment."""
    crowd: np.ndarray | None = None
    """bool [N]; None means that no segment is a crowd."""
    scores: np.ndarray | None = None
    """float32 [N]; None for ground truth."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.segments.shape[0], self.segments.shape[1]

    def is_crowd(self) -> np.ndarray:
        """bool [N], with None read as no crowd."""
        return np.zeros(len(self.labels), bool) if self.crowd is None else self.crowd

    def areas(self) -> np.ndarray:
        """int64 [N], the pixels of each segment (counted, never read from a file)."""
        values, lengths = runs(self.segments)
        return np.bincount(values, lengths, minlength=len(self.labels) + 1)[1:].astype(np.int64)

    def semantic(self) -> np.ndarray:
        """int32 [H, W], the class of each pixel; `IGNORE` where void."""
        table = np.concatenate([[IGNORE], self.labels]).astype(np.int32)
        return table[self.segments]

    def crop(self, top: int, left: int, height: int, width: int) -> Segmentation:
        """A window of the map. Segments that vanish keep their entry (see `compact`)."""
        return replace(self, segments=self.segments[top : top + height, left : left + width])

    def compact(self) -> Segmentation:
        """Drop the segments that have no pixel and renumber the others in order."""
        alive = self.areas() > 0
        if alive.all():
            return self
        table = np.concatenate([[0], np.where(alive, np.cumsum(alive), 0)]).astype(np.int32)
        return Segmentation(
            segments=table[self.segments],
            labels=self.labels[alive],
            crowd=None if self.crowd is None else self.crowd[alive],
            scores=None if self.scores is None else self.scores[alive],
        )


def runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The value and the length of each run of equal neighbours of a map, read row by row.

    Counting over runs is several times as fast as over the pixels of photographs' maps.
    """
    flat = np.ascontiguousarray(values).ravel()
    if not flat.size:
        return flat, np.zeros(0, np.int64)
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]), flat.size - 1)
    lengths = ends.copy()
    lengths[1:] -= ends[:-1]
    lengths[0] += 1
    return flat[ends], lengths


def renumber(
    id_map: np.ndarray, ids: Sequence[int], of_map: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Map arbitrary segment ids to 1..N in the order of `ids`.

    Works on runs of equal pixels: 25 times fewer than pixels on photographs.

    Args:
        id_map: int [H, W] of the source's ids (up to 2^24 - 1), 0 = void.
        ids: the N ids that the source's record lists.
        of_map: the `runs` of the map, where they are known.

    Returns:
        segments int32 [H, W] with pixels of unlisted ids at 0, the sorted unlisted non-zero ids, and bool [N], which
        of `ids` have a pixel (of an id listed twice, the last entry).
    """
    # one value for each run of equal pixels
    values, lengths = of_map or runs(id_map)
    # the place of each value in the list, void first, by binary search
    listed = np.array([VOID, *ids], np.int64)
    order = np.argsort(listed, kind="stable")
    place = order[np.searchsorted(listed[order], values, side="right") - 1]
    # values that the search did not hit are not listed
    known = listed[place] == values
    unlisted = np.unique(values[~known]).astype(np.int64)
    place[~known] = VOID
    present = np.zeros(len(listed), bool)
    present[place] = True
    # back to pixels
    segments = np.repeat(place.astype(np.int32), lengths)
    return segments.reshape(id_map.shape), unlisted, present[1:]


def distinct(values: np.ndarray) -> np.ndarray:
    """The sorted distinct values of an integer map [H, W]; looks at runs of equal pixels, as `renumber` does."""
    flat = np.ascontiguousarray(values).ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))[: flat.size]
    return np.unique(flat[starts])


@dataclass(frozen=True)
class Frame:
    """The place of the images within a batch, and the size of their maps.

    Padding that an augmentation drew is part of the image and lies inside `sizes`; only batch padding
    (bottom and right) lies outside.
    """

    canvas: tuple[int, int]
    """(H, W) of the batch tensor."""
    sizes: Tensor
    """int64 [B, 2] on the CPU: valid height and width of each image."""
    output_sizes: Tensor
    """int64 [B, 2] on the CPU: height and width of each image's map, instances and class map."""

    @classmethod
    def full(cls, images: Tensor) -> Frame:
        """No padding, maps at the size of the input. `images` is [B, C, H, W]."""
        import torch

        height, width = images.shape[-2:]
        sizes = torch.tensor([[height, width]] * images.shape[0], dtype=torch.int64).reshape(-1, 2)
        return cls((height, width), sizes, sizes)

    def size(self, image: int) -> tuple[int, int]:
        """Height and width of an image inside its padding."""
        height, width = self.sizes[image].tolist()
        return height, width

    def output_size(self, image: int) -> tuple[int, int]:
        """Height and width of an image's map."""
        height, width = self.output_sizes[image].tolist()
        return height, width

    def valid(self, device: torch.device | str = "cpu") -> Tensor:
        """bool [B, H, W], True inside each image and False in batch padding."""
        import torch

        rows = torch.arange(self.canvas[0], device=device)[None, :, None]
        columns = torch.arange(self.canvas[1], device=device)[None, None, :]
        sizes = self.sizes.to(device, non_blocking=True)
        return (rows < sizes[:, 0, None, None]) & (columns < sizes[:, 1, None, None])


@dataclass(frozen=True)
class Targets:
    """Ground truth of a batch, on the training device. Dense targets are computed from it by `targets`."""

    segments: Tensor
    """int32 [B, H, W], 0 = void and batch padding, k = entry k - 1 of `labels`."""
    labels: Tensor
    """int64 [B, N], `IGNORE` where an image has fewer than N segments; N is at least 1."""
    crowd: Tensor
    """bool [B, N]."""
    frame: Frame
    names: tuple[str, ...]
    """Names of the images, for error messages."""
    features: dict[str, Tensor] | None = None
    """Maps of a frozen backbone, float32 [B, C, h, w], that were computed before; None where images have pixels."""
    countable: Tensor | None = None
    """int64 [B, N], always on the CPU: the class of each segment that has a pixel and is no crowd, else `IGNORE`. What
    has a size by these numbers needs no answer of the device. None where nobody has looked; who changes the other
    fields gives None here."""

    def to(self, device: torch.device | str) -> Targets:
        """The targets on `device` (`frame` and `countable` stay on the CPU)."""
        return replace(
            self,
            segments=self.segments.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            crowd=self.crowd.to(device, non_blocking=True),
            features=self._features(lambda feature: feature.to(device, non_blocking=True)),
        )

    def pin_memory(self) -> Targets:
        """The targets in pinned memory (`frame` and `countable` as they are)."""
        from torch import Tensor

        parts = {name: getattr(self, name).pin_memory() for name in ("segments", "labels", "crowd")}
        return replace(self, **parts, features=self._features(Tensor.pin_memory))

    def _features(self, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor] | None:
        if self.features is None:
            return None
        return {name: change(feature) for name, feature in self.features.items()}


@dataclass(frozen=True)
class Instances:
    """Scored instances of one image before merging, for AP; masks may overlap."""

    masks: list[dict]
    """COCO RLE of each instance: {"size": [H, W], "counts": bytes}, as pycocotools encodes it."""
    labels: np.ndarray
    """int64 [N], contiguous classes."""
    scores: np.ndarray
    """float32 [N]."""
    boxes: np.ndarray
    """float32 [N, 4], x0 y0 x1 y1 in pixels, x1 and y1 exclusive."""


@dataclass(frozen=True)
class Sample:
    """One decoded image with its truth, before batching."""

    image: np.ndarray
    """uint8 [H, W, 3], RGB."""
    truth: Segmentation
    """At the size of `image`."""
    name: str
    original: Segmentation | None = None
    """The truth at the size of the source image, for PQ; None while training."""
    position: int = 0
    """Position of the sample in the training stream, or its row number in an evaluation."""
    drawn: Mapping[str, float] = field(default_factory=dict)
    """Numbers that the augmentation drew (scale, top, left, flip, ...), for replay."""
    features: Mapping[str, np.ndarray] | None = None
    """Maps [C, h, w] of a frozen backbone in place of pixels: `image` is then black."""


def collate(samples: Sequence[Sample], divisor: int = 1, canvas: tuple[int, int] = (0, 0)) -> tuple[Tensor, Targets]:
    """Stack samples of any sizes, padded bottom and right with zeros to a common multiple of `divisor`.

    Args:
        samples: B decoded samples.
        divisor: the model's; the canvas height and width are rounded up to it.
        canvas: the least height and width of the canvas.

    Returns:
        images uint8 [B, 3, H, W] and the targets on the CPU. `frame.output_sizes` is the size of
        `original` where a sample has one, else the size of its image.
    """
    import torch

    # the canvas: the largest image, rounded up
    sizes = [s.image.shape[:2] for s in samples]
    height, width = (-(-max(canvas[axis], *(size[axis] for size in sizes)) // divisor) * divisor for axis in (0, 1))
    count = max(1, *(len(s.truth.labels) for s in samples))
    images = torch.zeros(len(samples), 3, height, width, dtype=torch.uint8)
    segments = torch.zeros(len(samples), height, width, dtype=torch.int32)
    labels = torch.full((len(samples), count), IGNORE, dtype=torch.int64)
    crowd = torch.zeros(len(samples), count, dtype=torch.bool)
    countable = torch.full_like(labels, IGNORE)
    for b, (sample, (h, w)) in enumerate(zip(samples, sizes, strict=True)):
        n = len(sample.truth.labels)
        # channels are written in place: ten times faster than a permuted copy
        cv2.split(np.ascontiguousarray(sample.image), list(images[b, :, :h, :w].numpy()))
        segments[b, :h, :w] = torch.from_numpy(np.ascontiguousarray(sample.truth.segments))
        labels[b, :n] = torch.from_numpy(np.asarray(sample.truth.labels, np.int64))
        crowd[b, :n] = torch.from_numpy(np.asarray(sample.truth.is_crowd(), bool))
        seen = np.zeros(n + 1, bool)
        seen[sample.truth.segments] = True
        counted = torch.from_numpy(seen[1:]) & ~crowd[b, :n]
        countable[b, :n] = torch.where(counted, labels[b, :n], IGNORE)
    outputs = [s.original.size if s.original is not None else size for s, size in zip(samples, sizes, strict=True)]
    frame = Frame(
        (height, width),
        torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2),
        torch.tensor(outputs, dtype=torch.int64).reshape(-1, 2),
    )
    names = tuple(s.name for s in samples)
    features = _stacked([s.features for s in samples])
    return images, Targets(segments, labels, crowd, frame, names, features, countable)


def _stacked(features: Sequence[Mapping[str, np.ndarray] | None]) -> dict[str, Tensor] | None:
    """The features of a batch, float32 [B, C, h, w] by name; None where images have pixels."""
    import torch

    if features[0] is None:
        return None
    return {
        name: torch.from_numpy(np.stack([one[name] for one in features if one is not None]).astype(np.float32))
        for name in features[0]
    }
