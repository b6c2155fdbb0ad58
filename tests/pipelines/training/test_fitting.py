"""Steps for which memory runs out: before the first, in the middle, on one worker and on several."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from panoptic.models.base import PanopticModel
from panoptic.segmentation import Categories
from panoptic.training.memory import StepDoesNotFit
from panoptic.training.recomputing import recomputes
from panoptic.transforms import POLICIES, Augment
from pipelines.cluster.exits import FailedRun
from pipelines.presets import PRESETS
from pipelines.tracking.runs import Run
from pipelines.training import fitting, worker
from pipelines.training.attempts import repeat
from pipelines.training.checkpoints import optimiser_slots
from pipelines.training.failures import OutOfMemory, out_of_memory
from pipelines.training.fitting import largest_size, try_largest
from pipelines.training.state import Job, State
from pipelines.training.worker import build_state, train
from pipelines.training.writer import Writer
from tests.support.small import SMALL_DEEPLAB
from tests.support.stored import write_shards
from tests.support.worker_failures import group_error


@pytest.fixture
def job(small_categories: Categories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """Three steps of a tiny model with batch norms, 4 images each, without validation, checkpoint and MLflow."""
    threads = torch.get_num_threads()
    shards = write_shards(tmp_path / "data", small_categories, 8)
    demo = PRESETS["demo"]()
    options = replace(demo.train, batch=4, steps=3, threads=1, workers=1, log_every=9, fit_memory=True)
    experiment = replace(demo, model=SMALL_DEEPLAB, augment=Augment(crop=(33, 33)), train=options)
    experiment = replace(experiment, engine=replace(demo.engine, precision="float32"))
    monkeypatch.setattr(worker, "Tracker", lambda *_: None)
    monkeypatch.setattr(worker, "validate", lambda state, interrupts: state.model.eval())
    monkeypatch.setattr(worker, "log", lambda *_: None)
    monkeypatch.setattr(Writer, "save", lambda self, evaluation=None: None)
    yield Job(experiment, shards, shards, Run("", "", ""), str(tmp_path / "run"), False)
    torch.set_num_threads(threads)


def with_options(job: Job, **options: Any) -> Job:
    return replace(job, experiment=replace(job.experiment, train=replace(job.experiment.train, **options)))


def limit(state: State, most: int, calls: int = 0) -> list[int]:
    """Let the model run out of memory with more than so many images, after so many calls; the images of each call.

    It runs first, so that its batch norms have seen the images.
    """
    model: PanopticModel = state.model
    forward: Callable[..., Any] = model.forward
    seen: list[int] = []

    def limited(images: torch.Tensor, *rest: Any) -> Any:
        result = forward(images, *rest)
        seen.append(len(images))
        if len(images) > most and len(seen) > calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return result

    model.forward = limited  # type: ignore[method-assign]
    return seen


def trained(state: State) -> dict[str, torch.Tensor]:
    assert train(state) == "" and state.step == 3
    return {name: value.clone() for name, value in state.model.state_dict().items()}


@pytest.fixture
def halves(job: Job) -> dict[str, torch.Tensor]:
    """What three steps in halves learn, when the options ask for them."""
    return trained(build_state(with_options(job, micro_batch=2, fit_memory=False)))


@pytest.mark.parametrize(
    ("calls", "seen"),
    [
        pytest.param(0, [4, 4, 2] + 6 * [2], id="before the first step"),
        pytest.param(1, [4, 4, 4] + 6 * [2], id="in the first step"),
    ],
)
def test_a_batch_that_does_not_fit_is_taken_in_parts(calls, seen, job: Job, halves, capsys) -> None:
    """Weights, statistics, images, dropout: as if the options had asked for the parts. Nothing of the failure stays."""
    state = build_state(job)
    images = limit(state, 2, calls)
    found = trained(state)
    assert images == seen
    assert found.keys() == halves.keys()
    assert [name for name, value in found.items() if not torch.equal(value, halves[name])] == []
    assert recomputes(state.model)  # which alone did not do here
    if calls:
        out = capsys.readouterr().out
        assert "step 0: memory ran out; from here on activations are computed again" in out
        assert "step 0: memory ran out; from here on 2 parts of each micro-batch" in out


@pytest.mark.parametrize("calls", [0, 1])
def test_activations_that_are_computed_again_may_be_enough(calls: int, job: Job) -> None:
    """Then nothing that is learnt changes: the batch norms see all images at once."""
    plain = trained(build_state(with_options(job, fit_memory=False)))
    state = build_state(job)
    forward, seen = state.model.forward, []

    def limited(images: torch.Tensor, *rest: Any) -> Any:
        result = forward(images, *rest)
        seen.append(recomputes(state.model))
        if not seen[-1] and len(seen) > calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return result

    state.model.forward = limited  # type: ignore[method-assign]
    found = trained(state)
    assert seen == [False] * (calls + 1) + [True] * (4 - calls)
    assert [name for name, value in plain.items() if not torch.equal(value, found[name])] == []


def test_they_are_computed_again_where_the_options_say_so(job: Job) -> None:
    engine = replace(job.experiment.engine, activation_checkpointing=True)
    assert recomputes(build_state(replace(job, experiment=replace(job.experiment, engine=engine))).model)
    assert not recomputes(build_state(job).model)


def test_a_later_step_is_taken_again_from_the_weights_before_it(job: Job) -> None:
    """Two micro-batches a step: the first of the second step was taken, and comes again in parts."""
    state = build_state(with_options(job, micro_batch=2))
    names: list[tuple[str, ...]] = []
    forward = state.model.forward

    def noting(images: torch.Tensor, targets: Any, *rest: Any) -> Any:
        names.append(targets.names)
        return forward(images, targets, *rest)

    state.model.forward = noting  # type: ignore[method-assign]
    seen = limit(state, 1, calls=4)
    trained(state)
    assert seen == [2] + 2 * [2] + [2, 2] + [2] + 4 * [1] + 4 * [1]
    assert [name for part in names[6:10] for name in part] == [*names[3], *names[4]]


@pytest.mark.parametrize("fit", [True, False])
def test_the_log_tells_the_peak_of_memory_before_and_after_the_first_step(fit: bool, job: Job, monkeypatch, capsys):
    monkeypatch.setattr(fitting, "reset_peak", lambda device: resets.append("before an attempt"))
    monkeypatch.setattr(worker.machine, "describe", lambda state: "")
    monkeypatch.setattr(worker, "show_beginning", lambda state: None)
    monkeypatch.setattr(worker, "gauges", MagicMock())
    monkeypatch.setattr(worker, "validate", MagicMock())
    monkeypatch.setattr(worker, "reset_peak", lambda device: resets.append("before the training"))
    resets: list[str] = []
    state = build_state(with_options(job, fit_memory=fit))
    state.tracker = SimpleNamespace(close=lambda: None)  # type: ignore[assignment]
    if fit:
        limit(state, 2)
    trained(state)
    told = re.findall(r"(.*) at most \d+ of the \d+ MiB of the machine(.*)", capsys.readouterr().out)
    largest = "train.fit_memory: 2 images of 33x33 at once,", "; 2 parts, activations computed again"
    assert told == [largest] * fit + [("memory of this worker after its first step:", "")]
    assert resets == (3 * ["before an attempt"] + ["before the training"]) * fit


def test_a_gpu_is_asked_for_the_largest_batch_whatever_the_options_say(job: Job, monkeypatch) -> None:
    """One that does not fit is no error: perhaps no step meets it."""
    monkeypatch.setattr(fitting, "reset_peak", lambda device: None)
    monkeypatch.setattr(fitting, "peak_line", lambda device: "5 of the 9 MiB of the GPU")
    tried: list[int] = []

    def fits(model: PanopticModel, batch: Any, engine: Any, parts: int, extra: int) -> bool:
        tried.append(extra)
        return len(tried) == 1

    monkeypatch.setattr(fitting, "fits", fits)
    state = build_state(with_options(job, fit_memory=False))
    assert try_largest(state) == (1, "") and tried == []
    state.device = torch.device("cuda")
    largest = "the largest batch, 4 images of 33x33 at once"
    assert try_largest(state) == (1, f"{largest}, takes at most 5 of the 9 MiB of the GPU")
    parts, told = try_largest(state)
    assert parts == 1 and f"{largest}, does not fit" in told and "--train.micro-batch 2 " in told
    trainable = sum(parameter.nbytes for parameter in state.model.parameters())
    assert tried == 2 * [optimiser_slots(state.experiment.optim) * trainable]
    state.job = replace(state.job, features=state.job.train)
    assert try_largest(state) == (1, "") and len(tried) == 2


def test_not_even_one_image(job: Job) -> None:
    state = build_state(job)
    seen = limit(state, 0)
    with pytest.raises(OutOfMemory, match=r"not even one image of 33x33 fits.*augment\.crop"):
        train(state)
    assert seen == [4, 4, 2, 1]


def test_without_the_option_the_error_names_what_takes_less(job: Job) -> None:
    state = build_state(with_options(job, fit_memory=False))
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    limit(state, 2)
    with pytest.raises(
        StepDoesNotFit, match=r"step 0: 4 images of 33x33 at once.*--train\.micro-batch 2 .*fit-mem"
    ) as e:
        train(state)
    assert all(torch.equal(value, before[name]) for name, value in state.model.state_dict().items())
    assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value)
    assert out_of_memory(e.value)


def test_workers_that_ran_out_of_memory_start_again_with_fewer_images(tmp_path: Path, job: Job) -> None:
    """No failure is counted as long as there is something to halve."""
    folder = tmp_path / "run"
    folder.mkdir()
    job = with_options(job, batch=8, workers=2, max_failures=0)
    taken: list[int] = []

    def fit(attempt: Job) -> Any:
        taken.append(attempt.experiment.train.micro_batch)
        if taken[-1] != 1:
            raise group_error({1: StepDoesNotFit(3, 4, (33, 33), ("a.jpg",))})
        return SimpleNamespace(metrics={"step": 3}, return_value="")

    repeat(fit, job)
    assert taken == [0, 0, 2, 1]  # the second with activations that are computed again
    taken.clear()
    with pytest.raises(FailedRun, match="4 images of 33x33 at once do not fit"):
        repeat(fit, with_options(job, fit_memory=False))
    assert taken == [0]


@pytest.mark.parametrize(
    ("augment", "size"),
    [
        (Augment(crop=(192, 320)), (192, 320)),
        (Augment(size=(448, 640)), (448, 640)),
        (Augment(fit=(641, 801)), (801, 801)),
        (Augment(scale="short", sides=(480, 800), longest=1333), (1333, 1333)),
        (Augment(scale="short", sides=(300,)), (600, 600)),
        (Augment(scale="factor", factors=(0.5, 2.0, 0.1)), (800, 800)),
        (Augment(scale="jitter", target=(640, 640), factors=(0.1, 2.0, 0.1)), (1280, 1280)),
        (Augment(), (400, 400)),
        (POLICIES["lsj"], (1024, 1024)),
    ],
)
def test_the_largest_batch_of_a_training_view(augment: Augment, size: tuple[int, int]) -> None:
    assert largest_size(augment, (200, 400)) == size
