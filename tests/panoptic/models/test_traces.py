"""Every architecture computes what it did: twenty steps of training, and what it makes of a batch.

A refactor leaves these numbers alone; a change of behaviour changes them on purpose, and then records them anew with
`python -m tests.panoptic.models.record_traces`, which prints what changed.

Weights moved by 1e-14 of themselves, as another processor's rounding might, move losses by 1e-9 at most and no
digest; but for `STEADY` cases, of which only the first steps are compared. With PANOPTIC_EXACT_TRACES=1 in the
environment every loss must agree in every bit: for a refactor, on the machine and with the libraries that recorded
them (or record them there first, before the first change).
"""

from __future__ import annotations

import os
import typing

import pytest

from panoptic import models
from tests.panoptic.models.traces import CASES, STEADY, STEPS, differences, digests, measured, recorded

FIRST = {type(config): name for name, config in reversed(CASES.items())}
"""The case of each architecture that every change is tried on; the others are nightly."""

NAMES = [
    pytest.param(name, marks=[] if FIRST[type(config)] == name else pytest.mark.nightly)
    for name, config in CASES.items()
]

EXACT = os.environ.get("PANOPTIC_EXACT_TRACES") == "1"


@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_and_a_batch_are_what_they_were(name: str) -> None:
    rtol, steps = (0.0, STEPS) if EXACT else (1e-6, STEADY.get(name, STEPS))
    assert not differences(recorded()[name], measured(name), rtol, steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_threads_make_the_same_of_a_batch(name: str) -> None:
    before = recorded()[name]
    assert digests(name, count=2) == {kind: before[kind] for kind in ("outputs", "truth")}


def test_every_architecture_is_traced() -> None:
    traced = recorded()
    assert traced.keys() == CASES.keys()
    assert {type(config) for config in CASES.values()} == set(typing.get_args(models.Architecture))
    for name, case in traced.items():
        assert len(case["losses"]) > 3, name
        assert all(len(values) == STEPS for values in case["losses"].values()), name
        assert all(count > 3 for count in case["truth"]["counts"]["segments"]), name


def test_a_difference_is_found_and_named() -> None:
    case = recorded()["deeplab_standalone"]
    (term, values), *_ = case["losses"].items()
    moved = {**case, "losses": {**case["losses"], term: [*values[:-1], values[-1] * (1 + 1e-4)]}}
    assert differences(case, case, 0.0) == []
    assert differences(case, moved, 1e-3) == []
    (line,) = differences(case, moved, 1e-6)
    assert line.startswith(f"loss {term} at 1 of {STEPS} steps, first at {STEPS - 1} (")
    other = {**case, "outputs": {**case["outputs"], "maps": "0"}}
    assert differences(case, other, 1.0) == ["maps of outputs"]
