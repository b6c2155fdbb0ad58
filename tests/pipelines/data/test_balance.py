"""Class-balanced sampling: the factors of LVIS, the classes of each image, and the options of a training."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from panoptic.segmentation import Categories
from panoptic.transforms import Augment
from pipelines.data import balance
from pipelines.data.balance import class_presence, repeat_factors
from pipelines.data.sampler import Repeats, Stream
from pipelines.data.shard_reader import Rows, view
from pipelines.presets.panoptic_deeplab import demo
from pipelines.training import driver
from pipelines.training.preflight import check_options
from tests.support.stored import write_shards


def test_the_factors_are_those_of_the_paper() -> None:
    """sqrt(t / f) of the rarest class of an image, 1 of a frequent one; images without a class are read once."""
    presence = np.zeros((100, 4), bool)
    presence[:, 0] = True
    presence[:25, 1] = True
    presence[10:11, 2] = True
    presence[99] = False
    factors = repeat_factors(presence, 0.5)
    assert factors[0] == pytest.approx(np.sqrt(0.5 / 0.25)) and factors[10] == pytest.approx(np.sqrt(0.5 / 0.01))
    assert factors[50] == factors[99] == 1.0
    assert (repeat_factors(presence, 0.001) == 1).all()


def test_the_classes_of_each_image_are_read_once(
    small_categories: Categories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_shards(tmp_path / "shards", small_categories, 70)
    cache = str(tmp_path / "cache")
    found = class_presence(manifest, range(70), cache)
    reader = Rows(manifest.shard_set)
    for row in range(70):
        assert set(np.flatnonzero(found[row])) == set(reader.row(row)["labels"])
    monkeypatch.setattr(balance, "Rows", lambda *given: pytest.fail("the rows were read again"))
    np.testing.assert_array_equal(class_presence(manifest, [5, 3], cache), found[[5, 3]])


def test_an_image_that_comes_again_looks_different(small_categories: Categories, tmp_path: Path) -> None:
    manifest = write_shards(tmp_path / "shards", small_categories, 3)
    stream = Stream(0, rows=3, batch=1, steps=9, repeats=Repeats(np.array([1.0, 1.0, 3.0])))
    again = [position for position in range(5) if stream.locate(position)[1] == 2]
    assert len(again) == 3
    row, augment = Rows(manifest.shard_set).row(2), Augment(scale="factor", crop=(33, 33))
    views = [view(row | {"position": position}, stream, augment) for position in again]
    assert len({tuple(sorted(one.drawn.items())) for one in views}) == 3
    plain = Stream(0, rows=3, batch=1, steps=9)
    first = next(position for position in range(3) if plain.locate(position)[1] == 2)
    once = view(row | {"position": first}, plain, augment)
    assert once.drawn == views[0].drawn  # the first time as in a plain epoch


def test_a_training_reads_rare_classes_more_often(
    small_categories: Categories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train_set = write_shards(tmp_path / "t", small_categories, 40)
    monkeypatch.setattr(driver, "ensure_shards", lambda *given, **more: train_set)
    base = replace(demo(), storage=str(tmp_path))

    def experiment(**changes: object):
        return replace(base, data=replace(base.data, root=str(tmp_path), **changes))  # type: ignore[arg-type]

    assert driver.repeats_of(experiment(), train_set) is None
    caplog.set_level(logging.INFO)
    repeats = driver.repeats_of(experiment(balance=1.0, limit=20), train_set)
    assert repeats is not None and len(repeats.factors) == 20 and repeats.size > 20
    assert f"data.balance 1: an epoch reads {repeats.size} images of 20" in caplog.text
    with pytest.raises(ValueError, match=r"data\.balance 0\.5: cannot be combined with data\.window"):
        check_options(experiment(balance=0.5, window=4))
