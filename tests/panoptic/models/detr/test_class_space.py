"""Class indices to logits and back."""

from __future__ import annotations

import pytest
import torch

from panoptic.models.detr.class_space import ClassSpace


def test_one_logit_a_class() -> None:
    space = ClassSpace(3)
    labels = torch.tensor([[0, 2, -1]])
    assert space.to_logits(labels).tolist() == [[0, 2, 3]]
    assert space.to_classes(torch.tensor([0, 2, 3])).tolist() == [0, 2, -1]


def test_published_logits_that_no_class_uses_are_no_object() -> None:
    space = ClassSpace(3, 9)
    space.load_state_dict({"index": torch.tensor([7, 1, 4])})
    assert space.to_logits(torch.tensor([0, 1, 2, -1])).tolist() == [7, 1, 4, 9]
    assert space.to_classes(torch.arange(10)).tolist() == [-1, 1, -1, -1, 2, -1, -1, 0, -1, -1]
    with pytest.raises(ValueError, match="2 cannot stand for 3 classes"):
        ClassSpace(3, 2)
