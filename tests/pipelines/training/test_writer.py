"""Checkpoints that a thread writes while the training goes on, and the steps at which they are due."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from panoptic.metrics.report import Evaluation, metrics
from panoptic.segmentation import Categories
from panoptic.training.checkpoint import Snapshot, make_record
from panoptic.training.optim import Optim
from panoptic.transforms import Augment, Resize
from pipelines.config import UNVALIDATED
from pipelines.presets import PRESETS
from pipelines.tracking.runs import Run
from pipelines.training import notice, validation, worker, writer
from pipelines.training import watch as watch_module
from pipelines.training.checkpoints import load_checkpoint
from pipelines.training.state import Job
from pipelines.training.watch import Watch
from pipelines.training.worker import build_state
from pipelines.training.writer import Writer
from tests.support.evaluations import evaluation_of, moved_pairs
from tests.support.ray_train import Report, in_ray
from tests.support.small import SMALL_DEEPLAB
from tests.support.stored import write_shards


@pytest.fixture
def job(small_categories: Categories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """A tiny model with averaged weights on 8 drawn images."""
    threads = torch.get_num_threads()
    shards = write_shards(tmp_path / "data", small_categories, 8)
    demo = PRESETS["demo"]()
    options = replace(demo.train, batch=2, steps=20, threads=1, workers=1, checkpoint_minutes=0, validate_every=100)
    experiment = replace(demo, model=SMALL_DEEPLAB, augment=Augment(crop=(33, 33)), train=options, optim=Optim(ema=0.9))
    monkeypatch.setattr(worker, "Tracker", lambda *_: None)
    (tmp_path / "run").mkdir()
    yield Job(experiment, shards, shards, Run("", "", ""), str(tmp_path / "run"), False)
    torch.set_num_threads(threads)


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Report]:
    return in_ray(monkeypatch, tmp_path / "run")


@pytest.fixture
def figures(small_categories: Categories, random_segmentation: Callable) -> Evaluation:
    return evaluation_of(moved_pairs(random_segmentation, small_categories, 1), small_categories)


def with_options(job: Job, **options: Any) -> Job:
    return replace(job, experiment=replace(job.experiment, train=replace(job.experiment.train, **options)))


def test_a_snapshot_is_not_changed_by_the_training_and_keeps_its_memory() -> None:
    from tests.support.tiny import TinyConfig, tiny_categories

    model = TinyConfig().build(tiny_categories())
    optimiser = torch.optim.AdamW(model.parameters())
    next(model.parameters()).sum().backward()
    optimiser.step()
    snapshot = Snapshot()
    taken = snapshot.take(make_record(config=TinyConfig(), model=model, optimiser=optimiser, step=3))
    name, weight = next(iter(taken["weights"].items()))
    before, place = weight.clone(), weight.data_ptr()
    moments = taken["optimiser"]["state"][0]["exp_avg"].clone()
    with torch.no_grad():
        model.state_dict()[name].add_(1)
    optimiser.step()
    assert torch.equal(weight, before) and torch.equal(taken["optimiser"]["state"][0]["exp_avg"], moments)
    again = snapshot.take(make_record(config=TinyConfig(), model=model, optimiser=optimiser, step=4))
    assert again["weights"][name].data_ptr() == place and torch.equal(again["weights"][name], model.state_dict()[name])


def test_tensors_that_share_memory_are_kept_once(tmp_path: Path) -> None:
    tied = torch.arange(1000.0)
    taken = Snapshot().take({"a": tied, "b": [tied], "c": tied[:10]})
    assert taken["a"] is taken["b"][0] and taken["c"] is not taken["a"] and torch.equal(taken["c"], tied[:10])


def test_training_goes_on_while_a_checkpoint_is_written(
    job: Job, reports: list[Report], figures: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one after it waits; what is written is the state at the step, and whole before it has its name."""
    state = build_state(job)
    folder, go_on, partial = Path(job.folder), threading.Event(), threading.Event()
    write = writer.write

    def slowly(place: Path, *content: Any) -> None:
        write(place, *content)
        partial.set()
        assert go_on.wait(30)

    monkeypatch.setattr(writer, "write", slowly)
    saving = Writer(state)
    state.step = 7
    name, weight = next((n, v) for n, v in state.model.state_dict().items() if v.is_floating_point())
    before = weight.clone()
    saving.save(figures)
    with torch.no_grad():
        weight.add_(1)
    assert partial.wait(30) and saving.busy and [path.name for path in folder.iterdir()] == [".step_000007"]
    state.step = 8
    second = threading.Thread(target=saving.save)
    second.start()
    second.join(0.2)
    assert second.is_alive() and len(reports) == 1
    go_on.set()
    second.join(30)
    for report in reports:
        report.uploaded.result()
    assert not saving.busy and sorted(path.name for path in folder.iterdir()) == ["step_000007", "step_000008"]
    record = load_checkpoint(str(folder / "step_000007"))
    assert record["step"] == 7 and torch.equal(record["weights"][name], before) and record["ema"] is not None
    assert json.loads((folder / "step_000007" / "metrics.json").read_text()).keys() == metrics(figures).keys()
    assert json.loads((folder / "step_000008" / "metrics.json").read_text()) == {}
    assert (folder / "step_000008" / "report.txt").read_text() == "step 8\nnot validated\n"
    assert [report.metrics["step"] for report in reports] == [7, 8]
    assert reports[0].metrics["score"] > reports[1].metrics["score"] == UNVALIDATED


