"""Optimiser, learning rate and weight averaging, all of them functions of the configuration.

The learning rate is a pure function of the step: there is no scheduler object, so nothing about it is
saved and a continued run cannot get it wrong.

A rate is `lr * learning_rate_factor(step, total, optim) * group factor`. Warm-up multiplies the
schedule, as in the references' WarmupPolyLR and WarmupMultiStepLR: at iteration `it` of warm-up the
factor is `(f (1 - a) + a) * schedule(it)` with `a = it / warmup_steps`, and the schedule counts from
iteration 0, warm-up included. Nothing is shifted and nothing restarts where the warm-up ends.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from panoptic.backbones.stages import stage_of
from panoptic.ranges import Decay, NonNegativeFloat, NonNegativeInt, PositiveUnitFloat, UnitFloat

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding)
"""Modules whose parameters the references never decay (Mask2Former counts embeddings among them)."""

TABLES = ("relative_position_bias_table", "absolute_pos_embed")
"""Names of parameters that the references do not decay either: Swin's positions."""


@dataclass(frozen=True)
class Optim:
    """The optimiser, its schedule and what is done to gradients and weights."""

    optimiser: Literal["adam", "adamw", "sgd"] = "adam"
    """The update rule."""
    lr: NonNegativeFloat = 1e-3
    """Learning rate for the global batch of the experiment, whatever the number of workers."""
    scale_lr: Literal["none", "linear", "sqrt"] = "none"
    """Rule by which lr follows a global batch that differs from lr_batch. With Adam, none or sqrt."""
    lr_batch: NonNegativeInt = 0
    """The global batch that lr belongs to; 0 = the experiment's, so that nothing is scaled."""
    momentum: Decay = 0.9
    """Momentum of SGD."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the two averages of Adam and AdamW."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty of Adam and SGD, decoupled decay of AdamW."""
    decay: Literal["weights", "weights_and_biases", "all"] = "weights"
    """Decayed parameters: neither norms nor biases (nothing 1-D), all but norms, or everything."""
    backbone_lr: NonNegativeFloat = 1.0
    """Factor on the learning rate of the backbone."""
    stage_decay: PositiveUnitFloat = 1.0
    """Factor on the backbone's learning rate from each stage to the one before it: res5 has the backbone's, res4 that
    times the factor, the stem its fourth power; 1 = the same for all."""
    schedule: Literal["poly", "cosine", "multistep", "constant"] = "poly"
    """Shape of the learning rate over the run."""
    power: NonNegativeFloat = 0.9
    """Exponent of poly."""
    milestones: tuple[NonNegativeInt, ...] = ()
    """Steps at which multistep multiplies the rate by gamma."""
    gamma: NonNegativeFloat = 0.1
    """Factor of multistep at each milestone."""
    final: UnitFloat = 0.0
    """Smallest factor on the rate: poly stops falling there, cosine ends there."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up; 0 = none."""
    warmup_factor: UnitFloat = 1e-3
    """Factor on the rate at the first step of warm-up."""
    clip_norm: NonNegativeFloat = 0.0
    """Largest norm of the whole gradient; 0 = not clipped."""
    clip_value: NonNegativeFloat = 0.0
    """Largest absolute value of each entry of the gradient, before its norm is clipped; 0 = not clipped."""
    ema: Decay = 0.0
    """Decay of the averaged weights that are evaluated and kept beside the raw ones (less at first); 0 = none."""


def learning_rate_factor(step: int, total: int, optim: Optim) -> float:
    """The factor on `optim.lr` at iteration `step` of `total`, counted from 0.

    Steps beyond `total` keep the last value, so that extending a run cannot fail. The floor `final` of
    poly holds after the warm-up only (as the reference's `constant_ending`).
    """
    done = min(max(step, 0) / max(total, 1), 1.0)
    warming = step < optim.warmup_steps
    if optim.schedule == "poly":
        factor = (1.0 - done) ** optim.power
        factor = factor if warming else max(factor, optim.final)
    elif optim.schedule == "cosine":
        factor = optim.final + (1.0 - optim.final) * 0.5 * (1.0 + math.cos(math.pi * done))
    elif optim.schedule == "multistep":
        factor = optim.gamma ** bisect_right(sorted(optim.milestones), step)
    else:
        factor = 1.0
    if warming:
        alpha = step / optim.warmup_steps
        factor *= optim.warmup_factor * (1.0 - alpha) + alpha
    return factor


