"""`run.json` in a run's folder: its MLflow run, and the options and data with which it began."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on

from pipelines.cluster import storage
from pipelines.cluster.json_file import read_json

RECORD = "run.json"
"""Name of the file."""


@with_config(ConfigDict(extra="allow"))
class Opened(TypedDict):
    """The one entry by which a run is found in MLflow."""

    run_id: str


@with_config(ConfigDict(extra="allow"))
class RunRecord(Opened):
    """The part of a run's record that a continued run reads; hashes of the data stand beside."""

    options: dict[str, Any]


def read_record(folder: str, shape: Any = RunRecord) -> dict[str, Any]:
    """The record of the run in a folder, {} where there is none.

    Args:
        folder: of the run, local or s3://.
        shape: what must be in it.

    Raises:
        ValueError: the file is empty, cut short or edited.
    """
    file = storage.join(folder, RECORD)
    remedy = f"restore the file, or give another --name (the checkpoints in {folder} stay)"
    return read_json(file, shape, remedy) if storage.exists(file) else {}
