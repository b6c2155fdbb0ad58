"""Runs on a local store: how they are opened, how they end, and what an outage does to both."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import urllib3
from sqlalchemy import event
from sqlalchemy.engine import create_engine
from sqlalchemy.orm import Session

from pipelines.tracking import client as client_module
from pipelines.tracking import runs
from pipelines.tracking.runs import DataSet, Run, Tracking, ending, start


@pytest.fixture
def run(mlflow_store: str, tmp_path: Path) -> Run:
    return start(Tracking(name="one"), tmp_path, params={"optim.lr": 0.1, "long": "x" * 9000})


def history(run: Run, key: str) -> list[tuple[int, float]]:
    found = client_module.connect(run.tracking_uri).get_metric_history(run.run_id, key)
    return [(metric.step, metric.value) for metric in found]


def artifacts(run: Run, folder: str = "") -> list[str]:
    return [f.path for f in client_module.connect(run.tracking_uri).list_artifacts(run.run_id, folder or None)]


def test_default_store_lies_in_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert runs.resolve_uri(Tracking(), tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert runs.resolve_uri(Tracking(), tmp_path) == "http://server:5000"
    assert runs.resolve_uri(Tracking(uri="sqlite:////x.db"), tmp_path) == "sqlite:////x.db"


def test_a_trial_was_started_by_the_command_of_its_sweep(mlflow_store, tmp_path, monkeypatch):
    """And not by the script of Ray's workers, in which it begins."""
    sweep = start(Tracking(experiment="e"), tmp_path)
    monkeypatch.setattr(sys, "argv", ["/ray/default_worker.py", "--node-ip-address=127.0.0.1"])
    trial = start(Tracking(experiment="e"), tmp_path, parent=sweep.run_id)
    client = client_module.connect(mlflow_store)
    of_sweep, of_trial = (client.get_run(run.run_id).data.tags for run in (sweep, trial))
    assert of_trial["mlflow.parentRunId"] == sweep.run_id
    for name in ("mlflow.source.name", "mlflow.source.type", "command"):
        assert of_trial[name] == of_sweep[name] and "default_worker" not in of_trial[name]


