"""The state of a preparation that has not ended: its options, and a report of each shard that is finished.

It lies in the folder `.prepare` beside the shards until the manifest is written. A shard is finished when its report is
there, its key is the one that its inputs have now, and the file is the one that was reported. Files and reports are
written whole or not at all, so a preparation may be killed at any moment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import cv2
import pyarrow as pa

from pipelines.cluster import storage

STATE = ".prepare"
"""Folder of the state, within that of the shards."""

_OPTIONS = "options.json"


def lease_folder(out: str) -> str:
    """The folder of the lease under which one process at a time prepares shards in `out`."""
    return storage.join(out, STATE, "lease")


def begin(out: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """Note what is being prepared, unless a preparation has begun here.

    Args:
        out: the folder of the shards.
        about: the data set and the options.

    Returns:
        what the preparation that has begun here noted; `about` where there is none.
    """
    file = storage.join(out, STATE, _OPTIONS)
    try:
        content = json.loads(storage.read_bytes(file))
    except (FileNotFoundError, ValueError):
        note(out, about)
        return dict(about)
    return content if isinstance(content, dict) else {}


def note(out: str, about: Mapping[str, Any]) -> None:
    """Note what is being prepared, in place of what was noted before."""
    storage.write_bytes(storage.join(out, STATE, _OPTIONS), json.dumps(about, indent=1).encode())


def forget(out: str, lease: bool = False) -> None:
    """Remove the reports and options, and with `lease` the whole state."""
    state = storage.join(out, STATE)
    if lease:
        storage.delete(state)
        return
    for name in storage.list_files(state) if storage.exists(state) else ():
        if not name.startswith("lease/"):
            storage.delete(storage.join(state, name))


def shard_key(rows: pa.Table, inputs: str) -> str:
    """The key of a shard: a hash of all that its content follows from.

    Args:
        rows: its light rows.
        inputs: stands for the files, the classes and the options.
    """
    about = [inputs, cv2.__version__, pa.__version__, rows.to_pylist()]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def finished_report(out: str, path: str, key: str) -> dict[str, Any] | None:
    """The report of a shard that an earlier attempt finished with the same inputs; None where it must be written.

    On local disks the file's hash is compared, as a machine that lost its power may have lost what was written last; an
    object of S3 is whole, and its size is compared.
    """
    try:
        content = json.loads(storage.read_bytes(_file(out, path)))
        if content["key"] != key:
            return None
        report = content["report"]
        if report["rows"] and not _is_what_was_written(storage.join(out, path), content["size"], report["sha256"]):
            return None
    except storage.Unavailable:
        raise
    except (OSError, ValueError, KeyError, TypeError):  # absent, or no report
        return None
    return report


def keep_report(out: str, path: str, key: str, report: Mapping[str, Any], size: int) -> None:
    """Note that a shard is finished, after its file of `size` bytes was written."""
    storage.write_bytes(_file(out, path), json.dumps({"key": key, "size": size, "report": report}).encode())


def _is_what_was_written(file: str, size: int, sha256: str) -> bool:
    if file.startswith("s3://"):
        return storage.open_file(file).size() == size
    return hashlib.sha256(storage.read_bytes(file)).hexdigest() == sha256


def _file(out: str, path: str) -> str:
    return storage.join(out, STATE, f"{path.partition('.')[0]}.json")
