"""The whole pipeline on 16 scenes: train, what it leaves, evaluate. One training serves all tests.

That a run goes on under its name is in tests/pipelines/test_legacy.py.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pipelines.tracking import client as client_module

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from pipelines.training.driver import Outcome

pytestmark = pytest.mark.timeout(300)  # the training is in the setup of whichever test runs first

STEPS = 6

TINY = """
--model.backbone.name resnet18 --model.rates 2 --model.aspp-channels 16
--model.semantic-projections 8 8 8 --model.instance-projections 8 8 8
--model.semantic-channels 16 --model.instance-channels 16 --model.semantic-head-channels 16
--model.instance-head-channels 8 --model.stuff-area 64 --augment.crop 65 97 --optim.ema 0.5 --optim.warmup-steps 0
--train.batch 4 --train.validate-every 2 --train.log-every 1 --train.overlays 2 --train.keep 1
"""


@dataclass(frozen=True)
class Trained:
    """A finished run and what it was started with."""

    arguments: list[str]
    outcome: Outcome
    printed: str
    client: MlflowClient

    def history(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, as the store holds them."""
        found = self.client.get_metric_history(self.outcome.run.run_id, key)
        return [(metric.step, metric.value) for metric in found]

    def artifacts(self, folder: str) -> list[str]:
        return [f.path for f in self.client.list_artifacts(self.outcome.run.run_id, folder or None)]

    def read(self, artifact: str, to: Path) -> str:
        return Path(self.client.download_artifacts(self.outcome.run.run_id, artifact, str(to))).read_text()


