"""Optimiser, learning rate and weight averaging, all of them functions of the configuration.

The learning rate is a pure function of the step: there is no scheduler object, so nothing about it is
saved and a continued run cannot get it wrong.

A rate is `lr * learning_rate_factor(step, total, optim) * group factor`. Warm-up multiplies the
schedule, as in the references' WarmupPolyLR and WarmupMultiStepLR: at iteration `it` of warm-up the
factor is `(f (1 - a) + a) * schedule(it)` with `a = it / warmup_steps`, and the schedule counts from
iteration 0, warm-up included. Nothing is shifted and nothing restarts where the warm-up ends. Two options give EoMT's
rule instead (specification eomt.md, section 8): `schedule_start after_warmup` lets the schedule begin where the warm-up
ends, and `backbone_warmup_steps` holds the backbone still during the first warm-up and then gives it one of its own.
"""

from __future__ import annotations

import itertools
import math
import re
from bisect import bisect_right
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from panoptic.backbones.config import STAGES
from panoptic.backbones.stages import stage_of
from panoptic.training.config import Optim

LISTS: Any = torch
"""torch with its operations on lists of tensors, a few kernels for all, which it does not list by name."""

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding)
"""Modules whose parameters the references never decay (Mask2Former counts embeddings among them)."""

TABLES = ("relative_position_bias_table", "absolute_pos_embed")
"""Names of parameters that the references do not decay either: Swin's positions."""


def learning_rate_factor(step: int, total: int, optim: Optim, backbone: bool = False) -> float:
    """The factor on `optim.lr` at iteration `step` of `total`, counted from 0.

    Args:
        step: iteration.
        total: iterations of the run.
        optim: the schedule.
        backbone: of the backbone's parameters, which `optim.backbone_warmup_steps` warms up after the others.

    Steps beyond `total` keep the last value, so that extending a run cannot fail. The floor `final` of
    poly holds after the warm-up only (as the reference's `constant_ending`).
    """
    late = backbone and optim.backbone_warmup_steps > 0
    begin, length = (optim.warmup_steps, optim.backbone_warmup_steps) if late else (0, optim.warmup_steps)
    if step < begin:
        return 0.0
    warming = step < begin + length
    shift = begin + length if optim.schedule_start == "after_warmup" else 0
    done = min(max(step - shift, 0) / max(total - shift, 1), 1.0)
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
        alpha = (step - begin) / length
        factor *= optim.warmup_factor * (1.0 - alpha) + alpha
    return factor


def scaled_learning_rate(optim: Optim, batch: int) -> float:
    """`optim.lr` for a global batch of `batch` images under `optim.scale_lr`."""
    if optim.scale_lr == "none" or optim.lr_batch == 0:
        return optim.lr
    ratio = batch / optim.lr_batch
    return optim.lr * (ratio if optim.scale_lr == "linear" else math.sqrt(ratio))


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float, backbone: float | None = None) -> None:
    """Give every parameter group `rate` times its own factor; those of the backbone `backbone` times it, if given."""
    for group in optimiser.param_groups:
        late = backbone is not None and group.get("backbone", False)  # not in the states of earlier versions
        group["lr"] = (backbone if late else rate) * group["lr_factor"]


def parameter_groups(model: nn.Module, optim: Optim) -> list[dict[str, Any]]:
    """The trainable parameters, by learning-rate factor and decay, in an order that never changes.

    Parameters named `backbone.…` get `optim.backbone_lr`, times `optim.stage_decay` for each stage that follows theirs
    (layer-wise rates: Clark et al., "ELECTRA", arXiv 2003.10555, by stages as Liu et al. do for ConvNeXt, 2201.03545),
    or times `optim.layer_decay` for each block (EoMT, arXiv 2503.19108; specification eomt.md, section 8). Parts that a
    backbone adds to a published plain ViT, such as a pyramid, are none of its layers and learn like the heads.
    Frozen parameters (and so a frozen backbone) are left out.

    Returns:
        up to four groups with `params`, `lr`, `lr_factor`, `weight_decay` and `backbone` (they belong to it); two more
        for each further stage or block with a decay over these.

    Raises:
        ValueError: nothing is left to train, or `optim.layer_decay` for a backbone that is no plain ViT.
    """
    undecayed = _undecayed(model, optim.decay)
    backbone = getattr(model, "backbone", model)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inner = name.removeprefix("backbone.")
            part = 0 if inner == name else 1 + _steps_down(backbone, inner, optim)
            groups.setdefault((part, name not in undecayed), []).append(parameter)
    if not groups:
        raise ValueError("parameter_groups: every parameter is frozen; freeze fewer stages")
    step_down = optim.layer_decay if optim.layer_decay != 1 else optim.stage_decay
    return [
        {
            "params": groups[key],
            "lr": optim.lr,
            "lr_factor": optim.backbone_lr * step_down ** (key[0] - 1) if key[0] else 1.0,
            "weight_decay": optim.weight_decay if key[1] else 0.0,
            "backbone": key[0] > 0,
        }
        for key in sorted(groups)
    ]


