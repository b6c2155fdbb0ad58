"""Where Panoptic FCN makes its kernels, and which of them say the same (Li et al., arXiv 2012.00720, section 3.2).

A peak of a thing's score map, and every region of a class, make a kernel each; what they draw is merged by
`drawing`. Everything is about one image.

Shapes: h x w a level, T thing classes, R region classes, K kernels of C channels.
"""

from __future__ import annotations

from torch import Tensor

TINY = 1e-8
"""The least norm that a kernel is divided by."""


def fuse(kernels: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Average kernels with the later ones that say the same.

    A kernel that an earlier one says the same as is absorbed; one that two earlier ones do counts for the first.

    Args:
        kernels: float [K, C], best first.
        groups: bool [K, K], whether two kernels say the same.

    Returns:
        float [k, C] and the indices int64 [k] of those that stay, in order.
    """
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
    """Mean kernel [k, C] and mean score [k] of each class, and the classes int64 [k], ascending."""
    classes = labels.unique()
    members = (labels == classes[:, None]).to(kernels.dtype)
    count = members.sum(1)
    return members @ kernels / count[:, None], classes, members @ scores / count
