"""A trial's options, what it tells Tune, where it goes on, what it says when it fails; the table of all trials."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pipelines.presets.deeplab import demo
from pipelines.sweeps import progress, search
from pipelines.sweeps.progress import Display, Line, table
from pipelines.sweeps.trial import (
    Plan,
    Resolved,
    Row,
    apply,
    beginning,
    best_of,
    describe,
    fit_workers,
    more_accumulation,
    out_of_memory,
    report,
    resolve,
)
from pipelines.tracking import Run

RUN = Run("sqlite:///none.db", "parent", "0")


def plan_of(*expressions: str, **more) -> Plan:
    space = search.parse(expressions)
    names = search.short_names(list(space))
    return Plan({"demo": demo(), "other": demo()}, "demo", "/nowhere", RUN, space, names, **more)


def test_what_tune_draws_becomes_an_experiment():
    plan = plan_of("optim.lr=loguniform(1e-4,1)", "train.batch=quniform(2,8,2)", "optim.ema=grid(0.5)")
    found = resolve({"optim.lr": 0.01, "train.batch": 4.0, "optim.ema": 0.5}, plan)
    assert (found.experiment.optim.lr, found.experiment.train.batch, found.experiment.optim.ema) == (0.01, 4, 0.5)
    assert found.row.label == "lr=0.01 batch=4" and found.row.params == {"lr": 0.01, "batch": 4}
    assert found.row.preset == "demo" and found.schedule == ((0, 0),)
    other = resolve({"preset": "other"}, plan_of("preset=grid(demo,other)"))
    assert other.row.preset == "other" and other.row.changes == {}
    assert resolve({"optim.ema": 0.5}, plan_of("optim.ema=0.5")).row.label == "as given"


def test_given_rows_are_taken_as_they_are():
    row = Row("first", "demo", {"optim.lr": 0.5}, {"row": "first"})
    found = resolve({"row": 0}, plan_of(rows=(row,)))
    assert found.row is row and found.experiment.optim.lr == 0.5


def test_a_schedule_of_freezing_is_split_off():
    experiment, schedule = apply(demo(), {"model.backbone.freeze": "5 2@100"})
    assert experiment.model.backbone.freeze == 5 and schedule == ((0, 5), (100, 2))
    with pytest.raises(ValueError, match=r"changes at step 1200, training ends before"):
        apply(demo(), {"model.backbone.freeze": "5 2@1200"})
    with pytest.raises(ValueError, match=r"no option 'optim\.rate'"):
        apply(demo(), {"optim.rate": 1})


@pytest.mark.parametrize(("batch", "workers", "fitting"), [(8, 2, 2), (5, 2, 1), (6, 4, 3), (4, 8, 4), (1, 2, 1)])
def test_workers_share_the_batch_equally(batch: int, workers: int, fitting: int):
    base = demo()
    assert fit_workers(replace(base, train=replace(base.train, batch=batch, workers=workers))).train.workers == fitting


def test_more_accumulation_halves_what_goes_through_at_once():
    base = demo()
    first = more_accumulation(replace(base, train=replace(base.train, batch=12, workers=2)))
    assert first is not None and first.train.micro_batch == 3
    second = more_accumulation(first)
    assert second is not None and second.train.micro_batch == 1 and more_accumulation(second) is None


def test_reports_have_an_objective_even_without_a_figure():
    values = {"step": 401, "val/pq": 12.5, "checkpoint": "uri"}
    found = report(values, demo(), plan_of())
    assert (found["objective"], found["round"], found["total"]) == (12.5, 2, 1200)
    assert report({"step": 400, "val/pq": math.nan}, demo(), plan_of())["objective"] == -1e9
    assert report({"step": 400}, demo(), plan_of(mode="min", metric="val/loss/total"))["objective"] == 1e9


def test_where_a_trial_begins():
    resolved = Resolved(Row("a", "demo", {"optim.lr": 0.5}, {}), demo(), ((0, 0),))
    first = beginning("7", None, resolved)
    assert first == {"name": "trial-7", "begin": "", "step": 0}
    own = {"checkpoint": "x/step_000400", "step": 400, "origin": first, "changes": {"optim.lr": 0.5}}
    assert beginning("7", own, resolved) == first
    donor = {**own, "origin": {"name": "trial-8", "begin": "", "step": 0}}
    taken = beginning("7", donor, resolved)
    assert taken["name"].startswith("trial-7-") and (taken["begin"], taken["step"]) == ("x/step_000400", 400)
    assert beginning("7", donor, resolved) == taken  # started again before it reported anything
    changed = beginning("7", {**own, "checkpoint": "y/step_000400", "changes": {"optim.lr": 0.1}}, resolved)
    assert changed["name"] not in (first["name"], taken["name"]) and changed["begin"] == "y/step_000400"
    assert beginning("7", {**own, "origin": taken}, resolved) == taken


class GroupError(RuntimeError):
    """As Ray Train's, which holds the workers' errors."""

    def __init__(self, failures):
        super().__init__("Worker group failed: [Rank 0]")
        self.worker_failures = failures


def test_the_reason_is_what_the_worker_raised():
    inner = GroupError({0: FloatingPointError("step 9: loss not finite")})
    assert describe(inner) == "FloatingPointError: step 9: loss not finite"
    text = "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory. Tried"
    assert describe(GroupError({1: RuntimeError(text)})) == "torch.OutOfMemoryError: CUDA out of memory. Tried"
    assert describe(ValueError("data.root: needs data")) == "ValueError: data.root: needs data"
    assert describe(KeyError()) == "KeyError: "


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (GroupError({0: RuntimeError("torch.OutOfMemoryError: CUDA out of memory")}), True),
        (GroupError({0: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")}), True),
        (GroupError({0: RuntimeError("Task was killed due to the node running low on memory pressure")}), True),
        (MemoryError(), True),
        (GroupError({0: FloatingPointError("not finite")}), False),
        (ValueError("train.batch"), False),
    ],
)
def test_out_of_memory_is_recognised(error: Exception, memory: bool):
    assert out_of_memory(error) == memory


def test_the_best_checkpoint_by_metric():
    kept = {"a/step_000010": {"val/pq": 3.0}, "b/step_000020": {"val/pq": math.nan}, "c/step_000005": {"val/pq": 5.0}}
    assert best_of(kept, "val/pq", "max") == "c/step_000005"
    assert best_of(kept, "val/pq", "min") == "a/step_000010"
    assert best_of(kept, "val/miou", "max") == "" == best_of({}, "val/pq", "max")


LINES = [
    Line("1", "lr=0.1", "finished", 20, 20, 41.0, 42.0),
    Line("2", "lr=1", "failed", 10, 20, 1.0, 1.0, "FloatingPointError: step 9"),
    Line("3", "lr=0.01", "pruned", 10, 20, 30.0, 30.0),
    Line("4", "lr=0.001", "waiting"),
]


def test_the_table_of_trials():
    lines = table(LINES).splitlines()
    assert lines[0] == "4 trials: 1 failed, 1 finished, 1 pruned, 1 waiting"
    assert lines[1].split() == ["trial", "state", "step", "PQ", "best"]
    assert lines[2].split() == ["lr=0.1", "finished", "20/20", "41.00", "42.00*"]
    assert lines[4].split()[:3] == ["lr=1", "failed", "10/20"] and lines[4].endswith("FloatingPointError: step 9")
    assert lines[5].split() == ["lr=0.001", "waiting", "-", "-", "-"]
    assert "42.00*" not in table(LINES, mode="min") and "1.00*" in table(LINES, mode="min")
    many = [Line(str(k), f"lr={k}", "waiting" if k else "running", 1, 2, float(k), float(k)) for k in range(100)]
    short = table(many, most=10).splitlines()
    assert len(short) == 12 and "10 of them" in short[0] and any(line.startswith("lr=0 ") for line in short)


def test_a_log_is_not_flooded():
    log, terminal = Display(False), Display(True)
    for display in (log, terminal):
        assert display.due(0.0, "a")
        display.write("table", 0.0, "a")
    assert not log.due(20.0, "b") and log.due(31.0, "b") and not log.due(599.0, "a") and log.due(600.0, "a")
    assert terminal.due(2.0, "a") and not terminal.due(1.0, "b")


def test_a_terminal_is_drawn_over(capsys):
    display = Display(True)
    display.write("one\ntwo", 0.0, "")
    display.write("one\ntwo", 3.0, "")
    display.write("three", 6.0, "")
    assert capsys.readouterr().out == "one\ntwo\n\x1b[2F\x1b[Jthree\n"


def test_a_trial_of_tune_as_a_line(tmp_path):
    plan = replace(plan_of("optim.lr=loguniform(1e-4,1)"), folder=str(tmp_path))
    last = {"step": 10, "total": 20, "val/pq": 5.0}
    analysis = {"objective": {"max": 7.0, "min": -1e9}}
    one = SimpleNamespace(
        trial_id="7", status="TERMINATED", last_result=last, metric_analysis=analysis, config={"optim.lr": 0.5}
    )
    line = progress.line_of(one, plan)
    assert (line.state, line.value, line.best, line.label) == ("pruned", 5.0, 7.0, "lr=0.5") and line.ended
    one.last_result = {**last, "step": 20}
    assert progress.line_of(one, plan).state == "finished"
    one.status, one.last_result, one.metric_analysis = "PENDING", None, None
    waiting = progress.line_of(one, plan)
    assert waiting.state == "waiting" and math.isnan(waiting.best) and not waiting.ended
    one.status = "ERROR"
    assert progress.line_of(one, plan).reason == "see its log"
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / "7.txt").write_text("ValueError: x")
    assert progress.line_of(one, plan).reason == "ValueError: x"
    assert progress.rows([progress.line_of(one, plan)], "val/pq")[0]["lr"] == 0.5
    assert progress.short_metric("val/pq_things") == "PQ things" and progress.short_metric("val/miou") == "miou"
