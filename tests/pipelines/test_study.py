"""The papers' studies: every row is understood and makes a model; tables, noise and budgets."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluate import Stored, load
from pipelines.independent import save
from pipelines.presets import PRESETS
from pipelines.presets.deeplab import demo
from pipelines.studies import STUDIES, judging, running
from pipelines.studies.results import Cell, least_difference, noise, plot, table_of, verdict
from pipelines.studies.running import Options, changes_of, key_of, limited, plan, short_name, shortened, with_weights
from pipelines.studies.table import METRICS, Row
from pipelines.sweeps.closing import Finished
from pipelines.sweeps.freezing import STAND_IN, meta_model
from pipelines.sweeps.progress import Line
from pipelines.sweeps.trial import apply
from pipelines.tracking import Tracking, connect, start
from tests.panoptic.models.small import SMALL_JSIS

PAPERS_TABLES = {
    "freezing-r50": 4,
    "freezing-r101": 3,
    "aspp": 2,
    "dilation": 3,
    "batch": 2,
    "joint": 3,
    "fcn-kernels": 5,
    "fcn-coordinates": 4,
    "fcn-fusion": 5,
    "fcn-channels": 4,
    "fcn-feature": 3,
    "fcn-points": 6,
    "fcn-schedule": 3,
    "fcn-star": 2,
}
"""Rows of the tables that the papers print whole."""


@pytest.fixture(scope="module")
def built() -> set[str]:
    """Models that were built already, by their options."""
    return set()


@pytest.mark.parametrize("small", [False, True], ids=["published", "small"])
@pytest.mark.parametrize("name", STUDIES)
def test_every_row_is_understood_and_makes_a_model(name: str, small: bool, built: set[str]):
    planned = plan(Options(study=(name,), small=small, steps=40), [], PRESETS)
    assert [entry.row for entry in planned] == list(range(len(STUDIES[name].rows)))
    for entry in planned:
        experiment, _ = apply(PRESETS[entry.preset](), entry.changes)
        assert 1 <= experiment.train.validate_every <= experiment.train.steps
        assert experiment.optim.warmup_steps < max(experiment.train.steps, 10)
        if repr(experiment.model) not in built:
            meta_model(experiment)
            built.add(repr(experiment.model))
        for path in STUDIES[name].rows[entry.row].judge:
            assert path.removeprefix("model.") in type(experiment.model).__dataclass_fields__


@pytest.mark.parametrize("name", STUDIES)
def test_tables_are_whole(name: str):
    table = STUDIES[name]
    assert len(table.rows) == PAPERS_TABLES.get(name, len(table.rows)) <= 30 and len(table.rows) >= 2
    assert set(table.columns) <= set(METRICS) and len({row.label for row in table.rows}) == len(table.rows)
    for row in table.rows:
        assert len(row.paper) in (0, len(table.columns))
        assert all(value is None or 0 < value < 100 for value in row.paper)


def test_what_has_not_landed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(running, "STUDIES", {name: STUDIES[name] for name in ("aspp", "fcn-points")})
    some = {name: preset for name, preset in PRESETS.items() if name != "panoptic-fcn-pedestrians"}
    assert "panoptic-fcn-pedestrians is unknown" in running.unavailable("fcn-points", some)
    lines = running.listing(some).splitlines()
    assert len(lines) == 3 and lines[0].startswith("aspp ") and "Table 4" in lines[0] and "not yet: preset" in lines[2]


@pytest.mark.parametrize(
    ("options", "rest", "message"),
    [
        (Options(study=("nothing",)), [], "unknown; there are: list, freezing-r50"),
        (Options(study=("aspp",), sweep=("a=1",)), [], "leave --sweep"),
        (Options(study=("aspp",), searcher="optuna"), [], "--searcher and --scheduler out"),
        (Options(study=("aspp",), scheduler="asha"), [], "--searcher and --scheduler out"),
        (Options(study=("aspp",), seeds=0), [], "--seeds is 1 or more"),
        (Options(study=("aspp",), steps=10, small=True), ["--storage", "s3://b/x"], "drawn into a local folder"),
        (Options(study=("aspp",)), ["dmo"], "preset dmo is unknown"),
        (Options(study=("aspp",), steps=10), ["demo"], r"aspp dual ASPP, seed 0: .*frozen noise"),
        (Options(study=("freezing-r50",), steps=10), [], r"frozen noise.*--pretrain-steps 600"),
    ],
)
def test_what_is_refused(options: Options, rest: list[str], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(running, "join_cluster", lambda *given: pytest.fail("Ray was started"))
    with pytest.raises(ValueError, match=message):
        running.run(options, rest, PRESETS)


def test_small_studies_map_trunks_and_leave_the_recipe_out():
    (first, *_) = plan(Options(study=("dilation",), small=True), [], PRESETS)
    assert first.changes["model.backbone.name"] == "resnet34" and first.changes["model.rates"] == (1, 2, 3)
    assert "optim.lr" not in first.changes and first.changes["model.backbone.freeze"] == 4
    (published, *_) = plan(Options(study=("dilation",)), [], PRESETS)
    assert published.changes["optim.lr"] == 0.0025 and published.changes["model.backbone.name"] == "resnet101"
    (other, *_) = plan(Options(study=("dilation",)), ["demo", "--optim.lr", "0.5"], PRESETS)
    assert other.preset == "demo" and "optim.lr" not in other.changes


def test_rows_of_other_lengths_follow_the_budget():
    lengths = {
        (name, steps): [
            entry.changes.get("train.steps") for entry in plan(Options(study=(name,), steps=steps), [], PRESETS)
        ]
        for name, steps in (("fcn-schedule", 90), ("fpn-res2net", 1000), ("fpn-vgg", 50), ("aspp", 77))
    }
    assert lengths == {
        ("fcn-schedule", 90): [90, 180, 270],
        ("fpn-res2net", 1000): [700, 1000],
        ("fpn-vgg", 50): [10, 20, 50],
        ("aspp", 77): [77, 77],
    }
    base = replace(demo(), optim=replace(demo().optim, milestones=(600, 900), warmup_steps=50))
    assert shortened(base, 1200) == {}
    assert shortened(base, 120) == {
        "train.steps": 120,
        "train.validate_every": 60,
        "optim.milestones": (60, 90),
        "optim.warmup_steps": 12,
    }
    rare = replace(base, train=replace(base.train, validate_every=5000))
    assert shortened(rare, 1200) == {"train.validate_every": 1200}
    row = Row("a", {"optim.lr": 0.5})
    changes = changes_of(STUDIES["detr-lr"], row, base, Options(steps=1), published=True)
    assert changes["train.steps"] == changes["train.validate_every"] == 1 and changes["optim.warmup_steps"] == 0


def test_milestones_belong_to_the_length_of_the_recipe():
    """Table 3 stops Mapillary's recipe two epochs early, and halves the rate after the same epochs; where a row's
    length differs from its table's, they follow."""
    joint = plan(Options(study=("joint",)), [], PRESETS)
    assert [entry.changes["train.steps"] for entry in joint] == [153_000] * 3
    experiment, _ = apply(PRESETS[joint[0].preset](), joint[0].changes)
    assert experiment.optim.milestones == (7 * 9000, 13 * 9000) and experiment.train.validate_every == 9000
    (half, *_) = plan(Options(study=("joint",), steps=76_500), [], PRESETS)
    assert half.changes["optim.milestones"] == (31_500, 58_500)
    stepped = replace(demo(), optim=replace(demo().optim, milestones=(60_000, 80_000)))
    study, row = STUDIES["fcn-schedule"], Row("twice", {"train.steps": 180_000})
    changes = changes_of(study, row, stepped, Options(), published=True)
    assert (changes["train.steps"], changes["optim.milestones"]) == (180_000, (120_000, 160_000))


