"""Matching: edge cases, and costs against their definitions, pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from panoptic.matcher import class_cost, cross_entropy_cost, dice_cost, focal_cost, hungarian

NAMES = ("first", "second")


def test_each_group_gets_its_own_best_assignment() -> None:
    cost = torch.rand(6, 9, 4, generator=torch.Generator().manual_seed(0))  # three layers of two images
    valid = torch.tensor([[True, False, True, True], [False, True, False, False]])
    matches = hungarian(cost, valid, NAMES)
    for g in range(6):
        columns = np.flatnonzero(valid[g % 2])
        queries, chosen = linear_sum_assignment(cost[g].numpy()[:, columns])
        own = matches.of(g, 1)
        assert own.groups.tolist() == [0] * len(columns)
        assert own.queries.tolist() == queries.tolist()
        assert own.targets.tolist() == columns[chosen].tolist()
    layer = matches.of(2, 2)
    assert layer.groups.tolist() == [0, 0, 0, 1]


def test_no_target() -> None:
    matches = hungarian(torch.rand(2, 3, 1), torch.zeros(2, 1, dtype=torch.bool), NAMES)
    assert [x.shape for x in (matches.groups, matches.queries, matches.targets)] == [(0,)] * 3
    assert matches.queries.dtype == torch.int64


def test_more_targets_than_queries() -> None:
    cost = torch.full((1, 2, 5), 9.0)
    cost[0, 0, 4] = cost[0, 1, 2] = 1.0
    matches = hungarian(cost, torch.ones(1, 5, dtype=torch.bool), ["image"])
    assert (matches.queries.tolist(), matches.targets.tolist()) == ([0, 1], [4, 2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_of_a_cost_that_is_not_finite_nothing_is_learnt(value: float, caplog: pytest.LogCaptureFixture) -> None:
    cost = torch.rand(4, 3, 2)
    cost[3, 1, 0] = value  # the second layer of the second image
    matches = hungarian(cost, torch.ones(2, 2, dtype=torch.bool), NAMES)
    assert not matches.finite and not matches.of(0, 2).finite and len(matches.groups) == 8
    assert "not finite for second;" in caplog.text
    logit = torch.ones((), requires_grad=True)
    terms = matches.learnable({"mask": 2 * logit})
    terms["mask"].backward()
    assert logit.grad is not None and torch.isnan(torch.stack([terms["mask"], logit.grad])).all()
    only_padding = torch.tensor([[True, True], [False, True]])
    whole = hungarian(cost, only_padding, NAMES)
    assert len(whole.groups) == 6 and whole.learnable({"mask": logit}) == {"mask": logit}


@pytest.mark.parametrize("autocast", [False, True])
def test_costs_are_the_losses_of_each_pair(autocast: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(2, 5, 40, generator=draw)
    masks = (torch.rand(2, 3, 40, generator=draw) > 0.5).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        costs = [focal_cost(logits, masks), cross_entropy_cost(logits, masks), dice_cost(logits, masks)]
    x, t = logits[:, :, None].expand(-1, -1, 3, -1), masks[:, None].expand(-1, 5, -1, -1)
    p, bce = x.sigmoid(), F.binary_cross_entropy_with_logits(x, t, reduction="none")
    focal = (bce * torch.where(t > 0, 0.25 * (1 - p) ** 2, 0.75 * p**2)).mean(3)
    dice = 1 - (2 * (p * t).sum(3) + 1) / ((p + t).sum(3) + 1)
    for cost, expected in zip(costs, [focal, bce.mean(3), dice], strict=True):
        torch.testing.assert_close(cost, expected)


def test_class_cost_ignores_what_padding_holds() -> None:
    logits = torch.randn(1, 2, 4)
    cost = class_cost(logits, torch.tensor([[2, -1]]))
    torch.testing.assert_close(cost[..., 0], -logits.softmax(2)[..., 2])
    assert cost.shape == (1, 2, 2)
