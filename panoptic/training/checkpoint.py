"""Checkpoints: everything that a run needs to go on, and a model to be built again, in one file.

A checkpoint is a dict of tensors, numbers, strings and lists, written by `torch.save` and read with
`weights_only=True`, so opening one executes nothing:

| key | content |
|---|---|
| format | version of this table |
| config | the model's configuration as `to_plain` writes it, with the class's name |
| categories | list of COCO category entries |
| weights, ema | state dicts; ema is None without averaging |
| ema_updates | how often the average moved (its decay grows with that) |
| optimiser | its state dict, or None |
| step, position | updates done; position of the next sample in the training stream |
| run_id | of the tracking server, "" if none |
| experiment | the flat configuration of the whole run |
"""

from __future__ import annotations

import pickle
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from panoptic import models
from panoptic.models.base import PanopticModel
from panoptic.segmentation import Categories

FORMAT = 1

KEYS = ("config", "categories", "weights", "ema", "optimiser", "step", "position", "run_id", "experiment")

SHOWN = 20
"""Names that an error message lists before it says how many more there are."""


def save(
    file: BinaryIO | str,
    *,
    config: Any,
    model: PanopticModel,
    ema: AveragedModel | None = None,
    optimiser: torch.optim.Optimizer | None = None,
    step: int = 0,
    position: int = 0,
    run_id: str = "",
    experiment: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint.

    Args:
        file: opened for writing bytes (a local path does too).
        config: the dataclass that built `model`.
        model: unwrapped.
        step: updates done.
        position: of the next sample in the training stream.
        experiment: flat, of plain values.
    """
    record = {
        "format": FORMAT,
        "config": to_plain(config),
        "categories": model.categories.to_coco(),
        "weights": _on_cpu(model.state_dict()),
        "ema": None if ema is None else _on_cpu(ema.module.state_dict()),
        "ema_updates": 0 if ema is None else int(ema.n_averaged),
        "optimiser": None if optimiser is None else optimiser.state_dict(),
        "step": step,
        "position": position,
        "run_id": run_id,
        "experiment": {key: to_plain(value) for key, value in (experiment or {}).items()},
    }
    torch.save(record, file)


def load(file: BinaryIO | str, name: str = "checkpoint") -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in it is executed. `name` stands in error messages.

    Raises:
        ValueError: the file is not a checkpoint of this project, or a newer one.
    """
    try:
        record = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{name}: not a checkpoint of panoptic-ray, or cut short ({str(error).splitlines()[0]}). "
            "Published weights of other projects go through jobs/convert.py"
        ) from error
    if not isinstance(record, dict) or "format" not in record:
        raise ValueError(f"{name}: holds no `format` field; convert published weights with jobs/convert.py")
    if record["format"] != FORMAT:
        raise ValueError(f"{name}: format {record['format']}, this version reads {FORMAT}; update panoptic-ray")
    missing = [key for key in KEYS if key not in record]
    if missing:
        raise ValueError(f"{name}: lacks {', '.join(missing)}; the file was not written by `checkpoint.save`")
    return record


def build_model(checkpoint: Mapping[str, Any], ema: bool = True) -> PanopticModel:
    """The model of a checkpoint, on the CPU, in evaluation mode.

    Args:
        ema: take the averaged weights where the checkpoint has them; they are what validation judged.

    Raises:
        ValueError: unknown class or field, or weights that do not fit.
    """
    model = read_config(_without_download(checkpoint["config"])).build(read_categories(checkpoint))
    load_weights(model, _chosen(checkpoint, ema))
    return model.eval()


