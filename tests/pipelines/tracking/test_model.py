"""The stored model: no pickle, the same maps as in memory, also where the project is not installed."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import panoptic
from panoptic.backbones import Backbone
from panoptic.models import PanopticDeepLabConfig
from panoptic.png import decode_ids
from panoptic.transforms import Resize

CONFIG = PanopticDeepLabConfig(
    backbone=Backbone(name="resnet18"),
    aspp_channels=8,
    semantic_projections=(8, 8, 8),
    instance_projections=(8, 8, 8),
    semantic_channels=8,
    instance_channels=8,
    semantic_head_channels=8,
    instance_head_channels=8,
    stuff_area=0,
)
RESIZE = Resize(short=48, longest=64)


def jpeg(height: int, width: int) -> bytes:
    pixels = np.random.default_rng(height).integers(0, 255, (height, width, 3)).astype(np.uint8)
    return cv2.imencode(".jpg", cv2.resize(pixels[::8, ::8], (width, height)))[1].tobytes()


@pytest.fixture(scope="module")
def checkpoint(small_categories) -> dict:
    import io

    from panoptic.training import checkpoint as checkpoints

    torch.manual_seed(0)
    model = CONFIG.build(small_categories)
    # an untrained model predicts nothing: let the two stuff classes win, and one centre be found
    last = [m for m in model.semantic_head.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    torch.nn.init.normal_(last.weight, std=100)
    torch.nn.init.normal_(last.bias, std=0.1)
    file = io.BytesIO()
    checkpoints.save(file, config=CONFIG, model=model, experiment={"optim.lr": 0.5})
    file.seek(0)
    return checkpoints.load(file)


def test_logged_registered_loaded_and_predicting(mlflow_store, tmp_path, checkpoint, small_categories, monkeypatch):
    import mlflow
    import pandas as pd

    from pipelines.tracking import model as mlflow_model
    from pipelines.tracking.runs import Tracking, start

    monkeypatch.setattr(sys, "path", list(sys.path))  # MLflow puts the stored code in front
    run = start(Tracking(), tmp_path)
    before = dict(os.environ)
    uri = mlflow_model.log_model(run, checkpoint, RESIZE, register="tiny", alias="champion", description="PQ **1**")
    assert dict(os.environ) == before and mlflow.active_run() is None
    assert uri.startswith("models:/m-")
    logged = mlflow.MlflowClient().get_logged_model(uri.removeprefix("models:/"))
    assert logged.tags["mlflow.note.content"] == "PQ **1**"

    for source in (uri, "models:/tiny@champion", "models:/tiny/1", f"runs:/{run.run_id}/model"):
        packaged = mlflow_model.load_packaged(source)
        assert packaged.resize == RESIZE and packaged.model.categories == small_categories
        assert packaged.experiment == {"optim.lr": 0.5}
        state = packaged.model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in checkpoint["weights"].items())
        assert not packaged.model.training
    with pytest.raises(ValueError, match="models:/nothing@champion: not found"):
        mlflow_model.load_packaged("models:/nothing@champion")
    with monkeypatch.context() as patch:  # the code beside it would be hundreds of requests of every actor
        patch.setattr(
            mlflow_model,
            "read_package",
            lambda paths: sorted(p.name for p in paths["config"].parent.parent.rglob("*.*")),
        )
        assert mlflow_model.load_packaged("models:/tiny/1") == sorted(mlflow_model.FILES.values())

    # before it is loaded: Python keeps byte code beside the stored code that it runs
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(tmp_path / "copy")))
    names = [path.name for path in folder.rglob("*") if path.is_file()]
    assert {"weights.safetensors", "config.json", "categories.json", "model.py"} <= set(names)
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pth", ".pt", ".pyc"))]

    loaded = mlflow.pyfunc.load_model("models:/tiny@champion")
    images = [jpeg(60, 80), jpeg(50, 40)]
    frame = loaded.predict(pd.DataFrame({"image": images}))
    assert list(frame.columns) == ["png", "segments"]
    for data, png, text, size in zip(images, frame["png"], frame["segments"], ((60, 80), (50, 40)), strict=True):
        ids, segments = decode_ids(png), json.loads(text)
        assert ids.shape == size
        assert {entry["id"] for entry in segments} == set(np.unique(ids).tolist()) - {0} != set()
        for entry in segments:
            index = small_categories.ids.index(entry["category_id"])
            assert entry["category"] == small_categories.names[index]
            assert entry["isthing"] == small_categories.is_thing[index]
            assert entry["area"] == (ids == entry["id"]).sum()
        assert mlflow_model.predict_image(packaged, data)[0] == png
        assert panoptic.load("models:/tiny@champion", device="cpu")(data).to_coco("image")[0] == png
    assert loaded.predict(images).equals(frame)
    assert loaded.predict([{"image": data} for data in images]).equals(frame)

    requirements = (folder / "requirements.txt").read_text().split()
    assert any(line.startswith("torch==") for line in requirements) and all("+" not in line for line in requirements)


@pytest.mark.slow  # MLflow's server, which imports torch and MLflow
@pytest.mark.timeout(300)
def test_is_served_where_the_project_is_not_installed(mlflow_store, tmp_path, checkpoint):
    """By `mlflow models serve`, in processes that find no `pipelines` and no `panoptic` but the stored one."""
    import mlflow

    from pipelines.tracking import model as mlflow_model
    from pipelines.tracking.runs import Tracking, start

    uri = mlflow_model.log_model(start(Tracking(), tmp_path), checkpoint, RESIZE)
    folder = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(tmp_path / "copy"))
    images = [jpeg(60, 80), jpeg(50, 40)]
    expected = [mlflow_model.predict_image(mlflow_model.load_packaged(uri), image)[0] for image in images]
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util, pathlib, sys\n"
        "sys.path = [p for p in sys.path if not (pathlib.Path(p or '.') / 'pipelines').is_dir()]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        "assert importlib.util.find_spec('panoptic') is None and importlib.util.find_spec('pipelines') is None\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [sys.executable, "-m", "mlflow", "models", "serve", "-m", folder, "-p", str(port), "--env-manager", "local"]
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # MLflow calls uvicorn by name
    environment = {**os.environ, "PYTHONPATH": str(hidden), "PATH": programs}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(serve, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        connection = wait_for(port, server, tmp_path / "log")
        text = [base64.b64encode(image).decode() for image in images]
        for body in bodies(text):
            status, answer = post(connection, body)
            assert status == 200, answer
            assert [base64.b64decode(row["png"]) for row in answer["predictions"]] == expected
        status, answer = post(connection, {"inputs": ["bm8gaW1hZ2U="]})
        assert status == 400 and answer["message"].startswith("image 0: ") and "\n" not in answer["message"]
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)


def bodies(text: list[str]) -> list[dict]:
    """The forms of a body that MLflow's server takes."""
    return [
        {"inputs": text},
        {"instances": text},
        {"instances": [{"image": one} for one in text]},
        {"dataframe_split": {"columns": ["image"], "data": [[one] for one in text]}},
        {"dataframe_records": [{"image": one} for one in text]},
    ]


