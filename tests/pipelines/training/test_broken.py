"""A training whose numbers are not finite stops, and the step is run again from what it kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import replay as job_replay
from panoptic.segmentation import Categories
from panoptic.training.step import BrokenSteps
from panoptic.transforms import Augment
from pipelines.cluster.exits import FailedRun
from pipelines.config import override
from pipelines.presets import PRESETS
from pipelines.tracking.runs import Run
from pipelines.training import worker
from pipelines.training.attempts import repeat
from pipelines.training.broken import Recent, replay
from pipelines.training.state import Job
from pipelines.training.worker import build_state, train
from pipelines.training.writer import Writer
from tests.support.small import SMALL_DEEPLAB
from tests.support.stored import write_shards
from tests.support.worker_failures import group_error


@pytest.fixture
def job(small_categories: Categories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """A tiny model on 8 drawn images, two micro-batches a step, which neither validates nor reports."""
    threads = torch.get_num_threads()
    shards = write_shards(tmp_path / "data", small_categories, 8)
    demo = PRESETS["demo"]()
    options = replace(demo.train, batch=4, micro_batch=2, steps=20, threads=1, workers=1, log_every=1)
    engine = replace(demo.engine, max_skipped=2, precision="float32")
    experiment = replace(demo, model=SMALL_DEEPLAB, augment=Augment(crop=(33, 33)), train=options, engine=engine)
    monkeypatch.setattr(worker, "Tracker", lambda *_: None)
    monkeypatch.setattr(worker, "validate", lambda state, interrupts: state.model.eval())
    monkeypatch.setattr(Writer, "save", lambda self, evaluation=None: None)
    yield Job(experiment, shards, shards, Run("", "", ""), str(tmp_path / "run"), False)
    torch.set_num_threads(threads)


def test_a_step_that_is_not_finite_is_kept_and_run_again(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight of the head is infinite: the replay names the images, the module and the gradients, by one command."""
    state = build_state(job)
    name = "semantic_head.predictor.weight" if "semantic_head.predictor.weight" in state.model.state_dict() else ""
    name = name or next(n for n, p in reversed(list(state.model.named_parameters())) if n.endswith("weight"))
    with torch.no_grad():
        state.model.get_parameter(name).view(-1)[0] = float("inf")
    with pytest.raises(BrokenSteps, match=r"not finite in 2 steps in a row.*python jobs/replay\.py (\S+)") as broken:
        train(state)
    file = str(broken.value).rsplit(" ", 1)[1]
    assert broken.value.step == 1 and file.endswith("/broken/step_000001-worker_0.pt")
    found = replay(file)
    assert found.broken and found.step == 1 and len(found.names) == 4
    assert all(each in str(broken.value) for each in found.names)
    assert found.modules[0] == name.removesuffix(".weight") and found.gradients
    capsys.readouterr()
    job_replay.main([file])
    assert f"not finite: output of {name.removesuffix('.weight')}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="as it is"),
        pytest.param({"engine.channels_last": True, "train.threads": 2}, id="channels last on two threads"),
        pytest.param({"engine.precision": "bfloat16"}, id="bfloat16"),
    ],
)
def test_a_replay_is_the_step_bit_for_bit(options: dict[str, Any], job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout and two micro-batches; it is told for broken here, and is not. The replay has other threads."""
    job = replace(job, experiment=override(job.experiment, options))
    state = build_state(job)
    seen: dict[int, dict[str, float]] = {}

    def note(state: Any, values: dict[str, float], *_: Any) -> None:
        seen[state.step - 1] = {n.removeprefix("loss/"): v for n, v in values.items() if n.startswith("loss/")}
        if state.step == 3:
            raise BrokenSteps("told", 2)

    weights: dict[str, torch.Tensor] = {}
    step = worker.train_step

    def stepping(*given: Any, **options: Any) -> Any:
        if options["step"] == 2:
            weights.update({name: value.clone() for name, value in state.model.state_dict().items()})
        return step(*given, **options)

    monkeypatch.setattr(worker, "train_step", stepping)
    monkeypatch.setattr(worker, "log", note)
    real = worker.kept

    def with_the_weights_before(error: Any, state: Any, *rest: Any) -> Any:
        state.model.load_state_dict(weights)  # this step was made
        return real(error, state, *rest)

    monkeypatch.setattr(worker, "kept", with_the_weights_before)
    with pytest.raises(BrokenSteps) as told:
        train(state)
    before = torch.get_num_threads()
    torch.set_num_threads(3 - before)
    found = replay(str(told.value).rsplit(" ", 1)[1])
    assert torch.get_num_threads() == 3 - before
    torch.set_num_threads(before)
    assert not found.broken and found.step == 2
    assert found.losses == seen[2]
    with pytest.raises(SystemExit) as ended:
        job_replay.main([str(told.value).rsplit(" ", 1)[1]])
    assert ended.value.code == 1


def test_the_micro_batches_of_the_last_two_steps_are_kept() -> None:
    recent = Recent(iter([(torch.tensor(k), k) for k in range(8)]), 2)  # type: ignore[list-item]
    for _ in range(6):
        next(recent)
    assert [int(image) for image, _ in recent.of_step(0)] == [4, 5]
    assert [int(image) for image, _ in recent.of_step(1)] == [2, 3]
    assert recent.steps == 3


def test_such_a_run_is_not_started_again(job: Job, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    calls: list[int] = []

    def fit(job: Job) -> Any:
        calls.append(1)
        raise group_error({0: BrokenSteps("step 7: not finite. It is kept: python jobs/replay.py X", 7)})

    with pytest.raises(FailedRun, match=r"step 7: not finite.*replay\.py X$"):
        repeat(fit, job)
    assert len(calls) == 1


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        replay(str(tmp_path / "x.pt"))
    (tmp_path / "x.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="give a file of a run's folder broken/"):
        replay(str(tmp_path / "x.pt"))
