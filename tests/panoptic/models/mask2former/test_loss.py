"""Mask2Former's loss against its definition, its memory, and edge cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from panoptic.matcher import hungarian
from panoptic.models.base import Outputs
from panoptic.models.mask2former.model import Mask2Former
from panoptic.models.mask_transformer import loss, point_sampling
from panoptic.models.mask_transformer.masks import mask_products
from panoptic.models.mask_transformer.targets import target_segments
from panoptic.segmentation import Targets
from tests.panoptic.models.mask2former.test_model import batch, built


def plain_losses(model: Mask2Former, outputs: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
    """The definition, with every mask at full size and points drawn in the published order."""
    config, terms = model.config, {}
    count = int(target_segments(targets).sum())
    layers = [("", outputs["classes"], outputs["embeddings"])]
    pairs = zip(outputs["auxiliary_classes"], outputs["auxiliary_embeddings"], strict=True)
    layers += [(f"_{k}", *pair) for k, pair in enumerate(pairs)]
    masks = (targets.segments[:, None] == torch.arange(1, targets.labels.shape[1] + 1).view(-1, 1, 1)).float()
    for suffix, classes, embeddings in layers:
        logits = mask_products(embeddings, outputs["features"])
        shared = torch.cat([torch.rand(1, config.loss_points, 2) for _ in range(len(logits))])
        x, t = point_sampling.sample(logits, shared)[:, :, None], point_sampling.sample(masks, shared)[:, None]
        x, t = torch.broadcast_tensors(x, t)
        cost = 5 * F.binary_cross_entropy_with_logits(x, t, reduction="none").mean(3)
        p = x.sigmoid()
        cost += 5 * (1 - (2 * (p * t).sum(3) + 1) / (p.sum(3) + t.sum(3) + 1))
        cost -= 2 * torch.stack([c.softmax(1)[:, labels] for c, labels in zip(classes, targets.labels, strict=True)])
        matches = hungarian(cost, target_segments(targets), targets.names)
        b, q, k = matches.groups, matches.queries, matches.targets
        chosen = point_sampling.uncertain_points(
            logits[b, q], *point_sampling.draw_candidates(len(b), config.loss_points, 3.0, 0.75, logits.device)
        )
        x, t = (
            point_sampling.sample(logits[b, q][:, None], chosen)[:, 0],
            point_sampling.sample(masks[b, k][:, None], chosen)[:, 0],
        )
        p = x.sigmoid()
        terms[f"masks{suffix}"] = 5 * F.binary_cross_entropy_with_logits(x, t, reduction="none").mean(1).sum()
        terms[f"dice{suffix}"] = 5 * (1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).sum()
        for name in ("masks", "dice"):
            terms[f"{name}{suffix}"] = terms[f"{name}{suffix}"] / count
        labels = torch.full(classes.shape[:2], len(model.categories))
        labels[b, q] = targets.labels[b, k]
        weights = torch.cat([torch.ones(len(model.categories)), torch.tensor([0.1])])
        terms[f"classes{suffix}"] = 2 * F.cross_entropy(classes.transpose(1, 2), labels, weights)
    return terms


def test_losses_are_those_of_the_definition(small_categories) -> None:
    model = built(small_categories)
    images, targets = batch(small_categories, (3, 5))
    with torch.no_grad():
        outputs = model.network(images)
        torch.manual_seed(7)
        losses = model.loss(outputs, targets)
        torch.manual_seed(7)
        plain = plain_losses(model, outputs, targets)
    assert len(losses) == 12 and losses.keys() == plain.keys()
    assert {k: v.item() for k, v in losses.items()} == pytest.approx({k: v.item() for k, v in plain.items()}, rel=1e-4)


@pytest.mark.parametrize("counts", [(0, 0), (0, 4), (30, 2)])
def test_no_target_and_more_targets_than_queries(small_categories, counts) -> None:
    model = built(small_categories)
    images, targets = batch(small_categories, counts)
    losses = model.loss(model.network(images), targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    if not any(counts):
        assert not any(value for name, value in losses.items() if not name.startswith("classes"))


def test_chunks_change_neither_losses_nor_gradients(small_categories, monkeypatch) -> None:
    """120 targets for 100 queries: in chunks whose values are computed again, and all at once."""
    model = built(small_categories, queries=100)
    images, targets = batch(small_categories, (120,))
    results = []
    for kept in (10_000, 320):
        monkeypatch.setattr(loss, "KEPT", kept)
        model.zero_grad()
        torch.manual_seed(1)
        losses = model.loss(model.network(images), targets)
        sum(losses.values()).backward()
        results.append((torch.stack(list(losses.values())), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0])
    for whole, parts in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-5)


def kept_bytes(outputs: Outputs, model: Mask2Former, targets: Targets) -> int:
    """The bytes that the graph of the losses keeps for the gradient, without the network's own outputs."""
    seen: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return x

    leaves = {name: value.detach().requires_grad_() for name, value in outputs.items()}
    own = {value.untyped_storage().data_ptr() for value in leaves.values()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        total = sum(model.loss(leaves, targets).values())
    total.backward()
    return sum(size for place, size in seen.items() if place not in own)


def test_memory_of_the_losses_is_bounded(small_categories, monkeypatch) -> None:
    """For 100 queries and 120 targets the graph keeps a fraction of what it would without chunks."""
    model = built(small_categories, queries=100, loss_points=1024)
    images, targets = batch(small_categories, (120,))
    with torch.no_grad():
        outputs = model.network(images)
    kept = {}
    for chunk in (10_000, 320):
        monkeypatch.setattr(loss, "KEPT", chunk)
        kept[chunk] = kept_bytes(outputs, model, targets)
    # of each layer the points and no masks: 100 masks of 1024 points with two coordinates
    assert kept[320] < 0.4 * kept[10_000]


def test_an_output_that_is_not_finite_names_its_image(small_categories, caplog) -> None:
    images, targets = batch(small_categories, (2, 2))
    model = built(small_categories)
    with torch.no_grad():
        outputs = model.network(images)
        outputs["features"][0, 0, 0, 0] = torch.inf
        assert all(term.isnan() for term in model.loss(outputs, targets).values())
    assert "not finite for sample 0;" in caplog.text
