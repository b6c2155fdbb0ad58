"""The targets of mask classification."""

from __future__ import annotations

from panoptic.models.mask_transformer.targets import coarse_masks, target_segments
from panoptic.segmentation import collate
from tests.panoptic.models.test_contract import as_sample, only


def test_targets_are_segments_with_pixels_that_are_no_crowd(small_categories) -> None:
    truth = only(8, 12, [0, 1, 2], [False, True, False])
    _, targets = collate([as_sample(truth), as_sample(only(8, 12, []), 1)])
    targets.segments[0][targets.segments[0] == 3] = 0
    chosen = target_segments(targets)
    assert chosen.tolist() == [[True, False, False], [False, False, False]]
    masks = coarse_masks(targets, chosen, (2, 3)).view(2, 3, 2, 3)
    assert masks[0, 0].tolist() == [[1, 0, 0]] * 2
    assert not masks[0, 1:].any() and not masks[1].any()