@pytest.fixture(scope="module")
def trained(
    ray_cluster: None, scenes16: Path, mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    from jobs import train

    folder = tmp_path_factory.mktemp("smoke")
    shutil.copy(mlflow_template, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    places = ["--storage", str(folder), "--data.root", str(scenes16), "--tracking.uri", uri, "--name", "smoke"]
    arguments = ["demo", *places, *TINY.split(), "--train.steps", str(STEPS)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        outcome = train.main(arguments)
    return Trained(arguments, outcome, printed.getvalue(), client_module.connect(uri))


def figures(evaluation: Any) -> dict[str, float]:
    """What a training run prints and logs, but for losses and times."""
    from panoptic.metrics.report import metrics

    names = ("val/pq", "val/sq", "val/rq", "val/miou", "val/pixel_accuracy", "val/images")
    return {name: value for name, value in metrics(evaluation).items() if name.startswith(names)}


def test_it_ends_with_the_table_and_the_places(trained: Trained):
    outcome = trained.outcome
    lines = outcome.report.splitlines()
    assert lines[1].split()[:3] == ["PQ", "SQ", "RQ"]
    assert [line.split()[0] for line in lines[2:5]] == ["all", "things", "stuff"]
    assert trained.printed.count(outcome.report) >= 1
    for place in (outcome.train.uri, outcome.val.uri, outcome.checkpoint, outcome.overlays, "mlflow ui"):
        assert place in trained.printed
    assert len(list(Path(outcome.overlays).glob("*.png"))) == 2


def test_it_begins_with_a_line_that_says_what_begins(trained: Trained):
    first = trained.printed.splitlines()[0]
    assert first.startswith("run smoke: PanopticDeepLab of 11.") and " 6 steps of 4 images of " in first
    assert "2 workers on " in first and f"folder {trained.outcome.folder}; " in first
    assert first.endswith(f"MLflow {trained.outcome.run.tracking_uri}")


def test_the_best_and_the_last_checkpoint_are_kept(trained: Trained):
    scores = {step: value for step, value in trained.history("val/pq")}
    assert sorted(scores) == [2, 4, 6]
    kept = sorted(Path(trained.outcome.folder).glob("step_*"))
    assert {path.name for path in kept} >= {f"step_{STEPS:06d}"} and len(kept) <= 2
    for path in kept:
        assert {file.name for file in path.iterdir()} >= {"checkpoint.pt", "metrics.json", "report.txt"}
    written = {path: json.loads((path / "metrics.json").read_text()) for path in kept}
    best = written[Path(trained.outcome.checkpoint)]
    assert best["val/pq"] == max(scores.values()) == max(values["val/pq"] for values in written.values())
    assert trained.outcome.metrics == pytest.approx(best, nan_ok=True)


def test_the_tracked_run(trained: Trained, tmp_path: Path):
    run = trained.client.get_run(trained.outcome.run.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "smoke"
    assert run.data.params["train.steps"] == str(STEPS) and run.data.params["model.backbone.name"] == "resnet18"
    assert run.data.tags["train_hash"] == trained.outcome.train.hash == run.data.params["train_hash"]
    assert run.data.tags["val_hash"] == trained.outcome.val.hash
    assert run.data.tags["preset"] == "demo"
    assert "version" in run.data.tags or "mlflow.source.git.commit" in run.data.tags
    losses = trained.history("train/loss/total")
    assert [step for step, _ in losses] == list(range(1, STEPS + 1)) and np.isfinite([v for _, v in losses]).all()
    # the first step waits for everything to start, so it has no speed
    assert [step for step, _ in trained.history("train/data_wait")] == list(range(2, STEPS + 1))
    assert [step for step, _ in trained.history("val/loss/total")] == [2, 4, 6]
    rates = [value for _, value in trained.history("train/lr")]
    assert rates[0] > 0 and rates == sorted(rates, reverse=True)
    config = json.loads(trained.read("config.json", tmp_path))
    assert config["train.batch"] == 4 and config["model.rates"] == [2]


def test_the_tracked_tables_and_overlays(trained: Trained, tmp_path: Path):
    assert len(trained.artifacts("overlays")) == 3
    first, last = ({Path(p).name for p in trained.artifacts(f"overlays/step_{step:06d}")} for step in (2, STEPS))
    assert first == last and len(first) == 2
    rows = list(csv.DictReader(io.StringIO(trained.read(f"classes/step_{STEPS:06d}.csv", tmp_path))))
    assert [row["class"] for row in rows] == list(trained.outcome.val.categories.names)
    pq = [float(row["pq"]) for row in rows]
    assert np.nanmean(pq) == pytest.approx(dict(trained.history("val/pq"))[STEPS], abs=1e-9)


@pytest.mark.parametrize("stored", ["checkpoint", "model"])
def test_evaluation_gives_the_figures_of_the_training_run(trained: Trained, stored: str, tmp_path: Path):
    from jobs import evaluate
    from panoptic.metrics.report import class_rows

    outcome = trained.outcome
    uri = getattr(outcome, stored)
    places = ["--tracking.uri", outcome.run.tracking_uri, "--out", str(tmp_path / "evaluations"), "--no-log"]
    evaluation = evaluate.main([uri, "--data.root", outcome.val.uri, *places, "--examples", "1", "--actors", "0"])
    assert evaluation is not None and list((tmp_path / "evaluations").glob("*.html"))
    found = figures(evaluation)
    assert found["val/images"] == 8 and found["val/miou"] > 0
    assert found == {name: pytest.approx(outcome.metrics[name], abs=0, nan_ok=True) for name in found}
    step = int(Path(outcome.checkpoint).name.removeprefix("step_"))
    rows = csv.DictReader(io.StringIO(trained.read(f"classes/step_{step:06d}.csv", tmp_path)))
    for logged, row in zip(rows, class_rows(evaluation), strict=True):
        assert logged == {name: str(row[name]) for name in logged}


def test_the_logged_model_predicts_on_encoded_images(trained: Trained, scenes16: Path):
    import mlflow.pyfunc

    from panoptic.png import decode_ids, decode_image

    mlflow.set_tracking_uri(trained.outcome.run.tracking_uri)
    try:
        model = mlflow.pyfunc.load_model(trained.outcome.model)
    finally:
        mlflow.set_tracking_uri("")
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow sets it, and the tests after this one would use that store
    image = sorted((scenes16 / "images" / "val").glob("*.jpg"))[0].read_bytes()
    answer = model.predict([image])
    ids, segments = decode_ids(answer["png"][0]), json.loads(answer["segments"][0])
    assert ids.shape == decode_image(image, "image").shape[:2]
    assert {int(i) for i in np.unique(ids)} - {0} == {entry["id"] for entry in segments}


def test_another_option_under_the_same_name_is_refused(trained: Trained):
    from jobs import train

    with pytest.raises(ValueError, match=r"'smoke' began with other options: optim\.lr was 0\.002, is 0\.5\. Choose"):
        train.main([*trained.arguments, "--optim.lr", "0.5"])


def test_weights_start_a_new_run(trained: Trained):
    import torch

    from panoptic.training.checkpoint import load
    from pipelines.config import parse
    from pipelines.presets import PRESETS
    from pipelines.training.state import Job
    from pipelines.training.worker import build_state

    _, experiment = parse([*trained.arguments, "--train.weights", trained.outcome.checkpoint], PRESETS)
    outcome = trained.outcome
    state = build_state(
        Job(experiment, outcome.train, outcome.val, outcome.run, outcome.folder, False), rank=1, world=2
    )
    stored = load(f"{outcome.checkpoint}/checkpoint.pt", "checkpoint")["ema"]
    assert state.step == state.position == 0 and not state.optimiser.state
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, stored[name]), name
