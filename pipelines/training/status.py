"""The status of a run, from its folder and MLflow alone: neither Ray nor a process of the run is asked.

| state | meaning |
|---|---|
| preparing | a driver holds the run and has not opened it yet: it checks data, or writes shards |
| running | a driver holds the run, and there was progress |
| stalled | a driver holds the run, and there was none for a while |
| dead | a driver held the run, and is gone without giving it back: killed, or its machine was lost |
| failed, killed | the run ended so, by MLflow: an error, or Ctrl-C, SIGTERM, `ray job stop` |
| stopped | it ended before the last step as it was told to (`train.stop_after`) |
| ended | it ended before the last step, and MLflow does not say how |
| finished | the last step is done |
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.cluster import lease, storage
from pipelines.cluster.masking import masked
from pipelines.tracking.client import connect, first_line, patience, sqlite_file
from pipelines.tracking.config import Tracking
from pipelines.tracking.runs import resolve_uri
from pipelines.tracking.spool import Spool
from pipelines.training.checkpoints import METRICS, read_metrics
from pipelines.training.record import read_record

STARTS = "starts"
"""Folder in a run's folder with one file for each start of its workers."""

WELL = ("preparing", "running", "stopped", "finished")
"""States that need nobody's attention."""

QUALITIES = ("pq", "pq_things", "pq_stuff")
"""Names, behind `val/`, of the figures of a validation that are told."""

SPEED = ("images_per_second", "data_wait", "step_seconds")
"""Names, behind `train/`, of the metrics of which the newest values are told."""


@dataclass(frozen=True)
class Validation:
    """The figures of one validation."""

    step: int
    pq: float
    pq_things: float
    pq_stuff: float
    checkpoint: str
    """Folder of its checkpoint; "" where that is not kept, or not written yet."""
    written: float
    """Unix time at which its figures were written."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is kept, of a validated step or not."""

    step: int
    folder: str
    written: float
    """Unix time at which it was whole."""


@dataclass(frozen=True)
class Status:
    """The status of a run."""

    name: str
    folder: str
    state: str
    """State of the run, from the module's table."""
    step: int = 0
    """Last step that is known of, from metrics or a checkpoint."""
    steps: int = 0
    """Step at which the run ends."""
    checkpoint: Checkpoint | None = None
    """The newest checkpoint."""
    last: Validation | None = None
    """The newest validation, of a checkpoint that is kept or by MLflow."""
    best: Validation | None = None
    """The kept checkpoint of the best PQ."""
    speed: Mapping[str, float] = field(default_factory=dict)
    """`images_per_second`, `data_wait` (0 to 1) and `step_seconds`, means between two log lines."""
    told: float = math.nan
    """Unix time of the figures of `speed`."""
    seconds_left: float = math.nan
    """Seconds for the steps that are left, at that speed and without validations."""
    holder: str = ""
    """The process that holds the run, or held it last."""
    renewed: float = math.nan
    """Unix time of the holder's last sign of life."""
    starts: int = 0
    """Times that a driver began to work on the run."""
    restarts: int = 0
    """Starts of its workers after the first one: by Ray Train after a failure, and by a new driver."""
    mlflow: str = ""
    """Status of its MLflow run, or why there is none."""
    undelivered: tuple[str, ...] = ()
    """Records in its folder that MLflow lacks."""

    @property
    def well(self) -> bool:
        """True where nobody has to look after it."""
        return self.state in WELL


def note_start(folder: storage.Uri, step: int) -> None:
    """Write down that the workers of a run begin at a step. One worker does it; one process at a time holds a run."""
    place = storage.join(storage.absolute(folder), STARTS)
    number = 1 + (len(storage.list_files(place)) if storage.exists(place) else 0)
    content = {"step": step, "time": time.time()}
    storage.write_bytes(storage.join(place, f"{number:06d}.json"), json.dumps(content).encode())


