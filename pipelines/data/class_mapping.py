"""The classes of a segmentation replaced by others: the pixel side of a class map (`class_map` reads the file).

Rules, for each segment of the source:

| from | to | the segment |
|---|---|---|
| thing | thing | stays as it is, crowds too |
| thing or stuff | stuff | all of the target become one segment, which is no crowd |
| stuff | thing | by the class's `Split` |
| any | void | its pixels are void; so are those of crowds, where the map says so |

Shapes: H x W pixels, N segments, C classes of the source.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import cv2
import numpy as np

from panoptic.segmentation import IGNORE, Categories, Instances, Segmentation

VOID = -1
"""The target of a class whose pixels become void."""

SplitKind = Literal["components", "whole", "crowd"]


@dataclass(frozen=True)
class Split:
    """The way in which a stuff class becomes a thing."""

    kind: SplitKind
    """components: each 8-connected part is an instance; whole: all of an image is one; crowd: all of it is a crowd."""
    min_area: int = 1
    """Parts of fewer pixels become void."""


@dataclass(frozen=True)
class ClassMapping:
    """A class map that is resolved for the classes of one data set or model."""

    categories: Categories
    """The target's classes."""
    targets: tuple[int, ...]
    """The target of each class of the source: an index of `categories`, or `VOID`."""
    crowd_to_void: tuple[bool, ...]
    """For each class of the source, True if its crowds become void."""
    splits: tuple[Split | None, ...] = field(default=())
    """For each class of the source, the way in which it becomes a thing where it was stuff."""

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of the target's classes that no class of the source becomes."""
        return tuple(name for k, name in enumerate(self.categories.names) if k not in self.targets)

    def describe(self, own: Categories) -> str:
        """The classes of the source that each class of the target has, in a line: "flat = road + sidewalk"."""
        parts = []
        for k, name in enumerate(self.categories.names):
            of = [one for one, target in zip(own.names, self.targets, strict=True) if target == k]
            parts.append(name if of == [name] else f"{name} = {' + '.join(of) or 'none'}")
        return ", ".join(parts)

    def removed(self, own: Categories) -> str:
        """The classes of the source that become void, in a line."""
        return ", ".join(n for n, target in zip(own.names, self.targets, strict=True) if target == VOID) or "none"

    def segmentation(self, source: Segmentation) -> Segmentation:
        """The segmentation in the target's classes.

        Segments keep their order: each stands where the first of those that it is made of stood; parts of a class that
        is split follow at the end. A united segment has the highest of the scores.
        """
        labels, crowd = source.labels, source.is_crowd()
        targets = np.array([*self.targets, VOID])[labels]
        targets[crowd & np.array([*self.crowd_to_void, False])[labels]] = VOID
        scores = np.zeros(len(labels), np.float32) if source.scores is None else source.scores
        made = _Segments()
        numbers = np.zeros(len(labels) + 1, np.int32)  # the new number of each segment, 0 = void
        split: dict[int, list[int]] = {}
        for k, (label, target) in enumerate(zip(labels.tolist(), targets.tolist(), strict=True)):
            if target == VOID:
                continue
            if self.splits[label] is not None:
                split.setdefault(label, []).append(k)
            elif self.categories.is_thing[target]:
                numbers[k + 1] = made.add(target, bool(crowd[k]), float(scores[k]))
            else:
                numbers[k + 1] = made.unite(target, float(scores[k]))
        segments = numbers[source.segments]
        for label, members in split.items():
            mask = np.isin(source.segments, np.array(members) + 1)
            rule, score = self.splits[label], float(scores[members].max())
            assert rule is not None
            for part in _parts(mask, rule):
                segments[part] = made.add(self.targets[label], rule.kind == "crowd", score)
        return Segmentation(
            segments=segments,
            labels=np.array(made.labels, np.int64),
            crowd=np.array(made.crowd, bool) if any(made.crowd) else None,
            scores=None if source.scores is None else np.array(made.scores, np.float32),
        )

    def semantic(self, classes: np.ndarray) -> np.ndarray:
        """A class map int32 [H, W] in the target's classes, `IGNORE` where it was that or becomes void."""
        return np.array([*self.targets, IGNORE], np.int32)[classes]

    def instances(self, source: Instances) -> Instances:
        """The scored instances that stay things, in the target's classes."""
        targets = np.array([*self.targets, VOID])[source.labels]
        kept = np.array([*self.categories.is_thing, False])[targets]  # VOID is the last
        masks = [mask for mask, keep in zip(source.masks, kept.tolist(), strict=True) if keep]
        return Instances(masks, targets[kept].astype(np.int64), source.scores[kept], source.boxes[kept])


class _Segments:
    """The segments of a map that is being made."""

    def __init__(self) -> None:
        self.labels: list[int] = []
        self.crowd: list[bool] = []
        self.scores: list[float] = []
        self._united: dict[int, int] = {}

    def add(self, label: int, crowd: bool, score: float) -> int:
        """A new segment; returns its number, from 1."""
        self.labels.append(label)
        self.crowd.append(crowd)
        self.scores.append(score)
        return len(self.labels)

    def unite(self, label: int, score: float) -> int:
        """The number of the one segment of a stuff class."""
        if label not in self._united:
            self._united[label] = self.add(label, False, score)
        number = self._united[label]
        self.scores[number - 1] = max(self.scores[number - 1], score)
        return number


def _parts(mask: np.ndarray, split: Split) -> list[np.ndarray]:
    """The masks bool [H, W] of the instances that a stuff class becomes, in the order of their first pixels."""
    if split.kind != "components":
        return [mask] if mask.any() else []
    _, numbers = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    values, first, areas = np.unique(numbers, return_index=True, return_counts=True)
    order = [k for k in np.argsort(first) if values[k] and areas[k] >= split.min_area]
    return [numbers == values[k] for k in order]
