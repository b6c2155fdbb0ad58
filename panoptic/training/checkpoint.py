"""Checkpoints: everything that a run needs to go on, and a model to be built again, in one file.

A checkpoint is a dict of tensors, numbers, strings and lists, written by `torch.save` and read with
`weights_only=True`, so opening one executes nothing. `load` checks the kind of every entry, so that whoever uses a
checkpoint need not:

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
| class_map | what became of the data sets' classes; only where a class map or a join changed them |
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from panoptic.models.base import PanopticModel
from panoptic.ranges import check_layers
from panoptic.segmentation import Categories
from panoptic.training.optim import share_frozen, unshare
from panoptic.training.plain import read_config, to_plain, without_download

FORMAT = 1
"""The version that is written, and the only one that is read."""

KEYS = ("config", "categories", "weights", "ema", "optimiser", "step", "position", "run_id", "experiment")
"""The keys that every checkpoint has (`ema_updates` and `class_map` came later)."""

CHECKPOINT = "checkpoint.pt"
"""The file of a checkpoint's folder that holds this table."""

LISTING = "checkpoint_manager_snapshot.json"
"""The file in a run's folder that lists its checkpoints with their scores; Ray Train writes it."""

NOT_OURS = "not a checkpoint of panoptic-ray, or cut short"

SHOWN = 20
"""Names that an error message lists before it says how many more there are."""


def best_listed(listing: bytes) -> str:
    """The name of the best checkpoint in the list of a run's folder (`LISTING`): of equal scores, the latest.

    Args:
        listing: content of the file.

    Returns:
        "" where it lists none, is cut short, or is something else.
    """
    try:
        listed = json.loads(listing)["checkpoint_results"]
        return max((e["metrics"]["score"], e["metrics"]["step"], e["checkpoint_dir_name"]) for e in listed)[-1]
    except (ValueError, KeyError, TypeError):
        return ""


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
    class_map: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint.

    Args:
        file: opened for writing bytes (a local path does too).
        config: the dataclass that built `model`.
        model: unwrapped.
        ema: averaged weights, where the run has them.
        optimiser: where the run is to be continued.
        step: updates done.
        position: of the next sample in the training stream.
        run_id: of the tracking server.
        experiment: the flat configuration of the whole run.
        class_map: what became of the data sets' classes, of plain values.
    """
    record = make_record(
        config=config,
        model=model,
        ema=ema,
        optimiser=optimiser,
        step=step,
        position=position,
        run_id=run_id,
        experiment=experiment,
        class_map=class_map,
    )
    torch.save(Snapshot().take(record), file)


def make_record(
    *,
    config: Any,
    model: PanopticModel,
    ema: AveragedModel | None = None,
    optimiser: torch.optim.Optimizer | None = None,
    step: int = 0,
    position: int = 0,
    run_id: str = "",
    experiment: Mapping[str, Any] | None = None,
    class_map: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of a checkpoint, with the tensors of the run itself: `Snapshot` copies them.

    Arguments as of `save`.
    """
    return {
        "format": FORMAT,
        "config": to_plain(config),
        "categories": model.categories.to_coco(),
        "weights": dict(model.state_dict()),
        "ema": None if ema is None else dict(ema.module.state_dict()),
        "ema_updates": 0 if ema is None else int(ema.n_averaged),
        "optimiser": None if optimiser is None else optimiser.state_dict(),
        "step": step,
        "position": position,
        "run_id": run_id,
        "experiment": {key: to_plain(value) for key, value in (experiment or {}).items()},
        **({"class_map": to_plain(class_map)} if class_map else {}),
    }


