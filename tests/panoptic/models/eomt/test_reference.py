"""EoMT beside the numbers of its reference: tokens, predictions, masks of attention, losses, matches, gradients."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from panoptic.models.base import Outputs
from panoptic.models.eomt.model import EoMT
from panoptic.models.mask_transformer import point_loss as losses_module
from panoptic.models.mask_transformer.masks import mask_products
from panoptic.segmentation import Frame, Targets
from tests.support import eomt_fixtures

NAME = "eomt_s"


@pytest.fixture
def case(shared) -> tuple[EoMT, dict[str, Tensor], dict[str, Any], Tensor]:
    model, arrays, meta = eomt_fixtures.network(shared, NAME)
    return model, arrays, meta, torch.from_numpy(eomt_fixtures.rules(shared).batch(meta))


class Tokens:
    """The tokens after every block, and the mask that each block got."""

    def __init__(self, model: EoMT, monkeypatch: pytest.MonkeyPatch) -> None:
        self.after: list[Tensor] = []
        self.masks: list[Tensor | None] = []
        block = model.backbone.block

        def run(index: int, x: Tensor, rope: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
            self.masks.append(mask)
            self.after.append(block(index, x, rope, mask))
            return self.after[-1]

        monkeypatch.setattr(model.backbone, "block", run)


def masks_of(outputs: Outputs) -> list[Tensor]:
    """The mask logits of every prediction, first to last."""
    earlier = range(len(outputs.get("auxiliary_embeddings", ())))
    found = [mask_products(outputs["auxiliary_embeddings"][k], outputs[f"features_{k}"]) for k in earlier]
    return [*found, mask_products(outputs["embeddings"], outputs["features"])]


def classes_of(outputs: Outputs) -> list[Tensor]:
    return [*outputs.get("auxiliary_classes", ()), outputs["classes"]]


def check(outputs: Outputs, masks: Tensor, classes: Tensor) -> None:
    torch.testing.assert_close(torch.stack(masks_of(outputs)), masks, rtol=0, atol=1.5e-4)
    torch.testing.assert_close(torch.stack(classes_of(outputs)), classes, rtol=0, atol=1e-5)


def check_attention(masks: list[Tensor | None], packed: Tensor, shape: list[int]) -> None:
    """Queries look where the reference lets them; everything else is open."""
    expected = torch.from_numpy(np.unpackbits(packed.numpy())[: np.prod(shape)].reshape(shape)).bool()
    blocks, _, queries, patches = shape
    assert [mask is not None for mask in masks] == [False] * (len(masks) - blocks) + [True] * blocks
    for mask, allowed in zip(masks[-blocks:], expected, strict=True):
        assert mask is not None
        assert torch.equal(mask[:, 0, :queries, -patches:], allowed)
        assert mask[:, :, queries:].all() and mask[..., :-patches].all()


def test_with_all_masks(case, monkeypatch) -> None:
    model, arrays, meta, images = case
    tokens = Tokens(model.train(), monkeypatch)
    with torch.no_grad():
        embedded, *_ = model.backbone.embed(model.pixels(images))
        outputs = model.network(images)
    torch.testing.assert_close(embedded, arrays["embedded"], rtol=0, atol=2e-5)
    for index, after in enumerate(tokens.after):
        torch.testing.assert_close(after, arrays[f"full_block_{index}"], rtol=0, atol=2e-5)
    check(outputs, arrays["full_masks"], arrays["full_classes"])
    check_attention(tokens.masks, arrays["full_attend"], meta["attend_shape"])


def test_with_masks_opened_by_chance(case, shared, monkeypatch) -> None:
    model, arrays, meta, images = case
    tokens, chances, rules = Tokens(model.train(), monkeypatch), meta["part_probs"], eomt_fixtures.rules(shared)
    model.begin_step(0, 60)
    model._certain = tuple(chance == 1 for chance in chances)
    block = {"now": -1}
    attention_mask = model._attention_mask

    def of_block(index: int, *rest: Any) -> Tensor:
        block["now"] = index
        return attention_mask(index, *rest)

    def rand(*shape: Any, **_: Any) -> Tensor:
        assert chances[block["now"]] < 1
        return torch.from_numpy(rules.Draws(meta["part_seed"] + block["now"])(*shape))

    monkeypatch.setattr(model, "_attention_mask", of_block)
    monkeypatch.setattr(torch, "rand", rand)
    monkeypatch.setattr("panoptic.models.eomt.model.mask_probability", lambda *_: torch.tensor(chances[block["now"]]))
    with torch.no_grad():
        outputs = model.network(images)
    check(outputs, arrays["part_masks"], arrays["part_classes"])
    check_attention(tokens.masks, arrays["part_attend"], meta["attend_shape"])


def test_without_masks(case, monkeypatch) -> None:
    model, arrays, meta, images = case
    tokens = Tokens(model.eval(), monkeypatch)
    # what lies outside of the second image is black, whatever the batch has there
    width = meta["images"][1][2]
    images[1, :, :, width:] = 77
    sizes = torch.tensor([size for _, *size in meta["images"]])
    with torch.no_grad():
        outputs = model.network(images, Frame(tuple(meta["canvas"]), sizes, sizes))
    check(outputs, arrays["none_masks"][None], arrays["none_classes"][None])
    torch.testing.assert_close(tokens.after[-1], arrays["none_block_last"], rtol=0, atol=2e-5)
    assert tokens.masks == [None] * len(tokens.after) and outputs.keys() == {"classes", "embeddings", "features"}


def targets_of(meta: dict[str, Any], rules: Any, second_empty: bool) -> Targets:
    segments, labels = [], []
    for image, (masks, classes) in enumerate(rules.targets(meta)):
        if second_empty and image == 1:
            masks, classes = masks[:0], classes[:0]
        numbers = np.arange(1, len(masks) + 1, dtype=np.int32)[:, None, None]
        segments.append(torch.from_numpy((masks * numbers).sum(0, dtype=np.int32)).expand(meta["canvas"]))
        labels.append(torch.from_numpy(classes))
    count = max(map(len, labels))
    padded = torch.stack([torch.cat([part, part.new_full((count - len(part),), -1)]) for part in labels])
    sizes = torch.tensor([size for _, *size in meta["images"]])
    frame = Frame(tuple(meta["canvas"]), sizes, sizes)
    return Targets(torch.stack(segments), padded, torch.zeros_like(padded, dtype=torch.bool), frame, ("a", "b"))


@pytest.mark.parametrize("ending", ["", "_second_empty"])
def test_losses_matches_and_gradients(case, shared, ending: str, monkeypatch) -> None:
    """Each prediction draws its points from a stream of its own, in the published order."""
    model, _, meta, images = case
    rules, blocks = eomt_fixtures.rules(shared), meta["config"]["blocks"]
    targets = targets_of(meta, rules, second_empty=bool(ending))
    # the last prediction comes first here; matcher points of both images, candidates, uniform rest
    streams = [rules.Draws(meta["loss_seed"] + layer) for layer in (blocks, *range(blocks))]
    drawn = iter([stream for stream in streams for _ in range(4)])
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.from_numpy(next(drawn)(*shape)))
    kept = {}
    hungarian = losses_module.hungarian

    def matching(*args: Any) -> Any:
        kept["matches"] = hungarian(*args)
        return kept["matches"]

    monkeypatch.setattr(losses_module, "hungarian", matching)
    outputs = model.train().network(images)
    terms = model.loss(outputs, targets)
    sum(terms.values()).backward()
    losses = {name: term.detach() for name, term in terms.items()}
    total = sum(losses.values())
    for index, layer in enumerate((blocks, *range(blocks))):
        suffix = "" if layer == blocks else f"_{layer}"
        for name, theirs, weight in (("classes", "ce", 2), ("masks", "mask", 5), ("dice", "dice", 5)):
            expected = weight * meta[f"losses{ending}"][theirs][layer]
            assert float(losses[name + suffix]) == pytest.approx(expected, rel=5e-6), name + suffix
        for image in range(2):
            found = kept["matches"].of(2 * index + image, 1)
            pairs = meta[f"matches{ending}"][layer][image]
            assert [found.queries.tolist(), found.targets.tolist()] == pairs
    assert float(total) == pytest.approx(meta[f"total{ending}"], rel=5e-6)
    assert next(drawn, None) is None
    if not ending:
        norms = {eomt_fixtures.our_name(key): norm for key, norm in meta["grad_norms"].items()}
        parameters = dict(model.named_parameters())
        assert norms.keys() == parameters.keys()
        for key, norm in norms.items():
            assert float(parameters[key].grad.norm()) == pytest.approx(norm, rel=1e-4, abs=1e-5), key
    assert all(shape[-1] == 2 for shape in streams[0].shapes) and all(
        a.shapes == b.shapes for a, b in pairwise(streams)
    )
