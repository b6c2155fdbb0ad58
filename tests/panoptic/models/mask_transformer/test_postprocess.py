"""Merging of queries: the published arrays, and a plain loop that makes every mask at full size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from torch import Tensor

from panoptic.models.mask2former.model import Mask2FormerConfig
from panoptic.models.mask_transformer import mask_resampler, pixel_assignment
from panoptic.models.mask_transformer.mask_resampler import Extent, MaskResampler
from panoptic.models.mask_transformer.postprocess import postprocess_image
from panoptic.models.maskformer.model import MaskFormerConfig
from panoptic.segmentation import Categories
from tests.support.query_fixtures import arrays, coco, record
from tests.support.query_scenes import EXTENTS, full_size, scene

CONFIGS = {"maskformer": MaskFormerConfig(), "mask2former": Mask2FormerConfig()}


def fixture(shared, name: str):
    reference, meta = arrays(shared, name), record(shared, name)
    masks = torch.from_numpy(reference["pred_masks"])
    extent = Extent(*(tuple(meta[key]) for key in ("padded", "image_size", "output")))
    return reference, meta, torch.from_numpy(reference["pred_logits"]), lambda queries: masks[queries], extent


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("case", ["few", "many"])
def test_published_maps(shared, model: str, case: str) -> None:
    reference, meta, classes, masks, extent = fixture(shared, f"{model}_post_synth_{case}")
    merged = postprocess_image(classes, masks, extent, ["maps"], contiguous(shared), CONFIGS[model]).map
    assert merged.labels.tolist() == [entry["category_id"] for entry in meta["segments_info"]]
    assert (merged.segments != reference["seg"]).mean() <= 5e-4
    assert merged.scores is not None and (merged.scores > meta["object_mask_threshold"]).all()


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("case", ["few", "many"])
def test_published_class_maps(shared, model: str, case: str) -> None:
    reference, _, classes, masks, extent = fixture(shared, f"{model}_post_synth_{case}")
    semantic = postprocess_image(classes, masks, extent, ["semantics"], contiguous(shared), CONFIGS[model]).semantic
    assert (semantic != reference["sem_argmax"]).mean() <= 5e-4
    whole = MaskResampler(masks(torch.arange(100)), extent)
    height, width = extent.output
    shares = whole.window(whole.masks, (0, height), (0, width)).sigmoid().flatten(1)
    highest = (classes.softmax(1)[:, :-1].T @ shares).amax(0).view(height, width)
    np.testing.assert_allclose(highest, reference["sem_max"].astype(np.float32), rtol=2e-3)  # stored as float16


@pytest.mark.parametrize("case", ["few", "many"])
def test_published_instances(shared, case: str) -> None:
    reference, _, classes, masks, extent = fixture(shared, f"mask2former_post_synth_{case}")
    config = CONFIGS["mask2former"]
    instances = postprocess_image(classes, masks, extent, ["instances"], contiguous(shared), config).instances
    ours, theirs = (np.argsort(-scores, kind="stable") for scores in (instances.scores, reference["inst_scores"]))
    np.testing.assert_allclose(instances.scores[ours], reference["inst_scores"][theirs], rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(instances.labels[ours], reference["inst_classes"][theirs])
    np.testing.assert_array_equal(rle.area(instances.masks)[ours], reference["inst_area"][theirs])


def contiguous(shared) -> Categories:
    """COCO's classes in the order of the head: things before stuff, whatever the order of their ids."""
    categories = coco(shared)
    assert categories.is_thing == (True,) * 80 + (False,) * 53
    return categories