class Snapshot:
    """Memory of the host that holds the tensors of a record while training goes on with its own.

    It is kept from one checkpoint to the next, since fresh memory costs more than the copy. (The demo's 84 MiB on one
    core of an AMD EPYC: 24 ms into memory that was used before, 86 ms into fresh memory.)
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}
        """The copy of the tensor at each place of the record."""

    def take(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The record with every tensor copied; the one that was taken before is overwritten.

        Tensors that share their memory share a copy, so that the file holds them once.
        """
        copied: dict[tuple[Any, ...], Tensor] = {}
        taken = self._copy(record, (), copied)
        if any(tensor.is_cuda for tensor in _tensors(record)):
            torch.cuda.synchronize()
        return taken

    def _copy(self, value: Any, place: tuple[Any, ...], copied: dict[tuple[Any, ...], Tensor]) -> Any:
        """A value at a place of the record, with its tensors copied; dicts, lists and tuples are entered."""
        if isinstance(value, Tensor):
            memory = (value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else (place,)
            if memory not in copied:
                copied[memory] = self._copy_tensor(value.detach(), place)
            return copied[memory]
        if isinstance(value, Mapping):
            return {key: self._copy(entry, (*place, key), copied) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(entry, (*place, k), copied) for k, entry in enumerate(value))
        return value

    def _copy_tensor(self, value: Tensor, place: tuple[Any, ...]) -> Tensor:
        kept = self._kept.get(place)
        if kept is None or (kept.dtype, kept.shape, kept.stride()) != (value.dtype, value.shape, value.stride()):
            kept = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._kept[place] = kept
        return kept.copy_(value, non_blocking=value.is_cuda)


def load(file: BinaryIO | str, name: str = "checkpoint") -> dict[str, Any]:
    """Read a checkpoint onto the CPU and check its structure; nothing in it is executed.

    Args:
        file: opened for reading bytes, seekable (a local path does too).
        name: of the file, for error messages.

    Raises:
        ValueError: the file is not a checkpoint of this project, or a newer one, or an entry is of another kind than
            the table says, or a weight is not finite; in one line that names the entries.
        OSError: the file cannot be read.
    """
    _check_archive(file, name)
    try:
        record = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler meets whatever the bytes say, and fails in as many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name}: {NOT_OURS} ({reason}). Published weights of other projects go through jobs/convert.py"
        ) from error
    if not isinstance(record, dict) or "format" not in record:
        raise ValueError(f"{name}: holds no `format` field; convert published weights with jobs/convert.py")
    if record["format"] != FORMAT:
        raise ValueError(f"{name}: format {record['format']}, this version reads {FORMAT}; update panoptic-ray")
    missing = [key for key in KEYS if key not in record]
    if missing:
        raise ValueError(f"{name}: lacks {', '.join(missing)}; the file was not written by `checkpoint.save`")
    wrong = [f"{key} is no {kind}" for key, (kind, fits) in KINDS.items() if key in record and not fits(record[key])]
    if wrong:
        raise ValueError(f"{name}: {'; '.join(wrong)}; the file was not written by `checkpoint.save`")
    check_entries(record["categories"], name)
    if not all(_is_dense(tensor) for tensor in _tensors(record)):
        raise ValueError(
            f"{name}: a tensor is larger than its place in the file, or sparse; the file was not written by "
            "`checkpoint.save`"
        )
    check_finite(record["weights"], name)
    check_finite(record["ema"] or {}, name)
    return record


def check_entries(categories: Any, name: str = "checkpoint") -> None:
    """Refuse what is no list of COCO categories as `Categories.to_coco` writes it.

    Raises:
        ValueError: names the first entry that is none.
    """
    if not isinstance(categories, list) or not categories:
        raise ValueError(f"{name}: categories is no list of COCO categories; the file was changed after it was written")
    for place, entry in enumerate(categories):
        if not _is_category(entry):
            raise ValueError(
                f"{name}: categories[{place}] is no COCO category (id, name, isthing 0 or 1, color of three numbers to "
                "255); the file was changed after it was written"
            )


