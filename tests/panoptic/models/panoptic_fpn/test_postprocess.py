"""Pasting and merging of overlapping instances: detectron2's arrays, and what the rule says of hard cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as rle

from panoptic.layers.upsampled_argmax import best_classes
from panoptic.models.panoptic_fpn.postprocess import merge_instances
from panoptic.rcnn.paste_masks import Pasted, encode, paste
from panoptic.segmentation import Categories

COCO = Categories(
    names=tuple(f"class {i}" for i in range(133)),
    is_thing=tuple(i < 80 for i in range(133)),
    ids=tuple(range(133)),
    colours=((0, 0, 0),) * 133,
)

TWO = Categories(("tree", "dog", "sky"), (False, True, False), (3, 1, 2), ((0, 0, 0),) * 3)


def unpacked(array: np.ndarray, width: int) -> np.ndarray:
    return np.unpackbits(array, axis=-1)[..., :width].astype(bool)


def whole(pasted: Pasted, size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[pasted.window] = pasted.mask
    return mask


def test_pasting_agrees_with_detectron2(fixture_arrays) -> None:
    arrays, _ = fixture_arrays("pfpn_units")
    found = paste(arrays["paste_masks"], arrays["paste_boxes"], (60, 90))
    for pasted, expected in zip(found, unpacked(arrays["paste_out"], 90), strict=True):
        np.testing.assert_array_equal(whole(pasted, (60, 90)), expected)


@pytest.mark.parametrize("case", range(4))
def test_merging_agrees_with_detectron2(fixture_arrays, case: int) -> None:
    arrays, meta = fixture_arrays("pfpn_units")
    given, rule = {k.split("/")[1]: v for k, v in arrays.items() if k.startswith(f"comb{case}/")}, meta["comb"][case]
    merged = merge_instances(
        [Pasted(0, 0, mask) for mask in unpacked(given["masks"], rule["w"])],
        given["classes"].tolist(),
        given["scores"].tolist(),
        given["sem"],
        COCO,
        confidence=rule["score"],
        overlap=rule["overlap"],
        stuff_area=rule["stuff"],
    )
    np.testing.assert_array_equal(merged.segments, given["pan"])
    assert merged.labels.tolist() == [s["category_id"] + (0 if s["isthing"] else 79) for s in rule["segments"]]
    np.testing.assert_allclose(merged.scores, [s.get("score", 1.0) for s in rule["segments"]])
    areas = merged.areas()
    assert all(areas[k] == s["area"] for k, s in enumerate(rule["segments"]) if not s["isthing"])


def test_an_instance_keeps_what_is_free_however_little_it_is() -> None:
    masks = [
        Pasted(0, 0, np.ones((2, 5), bool)),
        Pasted(0, 4, np.ones((2, 2), bool)),
        Pasted(0, 3, np.ones((1, 3), bool)),
    ]
    stuff = np.full((2, 8), 2)
    merged = merge_instances(masks, [1, 1, 1], [0.9, 0.8, 0.7], stuff, TWO, stuff_area=1)
    # the second loses half of itself, which is not more than half; the third all of its pixels
    assert merged.segments.tolist() == [[1, 1, 1, 1, 1, 2, 3, 3]] * 2
    assert merged.labels.tolist() == [1, 1, 2]
    np.testing.assert_allclose(merged.scores, [0.9, 0.8, 1.0])


def test_equal_scores_keep_their_order_and_low_ones_stay_out() -> None:
    masks = [Pasted(0, k, np.ones((1, 2), bool)) for k in range(3)]
    merged = merge_instances(masks, [1] * 3, [0.5, 0.5, 0.49], np.zeros((1, 4), np.uint8), TWO)
    assert merged.segments.tolist() == [[1, 1, 2, 0]]


def test_nothing_to_merge_is_void() -> None:
    merged = merge_instances([], [], [], np.zeros((3, 4), np.uint8), TWO)
    assert not merged.segments.any() and len(merged.labels) == 0 and merged.segments.dtype == np.int32


def test_small_stuff_is_void_and_counted_where_it_is_free() -> None:
    stuff = np.array([[1, 1, 1, 1, 2, 2]])
    masks = [Pasted(0, 0, np.ones((1, 3), bool))]
    merged = merge_instances(masks, [1], [1.0], stuff, TWO, stuff_area=2)
    assert merged.segments.tolist() == [[1, 1, 1, 0, 2, 2]]
    assert merged.labels.tolist() == [1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_windows_hold_everything_that_the_plain_rule_finds(seed: int) -> None:
    """Against torch's grid_sample over the whole image, boxes beyond the border and thinner than a pixel included."""
    rng = np.random.default_rng(seed)
    size, side = (37, 53), 28
    for _ in range(12):
        x0, y0 = rng.uniform(-20, 50), rng.uniform(-20, 35)
        box = [x0, y0, x0 + rng.uniform(0.2, 60), y0 + rng.uniform(0.2, 40)]
        mask = rng.random((side, side)).astype(np.float32)
        grids = [
            (torch.arange(length) + 0.5 - low) / (high - low) * 2 - 1
            for length, low, high in ((size[1], box[0], box[2]), (size[0], box[1], box[3]))
        ]
        across, down = torch.meshgrid(*grids, indexing="xy")
        grid = torch.stack([across, down], -1)[None].float()
        expected = torch.nn.functional.grid_sample(torch.from_numpy(mask)[None, None], grid, align_corners=False)[0, 0]
        (pasted,) = paste(mask[None], np.array([box], np.float32), size)
        sure = (expected - 0.5).abs().numpy() > 1e-4
        np.testing.assert_array_equal(whole(pasted, size)[sure], (expected.numpy() >= 0.5)[sure])
        np.testing.assert_array_equal(rle.decode(encode(pasted, size)).astype(bool), whole(pasted, size))


def test_boxes_outside_the_image_have_no_pixel() -> None:
    boxes = np.array([[-9, -9, -4, -4], [60, 2, 70, 8], [2, 2, 6, 6], [1, 40, 5, 50]], np.float32)
    found = paste(np.ones((4, 28, 28), np.float32), boxes, (20, 30))
    assert [int(instance.mask.sum()) for instance in found] == [0, 0, 16, 0]
    assert paste(np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32), (20, 30)) == []


def test_masks_that_touch_the_corners_are_encoded() -> None:
    full = encode(Pasted(0, 0, np.ones((3, 4), bool)), (3, 4))
    assert rle.decode(full).all()
    corner = encode(Pasted(2, 3, np.ones((1, 1), bool)), (3, 4))
    assert np.argwhere(rle.decode(corner)).tolist() == [[2, 3]]
    nothing = encode(Pasted(0, 0, np.zeros((0, 0), bool)), (3, 4))
    assert rle.area(nothing) == 0


def test_classes_are_the_same_in_chunks() -> None:
    logits = torch.randn(40, 5, 6, generator=torch.Generator().manual_seed(0))
    logits[20] = logits[3]  # the first of equals

    def twice(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")

    best, classes = best_classes(logits, twice)
    assert torch.equal(classes, twice(logits[None])[0].argmax(0))
    assert torch.equal(best, twice(logits[None])[0].amax(0))
