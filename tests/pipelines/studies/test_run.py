"""From a study's options to the files that it leaves; its tables, and what they claim."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.config import override
from pipelines.evaluation.evaluate import Stored, load
from pipelines.evaluation.merge_branches import save
from pipelines.presets import PRESETS
from pipelines.presets.panoptic_deeplab import demo
from pipelines.studies import STUDIES, evaluate, plan, run
from pipelines.studies.plan import Options, short_name
from pipelines.studies.statistics import Cell, beyond_chance, compare, noise, verdict
from pipelines.studies.table import plot, table_of
from pipelines.tracking.client import connect
from pipelines.tracking.runs import Tracking, start
from pipelines.training.preflight import STAND_IN
from pipelines.tuning.progress import Line
from pipelines.tuning.results import Finished
from tests.support.small import SMALL_JSIS

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

    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(run, "join_cluster", lambda wanted, experiments: 2)
    return options


def test_a_study_leaves_its_table_in_every_form(monkeypatch, tmp_path: Path, mlflow_template: Path):
    options = faked(monkeypatch, tmp_path, mlflow_template, failing="detr-lr 1e-3, seed 0")
    report = run.run(Options(study=("detr-lr",), small=True, steps=20), [], PRESETS)
    table = (tmp_path / "studies" / "detr-lr.csv").read_text().splitlines()
    assert table[0].startswith("row,PQ paper,PQ mean") and table[2].startswith("1e-4,6.66,11.0,")
    assert "| 1e-5 | - | 10.00 |" in (tmp_path / "studies" / "detr-lr.md").read_text()
    assert (tmp_path / "studies" / "detr-lr.svg").read_text().startswith("<svg")
    assert "without a figure: detr-lr 1e-3, seed 0: ValueError: x" in report.text and "11.00" in report.text
    kept = connect(options.uri).list_artifacts(report.finished.parent.run_id, "studies")
    assert {Path(entry.path).name for entry in kept} == {f"detr-lr.{ending}" for ending in ("csv", "md", "svg", "txt")}
    note = connect(options.uri).get_run(report.finished.parent.run_id).data.tags["mlflow.note.content"]
    assert "Learning rate" in note and report.finished.name.startswith("study-detr-lr-")


def test_branches_that_were_trained_alone_are_evaluated_merged(monkeypatch, tmp_path: Path, mlflow_template: Path):
    """The PQ of both rows is that of the two models as one, evaluated once; that of the joint row is its own."""
    asked: list[str] = []

    def evaluate_with(uri: str, changes: Any, base: Any, folder: str) -> dict[str, float]:
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
    sweep = run.execute
    monkeypatch.setattr(run, "execute", save_models)
    monkeypatch.setattr(run, "evaluated", evaluate_with)
    monkeypatch.setattr(evaluate, "evaluated", evaluate_with)
    report = run.run(Options(study=("joint",), small=True, steps=20), [], PRESETS)
    assert [row["PQ mean"] for row in report.tables["joint"].rows] == [1.0, 15.0, 15.0]
    assert len(asked) == 4 and sum(uri.endswith(".pt") for uri in asked) == 1
    assert math.isnan(evaluate.merged_quality("", "x", demo(), str(tmp_path)))


def test_a_row_that_cannot_be_evaluated_costs_its_figure_alone(monkeypatch, tmp_path: Path, mlflow_template: Path):
    def evaluate_with(uri: str, changes: Any, base: Any, folder: str) -> dict[str, float]:
        if changes["model.fusion_threshold"] == 0.85:
            raise RuntimeError("the actor died")
        return {"val/pq": 40.0, "val/ap": 5.0}

    options = faked(monkeypatch, tmp_path, mlflow_template)
    monkeypatch.setattr(run, "evaluated", evaluate_with)
    report = run.run(Options(study=("fcn-fusion",), small=True, steps=20), [], PRESETS)
    assert [row["PQ seeds"] for row in report.tables["fcn-fusion"].rows] == [1, 0, 1, 1, 1]
    reason = "fcn-fusion 0.85, seed 0: not evaluated: RuntimeError: the actor died; --resume evaluates it again"
    assert f"without a figure: {reason}" in report.text
    assert (tmp_path / "studies" / "fcn-fusion.md").exists()
    assert connect(options.uri).list_artifacts(report.finished.parent.run_id, "studies")


def test_results_of_one_training_say_so(monkeypatch, tmp_path: Path, mlflow_template: Path):
    seen: dict[str, Any] = {}

    def table(name: str, definition: Any, cells: Any, budget: str) -> Any:
        seen[name] = [[cell.trainings for cell in row] for row in cells]
        return table_of(name, definition, cells, budget)

    faked(monkeypatch, tmp_path, mlflow_template)
    monkeypatch.setattr(run, "table_of", table)
    monkeypatch.setattr(run, "evaluated", lambda *given: {"val/pq": 1.0})
    monkeypatch.setattr(run, "merged_quality", lambda *given: 2.0)
    run.run(Options(study=("fcn-fusion", "joint"), small=True, steps=20, seeds=2), [], PRESETS)
    fusion = {row[0] for row in seen["fcn-fusion"]}
    assert len(fusion) == 1 and len(set(fusion.pop())) == 2
    joint, semantic, instances = seen["joint"]
    place = STUDIES["joint"].columns.index("PQ")
    assert semantic[place] == instances[place] != joint[place] and len(set(semantic[place])) == 2
    assert semantic[0] != instances[0]  # their mIoU is of two models


@pytest.mark.parametrize(("resume", "message"), [(False, "is there already"), (True, "there is no sweep 'other'")])
def test_names_are_checked_before_anything_is_trained(resume: bool, message: str, monkeypatch, tmp_path: Path):
    for name in ("join_cluster", "limited", "with_weights", "execute"):
        monkeypatch.setattr(run, name, lambda *given: pytest.fail("something was started"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "sweep.json").write_text("{}")
    options = Options(study=("aspp",), small=True, steps=20, resume=resume)
    rest = ["--storage", str(tmp_path), "--name", "other" if resume else "taken"]
    with pytest.raises(ValueError, match=message):
        run.run(options, rest, PRESETS)


def test_no_trial_asks_for_more_images_than_there_are(monkeypatch: pytest.MonkeyPatch):
    """Neither its base nor its experiment, of which a sweep prepares the data."""
    seen: list[Any] = []

    def execute(given: Any, trials: Any, name: str, record: Any) -> Any:
        seen.extend([*trials.bases.values(), *trials.experiments])
        raise InterruptedError("trials were given")

    monkeypatch.setattr(plan, "prepare_data", lambda experiment: (SimpleNamespace(rows=485), None))
    monkeypatch.setattr(run, "join_cluster", lambda *given: 1)
    monkeypatch.setattr(run, "execute", execute)
    with pytest.raises(InterruptedError):
        run.run(Options(study=("detr-length",), steps=20), ["--train.weights", "detr.pt"], PRESETS)
    assert [one.data.limit for one in seen] == [196, 163, 196, 485]


def test_data_is_looked_at_before_weights_are_trained(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(run, "join_cluster", lambda *given: 1)
    monkeypatch.setattr(run, "with_weights", lambda *given: pytest.fail("weights were trained"))
    with pytest.raises(ValueError, match=r"data\.root: this preset needs data"):
        run.run(Options(study=("aspp",), small=True, steps=20), ["--storage", str(tmp_path)], PRESETS)


def test_a_table_says_what_was_typed_in_place_of_its_own():
    typed = ["--model.backbone.freeze", "2", "--optim.lr", "0.5", "--train.overlays", "1"]
    bases = {"demo": override(demo(), {"optim.lr": 0.5, "model.backbone.freeze": 2})}
    assert run.budget_of("aspp", Options(steps=9, small=True), typed, bases) == (
        "9 steps, 1 seed, model.backbone.freeze 2"
    )
    assert run.budget_of("aspp", Options(seeds=2), typed, bases) == (
        "the preset's steps, 2 seeds, model.backbone.freeze 2, optim.lr 0.5"
    )


def test_the_record_that_is_checked_is_the_one_that_is_kept(tmp_path: Path):
    """What `execute` would write lets the same command resume, and no other."""
    options, rest = Options(study=("aspp",), steps=20), ["--storage", str(tmp_path), "--name", "one"]
    kept = {key: value for key, value in asdict(options).items() if key not in ("resume", "concurrent")}
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "sweep.json").write_text(json.dumps({"run_id": "x", **kept, "arguments": rest}))
    base = replace(demo(), storage=str(tmp_path))
    run.check_name(replace(options, resume=True, concurrent=3), rest, base, "one")
    with pytest.raises(ValueError, match="steps was 20, is 30"):
        run.check_name(replace(options, resume=True, steps=30), rest, base, "one")


def test_folders_of_many_studies_have_short_names():
    assert short_name(("aspp", "batch")) == "aspp-batch"
    assert short_name(tuple(STUDIES)) == f"freezing-r50-and-{len(STUDIES) - 1}-more"


def test_the_job_lists_the_studies(monkeypatch: pytest.MonkeyPatch, capsys):
    from jobs.tune import main

    monkeypatch.setattr(run, "STUDIES", {"aspp": STUDIES["aspp"]})
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
    a, b = cells((10.0, 12.0), (15.302653, 15.302653))
    found = compare(("a", a), ("b", b), deviation, freedom)
    assert found.text == "b over a by 4.30" and found.chance == pytest.approx(0.05, rel=1e-5)  # t of 2 degrees


def test_differences_are_claimed_beyond_the_noise_only():
    lines = verdict(["a", "b", "c"], cells((10.0, 12.0), (20.0, 20.0), (11.0, 12.0), paper=(1.0, 3.0, 2.0)), "PQ")
    text = "\n".join(lines)
    assert "Noise of one run: PQ ± 0.91 (3 degrees of freedom)." in text
    assert "Beyond the noise (all of these together with 95% confidence): b over a by 9.00; b over c by 8.50." in text
    assert "Within it: c over a by 0.50." in text and "seed by seed" not in text
    assert "The order of the means is the paper's: b > c > a." in text
    one = verdict(["a", "b"], cells((10.0,), (20.0,)), "PQ")
    assert one == ["One seed: its noise is unknown, so no difference is claimed (--seeds 2 or more)."]
    assert "nothing to compare" in verdict(["a", "b"], cells((10.0,), (math.nan,)), "PQ")[0]
    other = verdict(["a", "b"], cells((10.0, 11.0), (20.0, 21.0), paper=(3.0, 1.0)), "PQ")
    assert "Order of the means: b > a; the paper's: a > b." in other[-1]


def test_what_is_unknown_is_not_claimed():
    lost = verdict(["a", "b"], cells((10.0, math.nan), (math.nan, 20.0)), "PQ")
    assert lost == ["No row has the figures of two seeds: the noise is unknown, so no difference is claimed."]
    alike = verdict(["a", "b"], cells((10.0, 10.0), (12.0, 12.0)), "PQ")
    assert alike == ["All seeds of a row gave the same figure: the noise is unknown, so no difference is claimed."]
    nought = "\n".join(verdict(["a", "b"], cells((10.0, 10.001), (10.0, 10.001)), "PQ"))
    assert "confidence): no difference." in nought and "Within it: a over b by 0.00." in nought


def test_claims_hold_together():
    """Holm: the k-th smallest chance of m is held against 5 % / (m - k + 1), and the first that exceeds it ends it."""
    assert beyond_chance([0.04, 0.01, 0.02]) == [True, True, True]
    assert beyond_chance([0.04, 0.02, 0.03]) == [False, False, False]
    assert beyond_chance([0.04, 0.01, 0.03]) == [False, True, False] and beyond_chance([]) == []
    alone = verdict(["a", "b"], cells((10.0, 10.2), (11.0, 11.2)), "PQ")
    assert "b over a by 1.00" in alone[1]
    several = verdict(list("abcd"), cells((10.0, 10.2), (10.5, 10.7), (10.2, 10.4), (10.3, 10.5)), "PQ")
    assert "no difference" in several[1]  # 0.50 alone would be beyond it: t of 4 degrees is 2.78, x 0.14 = 0.39


def test_rows_of_one_training_count_once_and_are_compared_seed_by_seed():
    seeds = ("first", "second", "third")
    rows = [Cell(None, (10.0 + k, 12.0 + k, 17.0 + k), seeds) for k in (0.0, 0.01, 1.0)]
    rows[1] = replace(rows[1], ours=(10.5, 12.7, 17.6))
    assert noise(rows)[1] == 2 and noise([replace(row, trainings=()) for row in rows])[1] == 6
    lines = verdict(["a", "b", "c"], rows, "PQ")
    assert "b over a by 0.60" in lines[1] and "compared seed by seed" in lines[3]  # ± 0.1, where runs differ by 3.6
    apart = [replace(row, trainings=()) for row in rows]
    assert "no difference" in verdict(["a", "b", "c"], apart, "PQ")[1]
    single = Cell(None, (5.0, 6.0, 7.0), ("joint 1", "joint 2", "joint 3"))
    merged = verdict(["joint", "semantic", "instances"], [single, rows[0], rows[0]], "PQ")
    assert "semantic over instances" not in "".join(merged[:-1]) and "4 degrees" in merged[0]


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