def test_seeds_multiply_rows_and_equal_rows_train_once():
    planned = plan(Options(study=("freezing-r101", "aspp"), seeds=2, small=True, steps=40), [], PRESETS)
    bases = {entry.preset: PRESETS[entry.preset]() for entry in planned}
    assert len(planned) == 10 and {entry.changes["train.seed"] for entry in planned} == {0, 1}
    keys = [key_of(entry, bases) for entry in planned]
    assert len(set(keys)) == 8  # "up to stage 4" is one of the rows of "aspp", under both seeds
    fusion = plan(Options(study=("fcn-fusion",), small=True, steps=40), [], PRESETS)
    bases = {entry.preset: PRESETS[entry.preset]() for entry in fusion}
    assert len({key_of(entry, bases) for entry in fusion}) == 1  # rows that differ while they are judged


def test_lengths_of_the_data_set_are_shares_of_it(monkeypatch: pytest.MonkeyPatch):
    class Shards:
        rows = 485

    monkeypatch.setattr(running, "prepare_data", lambda experiment: (Shards, Shards))
    planned = plan(Options(study=("detr-length",), small=True, steps=40), [], PRESETS)
    found = limited(planned, {entry.preset: PRESETS[entry.preset]() for entry in planned})
    assert [entry.changes["data.limit"] for entry in found] == [163, 196, 485]


