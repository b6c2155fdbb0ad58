"""Suppression beside torchvision's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms

from panoptic.runtime.regions import suppress


@pytest.mark.parametrize("count", [0, 1, 40, 700])
def test_suppression_is_torchvisions(count: int) -> None:
    rng = np.random.default_rng(count)
    corners = rng.uniform(0, 100, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 40, (count, 2))], 1).astype(np.float32)
    scores, groups = rng.permutation(count).astype(np.float32), rng.integers(0, 3, count)
    expected = batched_nms(torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(groups), 0.5).numpy()
    kept = suppress(boxes, scores, groups, 0.5)
    assert kept.tolist() == expected.tolist()
    assert count < 40 or 0 < len(kept) < count