def test_start_records_params_config_and_tags(mlflow_store, tmp_path):
    run = start(
        Tracking(experiment="e"),
        tmp_path,
        params={"optim.lr": 0.1, "long": "x" * 9000},
        config={"optim": {"lr": 0.1}},
        tags={"dataset": "abc", "seed": "3"},
        data=[DataSet("photographs", "d" * 64, "s3://bucket/train", "train")],
    )
    client = client_module.connect(mlflow_store)
    data = client.get_run(run.run_id).data
    assert data.params["optim.lr"] == "0.1" and len(data.params["long"]) == 6000
    assert (data.tags["dataset"], data.tags["seed"]) == ("abc", "3") and "mlflow.parentRunId" not in data.tags
    assert data.tags["mlflow.source.name"] == sys.argv[0] and data.tags["mlflow.source.type"] == "LOCAL"
    assert shlex.split(data.tags["command"]) == sys.argv
    (used,) = client.get_run(run.run_id).inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest, used.tags[0].value) == ("photographs", "d" * 36, "train")
    assert json.loads(used.dataset.source) == {"uri": "s3://bucket/train"}
    assert artifacts(run) == ["config.json"]
    experiment = client.get_experiment(run.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"  # the page of training runs
    assert experiment.artifact_location == f"file://{tmp_path}/mlruns/e"
    assert (tmp_path / "mlruns" / "e" / run.run_id / "artifacts" / "config.json").exists()


def test_a_run_is_opened_again_with_its_params(run, tmp_path):
    runs.finish(run, "FAILED")
    again = start(Tracking(), tmp_path, params={"optim.lr": 99}, run_id=run.run_id)
    assert again == run
    found = client_module.connect(run.tracking_uri).get_run(run.run_id)
    assert found.info.status == "RUNNING" and found.data.params["optim.lr"] == "0.1"
    with pytest.raises(ConnectionError, match="does not take the run nowhere"):
        start(Tracking(), tmp_path, run_id="nowhere")


def test_an_unreachable_server_stops_the_driver_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9 does not take the run.*--tracking\.uri"):
        start(Tracking(uri="http://127.0.0.1:9"), tmp_path)


def status(run: Run) -> str:
    return client_module.connect(run.tracking_uri).get_run(run.run_id).info.status


def test_the_final_status_tells_how_the_run_ended(run):
    with ending(run):
        assert status(run) == "RUNNING"
    assert status(run) == "FINISHED"
    with pytest.raises(ValueError, match="bad"), ending(run):
        raise ValueError("bad")
    assert status(run) == "FAILED"
    with pytest.raises(KeyboardInterrupt), ending(run):
        raise KeyboardInterrupt
    assert status(run) == "KILLED"


def test_a_run_that_its_sweep_has_closed_stays_killed(run):
    with pytest.raises(ValueError, match="died"), ending(run):
        runs.finish(run, "KILLED")
        raise ValueError("its worker died")
    assert status(run) == "KILLED"


def test_a_run_is_described(run):
    runs.describe(run, "PQ 50")
    assert client_module.connect(run.tracking_uri).get_run(run.run_id).data.tags["mlflow.note.content"] == "PQ 50"
    runs.describe(Run("http://127.0.0.1:9", "x", "0"), "nobody listens")  # a warning, no error


@pytest.mark.parametrize("theirs", [signal.SIG_DFL, lambda number, frame: pytest.fail("Ray's processes are ended")])
def test_sigterm_is_a_killed_run(run, theirs):
    """Also where Ray has a handler of its own, which is in place again afterwards."""
    before = signal.signal(signal.SIGTERM, theirs)
    try:
        with pytest.raises(SystemExit) as stop, ending(run):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) is theirs
        with pytest.raises(SystemExit) as stop, ending(run):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
            except SystemExit as error:
                raise SystemExit(1) from error  # as Ray does
        assert stop.value.code == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert status(run) == "KILLED"


STARTS = """
import sys
from pipelines.tracking.runs import DataSet, Tracking, ending, start

store, root, name = sys.argv[1:]
data = [DataSet("scenes", "d" * 36, "s3://bucket/train", "train")]
for part in range(3):
    with ending(start(Tracking(uri=store, name=f"{name}{part}"), root, params={"a": 1}, config={"a": 1}, data=data)):
        pass
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_processes_that_start_at_once_on_a_new_store_all_get_their_runs(tmp_path):
    """Its tables, the experiment and the data set are each created by one of them."""
    store = f"sqlite:///{tmp_path}/new/mlflow.db"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", STARTS, store, tmp_path / "new", name], stderr=subprocess.PIPE, text=True
        )
        for name in "xyz"
    ]
    told = [process.communicate(timeout=150)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], told
    with sqlite3.connect(tmp_path / "new" / "mlflow.db") as database:
        found = database.execute("select name, status from runs order by name").fetchall()
        assert found == [(f"{name}{part}", "FINISHED") for name in "xyz" for part in range(3)]
        assert database.execute("select count(*) from datasets").fetchone() == (1,)


def test_what_another_run_creates_at_the_same_moment_is_tried_again(mlflow_store, tmp_path):
    """A data set that another process writes between MLflow's question for it and its answer."""
    from mlflow.store.tracking.dbmodels.models import SqlDataset

    file, told = client_module.sqlite_file(mlflow_store), []

    def race(session: Session, *_: object) -> None:
        ours = [entry for entry in session.new if isinstance(entry, SqlDataset)]
        if ours and not told:
            told.append("raced")
            with sqlite3.connect(file) as other:
                names = "dataset_uuid, experiment_id, name, digest, dataset_source_type, dataset_source"
                row = ("u" * 36, ours[0].experiment_id, ours[0].name, ours[0].digest, "local", "theirs")
                other.execute(f"insert into datasets ({names}) values (?, ?, ?, ?, ?, ?)", row)
            other.close()

    event.listen(Session, "before_flush", race)
    try:
        run = start(Tracking(name="one"), tmp_path, data=[DataSet("scenes", "d" * 36, "s3://bucket/train", "train")])
    finally:
        event.remove(Session, "before_flush", race)
    found = client_module.connect(mlflow_store).get_run(run.run_id)
    assert told and [entry.dataset.source for entry in found.inputs.dataset_inputs] == ["theirs"]
    assert found.info.status == "RUNNING"


