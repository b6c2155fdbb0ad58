"""The plan on paper: the table of infra/README.md is what its command prints, and it does not deceive itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks import plan as paper

README = (Path(__file__).resolve().parents[2] / "infra" / "README.md").read_text()


def one() -> paper.Training:
    return paper.Training("x", "coco", 1_000_000, 16, 10, 16, 50.0, 4e8, 0.01)


def test_the_table_in_the_readme_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    paper.main([])
    assert capsys.readouterr().out.strip() in README


def test_more_gpus_are_faster_until_a_limit_rules() -> None:
    plans = [paper.plan(one(), gpus) for gpus in paper.GPUS]
    assert [p.rate for p in plans] == sorted(p.rate for p in plans)
    assert plans[0].shares["all-reduce"] == 0.0 and plans[0].rate == pytest.approx(50.0)
    assert plans[0].hours == pytest.approx((1e6 / 50 + 10 * 5000 * (1 / 150 + 0.01)) / 3600)
    assert plans[0].dollars == pytest.approx(plans[0].hours * paper.PUBLISHED_PRICE)
    assert all(p.rate <= p.gpus * 50.0 for p in plans)


def test_a_rate_is_cut_to_the_limit_that_rules() -> None:
    fast = replace(one(), rate=500.0)
    cut = paper.plan(fast, 512)
    assert cut.rate == pytest.approx(paper.PUBLISHED_GETS) and cut.next == "requests to the store"
    free = paper.plan(fast, 512, window=64)
    assert free.rate > 10 * cut.rate and free.shares["requests to the store"] < 1
    large = replace(fast, data="mapillary")
    assert paper.plan(large, 1).next == "CPU of the feed" and paper.plan(large, 1).rate < 500
    assert paper.plan(large, 1, copies=True).rate > paper.plan(large, 1).rate


def test_gradients_are_those_of_what_is_trained() -> None:
    """A ResNet-50 alone has 23.5 million weights; whoever has far fewer was not built for the data set's classes."""
    for architecture in ("panoptic-fpn", "detr"):
        assert 25e6 < paper.training(architecture, "coco").gradients / 4 < 60e6
    stand_in = paper.training("detr", "mapillary")
    assert stand_in.images == paper.training("panoptic-fpn", "mapillary").images and "no preset" in stand_in.name
