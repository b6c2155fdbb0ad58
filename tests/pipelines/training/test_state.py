"""Micro-batches of a worker."""

from __future__ import annotations

import pytest

from pipelines.config import Train
from pipelines.training.state import accumulation


@pytest.mark.parametrize(
    ("batch", "workers", "micro", "expected"),
    [(8, 2, 0, 1), (8, 2, 4, 1), (8, 2, 3, 2), (8, 2, 1, 4), (12, 1, 5, 3), (7, 1, 3, 7), (6, 6, 2, 1)],
)
def test_accumulation_takes_the_fewest_equal_micro_batches(batch: int, workers: int, micro: int, expected: int):
    assert accumulation(Train(batch=batch, micro_batch=micro), workers) == expected


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match=r"train\.batch 8 cannot be shared by 3 workers; choose a multiple of 3"):
        accumulation(Train(batch=8), 3)
