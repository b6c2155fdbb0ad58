"""The factor on the loss without which small gradients vanish in float16 (Micikevicius et al., arXiv 1710.03740, 3.2).

It halves where a gradient overflows under it and doubles after many steps without, as torch's GradScaler has it. But
everything stays on the device, and the factor lies in the optimiser's first parameter group, so that checkpoints keep
it with the rest of the optimiser's state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LISTS: Any = torch
"""torch with its operations on lists of tensors, a few kernels for all, which it does not list by name."""

INITIAL = 65536.0
"""The factor of the first step."""

PATIENCE = 2000
"""Steps without overflow after which it doubles."""

SCALE, GOOD = "loss_scale", "good_steps"
"""Entries of the parameter group: the factor, and the steps since it changed."""


def loss_scale(optimiser: torch.optim.Optimizer, device: torch.device) -> Tensor:
    """The factor of the next step, float32 scalar on the device."""
    group = optimiser.param_groups[0]
    first = torch.tensor(INITIAL, device=device), torch.zeros((), dtype=torch.int32, device=device)
    for name, value in zip((SCALE, GOOD), first, strict=True):
        group[name] = group.get(name, value).to(device)  # a checkpoint is read on the CPU
    return group[SCALE]


def unscale(optimiser: torch.optim.Optimizer, scale: Tensor) -> None:
    """Divide all gradients by the factor."""
    gradients = [p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    LISTS._foreach_mul_(gradients, 1 / scale)


def follow(optimiser: torch.optim.Optimizer, overflown: Tensor, made: Tensor) -> None:
    """Change the factor after a step.

    Args:
        optimiser: of the step.
        overflown: bool scalar, a gradient overflowed under the factor.
        made: bool scalar, the update was made. Where neither is True, the step says nothing about the factor.
    """
    group = optimiser.param_groups[0]
    good = torch.where(overflown, 0, group[GOOD] + made)
    patient = good >= PATIENCE
    factor = torch.where(overflown, 0.5, torch.where(patient, 2.0, 1.0))
    group[SCALE], group[GOOD] = group[SCALE] * factor, torch.where(patient, 0, good)
