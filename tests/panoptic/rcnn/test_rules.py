"""Proposals, matching and sampling where no published array says what they do: ties, limits, nothing to find."""

from __future__ import annotations

import pytest
import torch

from panoptic.rcnn import boxes as rules
from panoptic.rcnn.boxes import decode, encode, grid_anchors, match, overlaps, sample
from panoptic.rcnn.roi_align import pool
from panoptic.rcnn.roi_heads import (
    BoxHead,
    Detection,
    MaskHead,
    Sampled,
    box_losses,
    detect,
    mask_loss,
    match_regions,
    sample_regions,
)
from panoptic.rcnn.rpn import (
    Candidates,
    Proposals,
    RegionHead,
    Regions,
    anchors_of,
    flatten,
    propose,
    region_losses,
    suppress,
)


def random_boxes(count: int, seed: int = 0, side: float = 60) -> torch.Tensor:
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)) * side
    low, high = corners.amin(1), corners.amax(1)
    return torch.cat([low, high + 1], 1)


def test_code_there_and_back() -> None:
    boxes, truth = random_boxes(20, 0), random_boxes(20, 1)
    for weights in (rules.UNIT, (10.0, 10.0, 5.0, 5.0)):
        torch.testing.assert_close(decode(boxes, encode(boxes, truth, weights), weights), truth)


def test_a_box_grows_by_no_more_than_the_limit() -> None:
    grown = decode(torch.tensor([[0.0, 0, 16, 16]]), torch.tensor([[0.0, 0, 50, 50]]))
    torch.testing.assert_close(grown, torch.tensor([[-492.0, -492, 508, 508]]))


def test_matching_is_the_same_in_blocks(monkeypatch) -> None:
    truth, boxes = random_boxes(7, 2), random_boxes(50, 3)
    whole = match(truth, boxes, 0.3, 0.7, low_quality=True)
    monkeypatch.setattr(rules, "PAIRS", 40)
    parts = match(truth, boxes, 0.3, 0.7, low_quality=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    best = overlaps(truth, boxes)
    assert torch.equal(whole[0], best.argmax(0))
    assert set(best.argmax(1).tolist()) <= set((whole[1] == 1).nonzero()[:, 0].tolist())


def test_without_truth_everything_is_background() -> None:
    index, labels = match(torch.zeros(0, 4), random_boxes(9), 0.3, 0.7, low_quality=True)
    assert index.tolist() == labels.tolist() == [0] * 9


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"), [(30, 70, (8, 8)), (3, 70, (3, 13)), (30, 2, (8, 2)), (0, 5, (0, 5))]
)
def test_samples_are_filled_up_with_negatives(positives: int, negatives: int, expected: tuple[int, int]) -> None:
    labels = torch.tensor([1] * positives + [0] * negatives + [-1] * 11)
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    ((first, second),) = sample([labels], 16, 0.5)
    assert (len(first), len(second)) == expected
    assert (labels[first] == 1).all() and (labels[second] == 0).all()
    assert len(first.unique()) == len(first) and len(second.unique()) == len(second)


def test_positives_are_drawn_before_negatives() -> None:
    labels = torch.tensor([0, 1, 1, 0, 0, 1, 0])
    torch.manual_seed(3)
    ((first, second),) = sample([labels], 4, 0.5)
    torch.manual_seed(3)
    assert first.tolist() == torch.tensor([1, 2, 5])[torch.randperm(3)[:2]].tolist()
    assert second.tolist() == torch.tensor([0, 3, 4, 6])[torch.randperm(4)[:2]].tolist()


def test_several_images_are_sampled_as_one_after_the_other() -> None:
    labels = [torch.tensor(values) for values in ([0, 1, -1, 1, 0, 1], [0, 0, 0], [1, -1, 1], [1, 0, 0, 1, 1])]
    torch.manual_seed(5)
    together = sample(labels, 3, 0.5)
    torch.manual_seed(5)
    alone = [sample([image], 3, 0.5)[0] for image in labels]
    assert [[part.tolist() for part in drawn] for drawn in together] == [
        [part.tolist() for part in drawn] for drawn in alone
    ]


def outputs(regions: Regions, scale: float = 1.0, seed: int = 0):
    torch.manual_seed(seed)
    head = RegionHead(4, 8, len(regions.ratios))
    features = [scale * torch.randn(2, 4, 8, 12), scale * torch.randn(2, 4, 4, 6)]
    logits, deltas = head([feature.requires_grad_() for feature in features])
    return head, *flatten(logits, deltas), anchors_of(logits, (4, 8), regions)