def test_only_rank_0_writes(job: Job, reports: list[Report]) -> None:
    saving = Writer(build_state(job, rank=1, world=2))
    saving.save()
    assert reports[0].uploaded.result() is None and not saving.busy and not list(Path(job.folder).iterdir())


def test_an_error_of_writing_frees_the_next_checkpoint(
    job: Job, reports: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*content: Any) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(writer, "write", refuse)
    saving = Writer(build_state(job))
    saving.save()
    with pytest.raises(PermissionError):
        reports[0].uploaded.result()
    assert not saving.busy


def due_steps(job: Job, monkeypatch: pytest.MonkeyPatch, seconds: float, saving: float = 0.0) -> list[int]:
    """Steps of 200 at which a checkpoint is asked for, where a step takes `seconds` and a checkpoint `saving`."""
    now = [0.0]
    monkeypatch.setattr(watch_module.time, "monotonic", lambda: now[0])
    state = build_state(job)
    written, found = Writer(state), []
    ends = 0.0
    with Watch(state, written) as watch:
        for step in range(1, 201):
            now[0] += seconds
            if now[0] >= ends:
                written._idle.set()
            if watch.asks(step):
                found.append(step)
                written.saved, written.saved_at, ends = step, now[0], now[0] + saving
                written._idle.clear()
    return found


def test_checkpoints_are_due_by_steps_and_by_time(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    assert due_steps(job, monkeypatch, 1.0) == []
    assert due_steps(with_options(job, checkpoint_every=40), monkeypatch, 0.01) == [40, 80, 120, 160, 200]
    assert due_steps(with_options(job, checkpoint_minutes=1), monkeypatch, 1.0) == [60, 120, 180]
    # one is due a step or two later than the clock says, at the next look
    late = due_steps(with_options(job, checkpoint_minutes=1), monkeypatch, 0.4)
    assert len(late) == 1 and 150 <= late[0] <= 153
    # where writing takes longer than the interval, as soon as the one before is written
    slow = due_steps(with_options(job, checkpoint_every=10), monkeypatch, 1.0, saving=15.0)
    assert slow[:3] == [10, 25, 40]


def test_a_training_saves_at_the_steps_that_are_due_and_at_its_validations(
    job: Job, reports: list[Report], figures: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step twice, where both fall on it."""

    def validate(state: Any, interrupts: Any) -> Evaluation:
        state.model.eval()
        return figures

    monkeypatch.setattr(worker, "validate", validate)
    worker.train(build_state(with_options(job, steps=8, checkpoint_every=2, validate_every=4)))
    for report in reports:
        report.uploaded.result()
    assert sorted(path.name for path in Path(job.folder).glob("step_*"))[-1] == "step_000008"
    validated = [report.metrics["step"] for report in reports if report.metrics["score"] > UNVALIDATED]
    others = [report.metrics["step"] for report in reports if report.metrics["score"] == UNVALIDATED]
    assert validated == [4, 8] and others and not {*others} & {*validated} and others[0] == 2


def test_metrics_are_kept_before_their_checkpoint(
    job: Job, reports: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps before a checkpoint are not repeated, so a machine that is lost may not take their metrics along."""
    state = build_state(job)
    kept, order = threading.Event(), []

    class Kept:
        def keep(self) -> threading.Event:
            order.append("asked")
            threading.Timer(0.3, lambda: (order.append("kept"), kept.set())).start()
            return kept

    monkeypatch.setattr(writer, "upload_checkpoint", lambda *_: order.append("written"))
    state.tracker = Kept()  # type: ignore[assignment]
    Writer(state).save()
    reports[0].uploaded.result(10)
    assert order == ["asked", "kept", "written"]


@pytest.mark.parametrize("own", [True, False], ids=["own notice", "another worker's"])
def test_a_notice_in_a_validation_ends_it_with_a_checkpoint(
    own: bool, job: Job, reports: list[Report], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A validation may take longer than what a machine that is taken back leaves. The last one is not left: a training
    at its last step would have no figures."""
    evaluated: list[int] = []
    share = validation.share_batches

    def share_batches(*arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in share(*arguments, **options):
            evaluated.extend(batch.rows)
            yield batch

    monkeypatch.setattr(validation, "share_batches", share_batches)
    monkeypatch.setattr(notice, "of_this_worker", lambda: "SIGTERM" if own and evaluated else "")
    monkeypatch.setattr(notice, "asked", lambda key: "")
    monkeypatch.setattr(notice, "is_first_of_node", lambda: False)
    monkeypatch.setattr(watch_module, "SECONDS", 0.0)
    monkeypatch.setattr(watch_module, "is_marked", lambda name: not own and bool(evaluated))
    job = with_options(replace(job, key="run"), steps=4, validate_every=2, validation_batch=1)
    job = replace(job, experiment=replace(job.experiment, resize=Resize(short=33)))
    state = build_state(job)
    assert worker.train(state) == ("SIGTERM" if own else "notice of another worker")
    assert state.step == 2 and len(evaluated) == 1
    assert [report.metrics["step"] for report in reports] == [2]
    assert reports[0].metrics["score"] == UNVALIDATED and reports[0].uploaded.result() is not None
    assert load_checkpoint(f"{job.folder}/step_000002")["step"] == 2
    state.step = 3
    evaluated.clear()
    assert worker.train(state) == "" and state.step == 4
    assert len(evaluated) == 8 and reports[-1].metrics["score"] > UNVALIDATED
