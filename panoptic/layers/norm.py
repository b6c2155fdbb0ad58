"""Normalisation layers, and freezing them.

Shapes: B images, C channels, h x w a feature map.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.layers.config import Norm

Model = TypeVar("Model", bound=nn.Module)


NORM_EPS = 1e-5
"""Added to the variance, in every norm that is built here without another."""


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


class AbsoluteBatchNorm(nn.BatchNorm2d):
    """Batch norm whose scale is |weight| + eps, as in in-place activated batch norm (arXiv 1712.02616).

    The in-place form needs a scale that is never 0, since it computes its input back from its output. The memory that
    it saves is not saved here; weights that were trained with it need its scale all the same: beside a plain batch norm
    the output of a channel with a negative weight has the other sign.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, h, w] to the same."""
        scale = self.weight.abs() + self.eps
        momentum = 0.1 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            input, self.running_mean, self.running_var, scale, self.bias, self.training, momentum, self.eps
        )


class FrozenAbsoluteBatchNorm(FrozenBatchNorm):
    """The frozen form of `AbsoluteBatchNorm`, with its keys."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to the same."""
        scale = self.weight.abs() + self.eps
        return F.batch_norm(x, self.running_mean, self.running_var, scale, self.bias, False, 0.0, self.eps)


class AbsoluteSyncBatchNorm(nn.Module):
    """`AbsoluteBatchNorm` with the statistics of all workers, and with its keys.

    The worker's part is torch's synchronised norm without scale and shift, on this module's statistics.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: AbsoluteBatchNorm) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
        self.eps, self.momentum, self.weight, self.bias = norm.eps, norm.momentum, norm.weight, norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to the same."""
        plain = nn.SyncBatchNorm(len(self.weight), self.eps, self.momentum, affine=False).train(self.training)
        plain.running_mean, plain.running_var = self.running_mean, self.running_var
        plain.num_batches_tracked = self.num_batches_tracked
        scale = self.weight.abs() + self.eps
        return plain(x) * scale[:, None, None] + self.bias[:, None, None]


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


BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, AbsoluteSyncBatchNorm)
"""The norms that keep running statistics, timm's among them."""


def norm_layer(norm: Norm, channels: int, eps: float = NORM_EPS) -> nn.Module:
    """A normalisation of `channels` channels. Group norm takes the most groups up to 32 that fit.

    Raises:
        ValueError: the norm is unknown.
    """
    match norm:
        case "batch":
            return nn.BatchNorm2d(channels, eps=eps)
        case "sync":
            return nn.SyncBatchNorm(channels, eps=eps)
        case "group":
            return nn.GroupNorm(math.gcd(32, channels), channels, eps=eps)
        case "frozen":
            return FrozenBatchNorm(channels, eps)
        case "absolute":
            return AbsoluteBatchNorm(channels, eps=eps)
    raise ValueError(f"norm: {norm!r} is not one of {', '.join(get_args(Norm))}")


def frozen_batch_norm(norm: nn.Module) -> FrozenBatchNorm:
    """The constant norm that computes what a batch norm computes in evaluation, under the same keys."""
    assert isinstance(norm, BATCH_NORMS) and norm.running_mean is not None
    channels = len(norm.running_mean)
    if _is_timms(norm):
        frozen = FrozenBatchNormAct(channels, norm.eps, norm.get_submodule("drop"), norm.get_submodule("act"))
    elif isinstance(norm, AbsoluteBatchNorm | AbsoluteSyncBatchNorm):
        frozen = FrozenAbsoluteBatchNorm(channels, norm.eps)
    else:
        frozen = FrozenBatchNorm(channels, norm.eps)
    frozen.to(norm.running_mean.device).load_state_dict(norm.state_dict())
    return frozen.train(norm.training)


def _is_timms(norm: nn.Module) -> bool:
    """True for timm's batch norms that drop and activate. Where there is one, timm's module is imported; importing it
    here would cost every process seconds."""
    layers = sys.modules.get("timm.layers.norm_act")
    return layers is not None and isinstance(norm, (layers.BatchNormAct2d, layers.SyncBatchNormAct))


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
    from timm.layers.norm_act import convert_sync_batchnorm

    for name, module in list(model.named_modules()):
        if isinstance(module, AbsoluteBatchNorm):
            model.set_submodule(name, AbsoluteSyncBatchNorm(module))
    return convert_sync_batchnorm(model)  # type: ignore[return-value]


def set_norm_momentum(module: nn.Module, momentum: float) -> None:
    """Set the weight of the newest batch in every running statistic of `module`."""
    for child in module.modules():
        if isinstance(child, BATCH_NORMS):
            child.momentum = momentum