def status(folder: storage.Uri, tracking: Tracking, stalled_after: float, files_only: bool = False) -> Status:
    """The status of the run in a folder.

    Args:
        folder: of the run, local or s3://.
        tracking: its `uri` is where the run is looked for; by default where the run itself would be.
        stalled_after: seconds without progress after which a run that is held counts as stalled.
        files_only: leave MLflow alone.

    Raises:
        ValueError: there is no run; names others of that storage.
    """
    folder = storage.absolute(folder)
    base, name = folder.rsplit("/", 1)
    record = read_record(folder) if storage.exists(folder) else {}
    place = storage.join(folder, "lease")
    holding, starts = lease.last(place), lease.count(place)
    live, renewed = _life(holding)
    about = {"holder": lease.describe(holding) if holding else "", "renewed": renewed, "starts": starts}
    if not record:
        if live:
            return Status(name, folder, "preparing", **about)
        raise ValueError(f"{folder}: no run there{_others(base)}")
    options = record["options"]
    checkpoint, last, best = _kept(folder)
    spool = Spool(folder, record["run_id"])
    spool.load()
    told, speed = _newest(spool.records)
    known = "not asked"
    if not files_only:
        known, step, delivered, validation = _of_mlflow(tracking, options, base, record["run_id"])
        if step >= told.step:
            told, speed = delivered
        if validation is not None and (last is None or validation.step > last.step):
            last = validation
    steps = min(int(options["train.steps"]), int(options.get("train.stop_after") or options["train.steps"]))
    saved, written = (checkpoint.step, checkpoint.written) if checkpoint else (0, 0.0)
    step = max(told.step, saved)
    fresh = max(told.time, written, last.written if last else 0.0, float(holding.get("since", 0.0)))
    restarts = len(storage.list_files(storage.join(folder, STARTS))) if storage.exists(f"{folder}/{STARTS}") else starts
    gone = live is False and not holding.get("released")
    state = _state(live, gone, known, time.time() - fresh > stalled_after, saved, options)
    left = (steps - step) * speed.get("step_seconds", math.nan) if state in ("running", "stalled") else math.nan
    return Status(
        name=name,
        folder=folder,
        state=state,
        step=step,
        steps=steps,
        checkpoint=checkpoint,
        last=last,
        best=best,
        speed=speed,
        told=told.time or math.nan,
        seconds_left=left,
        restarts=max(0, restarts - 1),
        mlflow=known,
        undelivered=tuple(spool.describe()),
        **about,
    )


def _others(base: str) -> str:
    """The runs beside a folder, for a message."""
    if not storage.exists(base):
        return f", and no folder {base}"
    names = [name for name in storage.list_folder(base)[1] if storage.exists(storage.join(base, name, "run.json"))]
    return f"; {base} has {', '.join(names[:10]) or 'no runs'}{' …' if len(names) > 10 else ''}"


def _life(holding: Mapping[str, Any]) -> tuple[bool | None, float]:
    """True if the holder works, None where there never was one; and the Unix time of its last sign of life."""
    if not holding:
        return None, math.nan
    if holding.get("released"):
        return False, float(holding["expires"])
    renewed = float(holding["expires"]) - lease.HOLD_EXPIRY
    alive = lease.is_alive(holding)
    return (holding["expires"] > time.time() if alive is None else alive), renewed


def _state(live: bool | None, gone: bool, known: str, idle: bool, checkpointed: int, options: Mapping[str, Any]) -> str:
    """The state, from the lease, MLflow's status, the time without progress, and the last checkpoint's step."""
    done = checkpointed >= int(options["train.steps"])
    if live or (live is None and known == "RUNNING"):
        return "stalled" if idle else "running"
    if known in ("FAILED", "KILLED"):
        return known.lower()
    if done:
        return "finished"
    if gone:
        return "dead"
    return "stopped" if known == "FINISHED" else "ended"


def _kept(folder: str) -> tuple[Checkpoint | None, Validation | None, Validation | None]:
    """The newest checkpoint, the newest validation, and the best one, of the checkpoints that are kept."""
    whole, found = [], []
    for name, (_, written) in storage.list_stamps(folder).items():
        match = re.fullmatch(rf"(step_(\d+))/{re.escape(METRICS)}", name)
        if match is None:
            continue
        place, step = storage.join(folder, match[1]), int(match[2])
        try:
            values = read_metrics(place)
        except (ValueError, OSError):  # being written, or removed meanwhile
            continue
        whole.append(Checkpoint(step, place, float(written)))
        if "val/pq" in values:  # a checkpoint between validations has none
            found.append(_validation(step, values, place, float(written)))
    newest = max(found, key=lambda one: one.step, default=None)
    best = max(found, key=lambda one: (one.pq if one.pq == one.pq else -1.0, one.step), default=None)
    return max(whole, key=lambda one: one.step, default=None), newest, best


def _validation(step: int, values: Mapping[str, float], checkpoint: str, written: float) -> Validation:
    pq, things, stuff = (values.get(f"val/{name}", math.nan) for name in QUALITIES)
    return Validation(step, pq, things, stuff, checkpoint, written)


@dataclass(frozen=True)
class Told:
    """The moment of the newest figures."""

    step: int = 0
    time: float = 0.0


