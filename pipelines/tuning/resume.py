"""Going on with a sweep: what it was started with, and the state that Ray Tune left."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from pipelines.cluster import storage

logger = logging.getLogger(__name__)

STATE = "tune"
RECORD = "sweep.json"

SAVED = re.compile(r"experiment_state-.*\.json")
"""Tune's state, a file a start."""


def read_record(folder: str, name: str, record: Mapping[str, Any], resume: bool) -> dict[str, Any]:
    """What the sweep of this name was started with; {} for a new one."""
    file = storage.join(folder, RECORD)
    if not storage.exists(file):
        if resume:
            raise ValueError(f"--resume: there is no sweep {name!r} in {PurePosixPath(folder).parent}; give its --name")
        if storage.exists(folder):
            raise ValueError(f"{folder} exists and is no sweep; choose another --name")
        return {}
    before = json.loads(storage.read_bytes(file))
    if not resume:
        raise ValueError(f"a sweep {name!r} is there already; go on with --resume, or choose another --name")
    differing = [key for key in record if key in before and before[key] != record[key]]
    if differing:
        told = "; ".join(f"{key} was {_told(before[key])}, is {_told(record[key])}" for key in differing)
        raise ValueError(
            f"sweep {name!r} was started with other options: {told}. Resume it as it was, or choose another --name"
        )
    return before


def _told(value: Any) -> str:
    return " ".join(map(str, value)) or "nothing" if isinstance(value, list) else str(value)


def restorable(folder: str) -> bool:
    """Whether Tune left a state to go on from; one that was cut off while it was written gives way to the one before.

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
