"""Checkpoints that `panoptic.load` opens through the pipeline."""

from __future__ import annotations

import torch

from panoptic.transforms import Resize
from pipelines.training.sources import open_checkpoint
from tests.support.stored import write_model


def test_a_checkpoint_comes_with_its_view_and_options(tmp_path, small_categories) -> None:
    folder = write_model(tmp_path / "step_000001", small_categories, seed=3)
    model, resize, options = open_checkpoint(folder)
    assert resize == Resize() and options == {"train.validation_batch": 2} and not model.training
    torch.manual_seed(3)
    expected = type(model)(model.config, small_categories).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
