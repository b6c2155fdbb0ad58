"""Files of an earlier version still load, predict the same, and go on: see tests/data/legacy/README.md.

The files stay as they are: they are what people have on their disks and in their registries.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from panoptic.models.base import PanopticModel
from panoptic.png import decode_ids
from panoptic.segmentation import Segmentation, collate
from panoptic.training import checkpoint as checkpoints
from panoptic.training.device import Engine
from panoptic.training.optim import Optim, build_ema, build_optimiser
from panoptic.training.plain import from_plain, read_config
from panoptic.training.step import SkipCounter, train_step
from tests.panoptic.models.traces import CATEGORIES, drawn, predict

LEGACY = Path(__file__).resolve().parents[1] / "data/legacy"

SIZE = (48, 64)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((LEGACY / "expected.json").read_text())


def unpacked(name: str, folder: Path) -> Path:
    with tarfile.open(LEGACY / name) as archive:
        archive.extractall(folder, filter="data")
    return folder


def old_checkpoint() -> dict[str, Any]:
    return checkpoints.load(io.BytesIO(lzma.decompress((LEGACY / "checkpoint.pt.xz").read_bytes())))


def image_file() -> bytes:
    """A drawn image as PNG, for those that take files."""
    return cv2.imencode(".png", cv2.cvtColor(drawn(20, SIZE).image, cv2.COLOR_RGB2BGR))[1].tobytes()


def found_map(model: PanopticModel) -> Segmentation:
    images, targets = collate([drawn(20, SIZE)], model.divisor)
    with torch.inference_mode():
        return predict(model, model.network(images, targets.frame), targets.frame).maps[0]


def next_step(record: dict[str, Any]) -> tuple[dict[str, float], Any]:
    """The loss terms of the step after a checkpoint, and the average of weights then."""
    options = {key.removeprefix("optim."): v for key, v in record["experiment"].items() if key.startswith("optim.")}
    optim = from_plain(Optim, options)
    model = read_config(record["config"]).build(checkpoints.read_categories(record))
    optimiser, average = build_optimiser(model, optim), build_ema(model, optim.ema)
    checkpoints.restore(record, model, optimiser, average)
    batch = collate([drawn(21, SIZE), drawn(22, SIZE)], model.divisor)
    result = train_step(
        model.train(),
        optimiser,
        [batch],
        step=record["step"],
        total=record["step"] + 1,
        optim=optim,
        engine=Engine(),
        health=SkipCounter(),
        ema=average,
    )
    return {name: float(value) for name, value in result.losses.items()}, average


def class_rows(classes: np.ndarray) -> list[str]:
    """A map of single-digit classes as text, one row a line; `IGNORE` is a dot."""
    return ["".join("." if c < 0 else str(c) for c in row) for row in classes.tolist()]


def check_rows(rows: list[str], expected: list[str]) -> None:
    """Nearly all pixels: rounding may move a border, on another processor."""
    assert [len(row) for row in rows] == [len(row) for row in expected]
    a, b = (np.array([list(row) for row in part]) for part in (rows, expected))
    assert (a == b).mean() > 0.995
    assert len(np.unique(b)) > 1  # else any model would do


def test_a_checkpoint_loads_and_predicts_the_same(expected: dict[str, Any]) -> None:
    record = old_checkpoint()
    assert record["step"] == 2 and record["ema"] is not None and record["optimiser"] is not None
    for average in (True, False):
        found = found_map(checkpoints.build_model(record, ema=average))
        numbers = expected["checkpoint"]["averaged" if average else "weights"]
        check_rows(class_rows(found.semantic()), numbers["classes"])
        assert sorted(found.labels.tolist()) == numbers["labels"]


def test_a_checkpoint_is_trained_on_as_before(expected: dict[str, Any]) -> None:
    record = old_checkpoint()
    losses, average = next_step(record)
    assert losses == pytest.approx(expected["checkpoint"]["next_losses"], rel=1e-4)
    assert int(average.n_averaged) == record["ema_updates"] + 1


def test_a_logged_model_loads_and_predicts_the_same(expected: dict[str, Any], tmp_path: Path) -> None:
    from pipelines.tracking.model import load_packaged, predict_image

    packaged = load_packaged(str(unpacked("mlflow_model.tar.xz", tmp_path)))
    assert packaged.resize.short == 48 and packaged.experiment["train.steps"] == 2
    check_prediction(*predict_image(packaged, image_file()), expected["model"])


@pytest.mark.timeout(200)
@pytest.mark.parametrize("first", ["model", "package"])
def test_a_logged_model_runs_in_a_bare_process(expected: dict[str, Any], first: str, tmp_path: Path) -> None:
    """By the code that it carries; or by the present `panoptic`, where the process has imported that first."""
    folder = unpacked("mlflow_model.tar.xz", tmp_path / "model")
    (tmp_path / "image.png").write_bytes(image_file())
    code = (
        "import pathlib, sys, mlflow\n"
        f"{'' if first == 'model' else 'import panoptic'}\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model(str(folder))\n"
        "import panoptic\n"
        "its_own = pathlib.Path(panoptic.__file__).resolve().is_relative_to(folder.resolve() / 'code')\n"
        f"assert its_own == {first == 'model'}\n"
        "found = model.predict([pathlib.Path('image.png').read_bytes()])\n"
        "pathlib.Path('found.png').write_bytes(found['png'][0])\n"
        "pathlib.Path('found.json').write_text(found['segments'][0])\n"
    )
    # MLflow says in a warning when versions of libraries are not those of the model; that is not looked at here
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    segments = json.loads((tmp_path / "found.json").read_text())
    check_prediction((tmp_path / "found.png").read_bytes(), segments, expected["model"])


def check_prediction(png: bytes, segments: list[dict[str, Any]], numbers: dict[str, Any]) -> None:
    assert {entry["category"] for entry in segments} == set(numbers["categories"])
    check_rows(class_rows(classes_of(png, segments)), numbers["classes"])


def classes_of(png: bytes, segments: list[dict[str, Any]]) -> np.ndarray:
    ids = decode_ids(png)
    classes = np.full(ids.shape, -1)
    for entry in segments:
        classes[ids == entry["id"]] = CATEGORIES.ids.index(entry["category_id"])
    return classes


@pytest.mark.timeout(200)
def test_a_run_is_continued(
    expected: dict[str, Any],
    ray_cluster: None,
    mlflow_store: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From its second step to its fourth, by the command that began it and --train.steps 4.

    Its shards are prepared again, and are of the same content.
    """
    losses = continued(mlflow_store, tmp_path)
    again = [line for line in caplog.messages if f"Preparing them again from {tmp_path / 'data'}" in line]
    assert len(again) == 2 and "other content" not in caplog.text
    assert [step for step, _ in losses] == [3, 4]
    first, second = expected["run"]["next_totals"]
    assert losses[0][1] == pytest.approx(first, rel=1e-4)
    assert losses[1][1] == pytest.approx(second, rel=1e-2)  # Adam has amplified rounding by then