def scaled_learning_rate(optim: Optim, batch: int) -> float:
    """`optim.lr` for a global batch of `batch` images under `optim.scale_lr`."""
    if optim.scale_lr == "none" or optim.lr_batch == 0:
        return optim.lr
    ratio = batch / optim.lr_batch
    return optim.lr * (ratio if optim.scale_lr == "linear" else math.sqrt(ratio))


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group `rate` times its own factor."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["lr_factor"]


def parameter_groups(model: nn.Module, optim: Optim) -> list[dict[str, Any]]:
    """The trainable parameters, by learning-rate factor and decay, in an order that never changes.

    Parameters named `backbone.…` get `optim.backbone_lr`, times `optim.stage_decay` for each stage that follows theirs
    (layer-wise rates: Clark et al., "ELECTRA", arXiv 2003.10555, by stages as Liu et al. do for ConvNeXt, 2201.03545).
    Frozen parameters (and so a frozen backbone) are left out.

    Returns:
        up to four groups with `params`, `lr`, `lr_factor`, `weight_decay`; up to twelve with a decay over stages.

    Raises:
        ValueError: nothing is left to train.
    """
    undecayed = _undecayed(model, optim.decay)
    backbone = getattr(model, "backbone", model)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inner = name.removeprefix("backbone.")
            part = 0 if inner == name else 1 if optim.stage_decay == 1 else 5 - stage_of(backbone, inner)
            groups.setdefault((part, name not in undecayed), []).append(parameter)
    if not groups:
        raise ValueError("parameter_groups: every parameter is frozen; freeze fewer stages")
    return [
        {
            "params": groups[key],
            "lr": optim.lr,
            "lr_factor": optim.backbone_lr * optim.stage_decay ** (key[0] - 1) if key[0] else 1.0,
            "weight_decay": optim.weight_decay if key[1] else 0.0,
        }
        for key in sorted(groups)
    ]


def _undecayed(model: nn.Module, decay: str) -> set[str]:
    """Names of the parameters that weight decay leaves alone."""
    if decay == "all":
        return set()
    names = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if isinstance(module, NORMS) or name in TABLES
    }
    if decay == "weights":
        names |= {name for name, parameter in model.named_parameters() if parameter.ndim <= 1}
    return names


def build_optimiser(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The optimiser over `parameter_groups(model, optim)`; move `model` to its device first."""
    groups = parameter_groups(model, optim)
    # one pass over memory instead of one an operation: on a CPU the update of a ResNet-50 is 3 times faster
    if optim.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=True)
    if optim.optimiser == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)
    return torch.optim.Adam(groups, lr=optim.lr, betas=optim.betas, fused=True)


def build_ema(model: nn.Module, decay: float) -> AveragedModel | None:
    """Averaged weights and buffers of `model` (not of its DDP wrapper); None when `decay` is 0.

    The first update copies; update n + 1 moves by `1 - min(decay, (1 + n) / (10 + n))`, so that early
    validations do not evaluate the initial weights (weights and running statistics; integer buffers are copied).
    """
    if decay == 0:
        return None
    averaged = AveragedModel(model, multi_avg_fn=_moving_average(decay), use_buffers=True)
    return averaged.requires_grad_(False).eval()


def _moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """torch's moving average with a decay that grows, and safe for integers: torch's would corrupt an index table."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        if averaged[0].is_floating_point():
            done = int(count)
            get_ema_multi_avg_fn(min(decay, (1 + done) / (10 + done)))(averaged, current, count)
            return
        for old, new in zip(averaged, current, strict=True):
            old.copy_(new)

    return update
