"""Steps: accumulation, several workers, what is not finite, continuing exactly."""

from __future__ import annotations

import io
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from panoptic.distributed import is_marked, mark
from panoptic.training import checkpoint, loss_scale
from panoptic.training import phases as phases_module
from panoptic.training.device import Engine, prepare
from panoptic.training.loss_scale import GOOD, SCALE
from panoptic.training.optim import Optim, build_ema, build_optimiser
from panoptic.training.phases import Phases
from panoptic.training.step import BROKEN, MADE, Meter, SkipCounter, StepResult, Verdict, clip_gradients, train_step
from tests.support.tiny import Tiny, TinyBackbone, TinyConfig, tiny_batch, tiny_categories

OPTIM = Optim(lr=0.05, warmup_steps=3, weight_decay=1e-4, clip_norm=1.0, ema=0.9)
ENGINE = Engine(max_skipped=3)


class Run:
    """The plain loop that the engine is made for."""

    def __init__(self, optim: Optim = OPTIM, engine: Engine = ENGINE, config: TinyConfig | None = None) -> None:
        torch.manual_seed(0)
        self.config = config or TinyConfig()
        self.optim, self.engine, self.health = optim, engine, SkipCounter()
        self.model = prepare(self.config.build(tiny_categories()), "cpu", engine)
        self.optimiser = build_optimiser(self.model, optim)
        self.ema = build_ema(self.model, optim.ema)

    def step(self, step: int, batches, accumulation: int = 1) -> StepResult:
        return train_step(
            self.model,
            self.optimiser,
            batches,
            step=step,
            total=20,
            optim=self.optim,
            engine=self.engine,
            health=self.health,
            accumulation=accumulation,
            ema=self.ema,
            seed=5,
        )

    def steps(self, start: int, stop: int) -> list[float]:
        return [
            float(self.step(s, (tiny_batch(2 * s + k) for k in (0, 1)), 2).losses["total"]) for s in range(start, stop)
        ]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[key]) for key, x in a.state_dict().items())


def test_a_batch_norm_that_meets_one_value_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    run = Run()
    norm = nn.BatchNorm2d(3)
    monkeypatch.setattr(run.model, "forward", lambda images, targets: norm(images.float().mean((2, 3), keepdim=True)))
    images, targets = tiny_batch(0)
    with pytest.raises(ValueError, match=r"a batch norm in training needs more than one value.*train\.batch") as error:
        run.step(0, [(images[:1], targets)])
    assert str(error.value).startswith(targets.names[0]) and "Expected" not in str(error.value)
    with pytest.raises(ValueError, match=r"^expected 4D input"):  # another fault stays what it is
        monkeypatch.setattr(run.model, "forward", lambda images, targets: norm(images[0].float()))
        run.step(0, [(images[:1], targets)])


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_ten_steps_continued_by_ten_equal_twenty(rule):
    optim = replace(OPTIM, optimiser=rule)
    whole = Run(optim)
    losses = whole.steps(0, 20)
    first = Run(optim)
    first.steps(0, 10)
    file = io.BytesIO()
    checkpoint.save(file, config=first.config, model=first.model, ema=first.ema, optimiser=first.optimiser, step=10)
    file.seek(0)
    record = checkpoint.load(file)
    second = Run(optim)
    torch.manual_seed(99)  # whatever the generators hold, the steps seed them
    checkpoint.restore(record, second.model, second.optimiser, second.ema)
    assert second.steps(record["step"], 20) == losses[10:]
    assert same(whole.model, second.model)
    assert same(whole.ema.module, second.ema.module)
    assert losses[-1] < 0.8 * losses[0]
    assert not same(whole.model, whole.ema.module)


def test_micro_batches_add_up_to_the_batch():
    """With group norm and no draws that differ, 2 micro-batches of 2 are one batch of 4."""
    config = TinyConfig(TinyBackbone(norm="group"))
    gradients = []
    for count in (1, 2):
        run = Run(Optim(lr=0.0, optimiser="sgd"), config=config)
        images, targets = tiny_batch(0, batch=4)
        if count == 1:
            batches = [(images, targets)]
        else:
            batches = [(images[k : k + 2], _part(targets, k)) for k in (0, 2)]
        run.model.loss = _without_draws.__get__(run.model)  # type: ignore[method-assign]
        result = run.step(0, batches, count)
        assert result.images == 4
        gradients.append([p.grad.clone() for p in run.model.parameters()])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts)


