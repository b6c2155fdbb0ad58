"""Every shared block of the top-down models against arrays that detectron2 produced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from panoptic.rcnn.boxes import cell_anchors, decode, encode, grid_anchors, match, overlaps
from panoptic.rcnn.roi_align import assign_levels, pool
from panoptic.rcnn.roi_heads import Detection, detect
from panoptic.rcnn.rpn import cut, suppress
from panoptic.targets.instances import mask_targets


class Reference:
    """Arrays of the fixture as tensors."""

    def __init__(self, arrays: dict[str, np.ndarray], meta: dict) -> None:
        self.arrays, self.meta = arrays, meta

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def bits(self, name: str, width: int) -> Tensor:
        """A boolean array that was packed along its last axis."""
        return torch.from_numpy(np.unpackbits(self.arrays[name], axis=-1)[..., :width].astype(bool))


@pytest.fixture(scope="module")
def units(fixture_arrays) -> Reference:
    return Reference(*fixture_arrays("pfpn_units"))


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_anchors(units) -> None:
    shapes = [(6, 9), (3, 5), (2, 3), (1, 2), (1, 1)]
    for level, (height, width) in enumerate(shapes):
        cells = cell_anchors([32 * 2**level], (0.5, 1.0, 2.0))
        close(grid_anchors(cells, height, width, 4 * 2**level), units[f"anchors_p{level + 2}"])


def test_code_of_boxes(units) -> None:
    weights = (10.0, 10.0, 5.0, 5.0)
    close(encode(units["bt_src"], units["bt_dst"], weights), units["bt_deltas"])
    close(decode(units["bt_src"], units["bt_in_deltas"], weights), units["bt_applied"])


def test_overlap_and_matching(units) -> None:
    truth, boxes = units["iou_gt"], units["iou_pr"]
    close(overlaps(truth, boxes), units["iou"])
    for name, thresholds, low_quality in (("rpn", (0.3, 0.7), True), ("roi", (0.5, 0.5), False)):
        index, labels = match(truth, boxes, *thresholds, low_quality)
        assert torch.equal(index, units[f"match_{name}_idx"])
        assert torch.equal(labels, units[f"match_{name}_lab"].long())


def test_levels_and_pooling(units) -> None:
    strides = (4, 8, 16, 32)
    assert torch.equal(assign_levels(units["lvl_boxes"], strides), units["lvl"])
    features = [units[f"pool_feat{k}"] for k in range(4)]
    close(pool(features, strides, [units["pool_boxes0"], units["pool_boxes1"]], 7), units["pool_out"])


def test_selection_of_proposals(units) -> None:
    best = [units[f"rpnsel_logits{k}"].topk(min(20, units[f"rpnsel_logits{k}"].shape[1]), 1) for k in range(3)]
    boxes = [
        units[f"rpnsel_boxes{k}"].gather(1, index[:, :, None].expand(-1, -1, 4)) for k, (_, index) in enumerate(best)
    ]
    sizes = torch.tensor([[100, 150], [90, 140]])
    for image, found in enumerate(suppress(cut(boxes, [logits for logits, _ in best], sizes), 0.7, 30)):
        close(found.boxes, units[f"rpnsel_out_boxes{image}"])
        close(found.logits, units[f"rpnsel_out_logits{image}"])


def test_detections(units) -> None:
    found = detect(units["det_in_boxes"], units["det_in_scores"], (100, 150), Detection(most=20))
    close(found.boxes, units["det_boxes"])
    close(found.scores, units["det_scores"])
    assert torch.equal(found.classes, units["det_classes"])
    assert torch.equal(found.regions, units["det_idx"])


def test_mask_targets(units) -> None:
    masks = units.bits("mt_bitmasks", 90)
    rows, columns = masks.any(2), masks.any(1)
    outlines = [
        [c.nonzero().min(), r.nonzero().min(), c.nonzero().max() + 1, r.nonzero().max() + 1]
        for r, c in zip(rows, columns, strict=True)
    ]
    assert torch.equal(torch.tensor(outlines, dtype=torch.float32), units["mt_bbox"])
    shares = mask_targets(masks, units["mt_boxes"], torch.arange(6), 28)
    assert torch.equal(shares >= 0.5, units["mt_target"])
