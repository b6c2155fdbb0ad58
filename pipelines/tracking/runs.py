"""Runs in MLflow: opened by the driver, written by one worker, by explicit run id.

The driver creates database, experiment and run (several processes that open a fresh SQLite store at
once crash) and hands `Run`, three strings, to the workers; rank 0 makes a `Tracker` of it. Nothing
uses MLflow's global "active run", so a sweep's trials and a test's runs never meet.

A tracking server that is away stops a run only when it is opened. Everything written later catches its failure:
the `Tracker` keeps what was not delivered, and what this module writes (status, description, tags of another
process's run) has few seconds and leaves a warning.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from panoptic.metrics.text import metric_name
from pipelines.cluster import session, storage
from pipelines.cluster.file_names import safe_name
from pipelines.cluster.masking import masked, masked_values
from pipelines.tracking.config import Tracking
from pipelines.tracking.provenance import code_version, origin

if TYPE_CHECKING:
    from mlflow import MlflowClient
from pipelines.tracking.client import (
    LAST_WORDS,
    Refused,
    attempt,
    connect,
    first_line,
    logger,
    patience,
    sqlite_file,
    sqlite_uri,
)

Result = TypeVar("Result")

PARAMS_CHUNK = 100
"""Parameters in one request: MLflow's limit."""

PARAM_LENGTH = 6000
"""Characters of a parameter: MLflow's limit; a longer one is cut."""

TAG_LENGTH = 8000
"""Characters of a tag: MLflow's limit; a longer one is cut."""

KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Tells MLflow's UI to open the experiment as training runs instead of as traces of language models."""

STARTED_BY = ("mlflow.source.name", "mlflow.source.type", "command")
"""Tags that say what started a run, of `pipelines.tracking.provenance.origin`."""

DIGEST_LENGTH = 36
"""Characters of a data set's digest: MLflow's limit."""

CONTEXT = "mlflow.data.context"
"""MLflow's tag of the use that a run makes of a data set."""

REMEDY = "Start the server, correct --tracking.uri, or unset MLFLOW_TRACKING_URI for a local store"
"""Ends the message about a store that does not answer."""

SERVER = "give --tracking.uri http://HOST:5000, or export MLFLOW_TRACKING_URI"
"""Ends the message about work for which a store must be named."""

NAME_TAG = "mlflow.runName"
"""Tag by which a run is called in MLflow's lists."""


@dataclass(frozen=True)
class DataSet:
    """A prepared split, as a run's page lists it."""

    name: str
    """Name of the data set."""
    digest: str
    """Hash of its manifest."""
    source: str
    """URI of its shards."""
    context: str
    """Use that the run makes of it: train, val or eval."""


@dataclass(frozen=True)
class Run:
    """A run of the tracking server, as the workers receive it."""

    tracking_uri: str
    """Store in which it is recorded."""
    run_id: str
    """Id of the run in the store."""
    experiment_id: str
    """Id of the experiment that it belongs to."""


def resolve_uri(tracking: Tracking, root: str | Path) -> str:
    """The tracking URI: the configured one, MLFLOW_TRACKING_URI, or the SQLite store in `root` (a local folder)."""
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri:
        return uri
    return sqlite_uri(str(Path(root).resolve() / "mlflow.db"))


def check_store(tracking: Tracking, root: str | Path, place: storage.Uri = "") -> None:
    """Refuse a SQLite store in a place that vanishes, and one that nobody chose where other machines write to it.

    Args:
        tracking: its configuration.
        root: local folder of the default store.
        place: where the work's other results go, local or on S3.

    Raises:
        ValueError: it lies in Ray's temporary copy of the code of a submitted job; or results go to S3 or a cluster
            works (RAY_ADDRESS) and no store was named.
    """
    uri = resolve_uri(tracking, root)
    file, chosen = sqlite_file(uri), tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if file and not chosen and (os.environ.get("RAY_ADDRESS") or "://" in storage.absolute(place or root)):
        why = "a cluster works (RAY_ADDRESS)" if os.environ.get("RAY_ADDRESS") else f"results go to {masked(place)}"
        raise ValueError(f"--tracking.uri: missing, though {why}, where a file of this machine does not do: {SERVER}")
    if file:
        storage.check_lasting(file, "--tracking.uri")


