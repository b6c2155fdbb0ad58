"""DETR against numbers that facebookresearch/detr produced, through `convert`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocotools import mask as rle

from panoptic.convert import convert, reference_keys
from panoptic.convert.detr import class_index
from panoptic.models.base import Outputs
from panoptic.models.detr.loss import match
from panoptic.models.detr.model import valid_cells
from panoptic.models.detr.targets import box_targets
from panoptic.segmentation import Categories, Frame, Targets
from tests.support.query_fixtures import arrays, coco, record, weights
from tests.support.small import SMALL_DETR

PUBLISHED = {"class": "loss_ce", "box": "loss_bbox", "giou": "loss_giou", "mask": "loss_mask", "dice": "loss_dice"}


def close(ours: torch.Tensor, reference: np.ndarray, atol: float = 1e-3) -> None:
    np.testing.assert_allclose(ours.detach().numpy(), reference, rtol=0, atol=atol)


def as_targets(fixture: dict[str, np.ndarray], categories: Categories) -> Targets:
    """The fixture's masks as maps, and its sparse category ids as classes."""
    place = {identifier: k for k, identifier in enumerate(categories.ids)}
    masks = [fixture["t0_masks"], fixture["t1_masks"]]
    canvas = tuple(max(mask.shape[axis] for mask in masks) for axis in (1, 2))
    segments = torch.zeros(2, *canvas, dtype=torch.int32)
    labels = torch.full((2, max(map(len, masks))), -1)
    for b, mask in enumerate(masks):
        numbers = (mask * np.arange(1, len(mask) + 1)[:, None, None]).max(0)
        segments[b, : mask.shape[1], : mask.shape[2]] = torch.from_numpy(numbers.astype(np.int32))
        labels[b, : len(mask)] = torch.tensor([place[i] for i in fixture[f"t{b}_labels"].tolist()])
    sizes = torch.tensor([mask.shape[1:] for mask in masks])
    return Targets(
        segments, labels, torch.zeros_like(labels, dtype=torch.bool), Frame(canvas, sizes, sizes), ("a", "b")
    )


@pytest.fixture(scope="module")
def published(shared):
    """The converted model, the padded batch and the reference's numbers."""
    fixture, rule = arrays(shared, "detr_forward"), record(shared, "detr_gains")
    state = weights(shared, "detr_orig_keys", rule["seed"], rule["gains"])
    state["mask_head.lay1.weight"][:, 256:] *= rule["post_scale"]["mask_head.lay1.weight[:, 256:]"]
    labels = tuple(int(i) for b in (0, 1) for i in fixture[f"t{b}_labels"])
    categories = coco(shared, labels)
    config, converted = convert(state, "detr", categories)
    model = config.build(categories).eval()
    model.load_state_dict(converted)
    targets = as_targets(fixture, categories)
    pixels = torch.zeros(2, 3, *targets.frame.canvas)
    for b, image in enumerate((fixture["x1"], fixture["x2"])):
        pixels[b, :, : image.shape[1], : image.shape[2]] = torch.from_numpy(image)
    return model, pixels, targets, fixture, reference_keys(state, "detr")


@pytest.fixture(scope="module")
def outputs(published) -> Outputs:
    model, pixels, targets, _, _ = published
    with torch.no_grad():
        return model.forward_normalised(pixels, targets.frame)


def test_every_array_of_the_network(published, outputs) -> None:
    model, pixels, targets, fixture, _ = published
    with torch.no_grad():
        features = model.backbone(pixels)
        every = torch.arange(model.config.queries)
        masks = torch.stack([model.query_masks(outputs, targets.frame, b, every) for b in (0, 1)])
        valid = valid_cells(targets.frame, (3, 4), "cpu")
        attention = model.mask_attention(outputs["states"], outputs["memory"], valid)
    for i, name in enumerate(("res2", "res3", "res4", "res5")):
        expected = fixture[f"feat{i}_mean"]
        close(features[name].mean((2, 3)), expected, 1e-4 * np.abs(expected).max())
    close(model.projection(features["res5"]), fixture["src_proj"])
    np.testing.assert_array_equal(~valid.numpy(), fixture["mask"])
    for name, array in (("states", "hs_last"), ("memory", "memory"), ("logits", "pred_logits")):
        close(outputs[name], fixture[array])
    close(outputs["auxiliary_logits"][0][:, :10], fixture["aux0_logits"])
    close(outputs["boxes"], fixture["pred_boxes"], 1e-5)
    close(attention, fixture["bbox_mask"], 1e-4)
    close(masks, fixture["pred_masks"])