def test_training_and_testing_have_limits_of_their_own() -> None:
    regions = Regions((8, 16), train_before=40, train_after=9, test_before=5, test_after=100)
    _, logits, deltas, anchors = outputs(regions)
    sizes = torch.tensor([[32, 48], [20, 31]])
    training, testing = (propose(logits, deltas, anchors, sizes, regions, mode) for mode in (True, False))
    for trained, tested, (height, width) in zip(training, testing, sizes.tolist(), strict=True):
        assert len(trained.boxes) <= 9 and len(tested.boxes) <= 10
        for found in (trained, tested):
            assert not found.boxes.requires_grad
            assert (found.logits[:-1] >= found.logits[1:]).all()
            assert (found.boxes >= 0).all() and (found.boxes[:, [0, 2]] <= width).all()
            assert (found.boxes[:, [1, 3]] <= height).all()
            assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()


def test_boxes_that_are_not_finite_are_not_proposed() -> None:
    regions = Regions((8, 16))
    _, logits, deltas, anchors = outputs(regions)
    broken = [level.detach().clone() for level in deltas]
    broken[0][0, :5, 0] = torch.nan
    scores = [level.detach().clone() for level in logits]
    scores[1][1] = torch.inf
    found = propose(scores, broken, anchors, torch.tensor([[32, 48]] * 2), regions, False)
    assert all(part.boxes.isfinite().all() and part.logits.isfinite().all() for part in found)


@pytest.mark.parametrize("after", [3, 40, 200])
@pytest.mark.parametrize("append", [False, True])
def test_marked_boxes_change_nothing_that_is_drawn(after: int, append: bool) -> None:
    """Proposals whose number the host does not know are those of which it does, with others behind them."""
    torch.manual_seed(0)
    corners = torch.rand(2, 60, 2) * 80
    found = Candidates(
        torch.cat([corners, corners + torch.rand(2, 60, 2) * 30], 2),
        torch.randn(2, 60),
        torch.arange(3).repeat_interleave(20),
        torch.rand(2, 60) < torch.tensor([[0.5], [0.0]]),  # none of the second image is usable
    )
    found.boxes[~found.usable] = torch.nan
    exact, marked = (suppress(found, 0.5, after, mark=mark) for mark in (False, True))
    truth, detection = [found.boxes[0, found.usable[0]][:2] + 1, torch.zeros(0, 4)], Detection(append_truth=append)
    drawn = []
    for proposals in (exact, marked):
        regions, matched = match_regions(proposals, truth, detection)
        torch.manual_seed(1)
        pairs = sample([labels for _, labels in matched], 16, 0.25)
        drawn.append([[boxes[chosen] for chosen in pair] for boxes, pair in zip(regions, pairs, strict=True)])
    for few, more in zip(exact, marked, strict=True):
        assert more.usable is not None and torch.equal(more.boxes[more.usable], few.boxes)
        assert not more.usable[len(few.boxes) :].any()
    assert len(marked[1].boxes) == min(after, 60) and len(exact[1].boxes) == 0
    for one, other in zip(*drawn, strict=True):
        assert all(torch.equal(few, more) for few, more in zip(one, other, strict=True))


def test_sizes_are_shared_out_over_the_levels() -> None:
    cells = Regions((8, 16, 32, 64), ratios=(1.0,)).cells(2)
    assert [cell[:, 2].tolist() for cell in cells] == [[4, 8], [16, 32]]
    with pytest.raises(ValueError, match=r"regions\.sizes: 4 sizes cannot be shared out over 3 levels"):
        Regions((8, 16, 32, 64)).cells(3)


def test_anchors_stand_on_the_corner_of_their_cell_or_in_its_middle() -> None:
    cell = torch.tensor([[-2.0, -2, 2, 2]])
    assert grid_anchors(cell, 2, 2, 8)[3].tolist() == [6, 6, 10, 10]
    assert grid_anchors(cell, 2, 2, 8, 0.5)[0].tolist() == [2, 2, 6, 6]


@pytest.mark.parametrize("things", [0, 1, 300])
def test_losses_of_proposals_reach_every_layer(things: int) -> None:
    regions = Regions((8, 16), samples=32)
    head, logits, deltas, anchors = outputs(regions)
    truth = [random_boxes(things, 5, 30), torch.zeros(0, 4)]
    objectness, region = region_losses(logits, deltas, anchors, truth, regions)
    (objectness + region).backward()
    assert torch.isfinite(objectness) and torch.isfinite(region)
    assert (region > 0) == (things > 0)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())


