"""Metrics and artifacts that a run has yet to send to MLflow, kept in the run's folder until they are delivered.

| file | content |
|---|---|
| mlflow-RUN.jsonl | one JSON object a line: metrics, tags, figures without a step, rewinds; in the order of writing |
| mlflow-RUN/NAME | one file for each artifact, under the artifact's own name |

In a local folder everything is written before it is sent, so that a process that is killed loses nothing; to a folder
on S3 it is written when a delivery has failed. A line that was torn by a kill or a full disk is left out.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from pyarrow import fs
from pydantic import TypeAdapter
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on

from pipelines.cluster import storage

logger = logging.getLogger("pipelines.tracking")

PREFIX = "mlflow-"
"""Begins the name of every file and folder of a spool."""


class Metric(TypedDict):
    """A metric of a step."""

    key: str
    value: float
    step: int
    timestamp: int


class Figure(TypedDict):
    """A metric without a step."""

    figure: str
    value: float
    timestamp: int


class Tag(TypedDict):
    """A tag of the run."""

    tag: str
    value: str


class Rewind(TypedDict):
    """The step to which the run went back."""

    rewind: int


RECORD: TypeAdapter[Any] = TypeAdapter(Metric | Figure | Tag | Rewind)
"""One line of the file."""


class Spool:
    """The undelivered records and artifacts of one run. One thread at a time may use it."""

    def __init__(self, folder: str | Path | None, run_id: str) -> None:
        """Name the place; nothing is read or written yet.

        Args:
            folder: of the run, local or s3://; None = memory alone.
            run_id: of the MLflow run.
        """
        place = None if folder is None else storage.absolute(folder)
        self.local = place is not None and "://" not in place
        """True where saving before every delivery costs next to nothing."""
        self.records: list[dict[str, Any]] = []
        """Not yet delivered, in the order of writing."""
        self._lines = None if place is None else storage.join(place, f"{PREFIX}{run_id}.jsonl")
        self._folder = None if place is None else storage.join(place, f"{PREFIX}{run_id}")
        self._files: dict[str, bytes | None] = {}
        """Artifact name -> content, or None where it lies in the folder."""
        self._saved = 0
        """The first records, which the file holds already."""
        self._append = False
        """The file ends in a whole line, so that a local one can grow."""

    @property
    def place(self) -> str:
        """The folder in which it lies; "" where it is in memory."""
        return "" if self._lines is None else self._lines.rsplit("/", 1)[0]

    def load(self) -> None:
        """Take in what an earlier process left.

        Raises:
            OSError: the folder cannot be read.
        """
        if self._lines is None or self._folder is None:
            return
        if storage.exists(self._lines):
            earlier = read_lines(storage.read_bytes(self._lines))
            self.records[:0] = earlier
            self._append = False
        if storage.exists(self._folder):
            for name in storage.list_files(self._folder):
                if not _temporary(name):
                    self._files.setdefault(name, None)

    def add(self, records: list[dict[str, Any]]) -> None:
        """Take records behind the others."""
        self.records.extend(records)

    def put(self, name: str, data: bytes) -> None:
        """Take an artifact; an undelivered one of the same name is replaced."""
        self._files.pop(name, None)
        self._files[name] = data

    def describe(self) -> list[str]:
        """The undelivered: a line for all metrics, tags and artifacts by name."""
        return [*_summary(self.records), *self._files]

    def names(self) -> list[str]:
        """The artifacts, oldest first."""
        return list(self._files)

    def path(self, name: str) -> str | None:
        """The local file of an artifact; None where it has none."""
        if not self.local or self._folder is None or self._files[name] is not None:
            return None
        return storage.join(self._folder, name)

    def read(self, name: str) -> bytes:
        """The content of an artifact.

        Raises:
            OSError: its file cannot be read.
        """
        data = self._files[name]
        if data is not None:
            return data
        assert self._folder is not None
        return storage.read_bytes(storage.join(self._folder, name))

    def save(self) -> None:
        """Write what the folder lacks; one artifact that cannot be written does not keep the others from it.

        Raises:
            OSError: something cannot be written, such as on a full disk; it stays in memory.
        """
        if self._lines is None or self._folder is None:
            return
        if self._saved < len(self.records):
            self._save_records(self._lines)
        failed: OSError | None = None
        for name, data in list(self._files.items()):
            if data is not None:
                try:
                    storage.write_bytes(storage.join(self._folder, name), data)
                    self._files[name] = None
                except OSError as error:
                    failed = failed or error
        if failed is not None:
            raise failed

    def _save_records(self, uri: str) -> None:
        append, self._append = self._append, False  # until it has succeeded
        if append and self.local:
            with open(uri, "ab") as file:
                file.write(_lines(self.records[self._saved :]))
        else:
            storage.write_bytes(uri, _lines(self.records))
        self._saved, self._append = len(self.records), True

    def sent(self, count: int) -> None:
        """Drop the first `count` records, which are delivered.

        The file goes when all are. Until then it holds delivered ones, too; the run's own metrics tell them apart.

        Raises:
            OSError: the file cannot be removed.
        """
        del self.records[:count]
        self._saved = max(0, self._saved - count)
        if not self.records and self._lines is not None:
            self._append = False
            storage.delete(self._lines)

    def removed(self, name: str) -> None:
        """Drop an artifact that is delivered, and the folder with the last one.

        Raises:
            OSError: the file cannot be removed.
        """
        data = self._files.pop(name)
        if self._folder is None:
            return
        if data is None:
            storage.delete(storage.join(self._folder, name))
            if not self._files:
                storage.delete(self._folder)


def read_lines(data: bytes) -> list[dict[str, Any]]:
    """The records of a file, without lines that were torn."""
    records = []
    for line in data.decode(errors="replace").split("\n"):
        if not line.strip("\0 "):
            continue
        try:
            records.append(RECORD.validate_python(json.loads(line)))
        except (ValueError, RecursionError):
            logger.warning("tracking: a spooled line was torn or changed and is left out: %.60s", line)
    return records


def undelivered(folder: str | Path) -> list[str]:
    """The content of a run's folder, local or s3://, that MLflow lacks: a line for all metrics, each artifact by name.

    Empty where everything is delivered. Of a run that is training, it names what was written in the last seconds, too.

    Raises:
        OSError: the folder cannot be read.
    """
    if not storage.exists(folder):
        return []
    lines, names = [], []
    for path in _spooled(folder):
        top, _, name = path.partition("/")
        if name:
            names.append(name)
        elif top.endswith(".jsonl"):
            lines += read_lines(storage.read_bytes(storage.join(folder, path)))
    return [*_summary(lines), *sorted(names)]


def _spooled(folder: str | Path) -> list[str]:
    """The files of spools in a run's folder, relative to it; the checkpoints beside them are not walked through."""
    paths = []
    filesystem, path = storage.resolve(folder)
    for name in sorted(entry.base_name for entry in filesystem.get_file_info(fs.FileSelector(path))):
        if not name.startswith(PREFIX):
            continue
        if name.endswith(".jsonl"):
            paths.append(name)
        else:
            inside = storage.list_files(storage.join(folder, name))
            paths += [f"{name}/{path}" for path in inside if not _temporary(path)]
    return paths


def _summary(records: list[dict[str, Any]]) -> list[str]:
    """Records in a few words: how many metrics of which steps, the names of tags."""
    steps = [record["step"] for record in records if "step" in record]
    figures = [record["figure"] for record in records if "figure" in record]
    tags = dict.fromkeys(record["tag"] for record in records if "tag" in record)
    told = [f"{len(steps)} metrics of steps {min(steps)} to {max(steps)}"] if steps else []
    return [*told, *(f"metric {name}" for name in dict.fromkeys(figures)), *(f"tag {name}" for name in tags)]


def _temporary(name: str) -> bool:
    """A file that a killed process had not finished (`storage.write_bytes`)."""
    last = name.rsplit("/", 1)[-1]
    return last.startswith(".") and last.endswith(".tmp")


def _lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()