@pytest.mark.parametrize(
    ("error", "raised", "status"),
    [(OSError("disk full"), ConnectionError, "FAILED"), (KeyboardInterrupt(), KeyboardInterrupt, "KILLED")],
)
def test_a_run_that_cannot_be_described_does_not_stay_open(mlflow_store, tmp_path, monkeypatch, error, raised, status):
    from mlflow import MlflowClient

    def failing(*arguments, **named):
        raise error

    monkeypatch.setattr(MlflowClient, "log_text", failing)
    with pytest.raises(raised):
        start(Tracking(name="one"), tmp_path, config={"a": 1})
    client = client_module.connect(mlflow_store)
    experiment = client.get_experiment_by_name("panoptic")
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == [status]


def test_a_refusal_of_the_store_shows_no_password(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConnectionError, match=r"tracking: http://\*\*\*@127\.0\.0\.1:9 does not take") as refused:
        start(Tracking(uri="http://me:hunter2@127.0.0.1:9"), tmp_path)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("name", ["a?b", "a%20b", "a#b", "a%b", "ä日 ;&='", "file%3Fx"])
def test_a_store_lies_in_the_folder_that_was_named(tmp_path, monkeypatch, name):
    """SQLAlchemy took what follows `?` for options and `%20` for a blank: the store lay elsewhere, or nowhere."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / name
    uri = runs.resolve_uri(Tracking(), root)
    assert client_module.sqlite_file(uri) == str(root / "mlflow.db")
    database = create_engine(uri).url.database
    assert database == str(root / "mlflow.db")


@pytest.mark.parametrize("name", ["a?b", "a%20b#c", "../../x", "e"])
def test_artifacts_stay_beside_their_store(mlflow_store, tmp_path, name):
    root = tmp_path / "a#b %3F"
    run = start(Tracking(experiment=name), root, config={"a": 1})
    client = client_module.connect(run.tracking_uri)
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["config.json"]
    assert [path.name for path in root.rglob("config.json")] == ["config.json"]


@pytest.mark.parametrize("kind", ["a folder", "no database", "below a file", "no folder can be", "below locked"])
def test_a_store_that_cannot_be_written_is_refused_at_once(tmp_path, kind):
    """MLflow tried for 100 seconds, a paragraph each time."""
    file = tmp_path / "store.db"
    if kind == "a folder":
        file.mkdir()
    elif kind == "no database":
        file.write_text("text, and more than a hundred characters of it, " * 9)
    elif kind == "below a file":
        file.write_text("")
        file = file / "store.db"
    elif kind == "below locked":  # a name is no reason
        (tmp_path / "locked").write_text("")
        file = tmp_path / "locked" / "store.db"
    else:
        file = Path("/proc/none/store.db")
    with pytest.raises(ValueError, match=r"tracking: .*no SQLite file can be written there") as refused:
        runs.check_answers(Tracking(uri=f"sqlite:///{file}"), tmp_path)
    assert "\n" not in str(refused.value)


def test_a_store_that_can_be_written_is_not_touched(tmp_path, mlflow_store):
    runs.check_answers(Tracking(uri=f"sqlite:///{tmp_path}/new/store.db"), tmp_path)
    assert not (tmp_path / "new").exists()
    before = Path(client_module.sqlite_file(mlflow_store)).read_bytes()
    runs.check_answers(Tracking(uri=mlflow_store), tmp_path)
    assert Path(client_module.sqlite_file(mlflow_store)).read_bytes() == before


def test_retries_are_told_outside_of_patience_only(caplog):
    def ask() -> list[str]:
        caplog.clear()
        with pytest.raises(urllib3.exceptions.MaxRetryError):
            urllib3.PoolManager(retries=urllib3.Retry(1)).request("GET", "http://127.0.0.1:9")
        return [entry.getMessage() for entry in caplog.records if entry.name == "urllib3.connectionpool"]

    with client_module.patience(1, 1):
        assert not ask()
    assert [line.startswith(client_module.RETRY) for line in ask()] == [True]


def test_a_store_that_another_process_writes_to_is_a_store(tmp_path, monkeypatch):
    file, connect = tmp_path / "store.db", sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda file, timeout: connect(file, timeout=0))
    with closing(connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        runs.check_answers(Tracking(uri=f"sqlite:///{file}"), tmp_path)


def test_an_experiment_that_another_process_made_meanwhile_is_used(mlflow_store, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    first = start(Tracking(experiment="e"), tmp_path)
    find, answers = MlflowClient.get_experiment_by_name, [None]
    monkeypatch.setattr(
        MlflowClient, "get_experiment_by_name", lambda self, name: answers.pop() if answers else find(self, name)
    )
    assert start(Tracking(experiment="e"), tmp_path).experiment_id == first.experiment_id and not answers


@pytest.mark.parametrize(
    ("code", "message", "attempts"),
    [
        ("BAD_REQUEST", "(psycopg2.errors.UniqueViolation)", 3),
        ("TEMPORARILY_UNAVAILABLE", "(sqlite3.OperationalError)", 3),
        ("RESOURCE_ALREADY_EXISTS", "it is there", 3),
        ("INVALID_PARAMETER_VALUE", "a duplicate already exists", 1),
        ("INTERNAL_ERROR", "the response has a deadlock", 1),
        ("", "the experiment 'database is locked' was deleted", 1),
    ],
)
def test_only_races_are_tried_again(monkeypatch, code, message, attempts):
    from mlflow.exceptions import RestException

    error = RestException({"error_code": code, "message": message}) if code else ValueError(message)
    calls = []

    def write() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise error
        return "written"

    monkeypatch.setattr(runs, "time", SimpleNamespace(sleep=lambda seconds: None))
    with pytest.raises(type(error)) if attempts == 1 else nullcontext():
        assert runs._retried(write) == "written"
    assert len(calls) == attempts


@pytest.mark.parametrize("uri", ["http://me:hunter2@127.0.0.1:9", "htp://x", "postgresql://me:hunter2@127.0.0.1:9/x"])
def test_a_store_that_is_none_is_one_line_before_any_work(tmp_path, uri, monkeypatch):
    monkeypatch.setattr(runs, "patience", lambda retries, timeout: client_module.patience(0, 1))
    with pytest.raises(ConnectionError, match=r"tracking: .* does not answer .*Start the server") as refused:
        runs.check_answers(Tracking(uri=uri), tmp_path)
    assert "hunter2" not in str(refused.value) and "\n" not in str(refused.value)


def test_no_password_is_stored_with_a_run(mlflow_store, tmp_path):
    secret = "s3://me:hunter2@bucket/x"
    run = start(Tracking(), tmp_path, params={"a": secret}, config={"a": [secret]}, tags={"a": secret})
    runs.tag(run, {"b": secret})
    stored = client_module.connect(run.tracking_uri)
    data = stored.get_run(run.run_id).data
    assert {data.params["a"], data.tags["a"], data.tags["b"]} == {"s3://***@bucket/x"}
    assert "hunter2" not in Path(stored.download_artifacts(run.run_id, "config.json")).read_text()