def _part(targets, k: int):
    frame = replace(
        targets.frame, sizes=targets.frame.sizes[k : k + 2], output_sizes=targets.frame.output_sizes[k : k + 2]
    )
    part = {name: getattr(targets, name)[k : k + 2] for name in ("segments", "labels", "crowd", "names", "countable")}
    return replace(targets, frame=frame, **part)


def _without_draws(self: Tiny, outputs, targets) -> dict[str, Tensor]:
    return {"size": outputs["semantic"].square().mean()}


def test_a_step_that_is_not_finite_changes_nothing():
    run = Run()
    run.steps(0, 2)
    weights = {k: v.clone() for k, v in run.model.state_dict().items()}
    moments = {k: v["exp_avg"].clone() for k, v in run.optimiser.state_dict()["state"].items()}
    average = {k: v.clone() for k, v in run.ema.state_dict().items()}
    loss = run.model.loss
    poisoned = _poison(run.model)
    result = run.step(2, [tiny_batch(0)])
    assert result.skipped and run.health == SkipCounter(skipped=1, in_a_row=1)
    assert poisoned, "the forward pass was not reached"
    assert all(torch.equal(v, weights[k]) for k, v in run.model.state_dict().items())
    assert all(torch.equal(v["exp_avg"], moments[k]) for k, v in run.optimiser.state_dict()["state"].items())
    assert all(torch.equal(v, average[k]) for k, v in run.ema.state_dict().items())
    run.model.loss = loss  # type: ignore[method-assign]
    run.model.network = type(run.model).network.__get__(run.model)  # type: ignore[method-assign]
    assert not run.step(3, [tiny_batch(1)]).skipped
    assert run.health == SkipCounter(skipped=1, in_a_row=0)


def test_momentum_that_begins_with_a_skipped_step_begins_at_zero():
    optim = Optim(optimiser="sgd", lr=0.1)
    run, fresh = Run(optim), Run(optim)
    network = run.model.network
    _poison(run.model)
    assert run.step(0, [tiny_batch(0)]).skipped
    run.model.network = network  # type: ignore[method-assign]
    run.step(1, [tiny_batch(1)])
    fresh.step(1, [tiny_batch(1)])
    assert same(run.model, fresh.model)


class _Event:
    """An event of a GPU."""

    waited = 0

    def synchronize(self) -> None:
        self.waited += 1


def test_a_step_of_a_gpu_is_counted_once_its_verdict_has_been_copied():
    event, health = _Event(), SkipCounter(in_a_row=1)
    for value, waited in ((BROKEN, 1), (MADE, 2)):
        losses = {"total": torch.tensor(float("nan"))}
        copy = torch.tensor(value, dtype=torch.uint8)
        health.waiting = Verdict(7, ["a.jpg"], losses, torch.tensor(2.0), copy, event)  # type: ignore[arg-type]
        if value == BROKEN:
            with pytest.raises(FloatingPointError, match=r"step 7: .* 2 steps in a row.*total nan.*2, images a.jpg"):
                health.settle(2)
        health.settle(2)
        assert event.waited == waited
    assert health == SkipCounter(skipped=1, in_a_row=0)


@pytest.mark.usefixtures("half_precision")
def test_float16_learns_and_its_factor_falls_where_a_gradient_overflows():
    optim = replace(OPTIM, warmup_steps=0)
    run = Run(optim, engine=Engine(precision="float16", max_skipped=2))
    group = run.optimiser.param_groups[0]
    group[SCALE] = torch.tensor(2.0**40)
    results = [run.step(0, [tiny_batch(0)]) for _ in range(40)]
    made = [not result.skipped for result in results]
    # more in a row than may be broken, but a smaller factor cures them
    overflown = made.index(True)
    assert overflown > 5 and all(made[overflown:])
    assert run.health == SkipCounter(skipped=overflown, in_a_row=0)
    assert (float(group[SCALE]), int(group[GOOD])) == (2.0 ** (40 - overflown), 40 - overflown)
    plain = Run(optim)
    expected = [float(plain.step(0, [tiny_batch(0)]).losses["total"]) for _ in range(40 - overflown)]
    losses = [float(result.losses["total"]) for result in results[overflown:]]
    assert losses == pytest.approx(expected, rel=0.05) and losses[-1] < 0.8 * losses[0]


