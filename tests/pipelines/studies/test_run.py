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
from pipelines.studies.table import table_of
from pipelines.tracking.client import connect
from pipelines.tracking.runs import Tracking, start
from pipelines.training.preflight import STAND_IN
from pipelines.tuning.progress import TrialResult
from pipelines.tuning.results import SweepResult
from tests.support.small import SMALL_JSIS


def faked(monkeypatch: pytest.MonkeyPatch, folder: Path, template: Path, failing: str = "") -> Tracking:
    """Instead of a sweep, its result: every row finished with PQ 10, 11, … at step 20, but for one that failed."""
    shutil.copy(template, folder / "mlflow.db")
    options = Tracking(uri=f"sqlite:///{folder}/mlflow.db")

    def execute(given: Options, trials: Any, name: str, record: Any) -> SweepResult:
        results = []
        for k, row in enumerate(trials.configs):
            if row.label == failing:
                results.append(TrialResult(str(k), row.label, "failed", reason="ValueError: x"))
                continue
            last = folder / f"trial-{k}" / "step_000020"
            last.mkdir(parents=True)
            (last / "metrics.json").write_text(json.dumps({"val/pq": 10.0 + k, "val/miou": 30.0}))
            results.append(TrialResult(str(k), row.label, "finished", 20, 20, 10.0 + k, 10.0 + k))
        assert {e.train.steps for e in trials.experiments} == {20} and given.concurrent == 2
        return SweepResult(name, str(folder), results, None, "", "", start(options, folder), "")

    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(run, "join_cluster", lambda wanted, experiments: 2)
    return options


def test_a_study_leaves_its_table_in_every_form(monkeypatch, tmp_path: Path, mlflow_template: Path):
    options = faked(monkeypatch, tmp_path, mlflow_template, failing="detr-lr 1e-3, seed 0")
    report = run.run(Options(study=("detr-lr",), small=True, steps=20), [], PRESETS)
    table = (tmp_path / "studies" / "detr-lr.csv").read_text().splitlines()
    assert table[0].startswith("row,PQ paper,PQ mean") and table[2].startswith("1e-4,6.66,11.0,")
    assert "| 1e-5 | - | 10.00 |" in " ".join((tmp_path / "studies" / "detr-lr.md").read_text().split())
    assert (tmp_path / "studies" / "detr-lr.svg").read_text().startswith("<svg")
    assert "without a figure: detr-lr 1e-3, seed 0: ValueError: x" in report.text and "11.00" in report.text
    kept = connect(options.uri).list_artifacts(report.sweep.parent.run_id, "studies")
    assert {Path(entry.path).name for entry in kept} == {f"detr-lr.{ending}" for ending in ("csv", "md", "svg", "txt")}
    note = connect(options.uri).get_run(report.sweep.parent.run_id).data.tags["mlflow.note.content"]
    assert "Learning rate" in note and report.sweep.name.startswith("study-detr-lr-")


def test_branches_that_were_trained_alone_are_evaluated_merged(monkeypatch, tmp_path: Path, mlflow_template: Path):
    """The PQ of both rows is that of the two models as one, evaluated once; that of the joint row is its own."""
    asked: list[str] = []

    def evaluate_with(uri: str, changes: Any, base: Any, folder: str, true: Any = ()) -> dict[str, float]:
        asked.append(uri)
        merged = uri.endswith(".pt")
        assert not merged or load(uri).model.config.trunks == "separate"
        return {"val/pq": 15.0 if merged else 1.0, "val/ap50": 5.0}

    def save_models(given: Any, trials: Any, name: str, record: Any) -> SweepResult:
        done = sweep(given, trials, name, record)
        for k, row in enumerate(trials.configs[1:], 1):
            model = replace(SMALL_JSIS, branches=row.changes["model.branches"]).build(STAND_IN)
            save(Stored(model, {"resize.short": 64}), str(tmp_path / f"trial-{k}" / "step_000020"))
        return done

    faked(monkeypatch, tmp_path, mlflow_template)
    sweep = run.execute
    monkeypatch.setattr(run, "execute", save_models)
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", evaluate_with)
    report = run.run(Options(study=("joint",), small=True, steps=20), [], PRESETS)
    assert [row["PQ mean"] for row in report.tables["joint"].rows] == [1.0, 15.0, 15.0]
    assert len(asked) == 4 and sum(uri.endswith(".pt") for uri in asked) == 1
    assert math.isnan(evaluate.merged_pq("", "x", demo(), str(tmp_path)))


