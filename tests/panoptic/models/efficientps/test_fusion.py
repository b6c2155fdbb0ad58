"""The panoptic fusion module against a plain one, step by step and on whole planes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from panoptic.models.efficientps.model import EfficientPSConfig
from panoptic.models.efficientps.postprocess import Fusion
from panoptic.segmentation import Categories, Frame
from tests.support.small import SMALL

HEIGHT, WIDTH = 64, 96


def plain_fusion(
    detections: torch.Tensor, masks: torch.Tensor, logits: torch.Tensor, categories: Categories, fusion: Fusion
) -> tuple[np.ndarray, list[int]]:
    """The published rule (boxes with inclusive corners), with a plane of the whole image for every detection."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    occupied = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    planes, labels = [], []
    for (x0, y0, x1, y1, _, label), mask in zip(detections.tolist(), masks, strict=True):
        x1, y1 = x1 - 1, y1 - 1
        grid = torch.stack([(columns + 0.5 - x0) / (x1 - x0) * 2 - 1, (rows + 0.5 - y0) / (y1 - y0) * 2 - 1], -1)
        plane = F.grid_sample(mask[None, None], grid[None], mode="bilinear", padding_mode="zeros", align_corners=False)[
            0, 0
        ]
        inside = plane.sigmoid() > 0.5
        if inside.any() and float((inside & occupied).sum() / inside.sum()) > fusion.overlap:
            continue
        occupied |= inside
        semantic = torch.zeros(HEIGHT, WIDTH)
        top, left = max(int(y0 + 1), 0), max(int(x0 + 1), 0)
        bottom, right = min(int(round(y1 - 1) + 1), HEIGHT), min(int(round(x1 - 1) + 1), WIDTH)
        semantic[top:bottom, left:right] = logits[int(label), top:bottom, left:right]
        a = fusion.mask_factor * plane
        planes.append((a.sigmoid() + semantic.sigmoid()) * (a + semantic))
        labels.append(int(label))
    stuff = list(categories.stuff)
    winner = torch.cat([logits[stuff], torch.stack(planes)] if planes else [logits[stuff]]).argmax(0)
    thing = (winner - len(stuff) + 1).clamp(min=0).numpy()
    best = logits.argmax(0).numpy()
    names = np.full((HEIGHT, WIDTH), -1)
    segments = np.zeros((HEIGHT, WIDTH), np.int32)
    found = []
    for number, label in enumerate(labels, 1):
        if (thing == number).any():
            found.append(label)
            segments[thing == number] = len(found)
            names[thing == number] = label
    for label in stuff:
        where = (thing == 0) & (best == label)
        if where.sum() >= max(1, fusion.stuff_area):
            found.append(label)
            segments[where] = len(found)
    return segments, found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bias", [0.0, -6.0])
def test_the_published_rule(small_categories, seed: int, bias: float) -> None:
    """Also where all logits of stuff are negative, so that things win beyond their boxes."""
    rng = np.random.default_rng(seed)
    config = replace(SMALL[EfficientPSConfig]["group_norm"], fusion=Fusion(stuff_area=40))
    model = config.build(small_categories).eval()
    count = 7
    corners = np.stack([rng.uniform(0, WIDTH - 30, count), rng.uniform(0, HEIGHT - 30, count)], 1)
    sides = rng.uniform(6, 29, (count, 2))
    labels = rng.choice(small_categories.things, count)
    scores = np.sort(rng.uniform(0.5, 1, count))[::-1]
    rows = np.concatenate([corners, corners + sides, scores[:, None], labels[:, None]], 1)
    detections = torch.tensor(rows, dtype=torch.float32)
    masks = torch.tensor(rng.normal(1, 3, (count, 28, 28)), dtype=torch.float32)
    logits = torch.tensor(rng.normal(bias, 4, (len(small_categories), HEIGHT // 8, WIDTH // 8)), dtype=torch.float32)
    full = F.interpolate(logits[None], size=(HEIGHT, WIDTH), mode="bilinear", align_corners=False)[0]
    outputs = {"semantic": logits[None], "detections": detections[None], "masks": masks[None]}
    frame = Frame.full(torch.zeros(1, 3, HEIGHT, WIDTH))
    merged = model.postprocess(outputs, frame).maps[0]
    segments, found = plain_fusion(detections, masks, full, small_categories, config.fusion)
    assert merged.labels.tolist() == found
    assert len(set(found) & set(small_categories.things)) > 0
    different = np.count_nonzero(merged.segments != segments)
    assert different <= 2, different  # ties of interpolated values


def test_overlapping_instances_are_skipped(small_categories) -> None:
    thing = small_categories.things[0]
    model = SMALL[EfficientPSConfig]["group_norm"].build(small_categories).eval()
    detections = torch.tensor(
        [[[8.0, 8, 40, 40, 0.9, thing], [10, 8, 42, 40, 0.8, thing], [60, 8, 90, 40, 0.7, thing]]]
    )
    outputs = {
        "semantic": torch.zeros(1, len(small_categories), HEIGHT, WIDTH),
        "detections": detections,
        "masks": torch.full((1, 3, 28, 28), 5.0),
    }
    merged = model.postprocess(outputs, Frame.full(torch.zeros(1, 3, HEIGHT, WIDTH))).maps[0]
    assert merged.scores[merged.labels == thing].tolist() == pytest.approx([0.9, 0.7])
    assert len(np.unique(merged.segments[10:38, 12:38])) == 1
