"""Normalisation layers, and freezing them.

Shapes: B images, C channels, h x w a feature map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

Norm = Literal["batch", "sync", "group", "frozen"]
"""batch: over the worker's batch; sync: over all workers (GPU only when training); group: 32 groups;
frozen: fixed statistics and affine."""

NORM_EPS = 1e-5
"""Added to the variance, in every norm that is built here."""

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
"""The norms that keep running statistics, timm's among them."""


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

    def __init__(self, channels: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels) - eps)
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to the same, by one fused kernel that also takes half-precision inputs."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class FrozenBatchNormAct(FrozenBatchNorm):
    """The frozen form of timm's batch norms that drop and activate what they normalise; with their keys.

    Args:
        drop, act: of the batch norm.
    """

    def __init__(self, channels: int, eps: float, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(channels, eps)
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to the same."""
        return self.act(self.drop(super().forward(x)))


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """A normalisation of `channels` channels, eps 1e-5. Group norm takes the most groups up to 32 that fit.

    Raises:
        ValueError: the norm is unknown.
    """
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


def frozen_batch_norm(norm: nn.Module) -> FrozenBatchNorm:
    """The constant norm that computes what a batch norm computes in evaluation, under the same keys."""
    assert isinstance(norm, BATCH_NORMS) and norm.running_mean is not None
    if isinstance(norm, BatchNormAct2d | SyncBatchNormAct):
        frozen = FrozenBatchNormAct(norm.num_features, norm.eps, norm.get_submodule("drop"), norm.get_submodule("act"))
    else:
        frozen = FrozenBatchNorm(norm.num_features, norm.eps)
    frozen.to(norm.running_mean.device).load_state_dict(norm.state_dict())
    return frozen.train(norm.training)


def freeze(
    model: nn.Module, names: Iterable[str], frozen: Callable[[nn.Module], nn.Module] = frozen_batch_norm
) -> None:
    """Stop all learning in some submodules, in place: no gradients, and batch norms with constant statistics.

    Args:
        names: of the submodules, as `nn.Module.named_modules` lists them.
        frozen: makes the constant norm that replaces a batch norm.
    """
    for name in names:
        part = model.get_submodule(name)
        part.requires_grad_(False)
        for inner, module in list(part.named_modules(remove_duplicate=False)):
            if isinstance(module, BATCH_NORMS):
                model.set_submodule(".".join(filter(None, (name, inner))), frozen(module))


def synchronise_norms(model: Model) -> Model:
    """The model with batch norms whose statistics are those of all workers; frozen norms stay.

    By timm's conversion: torch's would drop the activations that timm's batch norms hold.
    """
    return convert_sync_batchnorm(model)  # type: ignore[return-value]


def set_norm_momentum(module: nn.Module, momentum: float) -> None:
    """Set the weight of the newest batch in every running statistic of `module`."""
    for child in module.modules():
        if isinstance(child, BATCH_NORMS):
            child.momentum = momentum