def test_positions_and_first_states(published) -> None:
    model, pixels, targets, fixture, _ = published
    seen: dict[str, torch.Tensor] = {}
    hook = model.decoder.register_forward_hook(lambda module, inputs, output: seen.update(at=inputs[2], states=output))
    with torch.no_grad():
        model.forward_normalised(pixels, targets.frame)
    hook.remove()
    close(seen["at"].transpose(1, 2).unflatten(2, (3, 4)), fixture["pos"], 1e-5)
    close(seen["states"][0], fixture["hs_first"])


def test_matches_and_every_loss(published, outputs, shared) -> None:
    model, _, targets, fixture, _ = published
    true = box_targets(targets)
    matches = match(outputs["logits"], outputs["boxes"], targets, true, model.classes, model.loss_weights)
    for b in (0, 1):
        close(true.boxes[b][true.present[b]], fixture[f"t{b}_boxes"], 1e-6)
        mine = matches.of(b, 1)
        np.testing.assert_array_equal(mine.queries, fixture[f"match{b}_src"])
        np.testing.assert_array_equal(mine.targets, fixture[f"match{b}_tgt"])
    reference = record(shared, "detr_losses")
    with torch.no_grad():
        losses = model.loss(outputs, targets)
    assert len(losses) == 20
    for name, value in losses.items():
        term, _, layer = name.partition("_")
        published = PUBLISHED[term] + (f"_{layer}" if layer else "")
        expected = reference["losses"][published] * reference["weights"][published]
        assert value.item() == pytest.approx(expected, rel=1e-4), name
    assert sum(losses.values()).item() == pytest.approx(reference["total"], rel=1e-4)


def test_gradients(published, shared) -> None:
    model, pixels, targets, _, names = published
    model.zero_grad()
    sum(model.loss(model.forward_normalised(pixels, targets.frame), targets).values()).backward()
    norms = record(shared, "detr_losses")["grad_norms"]
    ours = {name: float(p.grad.double().norm()) for name, p in model.named_parameters() if p.requires_grad}
    assert {names[key] for key in norms} == set(ours)
    for key, norm in norms.items():
        assert ours[names[key]] == pytest.approx(norm, rel=2e-3, abs=1e-5), key


def test_boxes_and_instance_masks(published, outputs, shared) -> None:
    """Instances of all queries: every logit is a class here, and every class a thing."""
    model, _, targets, _, _ = published
    fixture = arrays(shared, "detr_post_boxes")
    every = Categories.from_coco([{"id": i, "name": str(i), "isthing": 1} for i in range(250)])
    wide = replace(model.config, logits=0).build(every)
    wide.load_state_dict({**model.state_dict(), "classes.index": torch.arange(250)})
    frame = replace(targets.frame, output_sizes=torch.tensor([[150, 200], [61, 84]]))
    for b, instances in enumerate(wide.eval().postprocess(outputs, frame, ["instances"]).instances):
        np.testing.assert_array_equal(instances.labels, fixture[f"labels{b}"])
        np.testing.assert_allclose(instances.scores, fixture[f"scores{b}"], atol=1e-3)
        np.testing.assert_allclose(instances.boxes, fixture[f"boxes{b}"], atol=2e-3)
        pixels = float(frame.output_sizes[b].prod())
        np.testing.assert_allclose(rle.area(instances.masks), fixture[f"maskarea{b}"], atol=5e-4 * pixels)


@pytest.mark.parametrize("case", ["many", "few"])
def test_panoptic_maps(shared, case: str) -> None:
    fixture, expected = arrays(shared, f"detr_post_synth_{case}"), record(shared, f"detr_post_synth_{case}")
    categories = coco(shared)
    model = replace(SMALL_DETR, threshold=expected["threshold"], min_area=4, logits=250).build(categories)
    model.classes.index.copy_(class_index(250, categories))
    size, target = (torch.tensor([expected[name]]) for name in ("processed", "target"))
    outputs = {"logits": torch.from_numpy(fixture["pred_logits"]), "masks": torch.from_numpy(fixture["pred_masks"])}
    (merged,) = model.postprocess(outputs, Frame(tuple(expected["processed"]), size, target)).maps
    rows = expected["segments_info"]
    assert [categories.ids[label] for label in merged.labels] == [row["category_id"] for row in rows]
    np.testing.assert_allclose(merged.areas(), [row["area"] for row in rows], atol=5e-4 * fixture["seg"].size)
    assert (merged.segments - 1 != fixture["seg"]).mean() <= 5e-4