def test_all_rows_of_a_freezing_study_start_from_the_same_weights(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, str, int]] = []

    def stand_in(experiment: Any, kind: str, steps: int) -> dict[str, str]:
        asked.append((experiment.model.backbone.name, kind, steps))
        return {"model.backbone.weights": f"{experiment.model.backbone.name}.pt"}

    monkeypatch.setattr(running, "pretrained", stand_in)
    planned = plan(Options(study=("freezing-r50", "weight-decay"), small=True, steps=40), [], PRESETS)
    bases = {entry.preset: PRESETS[entry.preset]() for entry in planned}
    found = with_weights(planned, bases, 50)
    weights = [entry.changes.get("model.backbone.weights") for entry in found]
    assert weights == ["resnet18.pt"] * 4 + ["resnet34.pt"] * 3 and {steps for *_, steps in asked} == {50}
    assert with_weights(planned, bases, 0) == planned
    asked.clear()
    rows = plan(Options(study=("detr-freezing",), small=True, steps=40), [], PRESETS)
    with_weights(rows, {entry.preset: PRESETS[entry.preset]() for entry in rows}, 50)
    assert {kind for _, kind, _ in asked} == {"model"}


def test_pretraining_is_keyed_by_the_backbone_alone():
    from pipelines.sweeps.pretrain import pretraining

    planned = plan(Options(study=("freezing-r101", "aspp"), small=True, steps=40), [], PRESETS)
    experiments = [apply(PRESETS[entry.preset](), entry.changes)[0] for entry in planned]
    runs = [pretraining(experiment, "backbone", 30) for experiment in experiments]
    assert len({run.name for run in runs}) == 1 and runs[0].name.startswith("pretrained-backbone-resnet34-30-")
    run = runs[0]
    assert run.model.backbone.freeze == 0 and run.train.steps == 30 and run.data.root == "scenes"
    assert (run.model.centre_weight, run.model.offset_weight) == (0.0, 0.0) and run.model.semantic_weight > 0
    assert pretraining(experiments[0], "backbone", 31).name != run.name
    assert pretraining(experiments[0], "model", 30).model.centre_weight > 0


# From the options to the files that a study leaves.


def faked(monkeypatch: pytest.MonkeyPatch, folder: Path, template: Path, failing: str = "") -> Tracking:
    """Instead of a sweep, its result: every row finished with PQ 10, 11, … at step 20, but for one that failed."""
    shutil.copy(template, folder / "mlflow.db")
    options = Tracking(uri=f"sqlite:///{folder}/mlflow.db")

    def execute(given: Options, trials: Any, name: str, record: Any) -> Finished:
        lines = []
        for k, row in enumerate(trials.rows):
            if row.label == failing:
                lines.append(Line(str(k), row.label, "failed", reason="ValueError: x"))
                continue
            last = folder / f"trial-{k}" / "step_000020"
            last.mkdir(parents=True)
            (last / "metrics.json").write_text(json.dumps({"val/pq": 10.0 + k, "val/miou": 30.0}))
            lines.append(Line(str(k), row.label, "finished", 20, 20, 10.0 + k, 10.0 + k))
        assert {e.train.steps for e in trials.experiments} == {20} and given.concurrent == 2
        return Finished(name, str(folder), lines, None, "", "", start(options, folder), "")

    monkeypatch.setattr(running, "execute", execute)
    monkeypatch.setattr(running, "join_cluster", lambda wanted, experiments: 2)
    return options


def test_a_study_leaves_its_table_in_every_form(monkeypatch, tmp_path: Path, mlflow_template: Path):
    options = faked(monkeypatch, tmp_path, mlflow_template, failing="detr-lr 1e-3, seed 0")
    report = running.run(Options(study=("detr-lr",), small=True, steps=20), [], PRESETS)
    table = (tmp_path / "studies" / "detr-lr.csv").read_text().splitlines()
    assert table[0].startswith("row,PQ paper,PQ mean") and table[2].startswith("1e-4,6.66,11.0,")
    assert "| 1e-5 | - | 10.00 |" in (tmp_path / "studies" / "detr-lr.md").read_text()
    assert (tmp_path / "studies" / "detr-lr.svg").read_text().startswith("<svg")
    assert "without a figure: detr-lr 1e-3, seed 0: ValueError: x" in report.text and "11.00" in report.text
    kept = connect(options.uri).list_artifacts(report.finished.parent.run_id, "studies")
    assert {Path(entry.path).name for entry in kept} == {f"detr-lr.{ending}" for ending in ("csv", "md", "svg", "txt")}
    note = connect(options.uri).get_run(report.finished.parent.run_id).data.tags["mlflow.note.content"]
    assert "Learning rate" in note and report.finished.name.startswith("study-detr-lr-")


