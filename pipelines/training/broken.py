"""A step whose numbers were not finite, kept in a file and run again: `jobs/replay.py FILE`.

When a training stops since too many steps in a row were broken, each worker writes the weights, the optimiser's state
and its micro-batches of the last of them into the run's folder. The weights are those before the step, as its update
was left out. Torch is seeded as it was, so that dropout and what is drawn are the same, and it runs on as many threads:
the step of one worker gives every loss and gradient bit for bit on the same kind of machine. Of several workers three
things cannot be had back from the file of one: terms that divide by a count of the whole batch (`world_mean`: DETR,
MaskFormer, Mask2Former, EoMT) divide by this worker's, the summed mask loss of JSIS-Net is not multiplied by the number
of workers, and synchronised norms (`train.sync_bn`) see this worker's images only. A GPU's kernels agree to rounding
unless `train.deterministic` is on, as between two runs.
"""

from __future__ import annotations

import io
import itertools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from panoptic.models.base import PanopticModel
from panoptic.segmentation import Frame, Targets
from panoptic.training.checkpoint import NOT_OURS, load_weights, read_categories
from panoptic.training.config import Engine
from panoptic.training.device import prepare, seed_torch
from panoptic.training.freezing import freeze_parameters, training_mode
from panoptic.training.loss_scale import SCALE
from panoptic.training.memory import in_parts
from panoptic.training.phases import Phases
from panoptic.training.plain import read_config, without_download
from panoptic.training.recomputing import recompute_blocks, recomputes
from panoptic.training.step import BrokenSteps, forward_backward
from pipelines.cluster import storage
from pipelines.training.checkpoints import content
from pipelines.training.state import State

FOLDER = "broken"
"""Folder in a run's folder with a file for each worker."""

Batch = tuple[Tensor, Targets]


class Recent:
    """The micro-batches of a feed, of which those of the last two steps are kept: a GPU tells of a step in the next.

    Args:
        batches: the feed's.
        accumulation: micro-batches of a step.
        parts: equal parts in which each is given.
    """

    def __init__(self, batches: Iterator[Batch], accumulation: int, parts: int = 1) -> None:
        self._batches = batches
        self._kept: deque[Batch] = deque(maxlen=2 * accumulation)
        self._accumulation, self._taken = accumulation, 0
        self._pieces: Iterator[Batch] = iter(())
        self.parts = parts

    def __iter__(self) -> Recent:
        return self

    def __next__(self) -> Batch:
        piece = next(self._pieces, None)
        if piece is not None:
            return piece
        batch = next(self._batches)
        self._kept.append(batch)
        self._taken += 1
        self._pieces = in_parts(batch, self.parts)
        return next(self._pieces)

    def again(self, parts: int) -> None:
        """Give what the running step has taken once more, and from here on each micro-batch in `parts` parts."""
        begun = self._taken - (self._taken - 1) // self._accumulation * self._accumulation
        last = [self._kept.pop() for _ in range(begun)]
        self._batches = itertools.chain(reversed(last), self._batches)
        self._taken -= begun
        self._pieces, self.parts = iter(()), parts

    def of_step(self, ago: int) -> list[Batch]:
        """The micro-batches of the newest step (0) or of the one before it (1), in the parts that were given."""
        end = len(self._kept) - ago * self._accumulation
        batches = list(self._kept)[end - self._accumulation : end]
        return [piece for batch in batches for piece in in_parts(batch, self.parts)]

    @property
    def steps(self) -> int:
        """Steps whose micro-batches were taken."""
        return self._taken // self._accumulation


def kept(error: BrokenSteps, state: State, batches: Recent, first: int) -> BrokenSteps:
    """The error with the command that runs its step again, which is written down; without, where that fails.

    Args:
        error: of `train_step`.
        state: of the worker.
        batches: that the training took.
        first: step at which it began to take them.
    """
    try:
        file = save(state, batches.of_step(first + batches.steps - 1 - error.step), error.step)
    except OSError as failure:
        return BrokenSteps(f"{error}. The step could not be kept ({failure})", error.step)
    return BrokenSteps(f"{error}. It is kept: python jobs/replay.py {file}", error.step)


def save(state: State, batches: list[Batch], step: int) -> str:
    """Write a broken step into the run's folder; returns the URI of this worker's file.

    Args:
        state: of the worker, whose weights are those before the step.
        batches: the step's micro-batches.
        step: iteration, from 0.
    """
    record = {
        "checkpoint": content(state),
        "step": step,
        "rank": state.rank,
        "threads": torch.get_num_threads(),
        "recomputed": recomputes(state.model),
        "batches": [_pack(images, targets) for images, targets in batches],
    }
    buffer = io.BytesIO()
    torch.save(record, buffer)
    file = storage.join(state.job.folder, FOLDER, f"step_{step:06d}-worker_{state.rank}.pt")
    storage.write_bytes(file, buffer.getvalue())
    return file