def continued(store: str, folder: Path) -> list[tuple[int, float]]:
    """Step and total loss of every step that was taken. The working directory is `folder`, as `mlflow_store` has it."""
    from jobs import train
    from pipelines.tracking.client import connect

    unpacked("run.tar.xz", folder)
    # the store of that time stays out of it: its schema is MLflow's affair, and it is full of absolute paths
    client = connect(store)
    experiment = client.create_experiment("panoptic", artifact_location=(folder / "artifacts").as_uri())
    run_id = client.create_run(experiment, run_name="legacy").info.run_id
    file = folder / "runs/legacy/run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "run_id": run_id}))
    for file in folder.glob("shards/*/manifest.json"):  # where the data set lay, and lies
        file.write_text(file.read_text().replace("@/data", str(folder / "data")))
    arguments = json.loads((LEGACY / "expected.json").read_text())["run"]["arguments"]
    outcome = train.main([*arguments, "--tracking.uri", store, "--train.steps", "4"])
    assert outcome.run.run_id == run_id and outcome.model.startswith("models:/")
    record = checkpoints.load(str(Path(outcome.folder) / "step_000004/checkpoint.pt"))
    assert (record["step"], record["position"], record["run_id"]) == (4, 8, run_id)
    return [(m.step, m.value) for m in client.get_metric_history(run_id, "train/loss/total")]
