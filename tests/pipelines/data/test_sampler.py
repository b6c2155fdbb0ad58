"""The order of training data: permutations, parts of steps, parts of an evaluation."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.sampler import (
    Repeats,
    Stream,
    chosen_rows,
    evaluation_rows,
    evaluation_window,
    limited,
    micro_batches,
    order,
    windowed,
)


@pytest.mark.parametrize("rows", [1, 2, 17, 100])
def test_every_epoch_is_another_permutation_of_all_rows(rows: int) -> None:
    epochs = [[order(5, epoch * rows + k, rows) for k in range(rows)] for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        assert [e for e, _ in epoch] == [number] * rows
        assert sorted(row for _, row in epoch) == list(range(rows))
    if rows > 2:
        assert len({tuple(row for _, row in epoch) for epoch in epochs}) == 3


def test_the_seed_changes_the_order() -> None:
    first, again, other = ([order(seed, k, 50) for k in range(50)] for seed in (1, 1, 2))
    assert first == again != other


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5), st.integers(0, 40))
@settings(max_examples=50, deadline=None)
def test_a_step_has_the_same_positions_for_any_layout(
    world: int, accumulation: int, size: int, step: int, start: int
) -> None:
    batch = world * accumulation * size
    parts = [part for rank in range(world) for part in micro_batches(step, batch, world, rank, accumulation, start)]
    assert [position for part in parts for position in part] == list(
        range(start + step * batch, start + (step + 1) * batch)
    )
    assert {len(part) for part in parts} == {size}


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 6"):
        micro_batches(0, 8, world=3, accumulation=2)


def test_a_stream_resumes_where_a_shorter_one_ended() -> None:
    whole = Stream(seed=1, rows=7, batch=6, steps=5, world=2, rank=1, accumulation=3)
    rest = Stream(seed=1, rows=7, batch=6, steps=3, start=12, world=2, rank=1, accumulation=3)
    assert [whole[k] for k in range(6, len(whole))] == [rest[k] for k in range(len(rest))]
    assert (len(whole), whole.size) == (15, 1)


def test_a_limit_keeps_the_first_rows_of_a_shuffle_of_its_own() -> None:
    kept = {}
    for limit in (5, 8):
        for seed in (0, 1):  # of the training: another order, the same rows
            stream = Stream(seed=seed, rows=20, batch=limit, steps=3, limit=limit)
            epochs = [[stream.locate(p) for p in stream[k]] for k in range(3)]
            assert [{epoch for epoch, _ in step} for step in epochs] == [{0}, {1}, {2}]
            rows = [sorted(row for _, row in step) for step in epochs]
            assert rows[0] == rows[1] == rows[2] and len(set(rows[0])) == limit
            assert kept.setdefault(limit, rows[0]) == rows[0]
    assert set(kept[5]) < set(kept[8]) and kept[5] != list(range(5))
    assert limited(20, 5, 1).tolist() != limited(20, 5, 0).tolist()
    assert Stream(seed=0, rows=20, batch=4, steps=1, limit=20).samples == 20
    with pytest.raises(ValueError, match=r"data\.limit 21: the training split has 20 rows"):
        Stream(seed=0, rows=20, batch=4, steps=1, limit=21)


def test_two_copies_of_each_row_make_an_epoch() -> None:
    stream = Stream(seed=3, rows=9, batch=2, steps=12, limit=6, copies=2)
    assert stream.samples == 12
    seen = [(*stream.locate(p), stream.copy(p)) for k in range(12) for p in stream[k]]
    for epoch in (0, 1):
        rows = [(row, copy) for e, row, copy in seen if e == epoch]
        assert sorted(rows) == [(row, copy) for row in sorted({row for row, _ in rows}) for copy in (0, 1)]
    assert Stream(seed=3, rows=9, batch=2, steps=1).copy(1) == 0


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_evaluation_covers_every_row_once_in_whole_windows(rows: int, world: int, batch: int) -> None:
    window = evaluation_window(rows, batch)
    parts = [evaluation_rows(rows, rank, world, window) for rank in range(world)]
    assert [row for part in parts for row in part] == list(range(rows))
    assert all(part.start % window == 0 for part in parts if part)
    windows = [-(-len(part) // window) for part in parts]
    assert max(windows) - min(windows) <= 1
    assert window % batch == 0 and batch <= window <= 16 * batch
    assert rows // window >= min(rows // batch, 16)  # enough of them to be shared out


def test_the_global_order_is_that_of_earlier_versions() -> None:
    """What runs that began before have trained on; a change here would make them repeat and skip samples."""
    assert [order(3, k, 23) for k in (0, 1, 22, 23, 24, 1000)] == [(0, 9), (0, 17), (0, 19), (1, 13), (1, 10), (43, 10)]
    rows = np.array([order(0, k, 118_287)[1] for k in range(200_000)])
    digest = hashlib.sha256(rows.tobytes()).hexdigest()
    assert digest == "4f23067590fb318bd3649b079391a44b10888329d2063af0ca16ff71267f65b3"


@pytest.mark.parametrize(
    ("options", "digest"),
    [
        ({"window": 16}, "2df760853a275f4f2a345837cdc3e8a2c4eeee82be1f1d8b19267b2f18fab974"),
        ({"window": 5, "copies": 2}, "78f151d922a5c311eff35a6a4a89ca782fe0508a0d9ab58bde1300f357a1f71d"),
        ({"limit": 300}, "d8d9fc5539baa5e736d7070b3f1af9b9deb72ab33db7b9b43f93ddf1a992e302"),
        (
            {"limit": 300, "limit_seed": 7, "copies": 2},
            "ee30cb0a445fc2330fe53fdcf1fcd0c3f74c8e67f42cec071756811a8d014210",
        ),
        (
            {"repeats": Repeats(1 + np.arange(1000) % 7 / 4)},
            "bd4c054348be7cee0d16b98c33c92726ef75d17047ed617cc20709dc6c911912",
        ),
    ],
    ids=["window", "window-copies", "limit", "limit-copies", "repeats"],
)
def test_the_other_orders_are_those_of_earlier_versions(options: dict[str, Any], digest: str) -> None:
    """As the test above, of streams with windows, of a part of the rows, in copies, and with rows that come again."""
    stream = Stream(3, 1000, batch=12, steps=300, **options)
    found = [(*stream.locate(p), stream.copy(p), stream.times(p)) for p in range(3600)]
    assert hashlib.sha256(np.array(found, np.int64).tobytes()).hexdigest() == digest


def test_the_parts_of_a_split_are_those_of_earlier_versions() -> None:
    rows = np.array(chosen_rows(1000, 100, 50, 3, "--data.limit"), np.int64)
    assert rows[:6].tolist() == [5, 16, 24, 27, 32, 69]
    digest = hashlib.sha256(rows.tobytes()).hexdigest()
    assert digest == "5fbae61ab0ce6b79a35842cad129415bf15bc370686dc8efcd99245891aeeb5b"


@given(st.integers(1, 60), st.integers(1, 12), st.integers(2, 9), st.integers(1, 3), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_windows_give_every_row_once_an_epoch(samples: int, batch: int, window: int, epochs: int, seed: int) -> None:
    places = [windowed(seed, position, samples, batch, window) for position in range(epochs * samples)]
    for epoch in range(epochs):
        part = places[epoch * samples : (epoch + 1) * samples]
        assert {place.epoch for place in part} == {epoch}
        assert sorted(place.sample for place in part) == list(range(samples))


@given(st.integers(1, 300), st.integers(1, 12), st.integers(2, 9), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_a_lane_takes_its_window_in_neighbouring_steps(samples: int, batch: int, window: int, start: int) -> None:
    """From any position: what one request brings is what the lane takes in its next steps, and lies together."""
    stream = Stream(seed=1, rows=samples, batch=batch, steps=1, window=window)
    place = stream.place(start)
    together = stream.read_with(place)
    assert 1 <= len(together) == len(place.rest) <= window and together[0] == place.sample
    following = [stream.place(start + k * batch) for k in range(len(together))]
    assert [other.sample for other in following] == together
    assert {other.window for other in following} == {place.window}
    distances = {(sample - min(together)) % samples for sample in together}
    if samples >= 2 * window and max(together) - min(together) < samples - window:  # else it lies around the end
        assert max(distances) < window
    after = stream.place(start + len(together) * batch)
    assert after.window != place.window


def test_windows_change_with_epoch_and_seed() -> None:
    orders = [[windowed(seed, p, 160, 4, 8).sample for p in range(320)] for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1] and orders[0][:160] != orders[0][160:]
    stream = Stream(0, 160, 4, 1, window=8)
    windows = [tuple(sorted(stream.read_with(stream.place(p)))) for p in (0, 1, 2, 3, 160, 161, 162, 163)]
    assert len(set(windows)) == 8


def test_windows_mix_a_batch_from_all_over_the_set() -> None:
    """Two rows of one window hardly ever meet in a batch."""
    rows, batch, window = 6400, 16, 16
    pairs = 0
    for step in range(rows // batch):
        found = sorted(windowed(0, step * batch + k, rows, batch, window).sample for k in range(batch))
        pairs += sum(b - a < window for a, b in itertools.pairwise(found))
    assert pairs / (rows // batch) < 1.3 * batch * (batch - 1) / 2 * 2 * window / rows + 0.1


def test_windows_need_neighbours() -> None:
    with pytest.raises(ValueError, match=r"data\.window 8: the rows that data\.limit 10 keeps are no neighbours"):
        Stream(seed=0, rows=20, batch=4, steps=1, limit=10, window=8)
    doubled = Stream(seed=0, rows=20, batch=4, steps=10, copies=2, window=8)
    found = [(doubled.locate(p)[1], doubled.copy(p)) for p in range(40)]
    assert sorted(found) == [(row, copy) for row in range(20) for copy in range(2)]


def test_a_validation_and_a_test_set_of_one_split_share_no_image() -> None:
    validation, test = (chosen_rows(500, 50, skip, 0, "--data.limit") for skip in (0, 50))
    assert len(validation) == len(test) == 50 and not set(validation) & set(test)
    assert list(validation) == sorted(validation) and validation != tuple(range(50))
    assert set(chosen_rows(500, 0, 50, 0, "x")) == set(range(500)) - set(validation)
    assert chosen_rows(500, 0, 0, 0, "x") == () and chosen_rows(500, 50, 0, 1, "x") != validation
    assert set(chosen_rows(500, 20, 0, 0, "x")) < set(validation)
    for limit, skip in ((501, 0), (451, 50), (0, 500)):
        with pytest.raises(ValueError, match=f"--data.limit {limit} and skip {skip}: the split has 500 rows"):
            chosen_rows(500, limit, skip, 0, "--data.limit")


def test_rare_rows_come_as_often_as_their_factors_say() -> None:
    """Over many epochs; in each epoch the whole number above or below, and an epoch always has as many positions."""
    factors = np.array([1.0, 2.5, 1.0, 1.0, 3.25, 1.0])
    stream = Stream(3, rows=6, batch=4, steps=1000, repeats=Repeats(factors))
    assert stream.samples == 10
    counts = np.zeros((400, 6), int)
    for epoch in range(400):
        places = range(10 * epoch, 10 * epoch + 10)
        located = [stream.locate(position) for position in places]
        assert {found for found, _ in located} == {epoch}
        seen: dict[int, int] = {}
        for position, (_, row) in zip(places, located, strict=True):
            assert stream.times(position) == seen.get(row, 0)
            seen[row] = seen.get(row, 0) + 1
        counts[epoch, list(seen)] = list(seen.values())
    share = 10 / factors.sum()
    assert (np.abs(counts - factors * share) < 1).all()
    np.testing.assert_allclose(counts.mean(0), factors * share, atol=0.06)
    orders = [[stream.locate(position)[1] for position in range(10 * e, 10 * e + 10)] for e in range(3)]
    assert orders[0] != orders[1] != orders[2]
    other = Stream(3, rows=6, batch=4, steps=1000, repeats=Repeats(factors.copy()), world=2, rank=1)
    assert [other.locate(p) for p in range(50)] == [stream.locate(p) for p in range(50)]


def test_rare_rows_of_a_limited_set_are_those_rows() -> None:
    kept = limited(20, 3, 0).tolist()
    stream = Stream(0, rows=20, batch=1, steps=50, limit=3, repeats=Repeats(np.array([1.0, 1.0, 4.0])))
    assert [stream.locate(p)[1] for p in range(6)].count(kept[2]) == 4 and stream.samples == 6
    for options in ({"window": 4}, {"copies": 2}):
        with pytest.raises(ValueError, match=r"data\.balance"):
            Stream(0, rows=20, batch=1, steps=5, repeats=Repeats(np.ones(20)), **options)
    plain = Stream(0, rows=20, batch=1, steps=5)
    assert plain.times(7) == 0