def check_answers(tracking: Tracking, root: str | Path) -> None:
    """Ask a store for something, before any work: it must be there, and a file must be one that can be written.

    Raises:
        ConnectionError: it does not answer.
        ValueError: the file or its folder is none for a store.
    """
    uri = resolve_uri(tracking, root)
    if file := sqlite_file(uri):
        _check_file(Path(file))
        return
    try:
        with patience(1, 30):
            connect(uri).search_experiments(max_results=1)
    except Exception as error:  # whatever MLflow, requests or SQLAlchemy raise
        raise ConnectionError(f"tracking: {masked(uri)} does not answer ({first_line(error)}). {REMEDY}") from error


def _check_file(file: Path) -> None:
    """Refuse a file that SQLite cannot write; MLflow would try for minutes."""
    lacking = [folder for folder in file.parents if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        there = file.exists()
        with closing(sqlite3.connect(file, timeout=5)) as database:
            database.execute("BEGIN IMMEDIATE")
        if not there and not file.stat().st_size:  # it was only tried
            file.unlink()
            for folder in lacking:
                folder.rmdir()
    except (OSError, sqlite3.Error) as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:  # another process is writing
            return
        raise ValueError(
            f"tracking: {file}: no SQLite file can be written there ({error}). Give another --storage, or another "
            "--tracking.uri; check MLFLOW_TRACKING_URI"
        ) from error


def start(
    tracking: Tracking,
    root: str | Path,
    *,
    params: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    data: Sequence[DataSet] = (),
    parent: str = "",
    run_id: str = "",
) -> Run:
    """Open a run, or `run_id` again. Called once, in the driver.

    Args:
        root: local folder of the default store; artifacts go to `mlruns` in it.
        params: flat; immutable, so a run that is opened again keeps the ones it has.
        config: the whole configuration, kept as the artifact `config.json`.
        tags: dataset hash, seed and the like; code version and commit are added.
        data: the splits that it uses.
        parent: run id of the sweep that this run belongs to.

    Raises:
        ConnectionError: the store cannot be reached or lacks `run_id`. This is the one moment at which
            an unreachable server stops a run, before any time is spent.
    """
    uri = resolve_uri(tracking, root)
    if file := sqlite_file(uri):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    params, config, tags = masked_values(params), masked_values(config), masked_values(tags)
    labels = {**code_version(), **origin(), **(tags or {})}
    try:
        with patience(2, 30):
            client = connect(uri)
            if run_id:
                client.update_run(run_id, status="RUNNING")
                return Run(uri, run_id, client.get_run(run_id).info.experiment_id)
            experiment = _retried(lambda: _experiment(client, tracking.experiment, uri, root))
            if parent:
                labels |= _of_sweep(client, parent)
            labels = {key: str(value)[:TAG_LENGTH] for key, value in labels.items()}
            run = client.create_run(experiment, run_name=tracking.name or None, tags=labels)
            with _failing(client, run.info.run_id):
                _log_params(client, run.info.run_id, params or {})
                _retried(lambda: _log_data(client, run.info.run_id, data))
                if config is not None:
                    client.log_text(run.info.run_id, json.dumps(config, indent=2), "config.json")
    except Exception as error:
        raise ConnectionError(
            f"tracking: {masked(uri)} does not take the run{f' {run_id}' if run_id else ''} ({first_line(error)}). "
            f"{REMEDY}"
        ) from error
    return Run(uri, run.info.run_id, experiment)


def _of_sweep(client: MlflowClient, parent: str) -> dict[str, str]:
    """Tags of a trial's run: the sweep's run, and the program and command that started that one.

    The trial itself begins in a process of Ray, whose command is nobody's.
    """
    tags = client.get_run(parent).data.tags
    return {"mlflow.parentRunId": parent, **{name: tags[name] for name in STARTED_BY if name in tags}}


@contextmanager
def _failing(client: MlflowClient, run_id: str) -> Iterator[None]:
    """A run that could not be described as it should does not stay RUNNING for ever."""
    try:
        yield
    except BaseException as error:
        client.set_terminated(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise


RACES = ("RESOURCE_ALREADY_EXISTS", "BAD_REQUEST", "TEMPORARILY_UNAVAILABLE")
"""MLflow's codes where another process was faster with the same entry, which then is there now.

An experiment has the first. Of data sets MLflow passes on what the database said: a violated constraint is a
BAD_REQUEST, a lock or a deadlock makes it TEMPORARILY_UNAVAILABLE.
"""


def _retried(write: Callable[[], Result], attempts: int = 5) -> Result:
    """Read or write what several runs may create at once, such as an experiment or a data set of the same name."""
    from mlflow.exceptions import MlflowException

    for number in range(1, attempts):
        try:
            return write()
        except MlflowException as error:  # which wraps the errors of each kind of store
            if error.error_code not in RACES:
                raise
            time.sleep(random.uniform(0.1, 0.5) * number)
    return write()


@contextmanager
def ending(run: Run) -> Iterator[None]:
    """Give the run its final status: FINISHED, FAILED after an exception, KILLED after Ctrl-C or SIGTERM."""
    with session.sigterm_raises():
        try:
            yield
        except (KeyboardInterrupt, SystemExit) as stop:
            asked = isinstance(stop, SystemExit) and stop.code in (0, None)
            finish(run, "FINISHED" if asked else "KILLED")
            raise
        except BaseException:
            _fail(run)
            raise
        finish(run, "FINISHED")


def _fail(run: Run) -> None:
    """Set FAILED, but not over KILLED: an interrupted sweep closes the runs of trials whose workers it has ended."""

    def write(client: MlflowClient) -> None:
        if client.get_run(run.run_id).info.status != "KILLED":
            client.set_terminated(run.run_id, "FAILED")

    _write(run, "set to FAILED", write)


def finish(run: Run, status: str) -> None:
    """Set the final status (FINISHED, FAILED, KILLED); a store that is away is a warning."""
    _write(run, f"set to {status}", lambda client: client.set_terminated(run.run_id, status))


def describe(run: Run, text: str) -> bool:
    """Set the description (Markdown) that a run's page opens with; False and a warning where the store is away."""
    return _write(run, "described", lambda client: client.set_tag(run.run_id, "mlflow.note.content", text[:TAG_LENGTH]))


def tag(run: Run, values: Mapping[str, str]) -> None:
    """Set tags of a run that another process writes, at once; a store that is away is a warning."""
    from mlflow.entities import RunTag

    tags = [RunTag(key, masked(value)[:TAG_LENGTH]) for key, value in values.items()]
    _write(run, f"tagged with {', '.join(values)}", lambda client: client.log_batch(run.run_id, tags=tags))


def _write(run: Run, what: str, write: Callable[[MlflowClient], object]) -> bool:
    """One request with few seconds, none where the store failed a moment ago."""
    try:
        done = attempt(run.tracking_uri, lambda: write(connect(run.tracking_uri)), LAST_WORDS)
    except Refused as error:
        logger.warning("tracking: the run %s could not be %s (%s)", run.run_id, what, error)
        return False
    if not done:
        logger.warning("tracking: the run %s could not be %s: MLflow does not answer", run.run_id, what)
    return done


def _experiment(client: MlflowClient, name: str, uri: str, root: str | Path) -> str:
    """The id of the experiment, created on first use; a local store keeps its artifacts beside itself."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        if experiment.lifecycle_stage == "deleted":
            raise ValueError(f"the experiment {name!r} was deleted; restore it or set another --tracking.experiment")
        return experiment.experiment_id
    where = (Path(root).resolve() / "mlruns" / safe_name(name)).as_uri() if uri.startswith("sqlite:") else None
    return client.create_experiment(name, artifact_location=where, tags=KIND)


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    entries = [Param(metric_name(key), str(value)[:PARAM_LENGTH]) for key, value in params.items()]
    for start in range(0, len(entries), PARAMS_CHUNK):
        client.log_batch(run_id, params=entries[start : start + PARAMS_CHUNK])


def _log_data(client: MlflowClient, run_id: str, data: Sequence[DataSet]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            Dataset(entry.name, entry.digest[:DIGEST_LENGTH], "local", json.dumps({"uri": masked(entry.source)})),
            [InputTag(CONTEXT, entry.context)],
        )
        for entry in data
    ]
    if inputs:
        client.log_inputs(run_id, datasets=inputs)