def test_a_row_that_cannot_be_evaluated_costs_its_figure_alone(monkeypatch, tmp_path: Path, mlflow_template: Path):
    def evaluate_with(uri: str, changes: Any, base: Any, folder: str, true: Any = ()) -> dict[str, float]:
        if changes["model.fusion_threshold"] == 0.85:
            raise RuntimeError("the actor died")
        return {"val/pq": 40.0, "val/ap": 5.0}

    options = faked(monkeypatch, tmp_path, mlflow_template)
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", evaluate_with)
    report = run.run(Options(study=("fcn-fusion",), small=True, steps=20), [], PRESETS)
    assert [row["PQ seeds"] for row in report.tables["fcn-fusion"].rows] == [1, 0, 1, 1, 1]
    reason = "fcn-fusion 0.85, seed 0: not evaluated: RuntimeError: the actor died; --resume evaluates it again"
    assert f"without a figure: {reason}" in report.text
    assert (tmp_path / "studies" / "fcn-fusion.md").exists()
    assert connect(options.uri).list_artifacts(report.sweep.parent.run_id, "studies")


def test_results_of_one_training_say_so(monkeypatch, tmp_path: Path, mlflow_template: Path):
    seen: dict[str, Any] = {}

    def table(name: str, definition: Any, cells: Any, budget: str, notes: Any) -> Any:
        seen[name] = [[cell.trainings for cell in row] for row in cells]
        return table_of(name, definition, cells, budget, notes)

    faked(monkeypatch, tmp_path, mlflow_template)
    monkeypatch.setattr(run, "table_of", table)
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", lambda *given: {"val/pq": 1.0})
    monkeypatch.setattr(evaluate, "merged_pq", lambda *given: 2.0)
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
    (tmp_path / "taken" / "sweep.json").write_text('{"run_id": "1"}')
    options = Options(study=("aspp",), small=True, steps=20, resume=resume)
    rest = ["--storage", str(tmp_path), "--name", "other" if resume else "taken"]
    with pytest.raises(ValueError, match=message):
        run.run(options, rest, PRESETS)


def test_the_name_of_a_study_is_checked_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(run, "check_rows", lambda *given: pytest.fail("rows were looked at"))
    with pytest.raises(ValueError, match=r"^--name studies: a folder"):
        run.run(
            Options(study=("aspp",), small=True, steps=20), ["--storage", str(tmp_path), "--name", "studies"], PRESETS
        )


def test_no_trial_asks_for_more_images_than_there_are(monkeypatch: pytest.MonkeyPatch):
    """Neither its base nor its experiment, of which a sweep prepares the data."""
    seen: list[Any] = []

    def execute(given: Any, trials: Any, name: str, record: Any) -> Any:
        seen.extend([*trials.bases.values(), *trials.experiments])
        raise InterruptedError("trials were given")

    monkeypatch.setattr(plan, "prepare_data", lambda experiment: (SimpleNamespace(rows=485),) * 2)
    monkeypatch.setattr(run, "join_cluster", lambda *given: 1)
    monkeypatch.setattr(run, "execute", execute)
    with pytest.raises(InterruptedError):
        run.run(Options(study=("detr-length",), steps=20), ["--train.weights", "detr.pt"], PRESETS)
    assert [one.data.limit for one in seen] == [196, 163, 196, 485]


