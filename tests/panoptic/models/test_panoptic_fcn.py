"""Panoptic FCN against numbers that the published implementation produced, through `convert`; and its options."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from panoptic.convert import convert, reference_keys
from panoptic.layers import NORM_EPS, FrozenBatchNorm
from panoptic.models.panoptic_fcn import LEVELS
from panoptic.segmentation import Categories, Sample, Segmentation, collate

COCO = Categories(
    names=tuple(f"class {i}" for i in range(133)),
    is_thing=tuple(i < 80 for i in range(133)),
    ids=tuple(range(133)),
    colours=((0, 0, 0),) * 133,
)


def reference_state(shared, rules, name: str, seed: int, overrides: dict) -> dict[str, torch.Tensor]:
    """Every weight of a published model, drawn by the fixtures' rule from its name."""
    state = {}
    for line in shared(f"specs/keys/{name}.txt").read_text().splitlines():
        key, shape = line.split("\t")[:2]
        value = rules.fill_value(key, ast.literal_eval(shape), seed)
        scale, shift = overrides.get(key, (1, 0))
        state[key] = torch.from_numpy((value * np.float32(scale) + np.float32(shift)).astype(np.float32))
    return state


def as_sample(image: np.ndarray, truth: Segmentation) -> Sample:
    """A fixture's image, whose channels are blue, green, red, as one of ours."""
    return Sample(np.ascontiguousarray(image[::-1].transpose(1, 2, 0)).astype(np.uint8), truth, "fixture")


def empty(height: int, width: int) -> Segmentation:
    return Segmentation(np.zeros((height, width), np.int32), np.zeros(0, np.int64))


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """As the fixtures were made: random offsets are large, and turn another order of additions into 5e-4."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def published(two_threads, shared, fixture_arrays, fixture_rules):
    arrays, meta = fixture_arrays("pfcn_forward_r50")
    state = reference_state(shared, fixture_rules, "panoptic_fcn_r50_coco", meta["fill_seed"], meta["fill_overrides"])
    config, weights = convert(state, "panopticfcn", COCO)
    model = replace(config, stuff_area=100, most_kernels=20).build(COCO).eval()
    model.load_state_dict(weights)
    image = fixture_rules.smooth_image(meta["fill_seed"] + 1, 3, meta["h"], meta["w"])
    images, targets = collate([as_sample(image, empty(meta["h"], meta["w"]))], model.divisor)
    with torch.no_grad():
        outputs = model.network(images, targets.frame)
    return model, outputs, targets.frame, arrays, meta, reference_keys(state, "panopticfcn")


def close(ours: torch.Tensor, reference: np.ndarray, worst: float = 1e-4) -> None:
    np.testing.assert_allclose(ours.detach().numpy(), reference, rtol=0, atol=worst * np.abs(reference).max())


def test_published_outputs(published, fixture_rules) -> None:
    _, outputs, _, arrays, _, _ = published
    close(outputs["encoded"][0, :, ::2, ::2], arrays["encode_feat_s2"])
    for k, level in enumerate(LEVELS):
        close(outputs[f"things_{level}"][0], arrays[f"center_{k}"])
        close(outputs[f"regions_{level}"][0], arrays[f"region_{k}"])
        np.testing.assert_allclose(
            fixture_rules.summary(outputs[f"kernels_{level}"]), arrays[f"kernel_{k}_sum"], rtol=0, atol=1e-4
        )
    close(outputs["kernels_p5"][0], arrays["kernel_2"])


def test_published_map_instances_and_classes(published) -> None:
    model, outputs, frame, arrays, meta, _ = published
    (merged,), (instances,) = model.segment(outputs, frame), model.instances(outputs, frame)
    assert (merged.segments != arrays["panoptic"]).mean() < 5e-4
    expected = [s["category_id"] if s["isthing"] else 79 + s["category_id"] for s in meta["segments_info"]]
    assert merged.labels.tolist() == expected
    np.testing.assert_allclose(merged.scores[: len(expected)], [s["score"] for s in meta["segments_info"]], rtol=1e-4)
    assert len(instances.labels) == meta["n_det"]
    assert instances.labels.tolist() == arrays["det_classes"].tolist()
    np.testing.assert_allclose(instances.scores, arrays["det_scores"], rtol=1e-4)
    np.testing.assert_array_equal(instances.boxes, arrays["det_boxes"])
    from pycocotools import mask as rle

    drawn = np.stack([rle.decode(mask) for mask in instances.masks]).astype(bool)
    expected_masks = np.unpackbits(arrays["det_masks"], axis=2)[:, :, : meta["w"]].astype(bool)
    assert (drawn != expected_masks).mean() < 5e-4
    (classes,) = model.semantics(outputs, frame)
    stuff = arrays["sem_argmax"] > 0
    assert (classes[stuff] != 79 + arrays["sem_argmax"][stuff]).mean() < 5e-4


def truths(rules, arrays_meta: dict) -> list[Sample]:
    samples = []
    for i, (height, width) in enumerate(arrays_meta["train_sizes"]):
        seed = arrays_meta["fill_seed"]
        ids, records = rules.make_panoptic(
            seed + 20 + i, height, width, list(range(80)), list(range(80, 133)), n_things=6, max_r=width // 3
        )
        table = np.zeros(ids.max() + 1 + 300, np.int32)
        table[[r["id"] for r in records]] = np.arange(1, len(records) + 1)
        crowd = [bool(r["iscrowd"]) or (r["category_id"] < 80 and r["area"] <= 12) for r in records]
        truth = Segmentation(table[ids], np.array([r["category_id"] for r in records]), np.array(crowd))
        samples.append(as_sample(rules.smooth_image(seed + 30 + i, 3, height, width), truth))
    return samples


def named(losses: dict) -> dict[str, float]:
    """The reference's losses under our names."""
    names = {"thing_position": "pos_th", "stuff_position": "pos_st", "thing_mask": "seg_th", "stuff_mask": "seg_st"}
    return {name: losses[f"loss_{theirs}"] for name, theirs in names.items()}


def test_published_losses(published, fixture_rules) -> None:
    model, _, _, _, meta, _ = published
    images, targets = collate(truths(fixture_rules, meta), model.divisor)
    with torch.no_grad():
        losses = model.loss(model.network(images, targets.frame), targets)
    assert {name: float(value) for name, value in losses.items()} == pytest.approx(named(meta["losses_no_grad"]), 1e-4)


@pytest.mark.slow
def test_published_gradients(published, fixture_rules, monkeypatch) -> None:
    """With autograd detectron2's frozen norms multiply and add, which rounds differently and here is felt."""

    forward = FrozenBatchNorm.forward

    def multiply_and_add(self, x):
        if not x.requires_grad:
            return forward(self, x)
        scale = self.weight * (self.running_var + NORM_EPS).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]

    monkeypatch.setattr(FrozenBatchNorm, "forward", multiply_and_add)
    model, _, _, _, meta, keys = published
    images, targets = collate(truths(fixture_rules, meta), model.divisor)
    losses = model.loss(model.network(images, targets.frame), targets)
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(named(meta["losses"]), rel=1e-4)
    sum(losses.values()).backward()
    ours = {name: float(p.grad.double().norm()) for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == {keys[key] for key in meta["grad_norms"]}
    errors = {key: abs(ours[keys[key]] / norm - 1) for key, norm in meta["grad_norms"].items()}
    assert max(errors.values()) < 1e-3, max(errors, key=errors.__getitem__)
