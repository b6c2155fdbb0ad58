"""Parts that several kinds of a prediction need are computed once, whatever is wanted of `postprocess`.

The calls of each expensive function are counted for one part alone and for all of them.
"""

from __future__ import annotations

import pkgutil
from collections import Counter
from typing import Any

import pytest
import torch

from panoptic.models.base import Wanted
from panoptic.models.detr.model import DETRConfig
from panoptic.models.efficientps.model import EfficientPSConfig
from panoptic.models.eomt.model import EoMTConfig
from panoptic.models.jsis_net import instance_branch
from panoptic.models.jsis_net.c4_head import C4Head
from panoptic.models.jsis_net.model import JSISNetConfig
from panoptic.models.mask2former.model import Mask2FormerConfig
from panoptic.models.maskformer.model import MaskFormerConfig
from panoptic.models.panoptic_deeplab.model import PanopticDeepLabConfig
from panoptic.models.panoptic_fcn.model import PanopticFCNConfig
from panoptic.models.panoptic_fpn.model import PanopticFPNConfig
from panoptic.rcnn.mask_rcnn import Detector
from panoptic.segmentation import Frame
from tests.panoptic.models.test_contract import EVERYTHING, build
from tests.support.small import SMALL

IMAGES = 2

QUERY_MASKS: dict[str, int | None] = {
    "panoptic.models.mask_transformer.masks.mask_products": None,
    "panoptic.models.mask_transformer.mask_resampler.Axis.__init__": None,
}

EXPENSIVE: dict[type, dict[str, int | None]] = {
    DETRConfig: {
        "panoptic.models.detr.mask_head.MaskHead.forward": None,
        "panoptic.models.detr.model.DETR.query_masks": None,
    },
    MaskFormerConfig: QUERY_MASKS,
    Mask2FormerConfig: QUERY_MASKS,
    EoMTConfig: QUERY_MASKS,
    PanopticDeepLabConfig: {
        "panoptic.models.panoptic_deeplab.postprocess.pixel_classes": IMAGES,
        "panoptic.models.panoptic_deeplab.postprocess.merge_centres": IMAGES,
        "panoptic.models.panoptic_deeplab.postprocess.scored_instances": IMAGES,
    },
    PanopticFPNConfig: {
        "panoptic.models.panoptic_fpn.postprocess.paste_detections": IMAGES,
        "panoptic.models.panoptic_fpn.postprocess.semantic_classes": IMAGES,
        "panoptic.models.panoptic_fpn.postprocess.merge_by_score": IMAGES,
        "panoptic.rcnn.mask_rcnn.propose": 1,
        "panoptic.rcnn.mask_rcnn.Detector._run_box_head": 1,
        "panoptic.rcnn.mask_rcnn.Detector._run_mask_head": 1,
    },
    EfficientPSConfig: {
        "panoptic.models.efficientps.postprocess.paste_detections": IMAGES,
        "panoptic.models.efficientps.postprocess.SemanticLogits.__init__": IMAGES,
        "panoptic.models.efficientps.postprocess.fuse": IMAGES,
        "panoptic.rcnn.mask_rcnn.propose": 1,
        "panoptic.rcnn.mask_rcnn.Detector._run_box_head": 1,
        "panoptic.rcnn.mask_rcnn.Detector._run_mask_head": 1,
    },
    JSISNetConfig: {
        "panoptic.models.jsis_net.postprocess.paste_detections": IMAGES,
        "panoptic.models.jsis_net.postprocess.class_probabilities": IMAGES,
        "panoptic.models.jsis_net.postprocess.merge_conflicts": IMAGES,
        "panoptic.models.jsis_net.instance_branch.choose": 1,
        "panoptic.models.jsis_net.c4_head.C4Head.detect": IMAGES,
        "panoptic.models.jsis_net.c4_head.C4Head.mask_probabilities": IMAGES,
    },
    PanopticFCNConfig: {
        "panoptic.models.panoptic_fcn.model.collect_things": IMAGES,
        "panoptic.models.panoptic_fcn.model.collect_regions": IMAGES,
        "panoptic.models.panoptic_fcn.postprocess.draw_things": IMAGES,
        "panoptic.models.panoptic_fcn.postprocess.draw_regions": IMAGES,
        "panoptic.models.panoptic_fcn.postprocess.merge_by_score": IMAGES,
    },
}
"""By class of configuration, what is expensive after the network: dotted paths to where functions are looked up when
they are called, and how often a batch of two images calls them; None where that depends on the predictions."""

NAMES: dict[type, tuple[str, ...]] = {
    PanopticDeepLabConfig: ("standalone", "detectron2"),
    PanopticFPNConfig: ("group_norm",),
    EfficientPSConfig: ("group_norm",),
    JSISNetConfig: ("own_stage",),
    PanopticFCNConfig: ("plain",),
}
"""Configurations (in `SMALL`) that call these functions, where others do not; all by default."""

WITHOUT_MASKS = {(DETRConfig, "boxes")}
"""Configurations that have none of these functions to call."""

CASES = [
    pytest.param(SMALL[kind][name], {} if (kind, name) in WITHOUT_MASKS else calls, id=f"{kind.__name__}-{name}")
    for kind, calls in EXPENSIVE.items()
    for name in NAMES.get(kind, tuple(SMALL[kind]))
]


@pytest.mark.parametrize(("config", "expected"), CASES)
def test_everything_calls_each_function_as_often_as_one_part_does(
    config, expected, small_categories, monkeypatch
) -> None:
    calls: Counter[str] = Counter()

    def counted(path: str):
        original = pkgutil.resolve_name(path)

        def call(*args: Any, **options: Any) -> Any:
            calls[path] += 1
            return original(*args, **options)

        return call

    for path in EXPENSIVE[type(config)]:
        monkeypatch.setattr(path, counted(path))
    torch.manual_seed(1)  # with these weights every model has something to draw
    model = config.build(small_categories).eval()
    images = torch.randint(0, 256, (IMAGES, 3, 65, 97), dtype=torch.uint8)
    frame = Frame((65, 97), torch.tensor([[65, 97], [33, 50]]), torch.tensor([[65, 97], [90, 80]]))
    with torch.no_grad():
        outputs = model.network(images, frame)

    def count(want: tuple[Wanted, ...]) -> Counter[str]:
        calls.clear()
        model.postprocess(outputs, frame, want)
        return Counter(calls)

    everything = count(EVERYTHING)
    assert everything.keys() == expected.keys(), "the table names a function that is not called"
    assert all(everything[path] == times for path, times in expected.items() if times is not None)
    alone = [count((part,)) for part in EVERYTHING]
    for path, times in everything.items():
        assert {used[path] for used in alone} - {0} == {times}, path
    assert not count(())


@pytest.mark.parametrize("kind", [PanopticFPNConfig, JSISNetConfig, EfficientPSConfig])
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
        (instance_branch, "choose"),
    ):
        monkeypatch.setattr(owner, name, None)
    prediction = model.postprocess(outputs | given, frame, EVERYTHING[:3])
    assert [part.labels.tolist() for part in prediction.instances] == [[small_categories.things[0]]] * IMAGES
