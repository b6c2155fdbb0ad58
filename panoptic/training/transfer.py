"""Beginning a run with what another one has learnt.

- Fine-tuning (`load_for_finetune`): the weights of a checkpoint, on the same or other classes. Where these differ, the
  layers whose size depends on them begin afresh, but for the rows of classes that both have by name.
- Taking over a training under other options (`transfer_training`), as a schedule of freezing and population based
  training do: weights, running statistics and averages move as they are. The optimiser's state moves parameter by
  parameter, by name: a parameter that was frozen there begins afresh here, the state of one that is frozen here is left
  behind, and the settings of the optimiser (learning rate, decay) are those of this run. Another kind of optimiser
  begins afresh with everything: the averages of Adam are no momentum.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from panoptic.models.base import PanopticModel
from panoptic.segmentation import Categories
from panoptic.training.checkpoint import chosen_weights, class_entries, load_weights, read_categories, restore
from panoptic.training.config import Optim
from panoptic.training.freezing import freeze_parameters
from panoptic.training.optim import parameter_groups
from panoptic.training.plain import read_config, without_download

COUNTER = "num_batches_tracked"
"""The buffer in which a norm that learns counts the batches of its statistics."""


@dataclass(frozen=True)
class Loaded:
    """The part of a model that `load_for_finetune` has loaded."""

    fresh: tuple[str, ...] = ()
    """Keys that are, as a whole or in some rows, as they were initialised; sorted."""
    classes: tuple[str, ...] = ()
    """Classes of the model whose rows were taken over from a class of the same name; () where no classes differ."""

    def tell(self, start: str, count: int) -> str:
        """A line for the log; "" where everything was loaded.

        Args:
            start: the checkpoint.
            count: classes of the model.
        """
        if not self.fresh and not self.classes:
            return ""
        kept = f"{len(self.classes)} of {count} classes keep their rows ({', '.join(self.classes)}); "
        fresh = f"of other classes or not in it, so fresh: {', '.join(self.fresh) or 'nothing'}"
        return f"starting from {start}; {kept if self.classes else ''}{fresh}"


def load_for_finetune(model: PanopticModel, checkpoint: Mapping[str, Any], ema: bool = True) -> Loaded:
    """Start a new run from a checkpoint of the same architecture, on the same or other classes.

    The layers whose size depends on the classes stay as they were initialised when the classes differ, be it only in
    name or order: those whose shape changes with the number of classes (`class_keys`), and the model's
    `class_modules`. Of their rows (`class_rows`) those of the classes that both have, by name and kind, are taken over,
    and with them the rows of no class ("no object"). Names agree whatever their case, blanks, hyphens and underscores.
    The model's `added_modules` stay fresh where the file has none of them.

    Args:
        model: of this run, already initialised.
        checkpoint: as `checkpoint.load` returns it.
        ema: take the averaged weights where the checkpoint has them.

    Returns:
        what was left fresh; nothing when classes and modules agree.

    Raises:
        ValueError: any other key or shape does not fit.
    """
    weights, own = chosen_weights(checkpoint, ema), model.state_dict()
    absent = tuple(name for name in model.added_modules if not _within(weights, (name,)))
    fresh = _within(own, absent)
    old = read_categories(checkpoint)
    rows: dict[str, Tensor] = {}
    names: tuple[str, ...] = ()
    whole: set[str] = set()
    if class_entries(old) != class_entries(model.categories):
        config = read_config(without_download(checkpoint["config"]))
        fresh |= class_keys(config, old)
        fresh |= _within([*weights, *own], model.class_modules)
        rows, whole, names = _common_rows(model, config.build(old), weights, fresh)
    kept = {key: value for key, value in weights.items() if key not in fresh}
    load_weights(model, counted(kept, own) | {key: own[key] for key in fresh & own.keys()} | rows)
    return Loaded(tuple(sorted(fresh & own.keys() - whole)), names)


def _common_rows(
    model: PanopticModel, former: PanopticModel, weights: Mapping[str, Tensor], fresh: Collection[str]
) -> tuple[dict[str, Tensor], set[str], tuple[str, ...]]:
    """The class layers of a model with the rows that the weights of a former one have for classes of the same name.

    Args:
        model: on its own classes.
        former: as the weights' classes make it.
        weights: of the former.
        fresh: the keys that depend on the classes.

    Returns:
        tensors by key, those keys of which every row was taken over, and the names of the classes.
    """
    before = {_plain(entry): label for label, entry in enumerate(class_entries(former.categories))}
    now = [before.get(_plain(entry)) for entry in class_entries(model.categories)]
    same = {label: other for label, other in enumerate(now) if other is not None}
    own, found, whole = model.state_dict(), {}, set()
    theirs = former.class_rows(weights)
    for layer, rows in model.class_rows(own).items() if same else ():
        place = {row: number for number, row in enumerate(theirs.get(layer, []))}
        sources = [place.get((same.get(label, -1) if isinstance(label, int) else label, k)) for label, k in rows]
        to = torch.tensor([number for number, source in enumerate(sources) if source is not None], dtype=torch.int64)
        of = torch.tensor([source for source in sources if source is not None], dtype=torch.int64)
        for key in (f"{layer}.weight", f"{layer}.bias"):
            if key not in own or key not in weights or key not in fresh or not len(to):
                continue
            value, source = own[key].clone(), weights[key].to(own[key])
            inner = layer in model.class_inputs and key.endswith("weight")
            if value.shape[1 + inner :] != source.shape[1 + inner :]:
                continue
            if inner:
                value[to[:, None], to] = source[of[:, None], of]
            else:
                value[to] = source[of]
            found[key] = value
            if len(to) == len(rows):
                whole.add(key)
    return found, whole, tuple(model.categories.names[new] for new in same) if found else ()


def _plain(entry: str) -> str:
    """Name and kind of a class without what data sets write in different ways."""
    return re.sub(r"[\s_-]+", " ", entry).strip().casefold()


def class_keys(config: Any, categories: Categories) -> set[str]:
    """The keys of the weights whose shape depends on the number of classes.

    Told by building the configuration twice: for the categories, and for one thing and one stuff more.
    """
    used = set(categories.ids)
    spare = [i for i in range(len(used) + 2) if i not in used][:2]
    extra = [{"id": i, "name": f"spare {i}", "isthing": k} for k, i in enumerate(spare)]
    before = config.build(categories).state_dict()
    after = config.build(Categories.from_coco(categories.to_coco() + extra)).state_dict()
    return {key for key, value in before.items() if key not in after or after[key].shape != value.shape}


def _within(keys: Iterable[str], modules: tuple[str, ...]) -> set[str]:
    """The keys of the submodules `modules`."""
    return {key for key in keys if key.split(".")[0] in modules}


def transfer_training(
    checkpoint: Mapping[str, Any],
    model: PanopticModel,
    optimiser: torch.optim.Optimizer,
    ema: AveragedModel | None = None,
) -> int:
    """Load a checkpoint of a run whose options may differ in anything but the shapes of the model.

    Args:
        checkpoint: as `checkpoint.load` returns it.
        model: built and frozen by this run's options.
        optimiser: over `parameter_groups` of it.
        ema: of this run.

    Returns:
        the number of tensors that keep their optimiser's state.

    Raises:
        ValueError: other categories, keys or shapes.
    """
    own = model.state_dict()
    parts = {kind: counted(checkpoint[kind], own) for kind in ("weights", "ema") if checkpoint[kind] is not None}
    restore({**checkpoint, **parts}, model, None, ema)
    saved = checkpoint["optimiser"]
    if saved is None or _kind(_optim(checkpoint).optimiser) != _kind(type(optimiser).__name__):
        return 0
    # state dicts number the parameters in the order of their groups, so the two are joined by the parameters' names
    positions = dict(zip(trained_names(checkpoint), _positions(saved), strict=True))
    settings = optimiser.state_dict()
    names = _names(model, [p for group in optimiser.param_groups for p in group["params"]])
    state = {
        position: saved["state"][positions[name]]
        for position, name in zip(_positions(settings), names, strict=True)
        if positions.get(name) in saved["state"]
    }
    optimiser.load_state_dict({"state": state, "param_groups": settings["param_groups"]})
    return len(state)


def counted(weights: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Weights with the counters of batches that a model has, and no others.

    timm's frozen norms have none, so a thawed model lacks them in a frozen one's checkpoint, and the other way round.
    A counter that the checkpoint lacks keeps the model's value.

    Args:
        weights: of a checkpoint.
        own: the model's state dict.
    """
    theirs = {key: value for key, value in weights.items() if key in own or not key.endswith(COUNTER)}
    return {**{key: value for key, value in own.items() if key.endswith(COUNTER)}, **theirs}


