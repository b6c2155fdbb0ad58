"""The benchmark at reduced size: every row gives figures, and a peer that disagrees gives none."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from panoptic.segmentation import Segmentation
from panoptic.training.step import Meter, StepResult
from tests.benchmarks import hosting, inputs
from tests.benchmarks.__main__ import ROWS, WITH_RAY, main
from tests.benchmarks.timing import Case, Row, measure, same_partition, table


@pytest.mark.nightly
def test_every_row_without_ray_prints_figures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "figures.json"
    names = [name for name in ROWS if name not in WITH_RAY]
    rows = main([*names, "--scale", "0.15", "--repeat", "1", "--json", str(file)])
    assert {row.name for row in rows} == set(names)
    assert all(row.ours > 0 for row in rows)
    compared = {row.peer: row.ratio for row in rows if row.name == "4"}
    assert compared["torchvision v2"] > 0 and compared["OpenCV"] > 0
    printed = capsys.readouterr().out
    assert "cores" in printed and all(f"| {name} " in printed for name in names)
    assert len(json.loads(file.read_text())["rows"]) == len(rows)


def test_the_hosts_work_is_that_of_the_loop_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done in every step and beside the network counts; waiting for the network does not."""
    add = Meter.add

    def busy(self: Meter, result: StepResult) -> None:
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass
        add(self, result)

    monkeypatch.setattr(Meter, "add", busy)
    loop, share = hosting.rows(tmp_path / "host", 12, 0.005)
    assert loop.ours > 20 > (loop.theirs or 0)
    assert share.ours == pytest.approx((loop.ours - (loop.theirs or 0)) / 0.05)


@pytest.mark.slow
def test_the_feed_agrees_with_a_dataloader(ray_cluster: None) -> None:
    *rates, wait = main(["feed", "--scale", "0.15", "--repeat", "1"])
    assert [row.unit for row in rates] == ["img/s", "img/s"] and all(row.ratio > 0 for row in rates)
    assert wait.unit == "ms" and 0 < wait.ours < 100


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_every_way_of_feeding_gives_figures() -> None:
    rows = main(["feeds", "feeds-bytes", "--scale", "0.15", "--repeat", "1"])
    assert {row.peer for row in rows} == {"DataLoader over files", "plain Ray Data"}
    assert all(row.ours > 0 and (row.theirs or 0) > 0 for row in rows if not row.work.startswith("bytes read"))
    # each byte is read once; of images this small a quarter more is the row's other columns
    assert all(0.7 < row.ours < 1.6 for row in rows if row.work.startswith("bytes read"))


def test_workers_are_compared_by_what_their_logs_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        workers, threads = (int(command[command.index(f"--train.{name}") + 1]) for name in ("workers", "threads"))
        asked.append((workers, threads))
        speeds = (1.0, *(10.0 * workers + threads + k for k in (0, 1, 5)))  # the first is of the loading
        lines = [
            f"step {k}/6 | total 1.5 | lr 1e-03 | {speed} images/s | data wait 0 %" for k, speed in enumerate(speeds)
        ]
        return SimpleNamespace(returncode=0, stdout="\n".join(["starting", *lines, "PQ 57"]), stderr="")

    monkeypatch.setattr("subprocess.run", run)
    rows = main(["workers"])
    assert asked == [(2, 1), (1, 1), (1, 2)]
    assert [(row.ours, row.theirs) for row in rows] == [(22.0, 12.0), (22.0, 13.0)]
    assert rows[0].ratio == pytest.approx(22 / 12)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: SimpleNamespace(returncode=2, stdout="", stderr="error: x"))
    with pytest.raises(ValueError, match=r"demo .*ended with 2:\nerror: x"):
        main(["workers"])


def test_what_cannot_be_measured_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row is called 9z"):
        main(["9z"])
    with pytest.raises(ValueError, match="no such folder; clone"):
        main(["1b", "--peers", str(tmp_path / "absent")])


def test_a_peer_that_disagrees_stops_the_case() -> None:
    def equal(ours: int, theirs: int) -> None:
        if ours != theirs:
            raise ValueError("differs")

    agreeing = Case("x", "a sum", lambda k: k, {"peer": lambda k: k}, {"peer": equal}, inputs=3)
    (row,) = measure(agreeing, 2)
    assert row.peer == "peer" and row.theirs is not None
    other = Case("x", "a sum", lambda k: k, {"peer": lambda k: min(k, 1)}, {"peer": equal}, inputs=3)
    with pytest.raises(ValueError, match="x, peer, input 2: differs"):
        measure(other, 2)


def test_partitions_are_equal_up_to_names() -> None:
    ours = np.array([[0, 1, 1], [2, 2, 2]])
    same_partition(ours, 7 - ours, 0.0, "map")
    for merged in (np.minimum(ours, 1), np.arange(6).reshape(2, 3)):  # parts joined, parts cut
        with pytest.raises(ValueError, match="map: "):
            same_partition(ours, merged, 0.1, "map")


def test_table_of_rows_with_and_without_a_peer() -> None:
    lines = table([Row("1", "a", 0.5, "ms"), Row("2", "b", 10, "ms", "p", 1234, 123.4)]).splitlines()
    assert lines[2].split("|")[3:7] == [" 0.50 ms ", " -    ", " -       ", " -     "]
    assert lines[3].split("|")[3:7] == [" 10.0 ms ", " p    ", " 1234 ms ", " 123x  "]


def test_drawn_inputs_are_seeded_partitions() -> None:
    classes = inputs.categories(8, 11)
    first, again = (inputs.draw_truth(np.random.default_rng(3), (120, 160), 9, 5, classes) for _ in range(2))
    assert isinstance(first, Segmentation) and np.array_equal(first.segments, again.segments)
    assert (first.areas() > 0).all() and 10 <= len(first.labels) <= 14 and (first.segments == 0).any()
    assert first.is_crowd().sum() == 1
    assert 0.2 < len(inputs.encode_jpeg(inputs.draw_image(np.random.default_rng(3), first))) / (120 * 160) < 0.53