def test_the_factor_of_float16_doubles_after_many_steps_and_survives_a_checkpoint(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss_scale, "PATIENCE", 3)
    run, second = (Run(engine=Engine(precision="float16")) for _ in range(2))
    run.steps(0, 4)
    file = io.BytesIO()
    checkpoint.save(file, config=run.config, model=run.model, ema=run.ema, optimiser=run.optimiser, step=4)
    file.seek(0)
    checkpoint.restore(checkpoint.load(file), second.model, second.optimiser, second.ema)
    group = second.optimiser.param_groups[0]
    assert (float(group[SCALE]), int(group[GOOD])) == (2 * loss_scale.INITIAL, 1)
    assert second.steps(4, 6) == run.steps(4, 6)
    assert float(second.optimiser.param_groups[0][SCALE]) == 4 * loss_scale.INITIAL


def test_a_loss_that_is_broken_is_no_matter_of_the_factor():
    run = Run(engine=Engine(precision="float16", max_skipped=2))
    _poison(run.model)
    run.step(0, [tiny_batch(0)])
    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        run.step(1, [tiny_batch(1)])


def _poison(model: Tiny) -> list[int]:
    calls: list[int] = []

    def network(images: Tensor, frame=None) -> dict[str, Tensor]:
        calls.append(1)
        return {"semantic": model.head(model.backbone(images.float() * float("nan")).relu())}

    model.network = network  # type: ignore[method-assign]
    return calls


def test_many_skipped_steps_stop_with_the_images_named():
    run = Run()
    _poison(run.model)
    run.step(0, [tiny_batch(0)])
    run.step(1, [tiny_batch(1)])
    with pytest.raises(FloatingPointError, match=r"step 2: .* 3 steps in a row.*semantic nan.*image-2-0, image-2-1"):
        run.step(2, [tiny_batch(2)])


def test_a_loss_that_is_not_finite_without_a_gradient_is_seen():
    run = Run()
    run.model.loss = lambda outputs, targets: {  # type: ignore[method-assign]
        "fine": outputs["semantic"].square().mean(),
        "constant": 0 * outputs["semantic"].sum() + float("inf"),
    }
    assert run.step(0, [tiny_batch(0)]).skipped


def test_data_that_end_early_are_an_error():
    with pytest.raises(ValueError, match="step 4 after 1 of 2 micro-batches"):
        Run().step(4, [tiny_batch(0)], 2)


def test_clipping_bounds_the_norm_and_reports_the_one_before():
    run = Run()
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = clip_gradients(run.optimiser, 0.5)
    assert float(before) == pytest.approx(sum(p.numel() for p in run.model.parameters()) ** 0.5)
    assert float(clip_gradients(run.optimiser, 0.0)) == pytest.approx(0.5, rel=1e-4)


def test_entries_are_cut_before_the_norm_and_an_infinite_one_is_seen():
    run = Run()
    parameters = list(run.model.parameters())
    for k, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, 3.0 if k % 2 else -0.5)
    clip_gradients(run.optimiser, 0.0, 1.0)
    assert all((p.grad == (1.0 if k % 2 else -0.5)).all() for k, p in enumerate(parameters))
    clip_gradients(run.optimiser, 0.25, 0.75)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    assert float(norm) == pytest.approx(0.25, rel=1e-4)
    parameters[0].grad.flatten()[0] = torch.inf
    assert not torch.isfinite(clip_gradients(run.optimiser, 1.0, 1.0))


