"""The writes of one worker to a run: metrics, tables, pictures and tags, delivered by a thread.

The caller only puts into a queue. A thread takes from it, keeps what it took in the run's folder (`spool`) and sends
it to MLflow: metrics every `INTERVAL` seconds in one request, artifacts at once. A store that is slow, away or broken
costs the caller nothing; what it lacks stays in the folder and is sent when the store answers, or when a tracker of
the same run and folder is opened again (`deliver`).

Nothing is in the run twice: a metric at a step that the run already holds is not written again, so a continued run
may repeat steps; an artifact replaces the one of its name.
"""

from __future__ import annotations

import csv
import io
import math
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from panoptic.metrics.text import metric_name
from panoptic.png import encode_image
from pipelines.cluster.file_names import safe_name
from pipelines.cluster.masking import masked
from pipelines.tracking import client as client_module
from pipelines.tracking.client import REFUSALS, Refused, Unwritten, attempt, connect, logger, patience
from pipelines.tracking.runs import TAG_LENGTH, Run
from pipelines.tracking.spool import Spool, undelivered

if TYPE_CHECKING:
    from mlflow import MlflowClient

INTERVAL = 10.0
"""Seconds for which metrics are collected into one request; with requests that take seconds they are 30 s late."""

TIMEOUT = 20
"""Seconds that a request of the thread may take."""

CLOSING = 10.0
"""Seconds without a successful write after which `Tracker.close` gives up."""

LONGEST_CLOSING = 60.0
"""Seconds after which a worker closes although the store still takes things, slowly; the driver has more time."""

LONGEST_DELIVERY = 300.0
"""Seconds after which `deliver` gives up; longer than `LONGEST_CLOSING`, since no GPU waits for it."""

ATTEMPTS = 5
"""Attempts at an artifact that fails while the store answers, before it is left to another process."""

RETRY = 1.0
"""Seconds between attempts while a tracker closes; before that, they are `client.PAUSE`."""

IMAGES_TAG = "mlflow.loggedImages"
"""Tag of runs for which MLflow's page looks for pictures with steps."""

THUMBNAIL = 256
"""Pixels of the longer side of a picture in the overview, as MLflow has it."""

CHUNK = 1000
"""Metrics and tags in one request: MLflow's limit."""

TAGS_CHUNK = 100
"""Tags in one request: MLflow's limit."""