@dataclass(frozen=True)
class Replay:
    """The results of a step that is run again."""

    step: int
    names: list[str]
    """Names of its images."""
    losses: dict[str, float]
    """Means over the micro-batches, and their sum as `total`."""
    modules: list[str]
    """Modules whose output is not finite, in the order in which they ran."""
    gradients: list[str]
    """Parameters whose gradient is not finite."""

    @property
    def broken(self) -> bool:
        """True if anything is not finite, as it was in the training."""
        return bool(self.modules or self.gradients) or not all(abs(v) < float("inf") for v in self.losses.values())


def replay(file: str, device: torch.device | str = "cpu") -> Replay:
    """Run a broken step again, in one process.

    Args:
        file: that `save` wrote, local or s3://.
        device: to run it on.

    Raises:
        ValueError: there is no such file, or it is none of these.
    """
    if not storage.exists(file):
        raise ValueError(f"{file}: no such file; a training that stopped names one in its folder {FOLDER}/")
    try:
        record = torch.load(io.BytesIO(storage.read_bytes(file)), map_location="cpu", weights_only=True)
        checkpoint, batches = record["checkpoint"], [_unpack(entry) for entry in record["batches"]]
        options = checkpoint["experiment"]
    except Exception as error:  # the unpickler meets whatever the bytes say
        raise ValueError(f"{file}: {NOT_OURS}; give a file of a run's folder {FOLDER}/") from error
    engine = Engine(
        precision=options["engine.precision"],
        tf32=options.get("engine.tf32", "convolutions"),  # this and the next not in files of earlier versions
        channels_last=options["engine.channels_last"],
    )
    with _as_in_training(record.get("threads", options["train.threads"]), options["train.deterministic"]):
        model = prepare(_model(checkpoint), device, engine)
        if record.get("recomputed"):
            recompute_blocks(model)
        freeze_parameters(model, tuple(options["train.freeze"]))
        training_mode(model, options["train.frozen_dropout"])
        model.begin_step(record["step"], options["train.steps"])
        modules = _watched(model)
        scale = checkpoint["optimiser"]["param_groups"][0].get(SCALE) if engine.precision == "float16" else None
        names: list[str] = []
        sums: Tensor | None = None
        for micro, (images, targets) in enumerate(batches):
            seed_torch(options["train.seed"], record["step"], micro, record["rank"])
            names, values = forward_backward(
                model,
                images,
                targets,
                engine,
                len(batches),
                micro == len(batches) - 1,
                None if scale is None else scale.to(device),
                Phases(torch.device(device)),
            )
            sums = values if sums is None else values + sums
    assert sums is not None
    losses = dict(zip(names, sums.tolist(), strict=True))
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    return Replay(record["step"], [name for _, t in batches for name in t.names], losses, modules, bad)


@contextmanager
def _as_in_training(threads: int, deterministic: bool) -> Iterator[None]:
    """A context with the training's settings of torch: sums depend on how they are shared out over threads."""
    before, was = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads or before)
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(was)


def _model(checkpoint: dict[str, Any]) -> PanopticModel:
    """The model with the weights that it trained; they may be anything but averaged."""
    model: PanopticModel = read_config(without_download(checkpoint["config"])).build(read_categories(checkpoint))
    load_weights(model, checkpoint["weights"])
    return model


def _watched(model: nn.Module) -> list[str]:
    """A list that takes the name of each module whose output is not finite, when it runs."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, given: Any, output: Any) -> None:
            if name not in found and not all(bool(torch.isfinite(tensor).all()) for tensor in _floats(output)):
                found.append(name)

        return look

    for name, module in model.named_modules():
        if name and not list(module.children()):
            module.register_forward_hook(watch(name))
    return found


def _floats(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _floats(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _floats(entry)


def _pack(images: Tensor, targets: Targets) -> dict[str, Any]:
    """A micro-batch as plain values and tensors on the CPU."""
    frame = targets.frame
    return {
        "images": images.cpu(),
        "segments": targets.segments.cpu(),
        "labels": targets.labels.cpu(),
        "crowd": targets.crowd.cpu(),
        "canvas": list(frame.canvas),
        "sizes": frame.sizes.cpu(),
        "output_sizes": frame.output_sizes.cpu(),
        "names": list(targets.names),
        "features": None if targets.features is None else {k: v.cpu() for k, v in targets.features.items()},
    }


def _unpack(entry: dict[str, Any]) -> Batch:
    height, width = entry["canvas"]
    frame = Frame((height, width), entry["sizes"], entry["output_sizes"])
    names = tuple(entry["names"])
    features = entry.get("features")  # not in files of earlier versions
    return entry["images"], Targets(entry["segments"], entry["labels"], entry["crowd"], frame, names, features)