def restore(
    checkpoint: Mapping[str, Any],
    model: PanopticModel,
    optimiser: torch.optim.Optimizer | None = None,
    ema: AveragedModel | None = None,
) -> None:
    """Continue a run: weights, averaged weights and optimiser state into the objects given.

    Raises:
        ValueError: other categories, other keys or shapes, no optimiser state, or other parameter groups.
    """
    check_categories(read_categories(checkpoint), model.categories)
    load_weights(model, checkpoint["weights"])
    if ema is not None:
        load_weights(ema.module, _chosen(checkpoint, True), "averaged weights")
        ema.n_averaged.fill_(max(1, checkpoint.get("ema_updates", 0)))  # at 0 the next update would copy
    if optimiser is not None:
        if checkpoint["optimiser"] is None:
            raise ValueError("checkpoint: holds no optimiser state; start a new run from its weights instead")
        optimiser.load_state_dict(checkpoint["optimiser"])


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], name: str = "checkpoint") -> None:
    """Every key, with its shape, or nothing.

    Raises:
        ValueError: lists the keys that are missing, unexpected or of another shape.
    """
    problems = compare(model, weights)
    if any(problems.values()):
        lines = [f"  {kind}: {_some(found)}" for kind, found in problems.items() if found]
        raise ValueError(f"{name}: does not fit {type(model).__name__}\n" + "\n".join(lines))
    model.load_state_dict(dict(weights))


def compare(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Keys `missing` from `weights`, `unexpected` in it, and with `another shape`."""
    own = model.state_dict()
    return {
        "missing": sorted(own.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - own.keys()),
        "another shape": [
            f"{key} (file {list(weights[key].shape)}, model {list(own[key].shape)})"
            for key in sorted(own.keys() & weights.keys())
            if own[key].shape != weights[key].shape
        ],
    }


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
    weights, own = _chosen(checkpoint, ema), model.state_dict()
    absent = tuple(name for name in model.added_modules if not _within(weights, (name,)))
    fresh = _within(own, absent)
    old = read_categories(checkpoint)
    if _classes(old) != _classes(model.categories):
        fresh |= class_keys(read_config(_without_download(checkpoint["config"])), old)
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


def read_categories(checkpoint: Mapping[str, Any]) -> Categories:
    """The classes that the checkpoint's heads stand for."""
    return Categories.from_coco(checkpoint["categories"], "checkpoint")


def check_categories(found: Categories, wanted: Categories, name: str = "checkpoint") -> None:
    """The classes of a checkpoint and of the data must agree in name, kind and order.

    Raises:
        ValueError: names those that differ.
    """
    a, b = _classes(found), _classes(wanted)
    if a == b:
        return
    only_a, only_b = [x for x in a if x not in b], [x for x in b if x not in a]
    parts = [f"only in {name}: {_some(only_a)}"] if only_a else []
    parts += [f"only in the data: {_some(only_b)}"] if only_b else []
    if not parts:
        moved = [f"{x} / {y}" for x, y in zip(a, b, strict=False) if x != y]
        parts = [f"the order differs: {_some(moved)}"]
    raise ValueError(
        f"{name}: its {len(a)} classes are not the {len(b)} of the data; {'; '.join(parts)}. "
        "To train on other classes, start a new run from its weights (fine-tuning)"
    )


def architectures() -> dict[str, type]:
    """Every configuration class of `panoptic.models.Architecture`, by name."""
    union: Any = models.Architecture
    return {kind.__name__: kind for kind in typing.get_args(union) or (union,)}


def read_config(plain: Mapping[str, Any]) -> Any:
    """The configuration that `to_plain` wrote, of the class of `panoptic.models.Architecture` that it names.

    Raises:
        ValueError: unknown class, unknown or mistyped field.
    """
    known = architectures()
    name = plain.get("class")
    if name not in known:
        raise ValueError(f"checkpoint: architecture {name!r} is not known; known are {', '.join(sorted(known))}")
    return from_plain(known[name], plain, name)


def to_plain(value: Any) -> Any:
    """A configuration as dicts, lists, strings and numbers; a dataclass becomes {"class": name, **fields}."""
    if is_dataclass(value) and not isinstance(value, type):
        own = {f.name: to_plain(getattr(value, f.name)) for f in fields(value) if f.init}
        return {"class": type(value).__name__, **own}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"to_plain: {type(value).__name__} is no plain value, dataclass, tuple, list or dict")