def _steps_down(backbone: nn.Module, name: str, optim: Optim) -> int:
    """The number of decays between a backbone's rate and that of one of its parameters; -1 if it is none of its layers.

    Raises:
        ValueError: layers are asked of a backbone that is no plain ViT.
    """
    layer_of = getattr(backbone, "layer_of", None)
    layer = layer_of(name) if layer_of is not None else None
    if layer_of is not None and layer is None:
        return -1
    if optim.stage_decay != 1:
        return len(STAGES) - stage_of(backbone, name)
    if optim.layer_decay == 1:
        return 0
    if layer is None:
        raise ValueError(
            f"optim.layer_decay {optim.layer_decay}: the backbone is no plain ViT, so it has stages and not layers; "
            "set optim.stage_decay instead"
        )
    depth: int = backbone.depth  # type: ignore[assignment]
    if layer > depth - optim.undecayed_layers:
        return 0
    return depth - layer if layer > 0 else depth - 1 + optim.layer_decay_embeddings


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
    if hasattr(getattr(model, "backbone", None), "layer_of"):  # a plain ViT's positions, as ViTDet's
        names |= {name for name, _ in model.named_parameters() if re.fullmatch(r"backbone\.(body\.)?pos_embed", name)}
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
    """Averaged weights and buffers of `model` (not of its DDP wrapper), for `update_ema`; None when `decay` is 0.

    Frozen parameters are those of the model: their average takes neither memory nor time.
    """
    if decay == 0:
        return None
    averaged = AveragedModel(model, use_buffers=True)
    averaged.n_averaged = averaged.n_averaged.to(next(model.parameters()).device)
    share_frozen(averaged, model)
    return averaged.requires_grad_(False).eval()


def share_frozen(ema: AveragedModel, model: nn.Module) -> None:
    """Let an average hold the model's own frozen parameters, where it has the same values.

    It has others where it was averaged while they still learned: those go on moving towards the model's.
    """
    for averaged, current in zip(ema.module.parameters(), model.parameters(), strict=True):
        if not current.requires_grad and not current.is_meta and torch.equal(averaged, current):
            averaged.data = current.data


def unshare(ema: AveragedModel, model: nn.Module) -> None:
    """Give an average memory of its own for all that it shares with the model, so that other values can be loaded."""
    for averaged, current in zip(ema.module.parameters(), model.parameters(), strict=True):
        if averaged.data_ptr() == current.data_ptr():
            averaged.data = averaged.data.clone()


@torch.no_grad()
def update_ema(ema: AveragedModel, model: nn.Module, decay: float, finite: Tensor | None = None) -> None:
    """Move the averages towards the model's weights and buffers, without the host waiting for the device.

    The first update copies; update n + 1 moves by `1 - min(decay, (1 + n) / (10 + n))`, so that early
    validations do not evaluate the initial weights (weights and running statistics; integer buffers are copied).

    Args:
        ema: from `build_ema`.
        model: unwrapped.
        decay: largest one.
        finite: bool scalar on the device; nothing moves where it is False. None = True.
    """
    done = ema.n_averaged
    n = done.double()
    share = torch.where(done == 0, 1.0, 1 - torch.clamp((1 + n) / (10 + n), max=decay))
    if finite is None:
        done += 1
    else:
        share = torch.where(finite, share, 0.0)
        done += finite
    for (device, kind), (averaged, current) in _by_kind(ema.module, model).items():
        if not kind.is_floating_point:  # an average would corrupt an index table
            LISTS._foreach_copy_(averaged, current)
        elif device.type == "cpu":
            LISTS._foreach_lerp_(averaged, current, [share.to(kind)] * len(averaged))
        else:  # torch has no kernel of all tensors at once for a share that lies on the device
            own = share.to(kind)
            LISTS._foreach_mul_(averaged, 1 - own)
            LISTS._foreach_add_(averaged, LISTS._foreach_mul(current, own))


def _by_kind(
    averaged: nn.Module, current: nn.Module
) -> dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]]:
    """Parameters and buffers of two equal models, by device and kind of number; none that they share."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for (olds, name), (news, other) in zip(_places(averaged), _places(current), strict=True):
        old, new = olds[name], news[other]
        if old is not new and old.data_ptr() == new.data_ptr() and old.numel():
            continue
        group = groups.setdefault((old.device, old.dtype), ([], []))
        group[0].append(old.detach())
        group[1].append(new.detach())
    return groups


PLACES: WeakKeyDictionary[nn.Module, list[tuple[dict[str, Any], str]]] = WeakKeyDictionary()
"""By model, what `_places` found: looking for it takes milliseconds of the host in every step."""


def _places(model: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """The places of a model's parameters and buffers, each once: the dictionary of a module, and the name in it.

    Tensors may be replaced afterwards, modules may not.
    """
    if model not in PLACES:
        kinds = [[(module._parameters, module._buffers)[kind] for module in model.modules()] for kind in (0, 1)]
        seen: set[int] = set()
        PLACES[model] = [
            (entries, name)
            for entries in itertools.chain(*kinds)
            for name, tensor in entries.items()
            if tensor is not None and not (id(tensor) in seen or seen.add(id(tensor)))
        ]
    return PLACES[model]


def masked_step(optimiser: torch.optim.Optimizer, finite: Tensor) -> None:
    """One update of a fused optimiser, none where `finite` (bool scalar on the device) is False.

    The device decides, so the host need not wait for it: the kernels of torch's fused optimisers take such a flag.
    """
    if isinstance(optimiser, torch.optim.SGD):
        _start_momentum(optimiser)
    holder: Any = optimiser
    holder.grad_scale, holder.found_inf = None, left_out(finite)
    try:
        optimiser.step()
    finally:
        del holder.grad_scale, holder.found_inf


def left_out(finite: Tensor) -> Tensor:
    """The flag that fused optimisers take, 1 where the update is left out: float32, whatever the parameters are."""
    return (~finite).to(torch.float32)


def _start_momentum(optimiser: torch.optim.SGD) -> None:
    """Begin momentum at zero: in a first step that is left out torch would keep memory that nothing was written to."""
    for group in optimiser.param_groups:
        if group["momentum"]:
            for parameter in group["params"]:
                state = optimiser.state[parameter]
                if parameter.grad is not None and state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
