"""Normalisation layers, and freezing them.

Shapes: B images, C channels, h x w a feature map.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["batch", "sync", "group", "frozen"]
"""batch: over the worker's batch; sync: over all workers (GPU only when training); group: 32 groups;
frozen: fixed statistics and affine."""


NORM_EPS = 1e-5


class FrozenBatchNorm(nn.Module):
    """Batch norm whose statistics and affine are constants; its keys are those of `nn.BatchNorm2d`.

    A checkpoint of either loads into the other, so stages can be frozen or thawed by config alone. Not
    a subclass of batch norm, so that SyncBN conversion passes it by. Unloaded it is the exact identity:
    the running variance starts at 1 - eps, as in detectron2.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels) - NORM_EPS)
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to the same, by one fused kernel that also takes half-precision inputs."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, NORM_EPS)


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """A normalisation of `channels` channels, eps 1e-5. Group norm takes the most groups up to 32 that fit."""
    match norm:
        case "batch":
            return nn.BatchNorm2d(channels, eps=NORM_EPS)
        case "sync":
            return nn.SyncBatchNorm(channels, eps=NORM_EPS)
        case "group":
            return nn.GroupNorm(math.gcd(32, channels), channels, eps=NORM_EPS)
        case "frozen":
            return FrozenBatchNorm(channels)
    raise ValueError(f"norm: {norm!r} is not one of batch, sync, group, frozen")


def freeze(module: nn.Module) -> nn.Module:
    """Stop all learning in `module`: no gradients, and every batch norm inside becomes a frozen one.

    Returns the module itself, or its frozen replacement where it is a batch norm.
    """
    module.requires_grad_(False)
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        frozen = FrozenBatchNorm(module.num_features).to(module.running_mean.device)  # type: ignore[union-attr]
        frozen.load_state_dict(module.state_dict())
        return frozen
    for name, child in module.named_children():
        replacement = freeze(child)
        if replacement is not child:
            setattr(module, name, replacement)
    return module


def freeze_parts(module: nn.Module, names: Iterable[str]) -> None:
    """`freeze` the submodules of these names in place."""
    for name in names:
        part = module.get_submodule(name)
        replacement = freeze(part)
        if replacement is not part:
            module.set_submodule(name, replacement)


def set_norm_momentum(module: nn.Module, momentum: float) -> None:
    """The weight of the newest batch in every running statistic of `module`."""
    for child in module.modules():
        if isinstance(child, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            child.momentum = momentum
