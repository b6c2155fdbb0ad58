"""Masks are made once, whatever is wanted of a prediction."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Collection

import pytest
import torch

from panoptic.models.base import Wanted
from panoptic.models.detr.model import DETRConfig
from panoptic.models.mask2former.model import Mask2FormerConfig
from panoptic.models.maskformer.model import MaskFormerConfig
from panoptic.segmentation import Frame
from tests.support.small import SMALL

MASK_MAKERS: dict[type, tuple[str, ...]] = {
    DETRConfig: ("panoptic.models.detr.mask_head.MaskHead.forward", "panoptic.models.detr.model.DETR.query_masks"),
    MaskFormerConfig: (
        "panoptic.models.mask_transformer.masks.mask_products",
        "panoptic.models.mask_transformer.mask_resampler.Axis.__init__",
    ),
    Mask2FormerConfig: (
        "panoptic.models.mask_transformer.masks.mask_products",
        "panoptic.models.mask_transformer.mask_resampler.Axis.__init__",
    ),
}
"""By class of configuration, the functions that make masks or whatever else is expensive after the network, as dotted
paths to where they are looked up when they are called."""

WITHOUT_MASKS: dict[type, tuple[str, ...]] = {DETRConfig: ("boxes",)}
"""Names of configurations (in `SMALL`) that have none of these functions to call."""

EVERYTHING: tuple[Wanted, ...] = ("maps", "instances", "semantics", "proposals")

CASES = [
    pytest.param(config, maker, name not in WITHOUT_MASKS.get(kind, ()), id=f"{kind.__name__}-{name}-{maker[16:]}")
    for kind, makers in MASK_MAKERS.items()
    for name, config in SMALL[kind].items()
    for maker in makers
]


@pytest.fixture
def count_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """A function that replaces another one by itself and a record of its calls, a list with an entry for each."""

    def count(path: str) -> list[str]:
        original, calls = pkgutil.resolve_name(path), []

        def counted(*args, **kwargs):
            calls.append(path)
            return original(*args, **kwargs)

        monkeypatch.setattr(path, counted)
        return calls

    return count


@pytest.mark.parametrize(("config", "maker", "has_masks"), CASES)
def test_everything_costs_as_many_masks_as_the_maps_alone(
    config, maker, has_masks, small_categories, count_calls
) -> None:
    torch.manual_seed(1)
    model = config.build(small_categories).eval()
    images = torch.randint(0, 256, (2, 3, 65, 97), dtype=torch.uint8)
    frame = Frame((65, 97), torch.tensor([[65, 97], [33, 50]]), torch.tensor([[65, 97], [90, 80]]))
    with torch.no_grad():
        outputs = model.network(images, frame)
    calls = count_calls(maker)

    def made(want: Collection[Wanted]) -> int:
        before = len(calls)
        model.postprocess(outputs, frame, want)
        return len(calls) - before

    once = made(EVERYTHING)
    assert (once > 0) == has_masks, "the table names a function that is not called"
    assert made(["maps"]) == once
    assert {made([want]) for want in EVERYTHING} <= {0, once}
    assert made([]) == 0
