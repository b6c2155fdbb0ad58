"""Panoptic FCN where no published array says it: any batch, nothing found, the cap, every option, four photographs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from panoptic.backbones import Backbone
from panoptic.models.panoptic_fcn.model import PanopticFCN, PanopticFCNConfig
from panoptic.models.panoptic_fcn.targets import LEVELS
from panoptic.segmentation import IGNORE, Categories, Frame, Sample, collate
from tests.support.small import SMALL_FCN


def build(config: PanopticFCNConfig, categories: Categories) -> PanopticFCN:
    torch.manual_seed(0)
    return config.build(categories)


def samples(categories: Categories, draw, sizes=((61, 93), (48, 80)), things: int = 5) -> list[Sample]:
    rng = np.random.default_rng(2)
    truths = [draw(rng, *size, categories, things=things, crowd=True) for size in sizes]
    return [Sample(rng.integers(0, 256, (*t.size, 3), np.uint8), t, str(k)) for k, t in enumerate(truths)]


def test_a_batch_is_merged_as_its_images_are_one_by_one(small_categories, random_segmentation) -> None:
    model = build(SMALL_FCN, small_categories).eval()
    images, targets = collate(samples(small_categories, random_segmentation), model.divisor)
    frame = replace(targets.frame, output_sizes=torch.tensor([[70, 101], [48, 80]]))
    with torch.no_grad():
        outputs = model.network(images, frame)
    together = list(
        zip(
            model.postprocess(outputs, frame).maps,
            model.postprocess(outputs, frame, ["instances"]).instances,
            model.postprocess(outputs, frame, ["semantics"]).semantics,
            strict=True,
        )
    )
    for b, (merged, instances, classes) in enumerate(together):
        one = slice(b, b + 1)
        alone = Frame(frame.canvas, frame.sizes[one], frame.output_sizes[one])
        with torch.no_grad():
            own = model.network(images[one], alone)
        for name, value in own.items():
            torch.testing.assert_close(value, outputs[name][one], rtol=1e-4, atol=1e-4)
        cut = {name: value[one] for name, value in outputs.items()}
        (again,) = model.postprocess(cut, alone).maps
        np.testing.assert_array_equal(again.segments, merged.segments)
        np.testing.assert_array_equal(again.scores, merged.scores)
        np.testing.assert_array_equal(
            model.postprocess(cut, alone, ["instances"]).instances[0].scores, instances.scores
        )
        np.testing.assert_array_equal(model.postprocess(cut, alone, ["semantics"]).semantics[0], classes)


@pytest.mark.parametrize("regions", ["with_things", "stuff", "all"])
@pytest.mark.parametrize("found", ["nothing", "things", "stuff"])
def test_no_thing_no_stuff_or_neither(regions, found, small_categories, random_segmentation) -> None:
    config = replace(
        SMALL_FCN,
        regions=regions,
        thing_threshold=0.0 if found == "things" else 1.0,
        region_threshold=0.0 if found == "stuff" else 1.0,
        merged_score=0.0,
        lowest_score=0.0,
    )
    model = build(config, small_categories).eval()
    images, targets = collate(samples(small_categories, random_segmentation), model.divisor)
    with torch.no_grad():
        outputs = model.network(images, targets.frame)
    for merged, instances, classes, size in zip(
        model.postprocess(outputs, targets.frame).maps,
        model.postprocess(outputs, targets.frame, ["instances"]).instances,
        model.postprocess(outputs, targets.frame, ["semantics"]).semantics,
        targets.frame.output_sizes.tolist(),
        strict=True,
    ):
        assert merged.size == classes.shape == tuple(size)
        is_thing = np.array(small_categories.is_thing)[merged.labels]
        assert (found == "things" or not is_thing.any()) and (found == "stuff" or is_thing.all())
        assert found == "things" or len(instances.labels) == 0
        if found == "nothing":
            assert not merged.segments.any() and (classes == IGNORE).all()


def test_more_things_than_a_level_holds_and_fewer_cells_than_points(small_categories, random_segmentation) -> None:
    config = replace(SMALL_FCN, scales=((1, 2048),) * 5, most_things=3, points=9)
    model = build(config, small_categories).train()
    images, targets = collate(samples(small_categories, random_segmentation, things=20), model.divisor)
    losses, _ = model(images, targets)
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    truth = model.truth(targets, model.network(images, targets.frame))
    assert (truth["position.things"] >= 0).sum(2).amax() == 3


def test_losses_are_weighted_and_divided_as_published(small_categories, random_segmentation) -> None:
    model = build(SMALL_FCN, small_categories).eval()
    images, targets = collate(samples(small_categories, random_segmentation), model.divisor)
    with torch.no_grad():
        outputs = model.network(images, targets.frame)
        once = model.loss(outputs, targets)
        model.config = replace(SMALL_FCN, position_weight=3.0, mask_weight=6.0)
        weighted = model.loss(outputs, targets)
        twice = {name: torch.cat([value, value]) for name, value in outputs.items()}
        frame = Frame(targets.frame.canvas, targets.frame.sizes.repeat(2, 1), targets.frame.output_sizes.repeat(2, 1))
        model.config = SMALL_FCN
        repeated = replace(
            targets,
            segments=targets.segments.repeat(2, 1, 1),
            labels=targets.labels.repeat(2, 1),
            crowd=targets.crowd.repeat(2, 1),
            frame=frame,
        )
        doubled = model.loss(twice, repeated)
    factors = {"thing_position": 3, "stuff_position": 3, "thing_mask": 2, "stuff_mask": 2}
    for name, factor in factors.items():
        assert float(weighted[name]) == pytest.approx(factor * float(once[name]), rel=1e-5)
        assert float(doubled[name]) == pytest.approx(float(once[name]), rel=1e-5)  # means, not sums


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scales=((1, 64),)), "scales and pool: 1 and 5"),
        (dict(backbone=Backbone("resnet18", output_stride=16)), "output_stride: 16, but the pyramid needs 32"),
    ],
)
def test_options_that_contradict_each_other_are_named(changes, message, small_categories) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL_FCN, **changes).build(small_categories)


def test_classes_that_it_cannot_do_without() -> None:
    only_stuff = Categories(("sky",), (False,), (1,), ((0, 0, 0),))
    only_things = Categories(("cat",), (True,), (1,), ((0, 0, 0),))
    with pytest.raises(ValueError, match="needs a thing class"):
        SMALL_FCN.build(only_stuff)
    with pytest.raises(ValueError, match="without stuff: with_things"):
        replace(SMALL_FCN, regions="stuff").build(only_things)
    assert replace(SMALL_FCN).build(only_things).region_head.out_channels == 1


ABLATIONS = {
    1: [dict(position_deform=deform, head_convs=count) for deform, count in ((False, 1), (False, 4), (True, 3))],
    2: [dict(kernel_coordinates=w, encoder_coordinates=f) for w in (False, True) for f in (False, True)],
    3: [dict(fusion_threshold=0.8), dict(class_aware=False)],
    4: [dict(encoder_channels=count) for count in (16, 256)],
    5: [dict(feature=feature) for feature in ("p2", "summed", "semantic_fpn")],
    6: [dict(points=count) for count in (0, 1, 9)],
    8: [dict(encoder_deform=True, encoder_channels=32)],
}
"""Of the paper's tables, some rows each (table 7 is the length of the training)."""