def wait_for(port: int, server: subprocess.Popen, log: Path) -> http.client.HTTPConnection:
    """A connection to a server that has begun to answer."""
    for _ in range(1200):
        assert server.poll() is None, log.read_text()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request("GET", "/ping")
            connection.getresponse().read()
            return connection
        except ConnectionError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def post(connection: http.client.HTTPConnection, body: dict) -> tuple[int, dict]:
    connection.request("POST", "/invocations", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_every_form_of_a_request(mlflow_store, tmp_path, checkpoint):
    """As MLflow's server reads them, without the server."""
    import mlflow
    from mlflow.pyfunc.scoring_server import invocations

    from pipelines.tracking import model as mlflow_model
    from pipelines.tracking.runs import Tracking, start

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))  # MLflow puts the stored code in front
        uri = mlflow_model.log_model(start(Tracking(), tmp_path), checkpoint, RESIZE)
        model = mlflow.pyfunc.load_model(uri)
        schema = model.metadata.get_input_schema()
        images = [jpeg(60, 80), jpeg(50, 40), jpeg(60, 80)]
        packaged = mlflow_model.load_packaged(uri)
        expected = [mlflow_model.predict_image(packaged, image)[0] for image in images]

        def ask(body: dict) -> list[dict]:
            answer = invocations(json.dumps(body), "application/json", model, schema)
            assert answer.status == 200
            return json.loads(answer.response)["predictions"]

        text = [base64.b64encode(image).decode() for image in images]
        for body in bodies(text):
            assert [base64.b64decode(row["png"]) for row in ask(body)] == expected, list(body)
        for bad in ("bm8gaW1hZ2U=", "no base64!", "abc"):
            good, failed = ask({"inputs": [text[0], bad]})
            assert base64.b64decode(good["png"]) == expected[0] and failed["png"] == ""
            assert json.loads(failed["segments"])["error"].startswith("image 1: ")
            with pytest.raises(mlflow.MlflowException) as refused:
                ask({"inputs": [bad]})
            assert refused.value.get_http_status_code() == 400
            told = json.loads(refused.value.serialize_as_json())["message"]
            assert told.startswith("image 0: ") and "\n" not in told and len(told) < 300


