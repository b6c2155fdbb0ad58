"""Numbers that the published implementation of Panoptic FCN produced, for the tests of its parts."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def published_units(fixture_arrays) -> tuple[dict[str, torch.Tensor], dict]:
    """Inputs and results of single functions, and the options that they ran with."""
    arrays, meta = fixture_arrays("pfcn_units")
    return {key: torch.from_numpy(value) for key, value in arrays.items()}, meta


@pytest.fixture(scope="module")
def units(published_units) -> dict[str, torch.Tensor]:
    """Only the arrays."""
    return published_units[0]