def check_finite(weights: Mapping[str, Tensor], name: str = "checkpoint") -> None:
    """Refuse weights with which a network computes nothing: NaN, or infinite.

    Raises:
        ValueError: names the weights.
    """
    bad = [key for key, value in weights.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise ValueError(
            f"{name}: {len(bad)} of {len(weights)} weights are not finite (NaN or infinite): {shortened(bad)}; the "
            "training diverged, or the file is damaged: take an earlier checkpoint"
        )


def build_model(checkpoint: Mapping[str, Any], ema: bool = True, name: str = "checkpoint") -> PanopticModel:
    """The model of a checkpoint, on the CPU, in evaluation mode.

    Args:
        ema: take the averaged weights where the checkpoint has them; they are what validation evaluated.
        name: of the file, for error messages.

    Raises:
        ValueError: unknown class or field, values that make no model, or weights that do not fit.
    """
    weights = chosen_weights(checkpoint, ema)
    try:
        config, categories = read_config(without_download(checkpoint["config"])), read_categories(checkpoint)
        check_layers(config)  # which would be built for ever
        with torch.device("meta"):  # a size that was changed takes no memory
            blueprint = config.build(categories)
    except (ValueError, RuntimeError, ArithmeticError, TypeError, LookupError) as error:
        told = "; ".join(str(error).splitlines()).removeprefix("checkpoint: ")
        raise ValueError(f"{name}: {told[:500]}; the file makes no model, take another one") from error
    check_fit(blueprint, weights, name)
    model = config.build(categories)
    model.load_state_dict(weights)
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
        unshare(ema, model)  # what is frozen now may have learned when it was averaged
        load_weights(ema.module, chosen_weights(checkpoint, True), "averaged weights")
        share_frozen(ema, model)
        ema.n_averaged.fill_(max(1, checkpoint.get("ema_updates", 0)))  # at 0 the next update would copy
    if optimiser is not None:
        if checkpoint["optimiser"] is None:
            raise ValueError("checkpoint: holds no optimiser state; start a new run from its weights instead")
        optimiser.load_state_dict(checkpoint["optimiser"])


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], name: str = "checkpoint") -> None:
    """Load every weight of a model, or none if any does not fit; arguments and errors are those of `check_fit`."""
    check_fit(model, weights, name)
    model.load_state_dict(dict(weights))


def check_fit(model: nn.Module, weights: Mapping[str, Tensor], name: str = "checkpoint") -> None:
    """Compare weights with those of a model, which may lie on the meta device.

    Args:
        name: of the weights, for error messages.

    Raises:
        ValueError: lists the keys that are missing, unexpected, of another shape or kind of number, in one line.
    """
    problems = compare(model, weights)
    if any(problems.values()):
        parts = [f"{kind}: {shortened(keys)}" for kind, keys in problems.items() if keys]
        raise ValueError(f"{name}: does not fit {type(model).__name__}; {'; '.join(parts)}")