def from_plain(kind: Any, plain: Any, where: str = "config") -> Any:
    """The inverse of `to_plain`: a value of the annotated type `kind`.

    A dataclass's absent fields take their defaults, so that older checkpoints load.

    Raises:
        ValueError: an unknown field, a missing one without default, or a value of another type; names the path.
    """
    arguments = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if is_dataclass(kind):
        return _read_fields(kind, plain, where)
    if origin is typing.Union or origin is types.UnionType:
        return _read_union(arguments, plain, where)
    if origin is typing.Literal:
        if plain in arguments:
            return plain
        raise ValueError(f"{where}: {plain!r} is none of {', '.join(map(repr, arguments))}")
    if origin is tuple and isinstance(plain, list | tuple):
        inner = arguments[:1] * len(plain) if arguments[-1] is Ellipsis else arguments
        if len(inner) != len(plain):
            raise ValueError(f"{where}: {len(plain)} values, {len(inner)} wanted")
        return tuple(from_plain(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(inner, plain, strict=True)))
    if origin is dict and isinstance(plain, dict):
        return {k: from_plain(arguments[1], v, f"{where}.{k}") for k, v in plain.items()}
    if kind is float and type(plain) is int:
        return float(plain)
    if isinstance(kind, type) and type(plain) is kind:
        return plain
    raise ValueError(f"{where}: {plain!r} is no {getattr(kind, '__name__', kind)}")


def _read_fields(kind: Any, plain: Any, where: str) -> Any:
    if not isinstance(plain, Mapping):
        raise ValueError(f"{where}: {plain!r} stands where the fields of {kind.__name__} are wanted")
    if plain.get("class", kind.__name__) != kind.__name__:
        raise ValueError(f"{where}: is a {plain['class']}, wanted is a {kind.__name__}")
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in fields(kind) if f.init}
    unknown = [name for name in plain if name not in known and name != "class"]
    if unknown:
        raise ValueError(f"{where}: unknown field {', '.join(unknown)}; {kind.__name__} has {', '.join(known)}")
    required = [f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in plain]
    if missing:
        raise ValueError(f"{where}: lacks {', '.join(missing)}, which {kind.__name__} has no default for")
    return kind(**{n: from_plain(hints[n], v, f"{where}.{n}") for n, v in plain.items() if n != "class"})


def _read_union(members: tuple[Any, ...], plain: Any, where: str) -> Any:
    """Dataclass members by the name that the value carries, others by the first type that takes it."""
    named = plain.get("class") if isinstance(plain, Mapping) else None
    for member in members:
        if is_dataclass(member):
            if named == getattr(member, "__name__", ""):
                return from_plain(member, plain, where)
            continue
        try:
            return from_plain(member, plain, where)
        except ValueError:
            continue
    names = ", ".join(getattr(member, "__name__", str(member)) for member in members)
    raise ValueError(f"{where}: {named or plain!s} is none of {names}")


def _chosen(checkpoint: Mapping[str, Any], ema: bool) -> dict[str, Tensor]:
    averaged = checkpoint["ema"] if ema else None
    return dict(checkpoint["weights"] if averaged is None else averaged)


def _without_download(plain: Any) -> Any:
    """The configuration with untrained backbones: their weights are about to be replaced."""
    if isinstance(plain, list):
        return [_without_download(value) for value in plain]
    if not isinstance(plain, Mapping):
        return plain
    changed = {key: _without_download(value) for key, value in plain.items()}
    return changed | {"weights": "none"} if plain.get("class") == "Backbone" else changed


def _classes(categories: Categories) -> list[str]:
    kinds = ("stuff", "thing")
    return [f"{n} ({kinds[t]})" for n, t in zip(categories.names, categories.is_thing, strict=True)]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu() for key, value in state.items()}
