"""Checks before a sweep starts anything: options, values of the search space, models, weights, the cluster."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from panoptic.backbones import Backbone, imagenet
from panoptic.backbones.build import OPTIONS
from panoptic.backbones.weights import load_weights
from panoptic.convert import read_checkpoint
from panoptic.training.transfer import COUNTER
from pipelines.cluster import storage
from pipelines.config import Experiment, least_workers
from pipelines.tracking import runs
from pipelines.training.preflight import check_freezing, lacking, meta_model
from pipelines.training.sharing import accumulation
from pipelines.tuning import search_space, trial_config
from pipelines.tuning.plan import Trials
from pipelines.tuning.search_space import PRESET


class MissingWeights(ValueError):
    """Raised where a trial freezes parts into which no weights are loaded."""


TensorShapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Name and shape of every tensor of a model."""


class TrialCheck:
    """Checks that a draw makes an experiment that can train, and that the weights of its backbone fit.

    Models are built without memory, each distinct one once. `experiments` collects those that passed.
    """

    def __init__(self, trials: Trials, allow_lacking: bool = False) -> None:
        """Args:
        trials: of the sweep.
        allow_lacking: frozen parts will get their weights before anything starts.
        """
        self.trials, self.allow_lacking = trials, allow_lacking
        self.experiments: list[Experiment] = []
        self._built: dict[str, TensorShapes] = {}
        self._weights = WeightsCheck()

    def __call__(self, values: Mapping[str, Any]) -> Experiment:
        """The experiment of a draw, `{path: value}`.

        Raises:
            ValueError: there is none, or it cannot train.
        """
        changes = {path: value for path, value in values.items() if path != PRESET}
        return self.check(values.get(PRESET, self.trials.preset), changes)

    def check(self, preset: str, changes: Mapping[str, Any]) -> Experiment:
        """The experiment of a preset with changes.

        Raises:
            MissingWeights: it freezes parts without weights, and that is not allowed.
            ValueError: there is none, or it cannot train.
        """
        experiment, schedule = trial_config.apply(self.trials.bases[preset], changes)
        options, backbone = experiment.train, experiment.model.backbone
        if least_workers(options.workers) < options.workers:
            raise ValueError(
                f"train.workers {options.workers}: the trials of a sweep share a cluster, so each has one number of "
                "workers; give one, or sweep over several: train.workers=choice(1,2)"
            )
        accumulation(options, options.workers)
        for stages in {stages for _, stages in schedule}:
            part = replace(experiment, model=replace(experiment.model, backbone=replace(backbone, freeze=stages)))
            self._shapes(part)
            if lacking(part) and not self.allow_lacking:
                try:
                    check_freezing(part)
                except ValueError as error:
                    raise MissingWeights(str(error)) from error
        self._weights.check(experiment)
        self.experiments.append(experiment)
        return experiment

    def check_exchange(self) -> None:
        """Check that trials of population based training can take over each other's weights.

        Raises:
            ValueError: a path of the space changes the weights' shapes.
        """
        first = next(search_space.probes(self.trials.space))
        for path, domain in self.trials.space.items():
            drawn = [self({**first, path: value}) for value in domain.probes()]
            if len({self._shapes(experiment) for experiment in drawn}) > 1:
                raise ValueError(
                    f"--scheduler pbt: {path} changes the shapes of the model's weights, which no trial could take "
                    "over from another; leave it out, or choose another scheduler"
                )

    def _shapes(self, experiment: Experiment) -> TensorShapes:
        """Names and shapes of the tensors of an experiment's model.

        Raises:
            ValueError: its options do not make a model.
        """
        key = repr(experiment.model)
        if key not in self._built:
            state = meta_model(experiment).state_dict()
            # A frozen norm holds the same tensors in another order, timm's without the counter.
            shapes = {name: tuple(value.shape) for name, value in state.items() if not name.endswith(COUNTER)}
            self._built[key] = tuple(sorted(shapes.items()))
        return self._built[key]


class WeightsCheck:
    """Checks that the weights which a backbone is to start from fit it, by names and shapes.

    Each distinct backbone is tried once, each file is read once, and nothing is downloaded.
    """

    def __init__(self) -> None:
        self._tried: set[Backbone] = set()
        self._files: dict[str, Mapping[str, Tensor]] = {}

    def check(self, experiment: Experiment) -> None:
        """Check an experiment's backbone.

        Raises:
            ValueError: the backbone's weights cannot be read, or do not fit; names what differs.
        """
        backbone = replace(experiment.model.backbone, freeze=0)
        if backbone.weights == "none" or backbone in self._tried:
            return
        shapes = _imagenet(backbone) if backbone.weights in imagenet.NAMES else self._read(backbone.weights)
        with torch.device("meta"):
            if shapes:
                load_weights(replace(backbone, weights="none").build(), shapes)
        self._tried.add(backbone)

    def _read(self, file: str) -> Mapping[str, Tensor]:
        """The tensors of a file of weights, without memory."""
        if file not in self._files:
            try:
                state = read_checkpoint(io.BytesIO(storage.read_bytes(file)), file)
            except OSError as error:
                raise ValueError(f"model.backbone.weights: {error}") from error
            self._files[file] = {name: value.to("meta") for name, value in state.items()}
        return self._files[file]


def _imagenet(backbone: Backbone) -> Mapping[str, Tensor]:
    """The tensors, without memory, of the ImageNet weights; {} for timm's own models, which they fit.

    Raises:
        ValueError: timm has no weights, or none for such a backbone.
    """
    import timm  # takes seconds, and most plans need nothing of it

    name = backbone.timm_name
    if not timm.is_model_pretrained(name):
        raise ValueError(f"model.backbone.weights imagenet: timm has no weights for {name}; give a FILE")
    if backbone.name not in OPTIONS:
        return {}
    if backbone.stride_in_1x1:
        raise ValueError(
            "model.backbone.weights imagenet: its bottlenecks stride in the 3x3, those of model.backbone.stride_in_1x1 "
            "in the first 1x1; give a FILE such as R-50.pkl"
        )
    with torch.device("meta"):
        return timm.create_model(name).state_dict()


def check_storage(bases: Iterable[Experiment]) -> None:
    """Check that what is written stays, that drawn scenes go to a local folder, and that results on S3 have a store.

    Raises:
        ValueError: the storage is a bucket, or Ray's temporary copy of the code of a submitted job; or no tracking
            store is named where other machines write to it.
    """
    bases = list(bases)
    for base in bases:
        storage.check_lasting(base.storage, "--storage")
        if base.data.root == "scenes" and "://" in base.storage:
            raise ValueError(
                f"data.root scenes: the scenes are drawn into a local folder, but storage is {base.storage}; set "
                "--storage to one, or give --data.root"
            )
    for base in bases:
        runs.check_store(base.tracking, base.storage if "://" not in base.storage else "runs", base.storage)


def check_population(samples: int, concurrent: int) -> None:
    """Check that a population trains all at once, without which its trials could not exchange.

    Raises:
        ValueError: the cluster does not hold it.
    """
    if concurrent < samples:
        raise ValueError(
            f"--scheduler pbt: a population of --samples {samples} must train at once, and {concurrent} trials do; "
            f"lower --samples to {concurrent}, let more of them share a machine's cores with --concurrent {samples}, "
            "or give each trial less with --train.workers and --train.cpus-per-worker"
        )
