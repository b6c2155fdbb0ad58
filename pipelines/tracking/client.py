"""Clients of MLflow with bounded patience, and names that it accepts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient


def connect(uri: str) -> MlflowClient:
    """A client of one store, whatever store the process uses otherwise."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    return mlflow.MlflowClient(tracking_uri=uri)


@contextmanager
def patience(retries: int, timeout: int) -> Iterator[None]:
    """MLflow's retries and seconds per request, without progress bars.

    Its defaults block four minutes on a server that is away, in which the other workers time out.
    """
    wanted = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout),
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    before = dict(os.environ)
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


def metric_name(name: str) -> str:
    """A name that MLflow accepts: letters, digits, `_ - . space : /`; anything else becomes `_`."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
