"""Shards of features: computed once, completed after a kill, found again by those who agree, without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from panoptic.segmentation import Sample
from panoptic.transforms import Augment
from pipelines.cluster.actor_pool import Pool
from pipelines.data import feature_shards
from pipelines.data.feature_maps import decode_features, encode_features, is_features
from pipelines.data.feature_shards import ensure_features, folder_of
from pipelines.data.manifest import Manifest
from pipelines.data.sampler import Stream
from pipelines.data.shard_reader import Rows, view
from pipelines.data.shard_row import read_features, read_row
from tests.support.shards import ROWS, write_shards

HERE = Pool(actors=0)


def mean_colours(calls: list[int], most: int = 1 << 30):
    """Builds a function that computes each image's mean colour, and dies after so many calls."""

    def extract(samples: Sequence[Sample]) -> list[dict[str, np.ndarray]]:
        if len(calls) >= most:
            raise KeyboardInterrupt
        calls.append(len(samples))
        return [{"res5": sample.image.mean((0, 1)).astype(np.float32)[:, None, None]} for sample in samples]

    return extract


@pytest.fixture
def images(tmp_path: Path) -> Manifest:
    return Manifest.load(write_shards(tmp_path))


def ensure(images: Manifest, cache: Path, calls: list[int], most: int = 1 << 30, about: str = "a") -> Manifest:
    return ensure_features(images, str(cache), {"backbone": about}, mean_colours, (calls, most), 12, HERE)


def test_rows_hold_the_features_of_the_same_rows(images: Manifest, tmp_path: Path) -> None:
    calls: list[int] = []
    features = ensure(images, tmp_path / "cache", calls)
    assert features.rows == images.rows and features.categories == images.categories and features.uri != images.uri
    for number in range(images.rows):
        before, row = (Rows(part.shard_set).row(number) for part in (images, features))
        sample, told = read_row(before), read_features(row)
        assert told.features is not None and told.name == sample.name and told.image.shape == sample.image.shape
        np.testing.assert_allclose(told.features["res5"][:, 0, 0], sample.image.mean((0, 1)), rtol=1e-6)
        np.testing.assert_array_equal(told.truth.segments, sample.truth.segments)
        np.testing.assert_array_equal(told.truth.labels, sample.truth.labels)
    stream = Stream(seed=0, rows=images.rows, batch=2, steps=2)
    seen = view(Rows(features.shard_set).row(3) | {"position": 3}, stream, Augment(flip=1.0))
    assert seen.position == 3 and not seen.drawn  # what was done to it stays
    with pytest.raises(ValueError, match="holds features of a frozen backbone, no pixels; give the images' shards"):
        read_row(Rows(features.shard_set).row(0))


def test_who_agrees_shares_and_what_differs_is_another_cache(images: Manifest, tmp_path: Path) -> None:
    calls: list[int] = []
    first = ensure(images, tmp_path, calls)
    done = len(calls)
    assert ensure(images, tmp_path, calls) == first and len(calls) == done
    other = ensure(images, tmp_path, calls, about="b")
    assert other.uri != first.uri and len(calls) == 2 * done
    changed, _ = folder_of(Manifest(**{**vars(images), "hash": "0" * 64}), str(tmp_path), {"backbone": "a"})
    assert changed not in (first.uri, other.uri)  # other pixels, other copies, another seed


def test_a_killed_computation_is_completed_to_the_same_bytes(images: Manifest, tmp_path: Path) -> None:
    whole = ensure(images, tmp_path / "whole", [])
    calls: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        ensure(images, tmp_path / "cut", calls, most=3)
    assert not list((tmp_path / "cut").rglob("manifest.json"))
    again: list[int] = []
    assert ensure(images, tmp_path / "cut", again) == whole
    assert len(calls) + len(again) == len(whole.shards)  # nothing twice
    for shard in whole.shards:
        parts = [next((tmp_path / name).rglob(shard.path)).read_bytes() for name in ("whole", "cut")]
        assert parts[0] == parts[1]


def test_a_missing_shard_is_named_with_the_remedy(images: Manifest, tmp_path: Path) -> None:
    features = ensure(images, tmp_path, [])
    Path(features.files[1]).unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.arrow is missing from the folder.*delete .*computed again"):
        ensure(images, tmp_path, [])


def test_shards_stay_small(images: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_shards, "SHARD_BYTES", 24)
    assert {shard.rows for shard in ensure(images, tmp_path, []).shards} <= {1, 2}
    assert images.rows == 2 * ROWS


def test_maps_are_what_was_written_and_nothing_else_is_read() -> None:
    maps = {"res2": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "res5": np.ones((1, 1, 2), np.float16)}
    data = encode_features(maps)
    assert is_features(data) and not is_features(b"\xff\xd8\xff\xe0")
    again = decode_features(data, "a.jpg")
    assert all(again[name].dtype == maps[name].dtype and np.array_equal(again[name], maps[name]) for name in maps)
    with pytest.raises(ValueError, match=r"a\.jpg: its features cannot be read"):
        decode_features(data[:-5], "a.jpg")
    with pytest.raises(ValueError, match=r"its feature x is int64 \(2,\), no map"):
        decode_features(encode_features({"x": np.arange(2)}), "a.jpg")
