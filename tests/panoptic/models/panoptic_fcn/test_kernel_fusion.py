"""Fusion of kernels against the numbers of the published implementation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from panoptic.models.panoptic_fcn.kernel_fusion import fuse, fuse_classes, similar


@pytest.mark.parametrize(("prefix", "aware"), [("fuse_thing", True), ("fuse_agn", False)])
def test_published_fusion(units, prefix: str, aware: bool) -> None:
    arrays = units
    kernels, kept = fuse(arrays["fuse_kern"], similar(arrays["fuse_kern"], arrays["fuse_cate"], 0.9, aware))
    torch.testing.assert_close(kernels, arrays[f"{prefix}_kern"], rtol=0, atol=1e-6)
    assert torch.equal(arrays["fuse_cate"][kept], arrays[f"{prefix}_cate"])
    assert torch.equal(arrays["fuse_score"][kept], arrays[f"{prefix}_score"])


def test_published_fusion_of_stuff(units) -> None:
    arrays = units
    kernels, labels, scores = fuse_classes(arrays["fuse_kern"], arrays["fuse_cate"], arrays["fuse_score"])
    torch.testing.assert_close(kernels, arrays["fuse_stuff_kern"], rtol=0, atol=1e-6)
    torch.testing.assert_close(scores, arrays["fuse_stuff_score"], rtol=0, atol=1e-6)
    assert torch.equal(labels, arrays["fuse_stuff_cate"])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**16), st.lists(st.integers(1, 4), min_size=1, max_size=5), st.floats(0.3, 1.0), st.booleans())
def test_fusing_identical_kernels_changes_nothing(seed: int, copies: list[int], threshold: float, aware: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    apart = torch.eye(8)[: len(copies)] * torch.rand(len(copies), 1, generator=rng).add(0.1)
    labels = torch.randint(0, 3, (len(copies),), generator=rng)
    repeated = torch.tensor(copies)
    order = torch.randperm(int(repeated.sum()), generator=rng)
    owner = torch.arange(len(copies)).repeat_interleave(repeated)[order]
    kernels, kept = fuse(apart[owner], similar(apart[owner], labels[owner], threshold, aware))
    torch.testing.assert_close(kernels, apart[owner[kept]])
    assert sorted(owner[kept].tolist()) == list(range(len(copies)))
    again, still = fuse(kernels, similar(kernels, labels[owner[kept]], threshold, aware))
    torch.testing.assert_close(again, kernels)
    assert still.tolist() == list(range(len(copies)))


def test_a_kernel_of_zeros_and_no_kernel_at_all() -> None:
    kernels = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    fused, kept = fuse(kernels, similar(kernels, torch.tensor([0, 0]), 0.9, True))
    assert torch.equal(fused, kernels) and kept.tolist() == [0, 1]
    empty = torch.zeros(0, 2)
    none = torch.zeros(0, dtype=torch.int64)
    assert fuse(empty, similar(empty, none, 0.9, True))[0].shape == (0, 2)
    assert fuse_classes(empty, none, torch.zeros(0))[0].shape == (0, 2)