@pytest.mark.parametrize("engine", [Engine(precision="bfloat16"), Engine(channels_last=True)])
def test_precision_and_memory_format(engine):
    run, plain = Run(engine=engine), Run()
    loss, expected = (r.step(0, [tiny_batch(0)]).losses["total"] for r in (run, plain))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected), rel=2e-2)
    weight = run.model.backbone[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == engine.channels_last


def test_meter_means_and_starts_again():
    meter = Meter()
    for loss, skipped in ((1.0, False), (3.0, False), (float("nan"), True)):
        losses = {"total": torch.tensor(loss)}
        finite = torch.tensor(not skipped)
        meter.add(StepResult(losses, torch.tensor(2.0), 0.1, finite, images=4, wait=0.5, seconds=2.0))
    assert meter.read() == {
        "loss/total": 2.0,
        "grad_norm": 2.0,
        "lr": 0.1,
        "images_per_second": pytest.approx(2.0),
        "step_seconds": pytest.approx(2.0),
        "data_wait": pytest.approx(0.25),
    }
    assert meter.read() == {"lr": 0.0}


def test_the_time_of_a_step_is_that_of_its_phases(monkeypatch):
    """Two micro-batches: forward and backward come twice, the optimiser once; what lies between is waiting."""
    ticks = iter(range(1000))
    monkeypatch.setattr(phases_module.time, "perf_counter", lambda: float(next(ticks)))
    phases = Phases(torch.device("cpu"))
    for _ in range(2):
        phases.begin()
        phases.end("forward")
        phases.end("backward")
    phases.end("optimiser")
    assert phases.seconds() == {"forward": 2.0, "backward": 2.0, "optimiser": 1.0}
    monkeypatch.undo()
    run, meter = Run(), Meter()
    assert meter.split() == {}
    for step in range(2):
        meter.add(run.step(step, [tiny_batch(step)]))
    split = meter.split()
    assert list(split) == ["data_wait_seconds", "forward_seconds", "backward_seconds", "optimiser_seconds"]
    assert all(seconds > 0 for seconds in split.values()) and sum(split.values()) <= meter.seconds / 2
    assert sum(split.values()) > 0.3 * meter.seconds / 2
    meter.forget_times()
    assert meter.split() == {} and "loss/total" in meter.read()


def _worker(rank: int, folder: str) -> None:
    """One of two workers: an ordinary step with accumulation, then one that is not finite on the second only."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(os.path.join(folder, "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    run = Run(Optim(lr=0.1, optimiser="sgd"), config=TinyConfig(TinyBackbone(norm="group")))
    inner = run.model
    inner.loss = _without_draws.__get__(inner)
    run.model = nn.parallel.DistributedDataParallel(inner)
    images, targets = tiny_batch(0, batch=8)
    mine = [(images[k : k + 2], _part(targets, k)) for k in (4 * rank, 4 * rank + 2)]
    meter = Meter()
    meter.add(run.step(0, mine, 2))
    loss = meter.read()["loss/total"]
    weights = [p.detach().clone() for p in inner.parameters()]
    if rank == 1:
        inner.loss = lambda outputs, targets: {"bad": 0 * outputs["semantic"].sum() + float("nan")}
    result = run.step(1, [mine[0]])
    kept = all(torch.equal(a, b) for a, b in zip(weights, inner.parameters(), strict=True))
    if rank == 1:
        mark("seen")
    until = time.monotonic() + 60
    while not is_marked("seen"):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert not is_marked("never set")
    torch.save({"loss": loss, "weights": weights, "skipped": result.skipped, "kept": kept}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # two processes that import torch
def test_two_workers_equal_one_and_skip_together(tmp_path: Path):
    context = torch.multiprocessing.start_processes(_worker, (str(tmp_path),), 2, start_method="spawn")
    assert context is None
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert a["skipped"] and b["skipped"] and a["kept"] and b["kept"]
    run = Run(Optim(lr=0.1, optimiser="sgd"), config=TinyConfig(TinyBackbone(norm="group")))
    run.model.loss = _without_draws.__get__(run.model)  # type: ignore[method-assign]
    alone = float(run.step(0, [tiny_batch(0, batch=8)]).losses["total"])
    assert a["loss"] == pytest.approx(alone) and b["loss"] == pytest.approx(alone)
    for one, two, single in zip(a["weights"], b["weights"], run.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
        torch.testing.assert_close(one, single.detach())
