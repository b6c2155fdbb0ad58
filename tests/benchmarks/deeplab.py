"""Panoptic-DeepLab's post-processing and targets against detectron2's (rows 2a, 2b, 3a, 3b)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from panoptic.models.panoptic_deeplab.grouping import find_centres
from panoptic.models.panoptic_deeplab.postprocess import merge_centres
from panoptic.segmentation import Sample, Segmentation, collate
from panoptic.targets.dense import CentreTargets, centre_targets
from tests.benchmarks import inputs, peers
from tests.benchmarks.timing import Case, close, same_partition

DIVISOR = 1000
"""detectron2's: panoptic label = class x 1000 + instance."""

MERGES = {"2a": ((1025, 2049), 42, 10, 19), "2b": ((640, 640), 14, 7, 133)}
"""Of each row: size, things and stuff drawn, classes of the dataset."""

TARGETS = {"3a": ((640, 640), 14, 7, 133), "3b": ((1025, 2049), 38, 9, 19)}

SIGMA, SMALL_AREA, SMALL_WEIGHT = 8, 4096, 3
"""Of the targets; what both publish."""

TIES = 0.001
"""Share of pixels that rounding may send to the other one of two centres that are equally near."""


def cases(names: Sequence[str], scale: float, peers_folder: Path | None) -> list[Case]:
    """The cases among 2a to 3b that are wanted, with sides multiplied by `scale`."""
    merges = [_merging(name, scale, peers_folder) for name in names if name in MERGES]
    return merges + [_targets(name, scale, peers_folder) for name in names if name in TARGETS]


def _draw(
    size: tuple[int, int], things: int, stuff: int, classes: int, scale: float
) -> tuple[np.random.Generator, Segmentation, Any]:
    rng = np.random.default_rng(2)
    of_things = 8 if classes == 19 else 80  # Cityscapes and COCO
    categories = inputs.categories(of_things, classes - of_things)
    height, width = (max(48, round(side * scale)) for side in size)
    return rng, inputs.draw_truth(rng, (height, width), things, stuff, categories), categories


def _merging(name: str, scale: float, peers_folder: Path | None) -> Case:
    rng, truth, categories = _draw(*MERGES[name], scale)
    semantic, heatmap, offset = inputs.draw_outputs(rng, truth, categories)
    stuff_area = round(2048 * scale**2)
    peer = peers.post_processing(peers_folder)

    def ours(_: int) -> Segmentation:
        return merge_centres(semantic, heatmap, offset, categories, stuff_area=stuff_area)

    def theirs(_: int) -> torch.Tensor:
        assert peer is not None
        planes = (semantic[None], heatmap[None], offset)
        # thresholds, window and top_k are its defaults, which are ours
        panoptic, _ = peer.get_panoptic_segmentation(
            *planes, set(categories.things), DIVISOR, stuff_area, void_label=-1
        )
        return panoptic[0]

    def compare(mine: Segmentation, other: torch.Tensor) -> None:
        labels = other.numpy()
        classes = np.where(labels < 0, -1, labels // DIVISOR)
        if (mine.semantic() != classes).mean() > TIES:
            raise ValueError(f"classes: {100 * (mine.semantic() != classes).mean():.3f} % of the pixels differ")
        same_partition(mine.segments, labels, TIES, "segments")

    height, width = truth.size
    work = f"Panoptic-DeepLab post-processing, {width}x{height}, {len(find_centres(heatmap))} centres"
    return Case(name, work, ours, *_only(peer is not None, theirs, compare))


def _targets(name: str, scale: float, peers_folder: Path | None) -> Case:
    _, truth, categories = _draw(*TARGETS[name], scale)
    height, width = truth.size
    _, batch = collate([Sample(np.zeros((height, width, 3), np.uint8), truth, "drawn")])
    module = peers.target_generator(peers_folder)
    generator = module and module.PanopticDeepLabTargetGenerator(
        255,
        categories.things,
        sigma=SIGMA,
        ignore_stuff_in_offset=True,
        small_instance_area=SMALL_AREA,
        small_instance_weight=SMALL_WEIGHT,
    )
    infos = [
        {"id": k + 1, "category_id": int(label), "iscrowd": int(crowd)}
        for k, (label, crowd) in enumerate(zip(truth.labels, truth.is_crowd(), strict=True))
    ]

    def ours(_: int) -> CentreTargets:
        return centre_targets(
            batch,
            categories,
            sigma=SIGMA,
            rounding="half_even",
            small_area=SMALL_AREA,
            small_weight=SMALL_WEIGHT,
        )

    def theirs(_: int) -> dict[str, Any]:
        assert generator is not None
        return generator(truth.segments, infos)

    def compare(mine: CentreTargets, other: dict[str, Any]) -> None:
        close(torch.where(mine.semantic < 0, 255, mine.semantic)[0], other["sem_seg"], "semantic")
        pairs = {
            "center": mine.centre[0, 0],
            "offset": mine.offset[0],
            "sem_seg_weights": mine.semantic_weights[0],
            "center_weights": mine.centre_weights[0],
            "offset_weights": mine.offset_weights[0],
        }
        for key, value in pairs.items():
            close(value, other[key], key)

    work = f"Panoptic-DeepLab targets, {width}x{height}, {len(truth.labels)} segments"
    return Case(name, work, ours, *_only(generator is not None, theirs, compare))


def _only(found: bool, theirs: Any, compare: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The peers and comparisons of a case that knows detectron2 alone."""
    return ({"detectron2": theirs}, {"detectron2": compare}) if found else ({}, {})
