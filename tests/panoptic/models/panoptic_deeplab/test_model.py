"""Panoptic-DeepLab against numbers that the two published implementations produced, through `convert`."""

from __future__ import annotations

import ast
from dataclasses import replace

import numpy as np
import pytest
import torch

from panoptic.convert import convert, reference_keys
from panoptic.models.panoptic_deeplab.model import PanopticDeepLab
from panoptic.segmentation import Categories, Frame, Sample, Segmentation, collate, renumber

CITYSCAPES = Categories(
    names=tuple(f"class {i}" for i in range(19)),
    is_thing=tuple(i >= 11 for i in range(19)),
    ids=tuple(range(19)),
    colours=((0, 0, 0),) * 19,
)


def reference_state(shared, rules, keys_file: str, seed: int) -> dict[str, torch.Tensor]:
    """Every weight of a published model, drawn by the fixtures' rule from its name."""
    state = {}
    for line in shared(f"specs/keys/{keys_file}.txt").read_text().splitlines():
        key, shape = line.split("\t")[:2]
        value = rules.fill_value(key, ast.literal_eval(shape), seed)
        state[key] = torch.zeros((), dtype=torch.long) if value is None else torch.from_numpy(value)
    return state


def sample(image: np.ndarray, ids: np.ndarray, segments: list[dict]) -> Sample:
    """A fixture's image (CHW floats of whole numbers) and id map as one of ours."""
    numbered, unlisted, _ = renumber(ids, [s["id"] for s in segments])
    assert not len(unlisted)
    labels = np.array([s["category_id"] for s in segments])
    truth = Segmentation(numbered, labels, np.array([bool(s["iscrowd"]) for s in segments]))
    return Sample(image.astype(np.uint8).transpose(1, 2, 0), truth, "fixture")


def panoptic_ids(segmentation: Segmentation, categories: Categories, void: int) -> np.ndarray:
    """The references' map: class * 1000 + a counter of things within the class, from 1 in order of the centres."""
    ids, seen = [void], dict.fromkeys(range(len(categories)), 0)
    for label in segmentation.labels.tolist():
        seen[label] += categories.is_thing[label]
        ids.append(label * 1000 + seen[label])
    return np.array(ids)[segmentation.segments]


def close(ours: torch.Tensor, reference: np.ndarray) -> None:
    np.testing.assert_allclose(ours.detach().numpy(), reference, rtol=0, atol=1e-4 * np.abs(reference).max())


def check_gradients(
    model: PanopticDeepLab, names: dict[str, str], norms: dict[str, float], worst: float = 1e-3
) -> None:
    assert {names[key] for key in norms} == {name for name, _ in model.named_parameters()}
    ours = {name: float(p.grad.double().norm()) for name, p in model.named_parameters()}
    errors = {key: abs(ours[names[key]] - norm) / norm for key, norm in norms.items()}
    assert float(np.median(list(errors.values()))) < 1e-3
    assert max(errors.values()) < worst, max(errors, key=errors.__getitem__)


@pytest.fixture(scope="module")
def standalone(shared, fixture_arrays, fixture_rules):
    arrays, meta = fixture_arrays("pdl_a_forward_r50_os32")
    state = reference_state(shared, fixture_rules, "panoptic_deeplab_A_r50_os32_cityscapes", meta["fill_seed"])
    config, weights = convert(state, "panoptic-deeplab", CITYSCAPES)
    model = replace(config, stuff_area=64).build(CITYSCAPES).eval()
    model.load_state_dict(weights)
    image = fixture_rules.smooth_image(meta["fill_seed"] + 1, 3, meta["h"], meta["w"])
    images, targets = collate([sample(image, arrays["gt_panoptic"], meta["segments"])])
    return model, images, targets, arrays, meta, reference_keys(state, "panoptic-deeplab")


def test_standalone_outputs_and_map(standalone, fixture_rules) -> None:
    model, images, _, arrays, _, _ = standalone
    with torch.no_grad():
        outputs = model.network(images)
        features = model.backbone(model.pixels(images))
    for name, feature in features.items():
        expected = arrays[f"feat_{name}"]
        np.testing.assert_allclose(fixture_rules.summary(feature), expected, atol=1e-4 * np.abs(expected).max())
    size = (images.shape[2], images.shape[3])
    for ours, theirs in (("semantic", "semantic"), ("centre", "center"), ("offset", "offset")):
        close(model.upsampling.canvas(outputs[ours], size)[0], arrays[theirs])
    merged = model.postprocess(outputs, Frame.full(images)).maps[0]
    np.testing.assert_array_equal(panoptic_ids(merged, CITYSCAPES, 255_000), arrays["panoptic"])


