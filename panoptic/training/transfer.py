"""Taking over the training of another run under other options: a schedule of freezing, population based training.

Weights, running statistics and averages move as they are. The optimiser's state moves parameter by parameter, by name:
what was frozen there begins afresh here, what is frozen here is left behind, and the settings of the optimiser
(learning rate, decay) are those of this run. Another kind of optimiser begins afresh with everything: the averages of
Adam are no momentum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from panoptic.models.base import PanopticModel
from panoptic.training import checkpoint as checkpoints
from panoptic.training.freezing import freeze_parameters
from panoptic.training.optim import Optim, parameter_groups

COUNTER = "num_batches_tracked"
"""Of a norm that learns: how many batches its statistics have seen."""


def take_over(
    record: Mapping[str, Any],
    model: PanopticModel,
    optimiser: torch.optim.Optimizer,
    ema: AveragedModel | None = None,
) -> int:
    """Load a checkpoint of a run whose options may differ in anything but the shapes of the model.

    Args:
        record: the checkpoint, as `checkpoint.load` returns it.
        model: built and frozen by this run's options.
        optimiser: over `parameter_groups` of it.
        ema: of this run.

    Returns:
        how many tensors keep their optimiser's state.

    Raises:
        ValueError: other categories, keys or shapes.
    """
    own = model.state_dict()
    record = {**record, **{kind: counted(record[kind], own) for kind in ("weights", "ema") if record[kind] is not None}}
    checkpoints.restore(record, model, None, ema)
    if record["optimiser"] is None or kept_by(_optim(record).optimiser) != kept_by(type(optimiser).__name__):
        return 0
    before = dict(zip(trained_names(record), _positions(record["optimiser"]), strict=True))
    there = record["optimiser"]["state"]
    settings = optimiser.state_dict()
    names = _names(model, [p for group in optimiser.param_groups for p in group["params"]])
    state = {}
    for position, name in zip(_positions(settings), names, strict=True):
        found = there.get(before.get(name, -1))
        if found is not None:
            state[position] = found
    optimiser.load_state_dict({"state": state, "param_groups": settings["param_groups"]})
    return len(state)


def counted(weights: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Weights with the counters of norms that a model has: timm's frozen norms have none."""
    theirs = {key: value for key, value in weights.items() if key in own or not key.endswith(COUNTER)}
    return {**{key: value for key, value in own.items() if key.endswith(COUNTER)}, **theirs}


def kept_by(optimiser: str) -> str:
    """Of optimisers of one kind, which keep the same state: Adam and AdamW."""
    return optimiser.lower().removesuffix("w")


def trained_names(record: Mapping[str, Any]) -> list[str]:
    """Names of the parameters that a checkpoint's optimiser holds, in its order."""
    config = checkpoints.read_config(record["config"])
    config = replace(config, backbone=replace(config.backbone, weights="none"))  # nothing is downloaded for names
    with torch.device("meta"):
        model = config.build(checkpoints.read_categories(record))
    freeze_parameters(model, record["experiment"].get("train.freeze", ()))
    return _names(model, [p for group in parameter_groups(model, _optim(record)) for p in group["params"]])


def _optim(record: Mapping[str, Any]) -> Optim:
    """The options of a checkpoint's optimiser; those that its version did not have, at their defaults."""
    options = record["experiment"]
    chosen = {entry.name: options[f"optim.{entry.name}"] for entry in fields(Optim) if f"optim.{entry.name}" in options}
    return replace(Optim(), **{name: tuple(v) if isinstance(v, list) else v for name, v in chosen.items()})


def _names(model: nn.Module, parameters: list[nn.Parameter]) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in parameters]


def _positions(state: Mapping[str, Any]) -> list[int]:
    return [position for group in state["param_groups"] for position in group["params"]]
