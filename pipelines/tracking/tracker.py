"""What one worker writes to a run: metrics, tables, pictures, and a spool while the server is away."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mlflow import MlflowClient
from pipelines.tracking.client import connect, first_line, metric_name, patience
from pipelines.tracking.runs import CHUNK, PAUSE, TAG_LENGTH, Run, logger


class Tracker:
    """Writes to one run from one process. No method raises because of the store."""

    def __init__(self, run: Run, spool: str | Path | None = None) -> None:
        """Args:
        run: opened by the driver.
        spool: local folder for metrics that could not be written; without one they are only kept in memory.
        """
        self.run = run
        self._client = connect(run.tracking_uri)
        self._pending: list[dict[str, Any]] = []
        self._spool = None if spool is None else Path(spool) / f"mlflow-{run.run_id}.jsonl"
        self._quiet_until = 0.0
        self._written: dict[str, int] | None = None
        """Last step of each metric in the run; None until the store has told."""
        self._rewound: int | None = None
        if self._spool is not None and self._spool.exists():
            self._pending = [json.loads(line) for line in self._spool.read_text().splitlines()]

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Buffer metrics of a step; `flush` writes them."""
        now = int(1000 * time.time())
        for key, value in values.items():
            name = metric_name(key)
            self._pending.append({"key": name, "value": float(value), "step": int(step), "timestamp": now})

    def rewind(self, step: int) -> None:
        """Write the metrics of later steps again: the run goes on from another one's training, at this step."""
        self._rewound = step

    def flush(self) -> bool:
        """Write what is buffered in as few requests as possible; True when nothing is left over."""
        if not self._pending:
            return True
        if self._try("metrics", self._write):
            return True
        if self._spool is not None:
            self._spool.parent.mkdir(parents=True, exist_ok=True)
            partial = self._spool.with_suffix(".part")
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in self._pending))
            partial.replace(self._spool)
        return False

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags; an existing one is overwritten."""
        for key, value in values.items():
            text = str(value)[:TAG_LENGTH]
            self._try(f"tag {key}", lambda key=key, text=text: self._client.set_tag(self.run.run_id, key, text))

    def figures(self, values: Mapping[str, float]) -> None:
        """Set metrics that have no step; an existing one is overwritten."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        entries = [Metric(metric_name(key), float(value), now, 0) for key, value in values.items()]
        self._try("figures", lambda: self._client.log_batch(self.run.run_id, metrics=entries))

    def text(self, name: str, text: str) -> None:
        """Keep a text as the artifact `name`."""
        self._try(name, lambda: self._client.log_text(self.run.run_id, text, name))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], text: str = "") -> None:
        """Keep rows as `name`.csv and, when given, their printed form as `name`.txt."""
        if rows:
            buffer = io.StringIO()
            writer = csv.DictWriter(buffer, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
            self.text(f"{name}.csv", buffer.getvalue())
        if text:
            self.text(f"{name}.txt", text)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Keep a picture, uint8 [H, W, 3] RGB, as overlays/step_000123/`name`.png."""
        path = f"overlays/step_{step:06d}/{Path(name).stem}.png"
        self._try(path, lambda: self._client.log_image(self.run.run_id, picture, path))

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Keep a local file under `folder`."""
        self._try(str(path), lambda: self._client.log_artifact(self.run.run_id, str(path), folder or None))

    def close(self) -> None:
        """Write what is buffered, once more even if the store was away a moment ago."""
        self._quiet_until = 0.0
        if not self.flush():
            kept = f"kept in {self._spool}" if self._spool is not None else "lost"
            logger.warning("tracking: %d metrics could not be written and are %s", len(self._pending), kept)

    def _write(self) -> None:
        from mlflow.entities import Metric

        if self._written is None:
            self._written = last_steps(self._client, self.run.run_id)
        if self._rewound is not None:
            self._written = {key: min(step, self._rewound) for key, step in self._written.items()}
            self._rewound = None
        fresh = [entry for entry in self._pending if entry["step"] > self._written.get(entry["key"], -1)]
        for start in range(0, len(fresh), CHUNK):
            chunk = fresh[start : start + CHUNK]
            self._client.log_batch(self.run.run_id, metrics=[Metric(**entry) for entry in chunk])
        for entry in fresh:
            self._written[entry["key"]] = max(entry["step"], self._written.get(entry["key"], -1))
        self._pending.clear()
        if self._spool is not None:
            self._spool.unlink(missing_ok=True)

    def _try(self, what: str, write: Any) -> bool:
        """Do it unless the store failed a moment ago; True on success."""
        if time.monotonic() < self._quiet_until:
            return False
        try:
            with patience(1, 5):
                write()
        except Exception as error:  # whatever MLflow, requests or SQLAlchemy raise: training goes on
            self._quiet_until = time.monotonic() + PAUSE
            logger.warning("tracking: %s not written (%s); next attempt in %.0f s", what, first_line(error), PAUSE)
            return False
        return True


def last_steps(client: MlflowClient, run_id: str) -> dict[str, int]:
    """The step of each metric that a run wrote last: the largest one, unless it went back since (`rewind`)."""
    found = {}
    for key in client.get_run(run_id).data.metrics:
        history = client.get_metric_history(run_id, key)
        found[key] = max(history, key=lambda metric: (metric.timestamp, metric.step)).step
    return found
