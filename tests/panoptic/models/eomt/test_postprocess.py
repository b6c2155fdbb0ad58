"""EoMT's merge and instances are Mask2Former's: beside the reference's maps, from the same logits."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as rle

from panoptic.models.eomt.model import EoMTConfig
from panoptic.models.mask_transformer.mask_resampler import Extent
from panoptic.models.mask_transformer.postprocess import postprocess_image
from tests.support.eomt_fixtures import categories, load

CASES = ("few", "many", "tie")
THRESHOLDS = {"t8": (0.8, 0.8), "t5": (0.5, 0.6)}


def extent_of(said: dict) -> Extent:
    return Extent(*(tuple(said[key]) for key in ("canvas", "scaled", "output")))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", THRESHOLDS)
def test_published_maps(shared, case: str, name: str) -> None:
    arrays, meta = load(shared, "post")
    masks, (threshold, overlap) = arrays[f"{case}_masks"], THRESHOLDS[name]
    config = EoMTConfig(threshold=threshold, overlap=overlap)
    merged = postprocess_image(
        arrays[f"{case}_classes"],
        lambda queries: masks[queries],
        extent_of(meta["cases"][case]),
        ["maps"],
        categories(meta["classes"], tuple(meta["stuff"])),
        config,
    ).map
    assert merged is not None
    np.testing.assert_array_equal(merged.segments, arrays[f"{case}_{name}"].numpy() + 1)
    assert merged.labels.tolist() == meta["cases"][case]["original"][name]["labels"]


@pytest.mark.parametrize("case", CASES)
def test_published_instances(shared, case: str) -> None:
    """With every class as a thing, since the reference drops no stuff here."""
    arrays, meta = load(shared, "post")
    masks = arrays[f"{case}_masks"]
    instances = postprocess_image(
        arrays[f"{case}_classes"],
        lambda queries: masks[queries],
        extent_of(meta["cases"][case]),
        ["instances"],
        categories(meta["classes"]),
        EoMTConfig(),
    ).instances
    assert instances is not None
    ours = np.argsort(-instances.scores, kind="stable")
    theirs = {part: arrays[f"{case}_inst_{part}"].numpy() for part in ("labels", "scores", "areas")}
    np.testing.assert_allclose(instances.scores[ours], theirs["scores"], rtol=0, atol=1e-5)
    areas = rle.area(instances.masks)[ours]
    found, expected = (
        sorted(zip(np.round(scores, 4).tolist(), labels.tolist(), sizes.tolist(), strict=True))
        for scores, labels, sizes in (
            (instances.scores[ours], instances.labels[ours], areas),
            (theirs["scores"], theirs["labels"], theirs["areas"]),
        )
    )
    assert [part[1:] for part in found] == [part[1:] for part in expected]
