"""Micro-batches of a worker."""

from __future__ import annotations

import pickle

import pytest

from pipelines.config import Train, Workers, flatten, override
from pipelines.presets import PRESETS
from pipelines.training.sharing import accumulation, workers_for


@pytest.mark.parametrize(
    ("batch", "workers", "micro", "expected"),
    [(8, 2, 0, 1), (8, 2, 4, 1), (8, 2, 3, 2), (8, 2, 1, 4), (12, 1, 5, 3), (7, 1, 3, 7), (6, 6, 2, 1)],
)
def test_accumulation_takes_the_fewest_equal_micro_batches(batch: int, workers: int, micro: int, expected: int):
    assert accumulation(Train(batch=batch, micro_batch=micro), workers) == expected


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match=r"train\.batch 8 cannot be shared by 3 workers; choose a multiple of 3"):
        accumulation(Train(batch=8), 3)


def test_a_range_of_workers_takes_the_most_that_share_the_batch():
    options = Train(batch=8, workers=Workers(4, 1))
    assert [workers_for(options, room) for room in (1, 2, 3, 4, 9)] == [1, 2, 2, 4, 4]
    assert workers_for(Train(batch=8, workers=2), 5) == 2
    with pytest.raises(ValueError, match=r"train\.batch 8 cannot be shared by 3 workers"):
        workers_for(Train(batch=8, workers=3), 3)


def test_a_range_of_workers_is_parsed_stored_and_sent():
    demo = PRESETS["demo"]()
    ranged = override(demo, {"train.workers": "1..4"})
    assert (ranged.train.workers, ranged.train.workers.least) == (4, 1)
    assert flatten(ranged)["train.workers"] == "1..4" and flatten(demo)["train.workers"] == 2
    again = override(demo, flatten(ranged)).train.workers
    assert (again, again.least) == (4, 1) == (pickle.loads(pickle.dumps(again)), again.least)
    for bad in ("4..1", "0..2", "a..b"):
        with pytest.raises(ValueError, match=r"train\.workers: .*a range goes from 1"):
            override(demo, {"train.workers": bad})