def test_standalone_losses_and_gradients(standalone) -> None:
    model, images, targets, _, meta, names = standalone
    model.zero_grad()
    losses, _ = model(images, targets)
    for ours, theirs in (("semantic", "Semantic loss"), ("centre", "Center loss"), ("offset", "Offset loss")):
        assert losses[ours].item() == pytest.approx(meta["losses"][theirs], rel=1e-5)
    total = sum(losses.values())
    assert total.item() == pytest.approx(meta["losses"]["Loss"], rel=1e-5)
    total.backward()
    check_gradients(model, names, meta["grad_norms"])


@pytest.fixture(scope="module")
def detectron2(shared, fixture_arrays, fixture_rules):
    arrays, meta = fixture_arrays("pdl_b_forward_r52_ds")
    seed, height, width = meta["fill_seed"], meta["h"], meta["w"]
    state = reference_state(shared, fixture_rules, "panoptic_deeplab_B_r52_dsconv_cityscapes", seed)
    config, weights = convert(state, "detectron2", CITYSCAPES)
    changed = replace(config, image_pool=tuple(meta["crop"]), stuff_area=meta["stuff_area"], dropout=0.0)
    assert (changed.sigma, changed.nms_kernel) == (meta["sigma"], meta["nms"])
    samples = []
    for i, image_seed in enumerate((seed + 1, seed + 11)):
        stuff = [k for k in range(19) if k not in meta["things"]]
        ids, segments = fixture_rules.make_panoptic(seed + 2 + i, height, width, meta["things"], stuff, n_things=8)
        samples.append(sample(fixture_rules.smooth_image(image_seed, 3, height, width), ids, segments))
    images, targets = collate(samples)

    def build() -> PanopticDeepLab:
        model = changed.build(CITYSCAPES)
        model.load_state_dict(weights)
        return model.eval()

    return build, images, targets, arrays, meta, reference_keys(state, "detectron2")


def test_detectron2_outputs_map_and_instances(detectron2, fixture_rules) -> None:
    build, images, _, arrays, meta, _ = detectron2
    model, images = build(), images[:1]
    with torch.no_grad():
        outputs = model.network(images)
        features = model.backbone(model.pixels(images))
    for name in ("res2", "res3", "res5"):
        expected = arrays[f"feat_{name}"]
        np.testing.assert_allclose(fixture_rules.summary(features[name]), expected, atol=1e-4 * np.abs(expected).max())
    size = (images.shape[2], images.shape[3])
    for ours, theirs in (("semantic", "semantic_logits_net"), ("centre", "center_net"), ("offset", "offset_net")):
        close(model.upsampling.canvas(outputs[ours], size)[0], arrays[theirs])
    frame = Frame.full(images)
    merged = model.postprocess(outputs, frame).maps[0]
    np.testing.assert_array_equal(panoptic_ids(merged, CITYSCAPES, -1), arrays["panoptic"])
    instances = model.postprocess(outputs, frame, ["instances"]).instances[0]
    assert len(instances.labels) == meta["n_instances"]
    order = np.argsort(instances.labels, kind="stable")  # the reference goes by class, then by centre
    np.testing.assert_array_equal(instances.labels[order], arrays["inst_classes"])
    np.testing.assert_array_equal(instances.boxes[order], arrays["inst_boxes"])
    np.testing.assert_allclose(instances.scores[order], arrays["inst_scores"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("training", "losses_key", "norms_key", "rel", "worst"),
    [
        (False, "train_mode_bn_eval", "grad_norms_bn_eval", 1e-5, 1e-3),
        # Over a batch's own statistics the gradients are ill-conditioned: the same network in float64 differs
        # by up to 2.8 %, one thread instead of two by 0.3 %. With the two threads of the record it is 2e-7.
        # The loss of centres differs by 3e-6 between one thread and two, and by 3e-5 on a processor without AVX-512.
        (True, "train_batchstats", "grad_norms_train_batchstats", 1e-4, 3e-2),
    ],
)
def test_detectron2_losses_and_gradients(detectron2, training, losses_key, norms_key, rel, worst) -> None:
    build, images, targets, arrays, meta, names = detectron2
    model = build().train(training)
    losses, _ = model(images, targets)
    for ours, theirs in (("semantic", "loss_sem_seg"), ("centre", "loss_center"), ("offset", "loss_offset")):
        assert losses[ours].item() == pytest.approx(meta["losses"][losses_key][theirs], rel=rel)
    sum(losses.values()).backward()
    check_gradients(model, names, meta[norms_key], worst)
    if training:
        close(model.backbone.bn1.running_mean, arrays["stem_running_mean_after_1_step"])
