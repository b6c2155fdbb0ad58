"""Checkpoint folders: a training continues where it stood, also in the data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from panoptic.metrics.report import Evaluation
from panoptic.segmentation import Categories, Targets
from panoptic.training.checkpoint import load, save
from panoptic.training.freezing import freeze_parameters
from panoptic.training.optim import Optim
from panoptic.transforms import Augment
from pipelines.cluster import disk
from pipelines.data.loader import Feed
from pipelines.presets import PRESETS
from pipelines.tracking.runs import Run
from pipelines.training import worker
from pipelines.training.checkpoints import (
    CHECKPOINT,
    METRICS,
    REPORT,
    checkpoint_bytes,
    content,
    drop_torn,
    load_checkpoint,
    resume,
    transfer,
    write,
)
from pipelines.training.state import Job, State
from pipelines.training.worker import build_state, stream_of, train
from pipelines.training.writer import Writer, upload_checkpoint
from tests.support.evaluations import evaluation_of, moved_pairs
from tests.support.ray_train import in_ray
from tests.support.small import SMALL_DEEPLAB
from tests.support.stored import write_shards

ROWS = 20


@pytest.fixture
def job(small_categories: Categories, tmp_path: Path) -> Iterator[Job]:
    """A tiny model on 20 drawn images, global batch 4."""
    threads = torch.get_num_threads()
    shards = write_shards(tmp_path, small_categories, ROWS)
    demo = PRESETS["demo"]()
    options = replace(demo.train, batch=4, steps=100, threads=1, workers=1)
    experiment = replace(demo, model=SMALL_DEEPLAB, augment=Augment(crop=(33, 33)), train=options)
    yield Job(experiment, shards, shards, Run("", "", ""), "", False)
    torch.set_num_threads(threads)


@pytest.fixture
def figures(small_categories: Categories, random_segmentation: Callable) -> Evaluation:
    return evaluation_of(moved_pairs(random_segmentation, small_categories, 1), small_categories)


def with_options(job: Job, **options: Any) -> Job:
    return replace(job, experiment=replace(job.experiment, train=replace(job.experiment.train, **options)))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that trained, in their order; neither validates nor reports."""
    names: list[str] = []

    class Recorded(Feed):
        def __iter__(self) -> Iterator[tuple[Tensor, Targets]]:
            for images, targets in super().__iter__():
                names.extend(targets.names)
                yield images, targets

    monkeypatch.setattr(worker, "Feed", Recorded)
    monkeypatch.setattr(worker, "Tracker", lambda *_: None)
    monkeypatch.setattr(worker, "validate", lambda state, interrupts: state.model.eval())
    monkeypatch.setattr(Writer, "save", lambda self, evaluation=None: None)
    return names


def kept(state: State, folder: Path, figures: Evaluation) -> str:
    """The checkpoint folder of a state."""
    folder.mkdir()
    write(folder, content(state), figures)
    assert {path.name for path in folder.iterdir()} == {CHECKPOINT, REPORT, METRICS}
    return str(folder)


def test_another_global_batch_neither_repeats_nor_skips_a_sample(
    job: Job, seen: list[str], tmp_path: Path, figures: Evaluation
) -> None:
    """3 steps of 4 images, then one of 2 and one of 6 are the 20 images of an epoch, each once."""
    first = build_state(with_options(job, stop_after=3))
    train(first)
    assert (first.step, first.position, len(seen)) == (3, 12, 12)
    second = build_state(with_options(job, batch=2, stop_after=4))
    transfer(second, kept(first, tmp_path / "first", figures))
    train(second)
    assert (second.step, second.position, len(seen)) == (4, 14, 14)
    third = build_state(with_options(job, batch=6, micro_batch=3, stop_after=5))
    transfer(third, kept(second, tmp_path / "second", figures))
    train(third)
    assert (third.step, third.position) == (5, 20)
    assert sorted(seen) == sorted(f"{row}.jpg" for row in range(ROWS))


def test_a_continued_run_reads_what_the_uninterrupted_one_reads(
    job: Job, seen: list[str], tmp_path: Path, figures: Evaluation
) -> None:
    train(build_state(with_options(job, stop_after=6)))
    whole = list(seen)
    seen.clear()
    half = build_state(with_options(job, stop_after=3))
    train(half)
    again = build_state(with_options(job, stop_after=6))
    resume(again, Path(kept(half, tmp_path / "half", figures)) / CHECKPOINT)
    train(again)
    assert seen == whole and (again.step, again.position) == (6, 24)
    train(again)  # nothing is left
    assert seen == whole


@pytest.mark.parametrize("world", [1, 2, 3])
def test_workers_share_the_samples_after_any_position(job: Job, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "Tracker", lambda *_: None)
    states = [build_state(with_options(job, batch=6, stop_after=7), rank, world) for rank in range(world)]
    for state in states:
        state.step, state.position = 5, 17
    positions = [
        position for state in states for micro in map(stream_of(state).__getitem__, range(2)) for position in micro
    ]
    assert sorted(positions) == list(range(17, 17 + 2 * 6))


def test_a_checkpoint_of_an_earlier_version_continues_at_step_times_batch(job: Job, tmp_path: Path) -> None:
    """It kept that position in the same key."""
    old = build_state(job, rank=1, world=2)
    file = tmp_path / CHECKPOINT
    save(str(file), config=old.experiment.model, model=old.model, optimiser=old.optimiser, step=5, position=20)
    state = build_state(job, rank=1, world=2)
    resume(state, file)
    assert (state.step, state.position) == (5, 20) and list(stream_of(state)[0]) == [22, 23]


