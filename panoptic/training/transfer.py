"""Taking over the training of another run under other options: a schedule of freezing, population based training.

Weights, running statistics and averages move as they are. The optimiser's state moves parameter by parameter, by name:
what was frozen there begins afresh here, what is frozen here is left behind, and the settings of the optimiser
(learning rate, decay) are those of this run. Another kind of optimiser begins afresh with everything: the averages of
Adam are no momentum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from panoptic.models.base import PanopticModel
from panoptic.segmentation import Categories
from panoptic.training import checkpoint as checkpoints
from panoptic.training import plain
from panoptic.training.checkpoint import chosen_weights, class_entries, load_weights, read_categories
from panoptic.training.freezing import freeze_parameters
from panoptic.training.optim import Optim, parameter_groups
from panoptic.training.plain import read_config, without_download

COUNTER = "num_batches_tracked"
"""Of a norm that learns: how many batches its statistics have seen."""


def transfer_training(
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
    config = plain.read_config(record["config"])
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


def load_for_finetune(model: PanopticModel, checkpoint: Mapping[str, Any], ema: bool = True) -> list[str]:
    """Start a new run from a checkpoint of the same architecture, on the same or other classes.

    The layers whose size depends on the classes stay as they were initialised when the classes
    differ, be it only in name or order. Which layers these are is read off a model built for
    classes of other counts and from `class_modules`; `added_modules` stay fresh where the file has none.

    Returns:
        the keys left fresh; empty when classes and modules agree.

    Raises:
        ValueError: anything else does not fit.
    """
    weights, own = chosen_weights(checkpoint, ema), model.state_dict()
    absent = tuple(name for name in model.added_modules if not _within(weights, (name,)))
    fresh = _within(own, absent)
    old = read_categories(checkpoint)
    if class_entries(old) != class_entries(model.categories):
        fresh |= class_keys(read_config(without_download(checkpoint["config"])), old)
        fresh |= _within([*weights, *own], model.class_modules)
    kept = {key: value for key, value in weights.items() if key not in fresh}
    load_weights(model, kept | {key: own[key] for key in fresh & own.keys()})
    return sorted(fresh & own.keys())


def _within(keys: Iterable[str], modules: tuple[str, ...]) -> set[str]:
    """The keys of these submodules."""
    return {key for key in keys if key.split(".")[0] in modules}


def class_keys(config: Any, categories: Categories) -> set[str]:
    """Keys of the weights whose shape depends on the number of classes."""
    used = set(categories.ids)
    spare = [i for i in range(len(used) + 2) if i not in used][:2]
    extra = [{"id": i, "name": f"spare {i}", "isthing": k} for k, i in enumerate(spare)]
    before = config.build(categories).state_dict()
    after = config.build(Categories.from_coco(categories.to_coco() + extra)).state_dict()
    return {key for key, value in before.items() if key not in after or after[key].shape != value.shape}
