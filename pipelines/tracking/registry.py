"""Questions of scheduled evaluations to MLflow: versions behind aliases, runs of evaluations, moved aliases.

Everything here goes by an explicit tracking URI; MLflow's globals stay as they are. A store that is away or errs is a
ConnectionError of one line, never the answer "there is none".
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.cluster.masking import masked
from pipelines.tracking.client import connect, first_line, patience
from pipelines.tracking.runs import Run

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY = "evaluation_key"
"""Tag of the runs of evaluations."""

ASKED = "evaluation_asked"
"""Tag with the key that is known before the model was loaded."""

ALIAS = re.compile(r"models:/([^/@]+)@([^/@]+)")
"""models:/name@alias."""

VERSION = re.compile(r"models:/([^/@]+)/0*(\d+)")
"""models:/name/3."""


class Absent(ValueError):
    """The store answers that it has no such thing."""


@contextmanager
def _asking(tracking_uri: str, retries: int = 2, seconds: int = 30) -> Iterator[MlflowClient]:
    """A client of the store.

    Raises:
        Absent: the store has no such thing.
        ConnectionError: the store did not answer, or with another error.
    """
    try:
        with patience(retries, seconds):
            yield connect(tracking_uri)
    except Exception as error:  # MLflow's stores raise what they like
        line = first_line(error)
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            raise Absent(masked(line)) from error
        raise ConnectionError(masked(f"MLflow at {tracking_uri} does not do what it is asked for: {line}")) from error


def pin(uri: str, tracking_uri: str) -> str:
    """The URI that means the same model for ever, models:/name/3 or models:/m-…; URIs outside MLflow stay as they are.

    Raises:
        ValueError: there is no such model, or the URI names something that may change.
        ConnectionError: the store does not answer.
    """
    if not uri.startswith(("models:/", "runs:/")):
        return uri
    if version := VERSION.fullmatch(uri):
        return f"models:/{version[1]}/{version[2]}"
    if re.fullmatch(r"models:/m-\w+", uri):
        return uri
    if ALIAS.fullmatch(uri):
        fixed = aliased(uri, tracking_uri)
    elif latest := re.fullmatch(r"models:/([^/@]+)/latest", uri, re.IGNORECASE):
        fixed = _latest(latest[1], tracking_uri)
    elif logged := re.fullmatch(r"runs:/(\w+)/([^/']+)", uri):
        fixed = _logged(logged[1], logged[2], tracking_uri)
    else:
        raise ValueError(
            f"{uri}: names no version; give models:/name/3, models:/name@alias, models:/name/latest, models:/m-… or "
            "runs:/id/model (MLflow has no stages any more)"
        )
    if fixed is None:
        raise ValueError(f"{uri}: not found in {masked(tracking_uri)}")
    return fixed


def aliased(uri: str, tracking_uri: str) -> str | None:
    """The version behind `models:/name@alias`, as models:/name/3; None where there is no such model or alias.

    The model is asked for: where an alias alone is missing, the kinds of stores give different errors.
    """
    parts = ALIAS.fullmatch(uri)
    assert parts is not None
    name, alias = parts.groups()
    try:
        with _asking(tracking_uri) as client:
            version = client.get_registered_model(name).aliases.get(alias)
    except Absent:
        return None
    return None if version is None else f"models:/{name}/{version}"


def _latest(name: str, tracking_uri: str) -> str | None:
    """The version of a registered model with the highest number; None where there is none."""
    with _asking(tracking_uri) as client:
        versions = client.search_model_versions(f"name='{name}'", max_results=1, order_by=["version_number DESC"])
    return f"models:/{name}/{versions[0].version}" if versions else None


def _logged(run_id: str, name: str, tracking_uri: str) -> str | None:
    """The last complete model of this name that a run logged; a continued run logs another."""
    try:
        with _asking(tracking_uri) as client:
            models = client.search_logged_models(
                [client.get_run(run_id).info.experiment_id],
                filter_string=f"source_run_id = '{run_id}' AND name = '{name}'",
                order_by=[{"field_name": "creation_timestamp", "ascending": False}],
            )
    except Absent:
        return None
    complete = [model.model_id for model in models if str(model.status) == "READY"]
    return f"models:/{complete[0]}" if complete else None


def movable(alias_uri: str, version_uri: str) -> tuple[str, str, str]:
    """Name, alias and version where `models:/name@alias` can mean `models:/name/3`.

    Raises:
        ValueError: they are not of this form, or of different names.
    """
    alias, version = ALIAS.fullmatch(alias_uri), VERSION.fullmatch(version_uri)
    if not alias or not version or alias[1] != version[1]:
        raise ValueError(
            f"{alias_uri} cannot be moved to {version_uri}: both must be versions of one registered model; "
            "give the model as models:/name/version or models:/name@challenger"
        )
    return alias[1], alias[2], version[2]


def move_alias(alias_uri: str, version_uri: str, tracking_uri: str) -> None:
    """Let `models:/name@alias` mean `models:/name/3`.

    Raises:
        ValueError: as `movable`.
    """
    name, alias, version = movable(alias_uri, version_uri)
    with _asking(tracking_uri) as client:
        client.set_registered_model_alias(name, alias, version)


def find_evaluation(tag: str, key: str, experiment: str, tracking_uri: str) -> Run | None:
    """The finished run of an evaluation that has this key in this tag."""
    with _asking(tracking_uri) as client:
        entry = client.get_experiment_by_name(experiment)
        if entry is None:
            return None
        query = f"tags.{tag} = '{key}' and attributes.status = 'FINISHED'"
        runs = client.search_runs([entry.experiment_id], query, max_results=1)
    return Run(tracking_uri, runs[0].info.run_id, entry.experiment_id) if runs else None


def read_tag(run: Run, name: str) -> str:
    """A tag of a run; "" where it has none."""
    with _asking(run.tracking_uri) as client:
        return client.get_run(run.run_id).data.tags.get(name, "")


def set_tag(run: Run, name: str, value: str) -> None:
    """Set a tag of a run, at once.

    Raises:
        ConnectionError: the store does not take it. A `Tracker` would go on; a verdict that is not noted would be
            given again.
    """
    with _asking(run.tracking_uri) as client:
        client.set_tag(run.run_id, name, value)


def metrics_of(run: Run) -> Mapping[str, float]:
    """The metrics that a run holds."""
    with _asking(run.tracking_uri) as client:
        return client.get_run(run.run_id).data.metrics


def read_artifact(run: Run, path: str) -> bytes:
    """The content of an artifact.

    Raises:
        ValueError: the run has none of this name.
    """
    client: MlflowClient = connect(run.tracking_uri)
    with patience(2, 60), tempfile.TemporaryDirectory() as folder:
        try:
            return Path(client.download_artifacts(run.run_id, path, folder)).read_bytes()
        except Exception as error:  # MLflow's stores raise what they like
            raise ValueError(masked(f"run {run.run_id} has no artifact {path} ({error})")) from error


def log_artifact(run: Run, path: str, data: bytes) -> None:
    """Keep a file with a run, at once.

    Raises:
        ConnectionError: the store does not take it. A `Tracker` would go on; an evaluation without its report is
            none.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(path).name
        file.write_bytes(data)
        place = Path(path).parent.as_posix()
        with _asking(run.tracking_uri, 3, 300) as client:
            client.log_artifact(run.run_id, str(file), None if place == "." else place)