def test_branches_that_were_trained_alone_are_judged_merged(monkeypatch, tmp_path: Path, mlflow_template: Path):
    """The PQ of both rows is that of the two models as one, judged once; that of the joint row is its own."""
    asked: list[str] = []

    def judge(uri: str, changes: Any, base: Any, folder: str) -> dict[str, float]:
        asked.append(uri)
        merged = uri.endswith(".pt")
        assert not merged or load(uri).model.config.trunks == "separate"
        return {"val/pq": 15.0 if merged else 1.0, "val/ap50": 5.0}

    def save_models(given: Any, trials: Any, name: str, record: Any) -> Finished:
        done = sweep(given, trials, name, record)
        for k, row in enumerate(trials.rows[1:], 1):
            model = replace(SMALL_JSIS, branches=row.changes["model.branches"]).build(STAND_IN)
            save(Stored(model, {"resize.short": 64}), str(tmp_path / f"trial-{k}" / "step_000020"))
        return done

    faked(monkeypatch, tmp_path, mlflow_template)
    sweep = running.execute
    monkeypatch.setattr(running, "execute", save_models)
    monkeypatch.setattr(running, "judged", judge)
    monkeypatch.setattr(judging, "judged", judge)
    report = running.run(Options(study=("joint",), small=True, steps=20), [], PRESETS)
    assert [row["PQ mean"] for row in report.tables["joint"].rows] == [1.0, 15.0, 15.0]
    assert len(asked) == 4 and sum(uri.endswith(".pt") for uri in asked) == 1
    assert math.isnan(judging.merged_quality("", "x", demo(), str(tmp_path)))


def test_folders_of_many_studies_have_short_names():
    assert short_name(("aspp", "batch")) == "aspp-batch"
    assert short_name(tuple(STUDIES)) == f"freezing-r50-and-{len(STUDIES) - 1}-more"


def test_the_job_lists_the_studies(monkeypatch: pytest.MonkeyPatch, capsys):
    from jobs.tune import main

    monkeypatch.setattr(running, "STUDIES", {"aspp": STUDIES["aspp"]})
    assert main(["--study", "list"]) is None
    assert capsys.readouterr().out.startswith("aspp ")


# Tables.


def cells(*groups: tuple[float, ...], paper: tuple[float | None, ...] = ()) -> list[Cell]:
    given = paper or (None,) * len(groups)
    return [Cell(p, group) for p, group in zip(given, groups, strict=True)]


def test_means_and_deviations():
    cell = Cell(6.35, (10.0, 12.0, math.nan))
    assert cell.mean == 11.0 and cell.deviation == pytest.approx(math.sqrt(2)) and cell.text() == "11.00 ± 1.41"
    assert Cell(None, (5.0,)).text() == "5.00" and Cell(None, (math.nan,)).text() == "-" == Cell(None, ()).text()
    deviation, freedom = noise(cells((10.0, 12.0), (20.0, 20.0)))
    assert (deviation, freedom) == (pytest.approx(1.0), 2)
    a, b = cells((10.0, 12.0), (20.0, 20.0))
    assert least_difference(a, b, deviation, freedom) == pytest.approx(4.302653, rel=1e-5)  # t of 2 degrees x 1


def test_differences_are_claimed_beyond_the_noise_only():
    lines = verdict(["a", "b", "c"], cells((10.0, 12.0), (20.0, 20.0), (11.0, 12.0), paper=(1.0, 3.0, 2.0)), "PQ")
    text = "\n".join(lines)
    assert "Beyond the noise: b over a by 9.00; b over c by 8.50." in text and "Within it: c over a by 0.50." in text
    assert "The order of the means is the paper's: b > c > a." in text
    one = verdict(["a", "b"], cells((10.0,), (20.0,)), "PQ")
    assert one == ["One seed: its noise is unknown, so no difference is claimed (--seeds 2 or more)."]
    assert "nothing to compare" in verdict(["a", "b"], cells((10.0,), (math.nan,)), "PQ")[0]
    other = verdict(["a", "b"], cells((10.0, 11.0), (20.0, 21.0), paper=(3.0, 1.0)), "PQ")
    assert "Order of the means: b > a; the paper's: a > b." in other[-1]


def test_a_table_in_every_form():
    definition = STUDIES["aspp"]
    body = [[Cell(p, (p + 1, p + 1.2)) for p in row.paper] for row in definition.rows]  # type: ignore[operator]
    made = table_of("aspp", definition, body, "40 steps, 2 seeds")
    assert "40 steps, 2 seeds" in made.text and "dual ASPP" in made.text and "19.484" in made.text
    assert "20.58 ± 0.14" in made.text and made.markdown.count("\n| ") >= 3
    assert made.csv.splitlines()[0].startswith("row,PQ paper,PQ mean,PQ deviation,PQ seeds,things paper")
    assert made.rows[0]["PQ paper"] == 19.484 and made.plot.startswith("<svg") and made.plot.endswith("</svg>")
    empty = plot("<none>", ["a"], [Cell(None, ())], "PQ")
    assert "&lt;none&gt;" in empty and "nan" not in empty
