"""MaskFormer against numbers that facebookresearch/MaskFormer produced, through `convert`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from panoptic.convert import convert, reference_keys
from panoptic.matcher import hungarian
from panoptic.models.base import Outputs
from panoptic.models.mask_transformer.masks import mask_logits, mask_products
from panoptic.models.mask_transformer.targets import coarse_masks, target_segments
from panoptic.models.maskformer.loss import matching_cost
from panoptic.models.maskformer.model import MaskFormerConfig
from panoptic.segmentation import Frame, Targets
from pipelines.presets.maskformer import maskformer_r50_coco, maskformer_r101_cityscapes, maskformer_scenes
from tests.support.query_fixtures import arrays, coco, record, weights

PUBLISHED = {"classes": "loss_ce", "masks": "loss_mask", "dice": "loss_dice"}


def close(ours: torch.Tensor, reference: np.ndarray, atol: float = 1e-3) -> None:
    np.testing.assert_allclose(ours.detach().numpy(), reference, rtol=0, atol=atol)


def as_targets(fixture: dict[str, np.ndarray]) -> Targets:
    """The masks of both images as maps."""
    masks = [fixture["t0_masks"], fixture["t1_masks"]]
    labels = torch.full((2, max(map(len, masks))), -1)
    maps = []
    for b, mask in enumerate(masks):
        maps.append((mask * np.arange(1, len(mask) + 1)[:, None, None]).max(0).astype(np.int32))
        labels[b, : len(mask)] = torch.from_numpy(fixture[f"t{b}_labels"])
    segments = torch.from_numpy(np.stack(maps))
    return Targets(
        segments, labels, torch.zeros_like(labels, dtype=torch.bool), Frame.full(segments[:, None]), ("a", "b")
    )


@pytest.fixture(scope="module")
def published(shared):
    """The converted model, its input, the targets, the reference's numbers and our names."""
    fixture, rule = arrays(shared, "maskformer_fpn_forward"), record(shared, "maskformer_fpn_losses")
    state = weights(shared, "maskformer_fpn_orig_keys", rule["seed"], rule["gains"])
    state["criterion.empty_weight"] = torch.cat([torch.ones(133), torch.tensor([0.1])])
    categories = coco(shared)
    config, converted = convert(state, "maskformer", categories)
    assert isinstance(config, MaskFormerConfig) and config.encoder_layers == 0
    model = config.build(categories).eval()
    model.load_state_dict(converted)
    names = reference_keys(state, "maskformer")
    return model, torch.from_numpy(fixture["x"]), as_targets(fixture), fixture, names


@pytest.fixture(scope="module")
def outputs(published) -> Outputs:
    model, pixels, *_ = published
    with torch.no_grad():
        return model.forward_normalised(pixels)


def test_every_array_of_the_network(published, outputs) -> None:
    model, pixels, _, fixture, _ = published
    with torch.no_grad():
        features = model.backbone(pixels)
    for name in ("res2", "res3", "res4", "res5"):
        close(features[name].mean((2, 3)), fixture[f"{name}_mean"], 1e-4 * np.abs(fixture[f"{name}_mean"]).max())
        close(features[name][:, :8], fixture[f"{name}_slice"], 1e-4 * np.abs(fixture[f"{name}_slice"]).max())
    close(outputs["features"].mean((2, 3)), fixture["mask_features_mean"])
    close(outputs["features"][:, :16], fixture["mask_features_slice"])
    close(outputs["classes"], fixture["pred_logits"])
    close(outputs["auxiliary_classes"][0], fixture["aux0_logits"])
    every = torch.arange(100)
    first = {**outputs, "embeddings": outputs["auxiliary_embeddings"][0]}
    last = {**outputs, "embeddings": outputs["auxiliary_embeddings"][-1]}
    for b in (0, 1):
        close(mask_logits(outputs, b, every), fixture["pred_masks"][b])
        close(mask_logits(first, b, every[:10]), fixture["aux0_masks"][b])
        close(mask_logits(last, b, every[:10]), fixture["auxm1_masks"][b])


def test_matches_and_every_loss(published, outputs, shared) -> None:
    model, _, targets, fixture, _ = published
    chosen = target_segments(targets)
    logits = mask_products(outputs["embeddings"], outputs["features"])
    masks = coarse_masks(targets, chosen, logits.shape[-2:])
    cost = matching_cost(outputs["classes"], logits, targets.labels, masks, model.config)
    matches = hungarian(cost, chosen, targets.names)
    for b in (0, 1):
        np.testing.assert_array_equal(matches.of(b, 1).queries, fixture[f"match{b}_src"])
        np.testing.assert_array_equal(matches.of(b, 1).targets, fixture[f"match{b}_tgt"])
    reference = record(shared, "maskformer_fpn_losses")
    with torch.no_grad():
        losses = model.loss(outputs, targets)
    assert len(losses) == 18
    for name, value in losses.items():
        term, _, layer = name.partition("_")
        published_name = PUBLISHED[term] + (f"_{layer}" if layer else "")
        expected = reference["losses"][published_name] * reference["weights"][published_name]
        assert value.item() == pytest.approx(expected, rel=1e-4), name
    total = sum(losses.values()).item()
    assert total == pytest.approx(reference["total"], rel=1e-4)
    assert total == pytest.approx(float(fixture["total_loss"]), rel=1e-4)


def test_gradients(published, shared) -> None:
    model, pixels, targets, _, names = published
    norms = record(shared, "maskformer_fpn_losses")["grad_norms"]
    model.zero_grad()
    sum(model.loss(model.forward_normalised(pixels), targets).values()).backward()
    ours = {name: float(p.grad.double().norm()) for name, p in model.named_parameters()}
    assert {names[key] for key in norms} <= set(ours)
    for key, expected in norms.items():
        # what is 0 but for rounding has no ratio
        assert ours[names[key]] == pytest.approx(expected, rel=2e-3, abs=1e-5), key


def test_the_defaults_are_those_that_were_published_for_coco(small_categories) -> None:
    """Padding too: the reference's SIZE_DIVISIBILITY is 0 for COCO panoptic, that is none, and 32 elsewhere."""
    published = maskformer_r50_coco().model
    assert MaskFormerConfig(backbone=published.backbone) == published
    assert MaskFormerConfig().build(small_categories).divisor == 1
    assert [preset().model.divisor for preset in (maskformer_r101_cityscapes, maskformer_scenes)] == [32, 32]


@pytest.mark.parametrize("option", [{"queries": 0}, {"decoder_layers": 0}, {"loss_stride": 0}])
def test_options_out_of_range_are_named(option, small_categories) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} 0"):
        MaskFormerConfig(**option).build(small_categories)