def plain(classes: Tensor, masks: Tensor, categories: Categories, inside: bool) -> tuple[np.ndarray, list[int]]:
    """The references' loop over the kept queries."""
    scores, labels = classes.softmax(1).max(1)
    kept = (labels != len(categories)) & (scores > 0.6)
    scores, labels, shares = scores[kept], labels[kept], masks[kept].sigmoid()
    segments, merged, stuff = np.zeros(masks.shape[1:], np.int32), [], {}
    if not len(labels):
        return segments, merged
    owners = (scores[:, None, None] * shares).argmax(0)
    for k, label in enumerate(labels.tolist()):
        own = shares[k] >= 0.5
        won = owners == k
        painted = won & own if inside else won
        if not (painted.any() and own.any() and won.any()) or won.sum() / own.sum() < 0.7:
            continue
        if label in stuff:
            segments[painted.numpy()] = stuff[label]
            continue
        merged.append(label)
        segments[painted.numpy()] = len(merged)
        if not categories.is_thing[label]:
            stuff[label] = len(merged)
    return segments, merged


@pytest.mark.parametrize(("extent", "cells"), EXTENTS)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("vague", [0.0, 1.0])
def test_merge_against_a_plain_loop(extent, cells, inside: bool, vague: float, small_categories, monkeypatch) -> None:
    """By windows and by cells."""
    monkeypatch.setitem(mask_resampler.BLOCK, "cpu", 500)  # many bands
    monkeypatch.setattr(pixel_assignment, "VAGUE", vague)
    c = small_categories
    for seed in range(6):
        classes, masks = scene(seed, extent, cells)
        classes = classes[:, : len(c) + 1]
        expected, labels = plain(classes, full_size(masks, extent), c, inside)
        config = MaskFormerConfig(threshold=0.6, overlap=0.7, inside=inside)
        merged = postprocess_image(classes, lambda queries, m=masks: m[queries], extent, ["maps"], c, config).map
        assert merged.labels.tolist() == labels
        assert (merged.segments != expected).mean() <= 5e-4


def test_nothing_is_sure_enough(small_categories) -> None:
    extent = Extent((8, 8), (8, 8), (5, 6))

    def masks(queries: Tensor) -> Tensor:
        return torch.zeros(len(queries), 20, 20)  # finer than the canvas, and none of them

    merged = postprocess_image(torch.zeros(3, 5), masks, extent, ["maps"], small_categories, MaskFormerConfig()).map
    assert merged.segments.shape == (5, 6) and not merged.segments.any() and len(merged.labels) == 0


def test_no_thing_among_the_candidates(small_categories) -> None:
    classes = torch.full((2, len(small_categories) + 1), -20.0)
    classes[:, small_categories.stuff[0]] = 9.0
    extent = Extent((8, 8), (8, 8), (8, 8))
    config, want = MaskFormerConfig(top_k=2), ["instances"]
    instances = postprocess_image(
        classes, lambda queries: torch.ones(len(queries), 2, 2), extent, want, small_categories, config
    ).instances
    assert instances.masks == [] and instances.boxes.shape == (0, 4)


@pytest.mark.parametrize("want", [["maps"], ["instances"], ["maps", "instances"], ["maps", "instances", "semantics"]])
def test_masks_are_made_once_of_the_queries_that_need_one(want, small_categories) -> None:
    """Query 0 is stuff, 1 an uncertain thing, 2 a certain one, 3 no object."""
    thing, stuff, nothing = small_categories.things[0], small_categories.stuff[0], len(small_categories)
    classes = torch.full((4, nothing + 1), -9.0)
    classes[range(4), [stuff, thing, thing, nothing]] = torch.tensor([9.0, -7.0, 9.0, 9.0])
    calls = []

    def masks(queries: Tensor) -> Tensor:
        calls.append(queries.tolist())
        return torch.ones(len(queries), 2, 2)

    extent, config = Extent((8, 8), (8, 8), (8, 8)), MaskFormerConfig(top_k=3)
    prediction = postprocess_image(classes, masks, extent, want, small_categories, config)
    needed = {"maps": {0, 2}, "instances": {1, 2}, "semantics": {0, 1, 2, 3}}
    assert calls == [sorted(set.union(*(needed[name] for name in want)))]
    assert [x is not None for x in prediction] == [name in want for name in needed]