@pytest.mark.parametrize(
    "changes",
    [pytest.param(c, id=f"table{table}-{k}") for table, rows in ABLATIONS.items() for k, c in enumerate(rows)],
)
def test_every_ablation_is_an_option(changes, small_categories, random_segmentation) -> None:
    model = build(replace(SMALL_FCN, **changes), small_categories).train()
    images, targets = collate(samples(small_categories, random_segmentation, sizes=((64, 96),)), model.divisor)
    losses, maps = model(images, targets, segment=True)
    assert maps is not None and all(torch.isfinite(value) for value in losses.values())


def test_stuff_may_be_where_its_centre_is(small_categories, random_segmentation) -> None:
    """Everything learns; with the truth in place of outputs maps are those of regions; a lone peak finds its class."""
    torch.manual_seed(0)
    config = replace(SMALL_FCN, stuff_positions="centres", stuff_area=0)
    model = build(config, small_categories)
    images, targets = collate(samples(small_categories, random_segmentation), model.divisor)
    outputs = model.network(images, targets.frame)
    terms = model.loss(outputs, targets)
    regions = build(replace(config, stuff_positions="regions"), small_categories)
    usual = regions.loss(outputs, targets)
    assert terms["thing_position"] == usual["thing_position"] and terms["stuff_position"] != usual["stuff_position"]
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

    model.eval()
    with torch.no_grad():
        outputs = model.network(images, targets.frame)
        truth = model.truth(targets, outputs)
    assert all((truth[f"position.{level}"].flatten(2).sum(2) <= 1).all() for level in LEVELS)
    with torch.no_grad():
        usual_truth = regions.eval().truth(targets, outputs)
    expected_maps = regions.postprocess(outputs | usual_truth, targets.frame).maps
    for merge in ("greedy", "argmax"):
        model.config = replace(config, merge=merge)
        for merged, expected in zip(model.postprocess(outputs | truth, targets.frame).maps, expected_maps, strict=True):
            assert len(expected.labels) > 3
            known = (expected.semantic() != IGNORE) | (merge == "greedy")  # argmax has a class for a crowd of things
            np.testing.assert_array_equal(merged.semantic()[known], expected.semantic()[known])
    model.config = config
    with torch.no_grad():
        for level in LEVELS:
            outputs[f"regions_{level}"] = torch.full_like(outputs[f"regions_{level}"], -200.0)
            outputs[f"things_{level}"] = torch.full_like(outputs[f"things_{level}"], -200.0)
        outputs["regions_p3"][:, 2, 1, 1] = 3.0
        found = model._region_kernels(outputs, 0)
        expected = model.stuff_embed(outputs["kernels_p3"])[0, :, 1, 1]
    assert found.regions.tolist() == [2] and torch.allclose(found.kernels[0], expected, atol=1e-5)
    assert found.scores[0] == pytest.approx(0.953, abs=1e-3)
