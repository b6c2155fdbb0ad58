"""What scheduled evaluations ask of MLflow: versions behind aliases, runs of evaluations, moved aliases.

Everything here goes by an explicit tracking URI; MLflow's globals stay as they are.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.tracking import Run, connect, patience

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY = "evaluation_key"
"""Tag of the runs of evaluations."""

ALIAS = re.compile(r"models:/([^/@]+)@([^/@]+)")


def pin(uri: str, tracking_uri: str) -> str:
    """`models:/name@alias` as `models:/name/3`; other URIs of models as they are.

    Raises:
        ValueError: there is no such alias.
    """
    found = ALIAS.fullmatch(uri)
    if not found:
        return uri
    from mlflow.exceptions import MlflowException

    try:
        with patience(2, 30):
            version = connect(tracking_uri).get_model_version_by_alias(*found.groups())
    except MlflowException as error:
        raise ValueError(f"{uri}: not found in {tracking_uri} ({error})") from error
    return f"models:/{found[1]}/{version.version}"


def has_alias(uri: str, tracking_uri: str) -> bool:
    """Whether `models:/name@alias` means a version."""
    try:
        return pin(uri, tracking_uri) != uri
    except ValueError:
        return False


def move_alias(alias_uri: str, version_uri: str, tracking_uri: str) -> None:
    """Let `models:/name@alias` mean `models:/name/3`.

    Raises:
        ValueError: they are not of this form, or of different names.
    """
    alias, version = ALIAS.fullmatch(alias_uri), re.fullmatch(r"models:/([^/@]+)/(\d+)", version_uri)
    if not alias or not version or alias[1] != version[1]:
        raise ValueError(
            f"{alias_uri} cannot be moved to {version_uri}: both must be versions of one registered model; "
            "give the model as models:/name/version or models:/name@challenger"
        )
    with patience(2, 30):
        connect(tracking_uri).set_registered_model_alias(alias[1], alias[2], version[2])


def find_evaluation(key: str, experiment: str, tracking_uri: str) -> Run | None:
    """The finished run of an evaluation."""
    with patience(2, 30):
        client = connect(tracking_uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return None
        wanted = f"tags.{KEY} = '{key}' and attributes.status = 'FINISHED'"
        runs = client.search_runs([found.experiment_id], wanted, max_results=1)
    return Run(tracking_uri, runs[0].info.run_id, found.experiment_id) if runs else None


def metrics_of(run: Run) -> Mapping[str, float]:
    """The metrics that a run holds."""
    with patience(2, 30):
        return connect(run.tracking_uri).get_run(run.run_id).data.metrics


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
            raise ValueError(f"run {run.run_id} has no artifact {path} ({error})") from error


def log_artifact(run: Run, path: str, data: bytes) -> None:
    """Keep a file with a run. Fails where a `Tracker` would go on: an evaluation without its report is none."""
    with patience(3, 300), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(path).name
        file.write_bytes(data)
        folder = Path(path).parent.as_posix()
        connect(run.tracking_uri).log_artifact(run.run_id, str(file), None if folder == "." else folder)