def test_losses_of_proposals_by_hand() -> None:
    """Two anchors of two cells: one on a thing, one on nothing."""
    anchors = [torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])]
    logits, deltas = [torch.tensor([[0.5, -1.0]])], [torch.tensor([[[0.1, 0.2, 0, 0], [9, 9, 9, 9.0]]])]
    truth = [torch.tensor([[1.0, 0, 11, 10]])]
    objectness, region = region_losses(logits, deltas, anchors, truth, Regions((8,), samples=4))
    expected = torch.log1p(torch.exp(torch.tensor([-0.5, -1.0]))).sum() / 4
    torch.testing.assert_close(objectness, expected)
    torch.testing.assert_close(region, torch.tensor(0.2 / 4))  # the centre lies 0.1 widths to the right, as said


def test_regions_to_learn_from() -> None:
    proposals = [Proposals(torch.tensor([[0.0, 0, 10, 10], [40, 40, 50, 50]]), torch.zeros(2))]
    truth, classes = [torch.tensor([[0.0, 0, 10, 11], [20, 20, 30, 30]])], [torch.tensor([2, 0])]
    (found,) = sample_regions(proposals, truth, classes, 3, Detection(samples=100, positive_fraction=1.0))
    assert sorted(found.classes.tolist()) == [0, 2, 2, 3]  # both true boxes, the first proposal; the second is empty
    assert found.classes[-1] == 3 and len(found.owners) == 3
    assert torch.equal(found.classes[:3], classes[0][found.owners])
    (found,) = sample_regions(
        proposals, truth, classes, 3, Detection(samples=100, positive_fraction=1.0, append_truth=False)
    )
    assert found.classes.tolist() == [2, 3] and found.positives.tolist() == [[0, 0, 10, 10]]


def test_losses_of_the_heads_by_hand() -> None:
    regions = torch.tensor([[0.0, 0, 10, 10], [0, 0, 5, 5]])
    sampled = [Sampled(regions, torch.tensor([1, 2]), torch.tensor([0]))]
    logits, deltas = torch.zeros(2, 3), torch.zeros(2, 8)
    deltas[0, 4] = 3.0  # dx of class 1
    entropy, box = box_losses(logits, deltas, sampled, [torch.tensor([[1.0, 0, 11, 10]])], Detection())
    torch.testing.assert_close(entropy, torch.tensor(3.0).log())
    torch.testing.assert_close(box, torch.tensor(2.0 / 2))  # says 3, should say 10 x 0.1; over two regions


@pytest.mark.parametrize("count", [0, 3])
def test_heads_learn_from_any_number_of_regions(count: int) -> None:
    torch.manual_seed(0)
    box, mask = BoxHead(4, 3, 8, 5), MaskHead(4, 6, 2, 5)
    features = [torch.randn(1, 4, 16, 16, requires_grad=True), torch.randn(1, 4, 8, 8, requires_grad=True)]
    regions = [random_boxes(count, 4)]
    logits, deltas = box(pool(features, (4, 8), regions, 3))
    classes = torch.arange(count)
    masks = mask(pool(features, (4, 8), regions, 4), classes)
    assert masks.shape == (count, 8, 8)
    sampled = [Sampled(regions[0], classes, torch.arange(count))]
    entropy, distance = box_losses(logits, deltas, sampled, [random_boxes(count, 6)], Detection())
    total = entropy + distance + mask_loss(masks, torch.ones(count, 8, 8, dtype=torch.bool))
    total.backward()
    assert torch.isfinite(total) and (total > 0) == (count > 0)
    assert all(p.grad is not None for part in (box, mask) for p in part.parameters())
    assert all(feature.grad is not None for feature in features)


def test_the_mask_of_a_class_is_that_row_of_the_predictor() -> None:
    torch.manual_seed(1)
    head = MaskHead(4, 6, 1, 5)
    torch.nn.init.normal_(head.predictor.bias)
    pooled, classes = torch.randn(3, 4, 4, 4), torch.tensor([4, 0, 4])
    hidden = torch.relu(head.deconv(torch.relu(head.convs[0](pooled))))
    torch.testing.assert_close(head(pooled, classes), head.predictor(hidden)[range(3), classes])


def test_detections_are_suppressed_class_by_class() -> None:
    regions = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [30, 30, 70, 40]])
    boxes = regions.repeat(1, 2)  # two classes
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.04, 0.46], [torch.nan, 0.9, 0.1]])
    found = detect(boxes, probabilities, (35, 60), Detection())
    assert found.classes.tolist() == [0, 1] and found.regions.tolist() == [0, 0]
    found = detect(boxes, probabilities.nan_to_num(0.0), (35, 60), Detection(most=2))
    assert found.scores.tolist() == pytest.approx([0.9, 0.6])
    assert found.boxes[0].tolist() == [30, 30, 60, 35]  # cut to the image
