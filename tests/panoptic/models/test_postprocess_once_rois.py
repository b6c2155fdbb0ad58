"""What `postprocess` needs for several parts of a prediction is computed once, whatever is wanted.

The calls of each dear function are counted for one part alone and for all of them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch

from panoptic.models.base import Wanted
from panoptic.models.jsis_net import instance_branch
from panoptic.models.jsis_net import postprocess as jsis_net
from panoptic.models.jsis_net.c4_head import C4Head
from panoptic.models.jsis_net.model import JSISNetConfig
from panoptic.models.panoptic_deeplab import postprocess as panoptic_deeplab
from panoptic.models.panoptic_deeplab.model import PanopticDeepLabConfig
from panoptic.models.panoptic_fcn import model as panoptic_fcn_model
from panoptic.models.panoptic_fcn import postprocess as panoptic_fcn
from panoptic.models.panoptic_fcn.model import PanopticFCNConfig
from panoptic.models.panoptic_fpn import postprocess as panoptic_fpn
from panoptic.models.panoptic_fpn.model import PanopticFPNConfig
from panoptic.rcnn import mask_rcnn
from panoptic.rcnn.mask_rcnn import Detector
from panoptic.segmentation import Frame
from tests.panoptic.models.test_contract import EVERYTHING, build
from tests.support.small import SMALL

IMAGES = 2


class Row(NamedTuple):
    """A function by the place where it is looked up, and how often a batch of two images may call it."""

    owner: Any
    name: str
    calls: int = IMAGES


CASES: dict[str, tuple[Any, list[Row]]] = {
    "deeplab_standalone": (
        SMALL[PanopticDeepLabConfig]["standalone"],
        [Row(panoptic_deeplab, name) for name in ("pixel_classes", "merge_centres", "scored_instances")],
    ),
    "deeplab_detectron2": (
        SMALL[PanopticDeepLabConfig]["detectron2"],
        [Row(panoptic_deeplab, name) for name in ("pixel_classes", "merge_centres", "scored_instances")],
    ),
    "panoptic_fpn": (
        SMALL[PanopticFPNConfig]["group_norm"],
        [
            Row(panoptic_fpn, "paste_detections"),
            Row(panoptic_fpn, "semantic_classes"),
            Row(panoptic_fpn, "merge_by_score"),
            Row(mask_rcnn, "propose", 1),
            Row(Detector, "_run_box_head", 1),
            Row(Detector, "_run_mask_head", 1),
        ],
    ),
    "jsis_net": (
        SMALL[JSISNetConfig]["own_stage"],
        [
            Row(jsis_net, "paste_detections"),
            Row(jsis_net, "class_probabilities"),
            Row(jsis_net, "merge_conflicts"),
            Row(instance_branch, "propose", 1),
            Row(C4Head, "detect"),
            Row(C4Head, "mask_probabilities"),
        ],
    ),
    "panoptic_fcn": (
        SMALL[PanopticFCNConfig]["plain"],
        [
            Row(panoptic_fcn_model, "collect_things"),
            Row(panoptic_fcn_model, "collect_regions"),
            Row(panoptic_fcn, "draw_things"),
            Row(panoptic_fcn, "draw_regions"),
            Row(panoptic_fcn, "merge_by_score"),
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_everything_costs_each_function_once(name: str, small_categories, monkeypatch) -> None:
    config, rows = CASES[name]
    calls: Counter[str] = Counter()

    def counted(row: Row):
        original = getattr(row.owner, row.name)

        def call(*args: Any, **options: Any) -> Any:
            calls[row.name] += 1
            return original(*args, **options)

        return call

    for row in rows:
        monkeypatch.setattr(row.owner, row.name, counted(row))
    model = build(config, small_categories).eval()
    images = torch.randint(0, 256, (IMAGES, 3, 64, 96), dtype=torch.uint8)
    frame = Frame((64, 96), torch.tensor([[64, 96], [40, 70]]), torch.tensor([[91, 133], [40, 70]]))
    with torch.no_grad():
        outputs = model.network(images, frame)

    def count(want: tuple[Wanted, ...]) -> Counter[str]:
        calls.clear()
        model.postprocess(outputs, frame, want)
        return Counter(calls)

    limits = {row.name: row.calls for row in rows}
    assert count(EVERYTHING) == limits
    alone = {part: count((part,)) for part in EVERYTHING}
    for part, used in alone.items():
        assert all(used[function] <= limits[function] for function in used), part
    assert not count(())
    # each is there for something
    assert {function for used in alone.values() for function in used} == limits.keys()


@pytest.mark.parametrize("kind", [PanopticFPNConfig, JSISNetConfig])
def test_true_detections_run_no_head(kind: type, small_categories, monkeypatch) -> None:
    """Detections and masks that are given take the place of proposals and of both heads."""
    model = build(next(iter(SMALL[kind].values())), small_categories).eval()
    images = torch.randint(0, 256, (IMAGES, 3, 64, 96), dtype=torch.uint8)
    frame = Frame.full(images)
    with torch.no_grad():
        outputs = model.network(images, frame)
    given = {
        "detections": torch.tensor([[[8.0, 8, 40, 40, 1, small_categories.things[0]]]] * IMAGES),
        "masks": torch.ones(IMAGES, 1, 28, 28),
    }
    for owner, name in (
        (Detector, "_run_box_head"),
        (Detector, "_run_mask_head"),
        (Detector, "propose"),
        (C4Head, "detect"),
        (C4Head, "mask_probabilities"),
        (instance_branch, "propose"),
    ):
        monkeypatch.setattr(owner, name, None)
    prediction = model.postprocess(outputs | given, frame, EVERYTHING[:3])
    assert [part.labels.tolist() for part in prediction.instances] == [[small_categories.things[0]]] * IMAGES