def _kind(optimiser: str) -> str:
    """The name that optimisers of the same state share: Adam and AdamW keep the same averages."""
    return optimiser.lower().removesuffix("w")


def trained_names(checkpoint: Mapping[str, Any]) -> list[str]:
    """Names of the parameters that a checkpoint's optimiser holds, in its order.

    Read off a model that is built and frozen as that run's was, without memory.
    """
    config = read_config(checkpoint["config"])
    config = replace(config, backbone=replace(config.backbone, weights="none"))  # nothing is downloaded for names
    with torch.device("meta"):
        model = config.build(read_categories(checkpoint))
    freeze_parameters(model, checkpoint["experiment"].get("train.freeze", ()))
    return _names(model, [p for group in parameter_groups(model, _optim(checkpoint)) for p in group["params"]])


def _optim(checkpoint: Mapping[str, Any]) -> Optim:
    """The options of a checkpoint's optimiser; those that its version did not have are at their defaults."""
    options = checkpoint["experiment"]
    chosen = {entry.name: options[f"optim.{entry.name}"] for entry in fields(Optim) if f"optim.{entry.name}" in options}
    return replace(Optim(), **{name: tuple(v) if isinstance(v, list) else v for name, v in chosen.items()})


def _names(model: nn.Module, parameters: list[nn.Parameter]) -> list[str]:
    """The names of some parameters of a model, in their order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in parameters]


def _positions(state: Mapping[str, Any]) -> list[int]:
    """The numbers under which an optimiser's state dict knows its parameters, group by group."""
    return [position for group in state["param_groups"] for position in group["params"]]