def compare(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The keys that do not fit a model: `missing` from `weights`, `unexpected` in it, of `another shape` or kind."""
    own = model.state_dict()
    shared = sorted(own.keys() & weights.keys())
    return {
        "missing": sorted(own.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - own.keys()),
        "another shape": [
            f"{key} (file {list(weights[key].shape)}, model {list(own[key].shape)})"
            for key in shared
            if own[key].shape != weights[key].shape
        ],
        "another kind of numbers": [  # PyTorch would cut them in silence
            f"{key} (file {weights[key].dtype}, model {own[key].dtype})"
            for key in shared
            if own[key].is_floating_point() != weights[key].is_floating_point()
        ],
    }


def read_categories(checkpoint: Mapping[str, Any]) -> Categories:
    """The classes that the checkpoint's heads stand for."""
    return Categories.from_coco(checkpoint["categories"], "checkpoint")


def check_categories(own: Categories, data: Categories, name: str = "checkpoint") -> None:
    """Compare the classes of a checkpoint with those of the data: name, kind and order must agree.

    Args:
        own: of the checkpoint.
        data: of the data.
        name: of the checkpoint, for error messages.

    Raises:
        ValueError: names the classes that differ.
    """
    a, b = class_entries(own), class_entries(data)
    if a == b:
        return
    only_a, only_b = [x for x in a if x not in b], [x for x in b if x not in a]
    parts = [f"only in {name}: {shortened(only_a)}"] if only_a else []
    parts += [f"only in the data: {shortened(only_b)}"] if only_b else []
    if not parts:
        moved = [f"{x} / {y}" for x, y in zip(a, b, strict=False) if x != y]
        parts = [f"the order differs: {shortened(moved)}"]
    raise ValueError(
        f"{name}: its {len(a)} classes are not the {len(b)} of the data; {'; '.join(parts)}. "
        "To train on other classes, start a new run from its weights (fine-tuning)"
    )


def chosen_weights(checkpoint: Mapping[str, Any], ema: bool) -> dict[str, Tensor]:
    """The averaged weights where they are asked for and the checkpoint has them, else the raw ones."""
    averaged = checkpoint["ema"] if ema else None
    return dict(checkpoint["weights"] if averaged is None else averaged)


def class_entries(categories: Categories) -> list[str]:
    """Name and kind of each class, "dog (thing)", in order: what two lists of classes are compared by."""
    kinds = ("stuff", "thing")
    return [f"{n} ({kinds[t]})" for n, t in zip(categories.names, categories.is_thing, strict=True)]


def shortened(names: list[str]) -> str:
    """The first `SHOWN` names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _check_archive(file: BinaryIO | str, name: str) -> None:
    """Refuse what `torch.save` did not write, by the directory of the archive: nothing of it is unpacked.

    `torch.save` does not compress, so what is read is bounded by the size of the file.
    """
    size = os.path.getsize(file) if isinstance(file, str) else file.seek(0, os.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        reason = "it is no archive of torch.save" if size else "the file is empty"
        raise ValueError(
            f"{name}: {NOT_OURS} ({reason}). Published weights of other projects go through jobs/convert.py"
        ) from error
    if not isinstance(file, str):
        file.seek(0)
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError(f"{name}: {NOT_OURS} (its entries are compressed or overlap, which torch.save does not do)")


def _is_count(value: object) -> bool:
    """A whole number from 0 to 2^63 - 1."""
    return type(value) is int and 0 <= value < 1 << 63


def _is_state(value: object) -> bool:
    """A state dict: tensors by name, one at least."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())
    )


def _is_options(value: object) -> bool:
    """A dict whose keys are text."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_category(value: object) -> bool:
    """An entry of COCO's `categories` as `Categories.to_coco` writes it."""
    if not isinstance(value, dict):
        return False
    colour = value.get("color")
    return (
        type(value.get("id")) is int
        and isinstance(value.get("name"), str)
        and isinstance(value.get("isthing"), int)
        and value["isthing"] in (0, 1)
        and isinstance(colour, list)
        and len(colour) == 3
        and all(type(part) is int and 0 <= part <= 255 for part in colour)
    )


def _is_optimiser(value: object) -> bool:
    """The state dict of an optimiser of torch."""
    if value is None:
        return True
    return (
        isinstance(value, dict)
        and isinstance(value.get("state"), dict)
        and isinstance(value.get("param_groups"), list)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in value["param_groups"])
    )


KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "config": ("configuration with its class's name", lambda v: _is_options(v) and isinstance(v.get("class"), str)),
    "weights": ("state dict", _is_state),
    "ema": ("state dict, or None", lambda v: v is None or _is_state(v)),
    "ema_updates": ("number of updates", _is_count),
    "optimiser": ("optimiser's state, or None", _is_optimiser),
    "step": ("number of steps", _is_count),
    "position": ("position of the stream", _is_count),
    "run_id": ("text", lambda v: isinstance(v, str)),
    "experiment": ("flat configuration", _is_options),
    "class_map": ("class map", lambda v: isinstance(v, dict)),
}
"""The kind of each entry in words, and whether a value is of it."""


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor within dicts, lists and tuples, which may hold themselves."""
    waiting, seen = [value], set()
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, Tensor):
            yield entry
        elif isinstance(entry, dict | list | tuple) and id(entry) not in seen:
            seen.add(id(entry))
            waiting.extend(entry.values() if isinstance(entry, dict) else entry)


def _is_dense(tensor: Tensor) -> bool:
    """True if every value of a tensor has memory of its own: strides of 0 make a few bytes a tensor of any size."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return math.prod(tensor.shape) * tensor.element_size() <= tensor.untyped_storage().nbytes()
