"""Going on with a sweep: what it was started with, and the state that Ray Tune left."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on

from pipelines.cluster import storage
from pipelines.cluster.json_file import read_json
from pipelines.cluster.masking import masked_values

logger = logging.getLogger(__name__)

STATE = "tune"
"""Folder of Tune's state in that of a sweep."""

RECORD = "sweep.json"
"""File of a sweep's folder: the options that it was started with, and its MLflow run."""

SAVED = re.compile(r"experiment_state-.*\.json")
"""Names of the files of Tune's state, one a start."""


@with_config(ConfigDict(extra="allow"))
class SweepRecord(TypedDict):
    """The one entry that every sweep's record has; its options stand beside."""

    run_id: str


def read_record(folder: str, name: str, record: Mapping[str, Any], resume: bool) -> dict[str, Any]:
    """The options that the sweep of this name was started with; {} for a new one.

    Args:
        folder: URI of the sweep's folder.
        name: of the sweep.
        record: options of this start.
        resume: it is to be gone on with.

    Raises:
        ValueError: the name is taken, or there is no such sweep, or it was started with other options, or its record
            is damaged.
    """
    file = storage.join(folder, RECORD)
    if not storage.exists(file):
        if resume:
            raise ValueError(f"--resume: there is no sweep {name!r} in {PurePosixPath(folder).parent}; give its --name")
        if storage.exists(folder):
            raise ValueError(f"{folder} exists and is no sweep; choose another --name")
        return {}
    remedy = "restore the file, or choose another --name"
    before = masked_values(read_json(file, SweepRecord, remedy))  # earlier versions kept users and passwords
    if not resume:
        raise ValueError(f"a sweep {name!r} is there already; go on with --resume, or choose another --name")
    differing = [key for key in record if key in before and before[key] != record[key]]
    if differing:
        changes = "; ".join(f"{key} was {_text(before[key])}, is {_text(record[key])}" for key in differing)
        raise ValueError(
            f"sweep {name!r} was started with other options: {changes}. Resume it as it was, or choose another --name"
        )
    return before


def _text(value: Any) -> str:
    """An option's value as an error quotes it."""
    return " ".join(map(str, value)) or "nothing" if isinstance(value, list) else str(value)


def restorable(folder: str) -> bool:
    """True if Tune left a state to go on from; one that was cut off while it was written gives way to the one before.

    Without any, its trials begin anew: an interruption before the first was saved, seconds after the start.
    """
    state = storage.join(folder, STATE)
    if not storage.exists(storage.join(state, "tuner.pkl")):
        return False
    for name in [name for name in storage.list_files(state) if SAVED.fullmatch(name)]:
        try:
            json.loads(storage.read_bytes(storage.join(state, name)))
        except ValueError:
            logger.warning("%s: cut off while it was written; it is removed", storage.join(state, name))
            storage.delete(storage.join(state, name))
    return any(SAVED.fullmatch(name) for name in storage.list_files(state))