def test_data_is_looked_at_before_weights_are_trained(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(run, "join_cluster", lambda *given: 1)
    monkeypatch.setattr(run, "with_weights", lambda *given: pytest.fail("weights were trained"))
    with pytest.raises(ValueError, match=r"data\.root: this preset needs data"):
        rest = ["panoptic-deeplab-pedestrians", "--storage", str(tmp_path)]
        run.run(Options(study=("aspp",), small=True, steps=20), rest, PRESETS)


@pytest.mark.parametrize("missing", [False, True])
def test_imagenet_weights_are_looked_for_before_anything_starts(missing: bool, monkeypatch: pytest.MonkeyPatch):
    """Each once; where they are not to be had, one line says what to install."""
    asked: list[str] = []

    def look(experiment: Any) -> None:
        asked.append(experiment.model.backbone.name)
        if missing:
            raise ValueError("without a network: pip install x")

    def join(*given: Any) -> int:
        raise InterruptedError("Ray would start")

    monkeypatch.setattr(run, "check_weights", look)
    monkeypatch.setattr(run, "join_cluster", join)
    with pytest.raises(ValueError if missing else InterruptedError, match="pip install x" if missing else "Ray"):
        run.run(Options(study=("freezing-r50", "aspp"), small=True, steps=20), [], PRESETS)
    assert asked == ["tf_efficientnet_lite0", "tf_efficientnet_lite2"][: 1 if missing else 2]


def test_a_table_says_what_a_step_takes(monkeypatch, tmp_path: Path, mlflow_template: Path, capsys):
    """Seconds and memory of each row, from the curves of its MLflow run; PQ with its noise over three seeds."""
    monkeypatch.setattr(run, "fetch_weights", lambda experiments: None)
    options = faked(monkeypatch, tmp_path, mlflow_template)
    monkeypatch.setattr(run, "run_id", lambda folder, identity: f"run-{identity}")
    asked: list[str] = []

    def curves(opened: Any, names: Any) -> list[list[tuple[int, float]]]:
        asked.append(opened.run_id)
        assert names == ["train/step_seconds", "train/memory_mib"] and opened.tracking_uri == options.uri
        if opened.run_id == "run-17":
            raise ConnectionError("away")
        k = int(opened.run_id.removeprefix("run-"))
        return [[(5, 1.0 + k), (10, 9.0), (20, 0.5)], [(5, 1000.0 + k), (20, 3000.0)]]

    monkeypatch.setattr(run, "curves", curves)
    report = run.run(Options(study=("freezing-photographs",), steps=20), [], PRESETS)
    assert len(asked) == 18
    first, *_, last = report.tables["freezing-photographs"].rows
    assert (first["PQ mean"], first["PQ seeds"], first["PQ paper"]) == (11.0, 3, "6.351")
    assert (first["s/step mean"], first["MiB mean"]) == (2.0, 1001.0) and last["MiB seeds"] == 2
    printed = " ".join(report.tables["freezing-photographs"].text.split())
    assert "2.000 ± 1.000" in printed and "1001 ± 1" in printed and "11.00 ± 1.00" in printed
    assert "Noise of one run: PQ ± 1.00" in printed and "The order of the means" not in printed
    assert "begins with ImageNet weights, as the paper's models: tf_efficientnet_lite0" in capsys.readouterr().out


def test_what_a_step_takes_is_read_off_the_curves_of_a_run(monkeypatch, tmp_path: Path, mlflow_template: Path):
    """The median of its seconds, and the memory of its first line; a run without curves tells nothing."""
    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    parent = start(Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db"), tmp_path)
    client, result = connect(parent.tracking_uri), TrialResult("0", "a", "finished")
    sweep = SweepResult("x", str(tmp_path), [result], None, "", "", parent, "")
    assert run.costs(result, sweep) == {}
    monkeypatch.setattr(run, "run_id", lambda folder, identity: parent.run_id)
    assert run.costs(result, sweep) == {}
    for step, seconds, memory in ((30, 2.0, 950.0), (10, 9.0, 900.0), (20, 1.0, 920.0)):
        client.log_metric(parent.run_id, "train/step_seconds", seconds, step=step)
        client.log_metric(parent.run_id, "train/memory_mib", memory, step=step)
    assert run.costs(result, sweep) == {"train/step_seconds": 2.0, "train/memory_mib": 900.0}


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
    assert short_name(tuple(STUDIES)) == f"deeplab-default-and-{len(STUDIES) - 1}-more"


def test_the_job_lists_the_studies(monkeypatch: pytest.MonkeyPatch, capsys):
    from jobs.tune import main

    monkeypatch.setattr(run, "STUDIES", {"aspp": STUDIES["aspp"]})
    assert main(["--study", "list"]) is None
    assert "\n    aspp " in capsys.readouterr().out
