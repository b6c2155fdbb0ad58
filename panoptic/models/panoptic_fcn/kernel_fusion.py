"""Kernel fusion of Panoptic FCN (Li et al., arXiv 2012.00720, section 3.2): kernels that are alike become their mean.

Several levels find the same thing and the same stuff; fused, it is drawn once. Everything is about one image.

Shapes: K kernels of C channels, k of them after the fusion.
"""

from __future__ import annotations

from torch import Tensor

TINY = 1e-8
"""The least norm that a kernel is divided by."""


def fuse(kernels: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The means of kernels and the later ones that are alike.

    A kernel like an earlier one is absorbed by it; one like two earlier ones counts for the first. Where that one is
    absorbed itself, the kernel enters no mean.

    Args:
        kernels: float [K, C], best first.
        groups: bool [K, K], pairs that are alike.

    Returns:
        float [k, C] and the indices int64 [k] of those that stay, in order.
    """
    # row i, column j: j is absorbed by i; a column's first entry counts, and a kernel that is its own first stays
    same = groups.triu()
    first = same.cumsum(0) < 2
    kept = first.diagonal().nonzero()[:, 0]
    members = (same & first)[kept].to(kernels.dtype)
    return members @ kernels / members.sum(1, keepdim=True), kept


def similar(kernels: Tensor, labels: Tensor, threshold: float, class_aware: bool) -> Tensor:
    """bool [K, K], pairs of a cosine of at least `threshold`, of one class where `class_aware`."""
    unit = kernels / kernels.norm(dim=1, keepdim=True).clamp(min=TINY)
    same = unit @ unit.T >= threshold
    same.fill_diagonal_(True)  # rounding, or a kernel of zeros, must not part a kernel from itself
    return same & (labels[:, None] == labels) if class_aware else same


def fuse_classes(kernels: Tensor, labels: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean kernel [k, C] of each class, the classes int64 [k], ascending, and the mean scores [k]."""
    classes = labels.unique()
    members = (labels == classes[:, None]).to(kernels.dtype)
    count = members.sum(1)
    return members @ kernels / count[:, None], classes, members @ scores / count