def _newest(records: list[dict[str, Any]]) -> tuple[Told, dict[str, float]]:
    """The newest figures of speed among records that were not delivered."""
    speed, told = {}, Told()
    for record in records:
        name = str(record.get("key", "")).removeprefix("train/")
        if name in SPEED and record["step"] >= told.step:
            told = Told(record["step"], record["timestamp"] / 1000)
            speed[name] = record["value"]
    return told, speed


def _of_mlflow(
    tracking: Tracking, options: Mapping[str, Any], base: str, run_id: str
) -> tuple[str, int, tuple[Told, dict[str, float]], Validation | None]:
    """Status of the MLflow run, or why there is none; the step of its newest figures; the figures; its validation."""
    own = str(options.get("tracking.uri") or "")
    own = "" if "***" in own else own  # a password was left out
    uri = resolve_uri(Tracking(uri=tracking.uri or own), base if "://" not in base else "runs")
    file = sqlite_file(uri)
    if file and not Path(file).exists():  # asking would create it
        return f"no store at {file}", -1, (Told(), {}), None
    names = [*(f"train/{name}" for name in SPEED), *(f"val/{name}" for name in QUALITIES)]
    try:
        with patience(1, 10):
            client = connect(uri)
            run = client.get_run(run_id)
            history = {name: client.get_metric_history(run_id, name) for name in names}
    except Exception as error:  # whatever MLflow, requests or SQLAlchemy raise
        return f"{masked(uri)} does not tell ({first_line(error)})", -1, (Told(), {}), None
    newest = {name: max(entries, key=lambda e: (e.step, e.timestamp)) for name, entries in history.items() if entries}
    validation = None
    if (quality := newest.get("val/pq")) is not None:
        same = {name: entry.value for name, entry in newest.items() if entry.step == quality.step}
        validation = _validation(quality.step, same, "", quality.timestamp / 1000)
    speed = {name: newest[f"train/{name}"] for name in SPEED if f"train/{name}" in newest}
    if not speed:
        return run.info.status, -1, (Told(), {}), validation
    at = max(speed.values(), key=lambda entry: entry.step)
    figures = {name: entry.value for name, entry in speed.items()}
    return run.info.status, at.step, (Told(at.step, at.timestamp / 1000), figures), validation


def lines(status: Status) -> str:
    """The status for people."""
    now = time.time()
    progress = f", step {status.step} of {status.steps}" if status.steps else ""
    percent = f" ({100 * status.step / status.steps:.0f} %)" if status.steps else ""
    rows = []
    if status.holder:
        verb = "held" if status.state in ("preparing", "running", "stalled") else "last held"
        rows.append(("driver", f"{verb} by {status.holder}, sign of life {ago(now - status.renewed)}"))
    if status.last is not None:
        one = status.last
        if one.pq == one.pq:  # a checkpoint between validations has none
            shown = f"{one.pq:.2f} (things {one.pq_things:.2f}, stuff {one.pq_stuff:.2f}) at step {one.step}"
            rows.append(("PQ", shown))
        if status.best is not None and status.best.step != one.step and status.best.pq == status.best.pq:
            rows.append(("best", f"{status.best.pq:.2f} at step {status.best.step}, {status.best.checkpoint}"))
    if status.checkpoint is not None:
        kept = status.checkpoint
        rows.append(("checkpoint", f"step {kept.step}, {ago(now - kept.written)}, {kept.folder}"))
    elif status.steps:
        rows.append(("checkpoint", "none yet"))
    if status.speed:
        values = {"images_per_second": math.nan, "data_wait": math.nan, "step_seconds": math.nan, **status.speed}
        rows.append(
            (
                "speed",
                f"{values['images_per_second']:.1f} images/s, data wait {100 * values['data_wait']:.0f} %, "
                f"{values['step_seconds']:.3f} s a step, {ago(now - status.told)}",
            )
        )
    if status.seconds_left == status.seconds_left:
        rows.append(("left", f"{duration(status.seconds_left)} of steps, without validations"))
    rows.append(("restarts", f"{status.restarts} of the workers, {status.starts} starts of a driver"))
    if status.mlflow:
        rows.append(("MLflow", status.mlflow))
    if status.undelivered:
        rows.append(("", f"{len(status.undelivered)} records to be sent: {', '.join(status.undelivered[:3])}"))
    told = [f"{head:12}{text}" for head, text in rows]
    return "\n".join([f"{status.name}: {status.state}{progress}{percent}", *told])


def ago(seconds: float) -> str:
    """A time that has passed, as "1:02:03 ago"."""
    return f"{duration(max(0.0, seconds))} ago"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    if seconds != seconds:
        return "?"
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
