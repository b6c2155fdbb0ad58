"""Training from the features of a frozen backbone: the losses of the images, and what cannot be cached, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from panoptic.training.checkpoint import save
from panoptic.training.step import SkipCounter, train_step
from panoptic.transforms import Augment
from pipelines.cluster.actor_pool import Pool
from pipelines.config import Experiment, override
from pipelines.data.copies import Copies
from pipelines.data.feature_maps import BACKBONE, FEATURES
from pipelines.data.loader import Feed
from pipelines.data.manifest import Manifest
from pipelines.presets import PRESETS
from pipelines.tracking.runs import Run
from pipelines.training.cached_features import cached_features
from pipelines.training.state import Job, State
from pipelines.training.worker import build_state, check_features, set_training_mode, stream_of
from tests.support.shards import write_shards

HERE = Pool(actors=0)

VIEW = {"augment.flip": 0.0, "augment.colour": "none", "augment.scale": "none", "augment.crop": (0, 0)}
"""Every image as it is: then none needs copies."""


@pytest.fixture
def images(tmp_path: Path) -> Manifest:
    return Manifest.load(write_shards(tmp_path))


@pytest.fixture
def experiment(images: Manifest, tmp_path: Path) -> Iterator[Experiment]:
    """The demo's model from weights of a checkpoint, its backbone frozen, on images as they are."""
    threads = torch.get_num_threads()
    demo = override(
        PRESETS["demo"](),
        {**VIEW, "engine.channels_last": False, "train.batch": 4, "train.workers": 1, "train.threads": 1},
    )
    weights = str(tmp_path / "weights.pt")
    torch.manual_seed(3)
    save(weights, config=demo.model, model=demo.model.build(images.categories))
    frozen = {"model.backbone.freeze": 5, "train.weights": weights, "data.shards": str(tmp_path / "cache")}
    yield override(demo, {**frozen, "data.cache_features": "float32", "train.steps": 6})
    torch.set_num_threads(threads)


def worker(experiment: Experiment, images: Manifest, features: Manifest | None) -> State:
    job = Job(experiment, images, images, Run("", "", ""), "", False, features=features)
    state = build_state(job, rank=1, world=1)
    set_training_mode(state.model, experiment.train)
    return state


def losses(state: State, last: int) -> list[float]:
    """The total loss of the steps up to `last`, which the state takes."""
    experiment, found = state.experiment, []
    stream = stream_of(state)
    with Feed(state.job.features or state.job.train, stream, experiment.augment, divisor=state.model.divisor) as feed:
        batches = iter(feed)
        while state.step < last:
            result = train_step(
                state.model,
                state.optimiser,
                batches,
                step=state.step,
                total=6,
                optim=experiment.optim,
                engine=experiment.engine,
                health=SkipCounter(),
            )
            found.append(result.losses["total"].item())
            state.step, state.position = state.step + 1, feed.position
    return found


def test_losses_are_those_of_the_images(experiment: Experiment, images: Manifest) -> None:
    features = cached_features(experiment, images, pool=HERE)
    assert features is not None and features.source[FEATURES][BACKBONE]
    plain = losses(worker(experiment, images, None), 6)
    cached = losses(worker(experiment, images, features), 6)
    assert cached == pytest.approx(plain, rel=1e-4) and len(set(plain)) == 6
    assert cached[0] == pytest.approx(plain[0], rel=1e-6)
    # stopped after four steps, and gone on with: to the bit
    first = worker(experiment, images, features)
    begun = losses(first, 4)
    second = worker(experiment, images, features)
    second.model.load_state_dict(first.model.state_dict())
    second.optimiser.load_state_dict(first.optimiser.state_dict())
    second.step, second.position = first.step, first.position
    check_features(second.model, features)
    assert begun + losses(second, 6) == cached


def test_another_backbone_or_option_makes_another_cache(experiment: Experiment, images: Manifest, capsys) -> None:
    def uri(**changes: Any) -> str:
        features = cached_features(override(experiment, changes), images, pool=HERE)
        assert features is not None
        return features.uri

    own = uri()
    assert (
        uri(**{"train.seed": 5, "optim.lr": 1.0, "train.batch": 2, "optim.ema": 0.9}) == own
    )  # trials of a sweep share it
    others = {own, uri(**{"data.cache_features": "float16"}), uri(**{"model.pixel_mean": (1.0, 2.0, 3.0)})}
    assert len(others) == 3
    model = experiment.model.build(images.categories)
    with pytest.raises(ValueError, match=r"come of another backbone.*--data\.cache-features no"):
        check_features(model, Manifest.load(own))
    assert cached_features(override(experiment, {"data.cache_features": "no"}), images) is None
    assert cached_features(override(experiment, {"model.backbone.freeze": 4}), images) is None
    assert "learn, so images are read" in capsys.readouterr().out


def test_views_that_change_are_refused(experiment: Experiment, images: Manifest) -> None:
    def refused(changes: dict[str, Any], match: str, shards: Manifest = images) -> None:
        with pytest.raises(ValueError, match=match):
            cached_features(override(experiment, changes), shards, pool=HERE)

    remedy = r"another view of an image in every epoch.*--augment\.copies N --augment\.originals False"
    refused({"augment.flip": 0.5}, remedy)
    for originals in (True, False):
        augment = Augment(flip=0.5, crop=(48, 48), pad="end", copies=1, originals=originals)
        copied = replace(images, source={**images.source, "copies": Copies(augment, 0).record()})
        changes = {"augment.flip": 0.5, "augment.crop": (48, 48), "augment.copies": 1, "augment.originals": originals}
        if originals:
            refused(changes, r"keep the copies alone with --augment\.originals False", copied)
            refused(changes | {"augment.copies": 0}, remedy, copied)
        else:
            assert cached_features(override(experiment, changes), copied, pool=HERE) is not None
    refused({"train.compile": True}, r"leave train\.compile out")
    small = replace(images, maximum_height=images.maximum_height + 1)
    refused({}, r"features are kept of views of one size: give --augment\.crop", small)
