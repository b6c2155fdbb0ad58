"""Configurations round trip through JSON; whatever does not fit is refused by its path."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Literal

import pytest

from panoptic import models
from panoptic.training.plain import from_plain, read_config, to_plain, without_download
from tests.support.tiny import TinyBackbone, TinyConfig

CONFIG = TinyConfig(TinyBackbone(width=6, norm="group"), rates=(3, 6, 9), factor=0.5)


@dataclass(frozen=True)
class Other:
    """Another member of a union."""

    size: int
    """No default."""
    mode: Literal["a", "b"] = "a"
    """A choice."""


@dataclass(frozen=True)
class Tree:
    """A configuration with everything in it."""

    model: TinyConfig | Other
    """A union of configurations."""
    crop: tuple[int, int] | None = None
    """Fixed length, or nothing."""
    pairs: tuple[tuple[float, str], ...] = ()
    """Nested tuples."""
    table: dict[str, float] | None = None
    """A mapping."""


@pytest.mark.parametrize(
    "tree",
    [
        Tree(CONFIG, (2, 3), ((1.0, "x"), (2.5, "y")), {"a": 1.0}),
        Tree(Other(4, "b")),
    ],
)
def test_round_trip_through_json(tree):
    plain = json.loads(json.dumps(to_plain(tree)))
    assert from_plain(Tree, plain) == tree


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widht": 3}, r"config: unknown field widht; Tree has model, crop"),
        ({"model": {"class": "Other"}}, r"config\.model: lacks size"),
        ({"model": {"class": "Other", "size": 1, "mode": "c"}}, r"config\.model\.mode: 'c' is none of 'a', 'b'"),
        ({"model": {"class": "Other", "size": True}}, r"config\.model\.size: True is no int"),
        ({"model": {"class": "Gone"}}, r"config\.model: Gone is none of TinyConfig, Other"),
        ({"crop": [1, 2, 3]}, r"config\.crop: \[1, 2, 3\] is none of"),
        ({"pairs": [[1.0]]}, r"config\.pairs\[0\]: 1 values, 2 wanted"),
        ({"class": "Other"}, r"config: is a Other, wanted is a Tree"),
    ],
)
def test_plain_values_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        from_plain(Tree, to_plain(Tree(Other(1))) | change)


def test_an_older_checkpoint_takes_the_defaults_of_new_fields():
    plain = to_plain(CONFIG)
    del plain["rates"]
    assert from_plain(TinyConfig, plain) == replace(CONFIG, rates=TinyConfig().rates)


def test_unknown_architectures_are_named(monkeypatch):
    monkeypatch.setattr(models, "Architecture", TinyConfig)
    with pytest.raises(ValueError, match="'Gone' is not known; known are TinyConfig"):
        read_config({"class": "Gone"})
    with pytest.raises(ValueError, match="no plain value"):
        to_plain({"path": object()})


def test_a_backbone_that_is_about_to_be_replaced_is_not_downloaded():
    plain = {"class": "X", "parts": [{"class": "Backbone", "weights": "timm", "name": "resnet50"}]}
    assert without_download(plain)["parts"][0]["weights"] == "none"
    assert plain["parts"][0]["weights"] == "timm"
