"""Whether the weights that a backbone is to start from fit it: told from names and shapes before anything starts."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import timm
import torch
from torch import Tensor

from panoptic.backbones import Backbone
from panoptic.backbones.config import OPTIONS, TIMM_NAMES
from panoptic.backbones.weights import load_weights
from panoptic.convert import read_checkpoint
from panoptic.training.transfer import COUNTER
from pipelines.cluster import storage
from pipelines.config import Experiment
from pipelines.training.preflight import check_freezing, meta_model
from pipelines.training.worker import accumulation
from pipelines.tuning import search_space, trial_config
from pipelines.tuning.plan import Sweep, Trials
from pipelines.tuning.search_space import PRESET, Space

Shapes = Mapping[str, Tensor]
"""Tensors without memory."""


class WeightsCheck:
    """Each distinct backbone is tried once, each file read once; nothing is downloaded."""

    def __init__(self) -> None:
        self._tried: set[Backbone] = set()
        self._files: dict[str, Shapes] = {}

    def check(self, experiment: Experiment) -> None:
        """Raises:
        ValueError: the backbone's weights cannot be read, or do not fit; names what differs.
        """
        backbone = replace(experiment.model.backbone, freeze=0)
        if backbone.weights == "none" or backbone in self._tried:
            return
        shapes = _timm(backbone) if backbone.weights == "timm" else self._read(backbone.weights)
        with torch.device("meta"):
            if shapes:
                load_weights(replace(backbone, weights="none").build(), shapes)
        self._tried.add(backbone)

    def _read(self, file: str) -> Shapes:
        if file not in self._files:
            try:
                state = read_checkpoint(io.BytesIO(storage.read_bytes(file)), file)
            except OSError as error:
                raise ValueError(f"model.backbone.weights: {error}") from error
            self._files[file] = {name: value.to("meta") for name, value in state.items()}
        return self._files[file]


def _timm(backbone: Backbone) -> Shapes:
    """Of what timm would download; {} for its own models, which fit themselves.

    Raises:
        ValueError: timm has no weights, or none for such a backbone.
    """
    name = TIMM_NAMES.get(backbone.name, backbone.name)
    if not timm.is_model_pretrained(name):
        raise ValueError(f"model.backbone.weights timm: timm has no weights for {name}; give a FILE")
    if backbone.name not in OPTIONS:
        return {}
    if backbone.stride_in_1x1:
        raise ValueError(
            "model.backbone.weights timm: its bottlenecks stride in the 3x3, those of model.backbone.stride_in_1x1 "
            "in the first 1x1; give a FILE such as R-50.pkl"
        )
    with torch.device("meta"):
        return timm.create_model(name).state_dict()


def check_options(options: Sweep, space: Space) -> None:
    """Combinations that Tune cannot do.

    Raises:
        ValueError: says what to write instead.
    """
    kinds = {domain.kind for domain in space.values()}
    gridded = [path for path, domain in space.items() if domain.kind == "grid" and len(domain.values) > 1]
    if options.searcher == "grid" and kinds - {"grid", "choice"}:
        raise ValueError("--searcher grid enumerates: write grid(…) or choice(…) for every path")
    if gridded and (options.searcher == "optuna" or options.scheduler == "pbt"):
        which = "--searcher optuna" if options.searcher == "optuna" else "--scheduler pbt"
        raise ValueError(f"{which} draws values: write choice(…) instead of grid(…) for {', '.join(gridded)}")
    if options.searcher == "optuna" and all(domain.constant for domain in space.values()):
        raise ValueError("--searcher optuna: every path has one value, so there is nothing to draw")
    if options.searcher == "optuna" and options.scheduler == "pbt":
        raise ValueError("--scheduler pbt changes options itself and takes no --searcher optuna; leave that out")
    if options.scheduler == "pbt" and options.samples < 2:
        raise ValueError("--scheduler pbt needs a population: --samples 4 or more")
    if options.scheduler == "pbt" and PRESET in space:
        raise ValueError("--scheduler pbt: weights of one architecture do not fit another; leave preset out")
    if options.samples < 1 or options.grace < 1 or options.reduction < 2 or options.concurrent < 0:
        raise ValueError("--samples and --grace are 1 or more, --reduction 2 or more, --concurrent 0 or more")
    if options.searcher == "optuna":
        try:
            import optuna  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "--searcher optuna needs the extra `search`: pip install 'panoptic-ray[search]'"
            ) from error


TensorShapes = tuple[tuple[str, tuple[int, ...]], ...]


class Checker:
    """Whether a draw makes an experiment that can train, and its backbone's weights fit; models are built without
    memory, each once."""

    def __init__(self, trials: Trials, allow_lacking: bool = False) -> None:
        """Args:
        trials: of the sweep.
        allow_lacking: frozen parts will get their weights before anything starts.
        """
        self.trials, self.allow_lacking = trials, allow_lacking
        self.experiments: list[Experiment] = []
        self._built: dict[str, TensorShapes] = {}
        self._fitting = WeightsCheck()

    def __call__(self, values: Mapping[str, Any]) -> Experiment:
        """Raises:
        ValueError: it does not.
        """
        changes = {path: value for path, value in values.items() if path != PRESET}
        return self.check(values.get(PRESET, self.trials.preset), changes)

    def check(self, preset: str, changes: Mapping[str, Any]) -> Experiment:
        """The experiment of a preset with changes.

        Raises:
            ValueError: there is none, or it cannot train.
        """
        experiment, schedule = trial_config.apply(self.trials.bases[preset], changes)
        options, backbone = experiment.train, experiment.model.backbone
        accumulation(options.batch, options.workers, options.micro_batch)
        for stages in {stages for _, stages in schedule}:
            part = replace(experiment, model=replace(experiment.model, backbone=replace(backbone, freeze=stages)))
            self._shapes(part)
            if not self.allow_lacking:
                check_freezing(part)
        self._fitting.check(experiment)
        self.experiments.append(experiment)
        return experiment

    def _shapes(self, experiment: Experiment) -> TensorShapes:
        """Of all tensors of its model."""
        key = repr(experiment.model)
        if key not in self._built:
            state = meta_model(experiment).state_dict()
            # A frozen norm holds the same tensors in another order, timm's without the counter.
            shapes = {name: tuple(value.shape) for name, value in state.items() if not name.endswith(COUNTER)}
            self._built[key] = tuple(sorted(shapes.items()))
        return self._built[key]

    def check_exchange(self) -> None:
        """Population based training moves weights between trials.

        Raises:
            ValueError: a path of the space changes their shapes.
        """
        first = next(search_space.probes(self.trials.space))
        for path, domain in self.trials.space.items():
            drawn = [self({**first, path: value}) for value in domain.probes()]
            if len({self._shapes(experiment) for experiment in drawn}) > 1:
                raise ValueError(
                    f"--scheduler pbt: {path} changes the shapes of the model's weights, which no trial could take "
                    "over from another; leave it out, or choose another scheduler"
                )


def check_storage(bases: Iterable[Experiment]) -> None:
    """Drawn scenes need a local folder.

    Raises:
        ValueError: says so before anything is started.
    """
    for base in bases:
        if base.data.root == "scenes" and "://" in base.storage:
            raise ValueError(
                f"data.root scenes: the scenes are drawn into a local folder, but storage is {base.storage}; set "
                "--storage to one, or give --data.root"
            )


def check_population(samples: int, concurrent: int) -> None:
    """A population exchanges only while all of it trains.

    Raises:
        ValueError: it does not fit.
    """
    if concurrent < samples:
        raise ValueError(
            f"--scheduler pbt: a population of --samples {samples} must train at once, and {concurrent} trials do; "
            f"lower --samples to {concurrent}, let more of them share a machine's cores with --concurrent {samples}, "
            "or give each trial less with --train.workers and --train.cpus-per-worker"
        )