def test_a_checkpoint_holds_the_state(job: Job, tmp_path: Path, figures: Evaluation) -> None:
    state = build_state(job, rank=1, world=2)
    state.step, state.position = 7, 30
    folder = kept(state, tmp_path / "step_000007", figures)
    record = load_checkpoint(folder)
    assert (record["step"], record["position"]) == (7, 30)
    assert record["experiment"]["train.batch"] == 4
    for name, value in state.model.state_dict().items():
        np.testing.assert_array_equal(record["weights"][name], value, err_msg=name)
    assert load(f"{folder}/{CHECKPOINT}")["step"] == load_checkpoint(f"{folder}/{CHECKPOINT}")["step"] == 7
    assert (Path(folder) / REPORT).read_text().startswith("step 7\n")
    with pytest.raises(ValueError, match=r"no checkpoint there; name a run's folder, a folder step_\* in it"):
        load_checkpoint(str(tmp_path / "step_000008"))


@pytest.mark.parametrize(
    ("optim", "freeze"),
    [
        (Optim(optimiser="adamw"), ()),
        (Optim(optimiser="sgd", momentum=0.9, ema=0.99), ()),
        (Optim(optimiser="sgd", momentum=0.0), ()),
        (Optim(optimiser="adam", ema=0.99), ("backbone.*",)),
    ],
)
def test_the_size_of_a_checkpoint_is_known_before_the_first_step(
    optim: Optim, freeze: tuple[str, ...], job: Job, seen: list[str], tmp_path: Path, figures: Evaluation
) -> None:
    """From a model without memory, to the kilobytes that the file's directory and other content take."""
    job = with_options(replace(job, experiment=replace(job.experiment, optim=optim)), freeze=freeze, stop_after=1)
    with torch.device("meta"):
        model = job.experiment.model.build(job.train.categories)
    freeze_parameters(model, freeze)
    expected = checkpoint_bytes(model, optim)
    state = build_state(job)
    train(state)
    size = (Path(kept(state, tmp_path / "step_000001", figures)) / CHECKPOINT).stat().st_size
    tensors = len(state.model.state_dict()) * (1 + bool(optim.ema)) + 3 * len(list(state.model.parameters()))
    assert 0 < size - expected < 2000 * tensors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
@pytest.mark.parametrize("writer", ["torch", "another"])
def test_a_full_disk_is_told_with_its_folder_and_what_is_needed(
    writer: str, job: Job, tmp_path: Path, figures: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether torch meets it, whose error has no code, or another writer."""
    run = tmp_path / "run"
    partial = run / ".step_000000"
    partial.mkdir(parents=True)
    (partial / (CHECKPOINT if writer == "torch" else METRICS)).symlink_to("/dev/full")
    in_ray(monkeypatch, run)
    state = build_state(replace(job, folder=str(run)), rank=1, world=2)
    with pytest.raises(disk.DiskFull, match=rf"^{run}: the disk is full; a checkpoint's files need \d+ MiB, \d+"):
        upload_checkpoint(state, content(state), figures, "step_000000")
    assert not (run / "step_000000").exists()
    if writer == "torch":  # another fault of torch's writer is no full disk

        def refuse(*arguments: Any) -> None:
            raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534")

        (partial / CHECKPOINT).unlink()
        monkeypatch.setattr(torch, "save", refuse)
        with pytest.raises(RuntimeError, match="unexpected pos"):
            upload_checkpoint(state, content(state), figures, "step_000000")


def test_only_torn_checkpoints_are_removed(job: Job, tmp_path: Path, figures: Evaluation) -> None:
    """Of those that Ray Train does not list: a whole one may have been committed just before the machine was lost."""
    assert drop_torn(str(tmp_path / "new")) == []
    run, state = tmp_path / "run", build_state(job, rank=1, world=2)
    run.mkdir()
    for step in (10, 20, 30, 40, 50):
        kept(state, run / f"step_{step:06d}", figures)
    (run / "run.json").write_text("{}")
    cut = {10: CHECKPOINT, 30: CHECKPOINT, 40: METRICS}
    for step, name in cut.items():
        file = run / f"step_{step:06d}" / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (run / "step_000050" / REPORT).unlink()
    (run / "checkpoint_manager_snapshot.json").write_text('{"latest": {"checkpoint_dir_name": "step_000010"}}')
    kept(state, run / ".step_000060", figures)  # on its way
    assert drop_torn(str(run)) == [".step_000060", "step_000030", "step_000040", "step_000050"]
    assert not list(run.glob(".step_*"))
    assert sorted(path.name for path in run.glob("step_*")) == ["step_000010", "step_000020"]
    assert (run / "run.json").exists()


def test_the_folder_of_a_run_stands_for_its_best_checkpoint(tmp_path: Path) -> None:
    from pipelines.training.checkpoints import SNAPSHOT, checkpoint_file

    results = []
    for step, score in ((2, 10.0), (4, 30.0), (6, 20.0)):
        (tmp_path / f"step_{step:06d}").mkdir()
        (tmp_path / f"step_{step:06d}" / "checkpoint.pt").touch()
        results.append({"checkpoint_dir_name": f"step_{step:06d}", "metrics": {"score": score, "step": step}})
    with pytest.raises(ValueError, match="no checkpoint there"):
        checkpoint_file(str(tmp_path))
    (tmp_path / SNAPSHOT).write_text(json.dumps({"checkpoint_results": results}))
    assert checkpoint_file(str(tmp_path)) == str(tmp_path / "step_000004" / "checkpoint.pt")