class Tracker:
    """Writes to one run from one thread of one process. No method raises because of the store, or waits for it.

    Only `close` waits, with bounded patience. Without it, a process that ends leaves what is undelivered in `folder`.
    """

    def __init__(self, run: Run, folder: str | Path | None = None) -> None:
        """Make a client; nothing is sent, and no thread started, before something is written.

        Args:
            run: opened by the driver.
            folder: of the run, local or s3://, in which undelivered things are kept; without one they are only kept
                in memory.
        """
        self.run = run
        self._client: MlflowClient = connect(run.tracking_uri)
        self._spool = Spool(folder, run.run_id)
        self._lock = threading.Lock()
        """Held while the spool is used; never while MLflow is asked."""
        self._loaded = False
        self._queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
        """Calls for the thread, in order."""
        self._thread: threading.Thread | None = None
        self._given_up = threading.Event()
        """Set where the present thread is to leave the spool alone."""
        self._closing = False
        self._progress = 0.0
        """Monotonic time of the last answer."""
        self._records_due = math.inf
        """Monotonic time at which the records are sent."""
        self._retry = 0.0
        """Monotonic time before which nothing is sent, after a failure."""
        self._refused: set[str] = set()
        """Artifacts that the store does not take; another process tries them again."""
        self._again: dict[str, tuple[int, float]] = {}
        """Artifacts that failed although the store answers: how often, and the monotonic time of the next attempt."""
        self._warned: set[str] = set()
        """Warnings that were given, each once."""
        self._metrics: set[str] | None = None
        """Metrics that the run had when it was opened; None until the store has told."""
        self._histories: dict[str, int] = {}
        """Last step of each metric in `_metrics`, as far as it was asked for."""
        self._written: dict[str, int] = {}
        """Last step of each metric in the run, as far as it is known."""
        self._rewound: int | None = None
        """Step to which the run went back."""
        self._figures_at = 0
        """Timestamp of the last figures."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write metrics of a step."""
        now = _now()
        self._add(
            [
                {"key": metric_name(key), "value": float(value), "step": int(step), "timestamp": now}
                for key, value in values.items()
            ]
        )

    def rewind(self, step: int) -> None:
        """Write the metrics of later steps again: the run continues another one's training, at this step."""
        self._add([{"rewind": int(step)}])

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags; an existing one is overwritten."""
        self._add([{"tag": key, "value": masked(value)[:TAG_LENGTH]} for key, value in values.items()])

    def figures(self, values: Mapping[str, float]) -> None:
        """Set metrics that have no step; an existing one is overwritten."""
        # MLflow shows the newest, and of two in the same millisecond the larger one
        self._figures_at = now = max(_now(), self._figures_at + 1)
        self._add([{"figure": metric_name(k), "value": float(v), "timestamp": now} for k, v in values.items()])

    def text(self, name: str, text: str) -> None:
        """Keep a text as the artifact `name`."""
        self._put(lambda: self._spool.put(name, text.encode()))

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
        """Keep a picture, uint8 [H, W, 3] RGB, as overlays/step_000123/`name`.png. It must not change afterwards.

        Characters of the name that would mean something in a URI become `_`.
        """
        path = f"overlays/step_{step:06d}/{safe_name(name)}.png"
        self._put(lambda: self._spool.put(path, encode_image(picture)))

    def slider(self, step: int, name: str, picture: np.ndarray) -> None:
        """Show a picture, uint8 [H, W, 3] RGB, under Model metrics on the run's page, where a slider chooses the step.

        Kept under the names that `MlflowClient.log_image(key=…, step=…)` gives, so that an outage loses none: at full
        size, and small for the overview. It must not change afterwards.
        """
        key = re.sub(r"[^\w\-. ]", "_", name, flags=re.ASCII)
        path = f"images/overlays~{key}+step+{step}+timestamp+{_now()}+{uuid.uuid4()}"
        self._put(lambda: self._spool.put(f"{path}.png", encode_image(picture)))
        self._put(lambda: self._spool.put(f"{path}+compressed.webp", _thumbnail(picture)))
        self._add([{"tag": IMAGES_TAG, "value": "True"}])

    def flush(self) -> None:
        """Send the metrics now instead of within `INTERVAL`; does not wait for it."""
        self._put(self._hurry)

    def keep(self) -> threading.Event:
        """Keep in the folder what is not delivered, also on S3, so that it outlives this machine; does not wait.

        Returns:
            an event that is set when that is done. It may take as long as a request that is under way.
        """
        done = threading.Event()

        def keep() -> None:
            self._save()
            done.set()

        self._put(keep)
        return done

    def close(self, longest: float = LONGEST_CLOSING) -> bool:
        """Deliver everything, also what an earlier process left; True when nothing is left over.

        Gives up after `CLOSING` seconds without a successful write and after `longest` seconds in all. What is left
        lies in the folder then, and a warning names it.
        """
        begin = self._progress = time.monotonic()
        self._put(self._hurry_to_close)
        thread = self._thread
        assert thread is not None
        while thread.is_alive():
            now = time.monotonic()
            if now - self._progress > CLOSING or now - begin > longest:
                self._given_up.set()  # a request may still hang; the thread ends with it
                break
            thread.join(0.05)
        with self._lock:
            self._take_all()
            self._save()
            left = self._spool.describe()
        self._thread, self._closing = None, False
        if left:
            kept = f"kept in {self._spool.place} and sent by the same command" if self._spool.place else "lost"
            logger.warning("tracking: not in MLflow: %s; %s", enumerate_briefly(left), kept)
        return not left

    def _add(self, records: list[dict[str, Any]]) -> None:
        def add() -> None:
            self._spool.add(records)
            self._records_due = min(self._records_due, time.monotonic() + INTERVAL)

        self._put(add)

    def _put(self, task: Callable[[], None]) -> None:
        """Hand a task to the thread, which is started where there is none."""
        self._queue.put(task)
        if self._thread is None or not self._thread.is_alive():
            self._given_up = threading.Event()
            name = f"mlflow-{self.run.run_id}"
            self._thread = threading.Thread(target=self._work, args=(self._given_up,), name=name, daemon=True)
            self._thread.start()

    def _hurry(self) -> None:
        self._records_due = 0.0

    def _hurry_to_close(self) -> None:
        self._closing, self._records_due, self._retry = True, 0.0, 0.0
        self._again = {name: (failed, 0.0) for name, (failed, _) in self._again.items()}

    def _work(self, given_up: threading.Event) -> None:
        """The thread: take what is new, keep it, send what is due."""
        with patience(0, TIMEOUT):  # all along, so that the environment changes once
            while not given_up.is_set():
                self._take(given_up)
                due = self._due()
                if due == math.inf and self._closing and self._queue.empty():
                    return
                if time.monotonic() >= due and not given_up.is_set():
                    self._send(given_up)

    def _take(self, given_up: threading.Event) -> None:
        """Wait for something new until something is due; keep all that is new."""
        due = self._due()
        wait = None if due == math.inf else max(0.0, due - time.monotonic())
        try:
            first = None if wait == 0.0 or (due == math.inf and self._closing) else self._queue.get(timeout=wait)
        except Empty:
            first = None
        with self._lock:
            if given_up.is_set():
                if first is not None:
                    self._do(first)
                return
            self._load()
            if first is not None:
                self._do(first)
            self._take_all()
            if self._spool.local:
                self._save()

    def _take_all(self) -> None:
        while True:
            try:
                self._do(self._queue.get_nowait())
            except Empty:
                return

    def _do(self, task: Callable[[], None]) -> None:
        try:
            task()
        except Exception as error:  # a picture that cannot be encoded: the training is worth more
            self._warn(f"something was not written ({client_module.first_line(error)})")

    def _load(self) -> None:
        """Take in what an earlier process left, once."""
        if self._loaded:
            return
        self._loaded = True
        try:
            self._spool.load()
        except OSError as error:
            self._warn(f"what an earlier process left in {self._spool.place} cannot be read ({error})")
        if self._spool.records:
            self._records_due = 0.0

    def _save(self) -> None:
        try:
            self._spool.save()
        except OSError as error:
            text = f"what MLflow lacks cannot be kept in {self._spool.place}, only in memory"
            self._warn(f"{text} ({error})", text)

    def _due(self) -> float:
        """Monotonic time of the next sending; infinite where there is nothing to send."""
        records = self._records_due if self._spool.records else math.inf
        return max(self._retry, min(records, self._next_artifact()[0]))

    def _next_artifact(self) -> tuple[float, str]:
        """Monotonic time at which the next artifact is sent, and its name; the oldest of those that are due."""
        now = time.monotonic()
        names = [name for name in self._spool.names() if name not in self._refused]
        times = [(max(now, self._again[name][1]) if name in self._again else 0.0, name) for name in names]
        return min(times, key=lambda entry: entry[0], default=(math.inf, ""))

    def _send(self, given_up: threading.Event) -> None:
        """One request: the records that are due, else an artifact. Records of a long outage take several."""
        records_due = self._spool.records and time.monotonic() >= self._records_due
        done = self._send_records(given_up) if records_due else self._send_artifact(self._next_artifact()[1], given_up)
        if done:
            self._progress = time.monotonic()
        if done is not False:
            return
        self._retry = time.monotonic() + (RETRY if self._closing else client_module.PAUSE)
        with self._lock:
            if not given_up.is_set():
                self._save()

    def _send_records(self, given_up: threading.Event) -> bool:
        count = 0

        def write() -> None:
            nonlocal count
            count = self._write(self._spool.records[:CHUNK])

        try:
            done = attempt(self.run.tracking_uri, write, TIMEOUT, at_once=True)
        except Refused as error:
            self._warn(f"MLflow does not take the metrics of run {self.run.run_id} ({error}); they are kept")
            return False
        if done and not given_up.is_set():
            with self._lock:
                self._forget(lambda: self._spool.sent(count))
                if not self._spool.records:
                    self._records_due = math.inf
        return done

    def _write(self, records: list[dict[str, Any]]) -> int:
        """Send records but for metrics that the run already holds; how many of them, from the first, are done."""
        from mlflow.entities import Metric, RunTag

        written, rewound, count = dict(self._written), self._rewound, 0
        metrics: list[Metric] = []
        tags: dict[str, str] = {}
        for record in records:
            if len(metrics) + len(tags) == CHUNK or len(tags) == TAGS_CHUNK:
                break
            count += 1
            if "rewind" in record:
                rewound = record["rewind"]
                written = {key: min(step, rewound) for key, step in written.items()}
            elif "tag" in record:
                tags[record["tag"]] = record["value"]
            elif "figure" in record:
                metrics.append(Metric(record["figure"], record["value"], record["timestamp"], 0))
            else:
                key, step = record["key"], record["step"]
                if key not in written:
                    before = self._last_step(key)
                    written[key] = before if rewound is None else min(before, rewound)
                if step > written[key]:
                    metrics.append(Metric(key, record["value"], record["timestamp"], step))
                    written[key] = step
        if metrics or tags:
            labels = [RunTag(key, value) for key, value in tags.items()]
            self._client.log_batch(self.run.run_id, metrics=metrics, tags=labels, synchronous=True)
        self._written, self._rewound = written, rewound
        return count

    def _last_step(self, key: str) -> int:
        """The step of a metric that was written last, before this tracker; -1 where there is none.

        It is the largest one, unless the run went back since (`rewind`).
        """
        if self._metrics is None:
            self._metrics = set(self._client.get_run(self.run.run_id).data.metrics)
            self._progress = time.monotonic()
        if key not in self._metrics:
            return -1
        if key not in self._histories:
            history = self._client.get_metric_history(self.run.run_id, key)
            self._histories[key] = max(history, key=lambda metric: (metric.timestamp, metric.step)).step
            self._progress = time.monotonic()
        return self._histories[key]

    def _send_artifact(self, name: str, given_up: threading.Event) -> bool | None:
        """False where the store does not answer, None where this artifact alone failed."""
        with self._lock:
            path = self._spool.path(name)
            try:
                data = b"" if path is not None else self._spool.read(name)
            except OSError as error:
                return self._refuse(name, error)
        folder = str(PurePosixPath(name).parent)
        place = None if folder == "." else folder

        def write() -> None:
            if path is not None:
                self._client.log_artifact(self.run.run_id, path, place)
                return
            with tempfile.TemporaryDirectory() as temporary:
                file = Path(temporary) / PurePosixPath(name).name
                file.write_bytes(data)
                self._client.log_artifact(self.run.run_id, str(file), place)

        def write_or_ask() -> None:
            try:
                write()
            except Exception as error:  # of this artifact alone, or of the whole store?
                if client_module.status(error) in REFUSALS:
                    raise
                self._client.get_run(self.run.run_id)
                raise Unwritten(client_module.first_line(error)) from error

        try:
            done = attempt(self.run.tracking_uri, write_or_ask, TIMEOUT, at_once=True)
        except Refused as error:
            return self._refuse(name, error)
        except Unwritten as error:
            return self._postpone(name, error)
        if done and not given_up.is_set():
            with self._lock:
                self._forget(lambda: self._spool.removed(name))
        return done

    def _postpone(self, name: str, error: Exception) -> bool | None:
        """Try an artifact again later, a few times; the others go on meanwhile."""
        failed = 1 + self._again.get(name, (0, 0.0))[0]
        if failed == ATTEMPTS:
            return self._refuse(name, error)
        pause = RETRY if self._closing else client_module.PAUSE
        self._again[name] = (failed, time.monotonic() + pause)
        return None

    def _refuse(self, name: str, error: Exception) -> bool:
        """Leave an artifact in the folder for another process; the others go on."""
        self._refused.add(name)
        self._warn(f"{name} is not written ({error})")
        return True

    def _forget(self, drop: Callable[[], None]) -> None:
        try:
            drop()
        except OSError as error:
            self._warn(f"what was delivered cannot be removed from {self._spool.place} ({error})")

    def _warn(self, text: str, about: str = "") -> None:
        """Log a warning once, or once for what it is `about` where its text varies."""
        if (about or text) not in self._warned:
            self._warned.add(about or text)
            logger.warning("tracking: %s", text)


def deliver(run: Run, folder: str | Path) -> list[str]:
    """Send what earlier processes left in a run's folder; what is left over, as `undelivered` names it.

    With a store that is away it takes `CLOSING` seconds.
    """
    if undelivered(folder):
        Tracker(run, folder).close(LONGEST_DELIVERY)
    return undelivered(folder)


def enumerate_briefly(names: Sequence[str], most: int = 4) -> str:
    """The first of some names, and how many there are besides."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _thumbnail(picture: np.ndarray) -> bytes:
    """A small WebP of a picture."""
    scale = min(1.0, THUMBNAIL / max(picture.shape[:2]))
    size = [max(1, round(side * scale)) for side in picture.shape[1::-1]]
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".webp", small[:, :, ::-1], [cv2.IMWRITE_WEBP_QUALITY, 80])[1].tobytes()


def _now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return int(1000 * time.time())