def test_averaged_weights_are_the_ones_stored(tmp_path, checkpoint):
    from pipelines.tracking.model import read_package, write_package

    average = {key: torch.zeros_like(value) for key, value in checkpoint["weights"].items()}
    packaged = read_package(write_package(tmp_path, {**checkpoint, "ema": average}, RESIZE))
    assert packaged.class_map is None
    mapped = {**checkpoint, "class_map": {"classes": [], "sha256": "x"}}
    (tmp_path / "mapped").mkdir()
    assert read_package(write_package(tmp_path / "mapped", mapped, RESIZE)).class_map == mapped["class_map"]
    assert all(not value.any() for value in packaged.model.state_dict().values())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"format": 2}))
    with pytest.raises(ValueError, match=r"config\.json: format 2"):
        read_package({name: tmp_path / file for name, file in (("config", "config.json"),)})


def test_bytes_that_are_no_image_are_named(tmp_path, checkpoint):
    from pipelines.tracking.model import predict_image, read_package, write_package

    packaged = read_package(write_package(tmp_path, checkpoint, RESIZE))
    with pytest.raises(ValueError, match="image 7"):
        predict_image(packaged, b"nothing", "image 7")


def test_one_bad_image_does_not_fail_its_batch(tmp_path, checkpoint):
    import pandas as pd

    from panoptic.png import encode_image
    from pipelines.tracking.model import PanopticPredictor, read_package, write_package

    predictor = PanopticPredictor()
    predictor.packaged = read_package(write_package(tmp_path, checkpoint, RESIZE))
    good = encode_image(np.zeros((40, 50, 3), np.uint8))
    answer = predictor.predict(None, pd.DataFrame({"image": [good, b"nothing", good]}))
    assert [bool(png) for png in answer["png"]] == [True, False, True]
    assert json.loads(answer["segments"][1]).keys() == {"error"} and "image 1: " in answer["segments"][1]
    with pytest.raises(ValueError, match="image 0: "):
        predictor.predict(None, pd.DataFrame({"image": [b"nothing"]}))


@pytest.mark.parametrize(
    ("file", "data", "words"),
    [
        ("config.json", b"", r"config\.json: empty, cut short or no JSON"),
        ("config.json", b"[]", r"config\.json: format None"),
        ("config.json", b'{"format": 1, "model": []}', r"config\.json: has no model, resize, experiment"),
        ("categories.json", b"{", r"categories\.json: empty, cut short or no JSON"),
        ("categories.json", b"[1]", r"categories\.json: categories\[0\] is no COCO category"),
        ("weights.safetensors", b"", r"weights\.safetensors: cut short or no safetensors file"),
    ],
)
def test_files_of_a_stored_model_that_are_none_are_named(file, data, words, tmp_path, checkpoint):
    from pipelines.tracking.model import read_package, write_package

    paths = write_package(tmp_path, checkpoint, RESIZE)
    (tmp_path / file).write_bytes(data)
    with pytest.raises(ValueError, match=words):
        read_package(paths)
    nan = {
        key: value + float("nan") if value.is_floating_point() else value
        for key, value in checkpoint["weights"].items()
    }
    paths = write_package(tmp_path, {**checkpoint, "weights": nan}, RESIZE)
    with pytest.raises(ValueError, match=r"weights\.safetensors: .* weights are not finite"):
        read_package(paths)
