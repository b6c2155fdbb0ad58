"""Questions to MLflow: URIs that mean one version for ever, and a store that does not answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from pipelines.tracking import registry
from pipelines.tracking.client import connect


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that has no model "gone" and errs for any other."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            gone = "name=gone" in self.path
            body = b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "gone"}' if gone else b"no database"
            self.send_response(404 if gone else 500)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Silent."""

    monkeypatch.setattr(registry, "patience", lambda *_: nullcontext())
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_store_that_errs_is_not_one_without_a_champion(broken: str) -> None:
    assert registry.aliased("models:/gone@champion", broken) is None
    for store in (broken, "http://127.0.0.1:9"):
        for call in (registry.aliased, registry.pin):
            with pytest.raises(ConnectionError, match=f"^MLflow at {store} does not do what it is asked for"):
                call("models:/street@champion", store)
        with pytest.raises(ConnectionError):
            registry.find_evaluation(registry.KEY, "key", "evaluation", store)


def test_a_missing_alias_or_model(mlflow_store: str) -> None:
    client = connect(mlflow_store)
    client.create_registered_model("street")
    client.create_model_version("street", source="nowhere")
    assert registry.aliased("models:/street@champion", mlflow_store) is None
    assert registry.aliased("models:/road@champion", mlflow_store) is None
    client.set_registered_model_alias("street", "champion", "1")
    assert registry.aliased("models:/street@champion", mlflow_store) == "models:/street/1"
    with pytest.raises(ValueError, match="models:/street@best: not found"):
        registry.pin("models:/street@best", mlflow_store)


def test_uris_become_versions(mlflow_store: str) -> None:
    client = connect(mlflow_store)
    client.create_registered_model("street")
    for _ in range(11):
        client.create_model_version("street", source="nowhere")
    for uri in ("models:/street/latest", "models:/street/Latest"):
        assert registry.pin(uri, mlflow_store) == "models:/street/11"  # by number: 9 is not the last
    client.create_model_version("street", source="nowhere")
    assert registry.pin("models:/street/latest", mlflow_store) == "models:/street/12"
    assert registry.pin("models:/street/003", mlflow_store) == "models:/street/3"
    for same in ("models:/m-0123abc", "/runs/a/step_1/checkpoint.pt"):
        assert registry.pin(same, mlflow_store) == same
    for uri in ("models:/street/Production", "models:/street", "runs:/0123"):
        with pytest.raises(ValueError, match="names no version"):
            registry.pin(uri, mlflow_store)
    with pytest.raises(ValueError, match="not found"):
        registry.pin("models:/road/latest", mlflow_store)


def test_the_model_of_a_run_is_the_last_whole_one(mlflow_store: str) -> None:
    client = connect(mlflow_store)
    experiment = client.create_experiment("x")
    run = client.create_run(experiment).info.run_id
    made = [client.create_logged_model(experiment, name="model", source_run_id=run).model_id for _ in range(2)]
    for uri in (f"runs:/{run}/model", "runs:/0123/model"):
        with pytest.raises(ValueError, match="not found"):  # not yet whole, no such run
            registry.pin(uri, mlflow_store)
    for model in made:
        client.finalize_logged_model(model, "READY")
        assert registry.pin(f"runs:/{run}/model", mlflow_store) == f"models:/{model}"
