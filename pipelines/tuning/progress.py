"""What a sweep shows while it runs: one table of its trials, and each trial's state in MLflow.

On a terminal the table is drawn in place. In a log it is written when a trial starts or ends, at most every
`LOG_SECONDS`, and otherwise every `QUIET_SECONDS`, so that a long job's log stays readable.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ray.tune import Callback

from pipelines.cluster import storage
from pipelines.tracking import runs, tracker
from pipelines.tuning import concurrency
from pipelines.tuning.failures import record_failure
from pipelines.tuning.plan import Plan, failure_file, run_id
from pipelines.tuning.trial import WORST
from pipelines.tuning.trial_config import row_of

logger = logging.getLogger(__name__)

TERMINAL_SECONDS = 2.0
LOG_SECONDS = 30.0
QUIET_SECONDS = 600.0

TRIALS = "trials.json"

SHOWN = 30
"""Trials in the table; of more the running, failed and best ones."""


@dataclass(frozen=True)
class Line:
    """A trial in the table."""

    identity: str
    label: str
    state: str
    """waiting, running, finished, pruned, failed."""
    step: int = 0
    total: int = 0
    value: float = math.nan
    """Last objective."""
    best: float = math.nan
    reason: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self.state in ("finished", "pruned", "failed")


def table(lines: Sequence[Line], metric: str = "PQ", mode: str = "max", most: int = SHOWN) -> str:
    """The trials as text, best first, with the number in each state above."""
    counts = {state: sum(line.state == state for line in lines) for state in STATES}
    head = f"{len(lines)} trials: " + ", ".join(f"{number} {state}" for state, number in counts.items() if number)
    ordered = ranked(lines, mode)
    if len(ordered) > most:
        first = sorted(ordered, key=lambda line: STATES.index(line.state))[: most // 2]
        kept = {id(line) for line in [*first, *[line for line in ordered if line not in first][: most - len(first)]]}
        head += f"; {len(kept)} of them:"
        ordered = [line for line in ordered if id(line) in kept]
    rows = [["trial", "state", "step", metric, "best", ""]]
    for place, line in enumerate(ordered):
        star = "*" if place == 0 and line.best == line.best else ""
        step = f"{line.step}/{line.total}" if line.total else "-"
        rows.append([line.label, line.state, step, number(line.value), number(line.best) + star, line.reason[:80]])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    left = (True, True, False, False, False, True)
    text = (
        "  ".join(cell.ljust(w) if first else cell.rjust(w) for cell, w, first in zip(row, widths, left, strict=True))
        for row in rows
    )
    return "\n".join([head, *(line.rstrip() for line in text)])


STATES = ("running", "failed", "finished", "pruned", "waiting")


def ranked(lines: Sequence[Line], mode: str = "max") -> list[Line]:
    """Best first; trials without a value last."""
    sign = -1 if mode == "max" else 1
    return sorted(lines, key=lambda line: sign * line.best if line.best == line.best else math.inf)


def number(value: float) -> str:
    """Two digits, `-` where there is none."""
    return "-" if value != value else f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"


class Display:
    """Writes a table when it is due."""

    def __init__(self, terminal: bool) -> None:
        """Args:
        terminal: draw in place.
        """
        self.terminal = terminal
        self._last, self._states, self._height = -math.inf, "", 0
        self._text = ""

    def due(self, now: float, states: str) -> bool:
        """Whether something should be written at a time, in seconds; `states` of all trials as one text."""
        waited = now - self._last
        if self.terminal:
            return waited >= TERMINAL_SECONDS
        return waited >= (LOG_SECONDS if states != self._states else QUIET_SECONDS)

    @property
    def most(self) -> int:
        """Trials that a table may have: on a terminal, what it holds beside the two lines above and the cursor's."""
        return min(SHOWN, max(1, shutil.get_terminal_size().lines - 3)) if self.terminal else SHOWN

    def write(self, text: str, now: float, states: str) -> None:
        """Write it, over the last one on a terminal, where a line that is too long would take two."""
        if self.terminal:
            width = shutil.get_terminal_size().columns
            text = "\n".join(line[:width] for line in text.splitlines())
        if text != self._text:
            up = f"\x1b[{self._height}F\x1b[J" if self.terminal and self._height else ""
            print(up + text if self.terminal else f"\n{text}", flush=True)
            self._height = text.count("\n") + 1
        self._text, self._last, self._states = text, now, states


class Progress(Callback):
    """Ray Tune's events as a table, and as states of the trials' MLflow runs. Survives Tune's own snapshots."""

    def __init__(self, plan: Plan) -> None:
        """Args:
        plan: of the sweep.
        """
        self.plan = plan
        self._forget()

    def _forget(self) -> None:
        """What does not outlive the process."""
        self._display: Display | None = None
        self._trial_limit: Any = None
        self._running: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"plan": self.plan}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.plan = state["plan"]
        self._forget()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Of Tune's loop."""
        self.let_through([trial.trial_id for trial in trials if trial.status == "RUNNING"])
        self.show(trials)

    def let_through(self, running: list[str]) -> None:
        """Tell the trial_limit which trials Tune has started, where that changed."""
        if running == self._running:
            return
        if self._trial_limit is None:
            self._trial_limit = concurrency.find_trial_limit(self.plan.parent.run_id)
        if self._trial_limit is not None:
            self._trial_limit.update.remote(running)
            self._running = running

    def show(self, trials: Sequence[Any], last: bool = False) -> None:
        """Write the table if it is due, or because it is the last; what fails in it must not end the sweep."""
        _guarded("the table could not be shown", lambda: self._show(trials, last))

    def _show(self, trials: Sequence[Any], last: bool) -> None:
        if self._display is None:
            self._display = Display(sys.stdout.isatty())
        now, states = time.monotonic(), " ".join(f"{trial.trial_id}:{trial.status}" for trial in trials)
        if last or self._display.due(now, states):
            lines, metric = [line_of(trial, self.plan) for trial in trials], short_metric(self.plan.metric)
            text = table(lines, metric, self.plan.mode, self._display.most)
            self._display.write(text, now, states)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """The last table, and the trials for whoever started the sweep."""
        self.show(trials, last=True)
        content = [asdict(line_of(trial, self.plan)) for trial in trials]
        storage.write_bytes(storage.join(self.plan.folder, TRIALS), json.dumps(content, indent=1).encode())

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Finished, or stopped by the scheduler."""
        _guarded("a trial's state was not written", lambda: self._complete(trial))

    def _complete(self, trial: Any) -> None:
        line = line_of(trial, self.plan, ended=True)
        known = run_id(self.plan.folder, trial.trial_id)
        if not known:
            return
        run = replace(self.plan.parent, run_id=known)
        state = f"pruned at step {line.step} of {line.total}" if line.state == "pruned" else "finished"
        tracker.Tracker(run).tags({"state": state})
        runs.finish(run, "KILLED" if line.state == "pruned" else "FINISHED")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial whose process died could not leave its reason."""
        _guarded("a trial's failure was not written", lambda: self._fail(trial))

    def _fail(self, trial: Any) -> None:
        if storage.exists(failure_file(self.plan.folder, trial.trial_id)):
            return
        text = Path(trial.error_file).read_text() if trial.error_file else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        reason = lines[-1] if lines else "its process died"
        record_failure(self.plan, row_of(trial.config, self.plan), trial.trial_id, reason)


def _guarded(what: str, work: Callable[[], None]) -> None:
    """Do what only tells of a sweep: a store that is away must not end it."""
    try:
        work()
    except Exception as error:  # whatever the storage, MLflow or the terminal raise
        logger.warning("%s (%s: %s)", what, type(error).__name__, error)


def line_of(trial: Any, plan: Plan, ended: bool = False) -> Line:
    """A trial of Tune as a line of the table."""
    last = trial.last_result or {}
    step, total = int(last.get("step", 0)), int(last.get("total", 0))
    state = STATUS.get(trial.status, "waiting")
    if ended or (state == "finished" and (last.get("done") or 0 < total <= step)):
        state = "finished" if step >= total else "pruned"
    elif state == "finished":  # Tune was interrupted, and ends what runs as if it were done
        state = "waiting"
    reason = ""
    if trial.status == "ERROR":
        file = failure_file(plan.folder, trial.trial_id)
        reason = storage.read_bytes(file).decode() if storage.exists(file) else "see its log"
    value = float(last.get(plan.metric, math.nan))
    found = (trial.metric_analysis or {}).get("objective", {}).get(plan.mode, math.nan)
    best = float(found) if abs(float(found)) < WORST else math.nan
    row = row_of(trial.config, plan)
    return Line(trial.trial_id, row.label, state, step, total, value, best, reason, dict(row.params))


STATUS = {"RUNNING": "running", "TERMINATED": "finished", "ERROR": "failed"}
"""Tune's words for ours; PENDING and PAUSED wait."""


def short_metric(metric: str) -> str:
    """`val/pq_things` is PQ things."""
    words = metric.removeprefix("val/").replace("_", " ")
    return words.replace("pq", "PQ") if words.startswith("pq") else words


def rows(lines: Sequence[Line], metric: str) -> list[dict[str, Any]]:
    """For a CSV file: one row a trial."""
    return [
        {
            "trial": line.label,
            "state": line.state,
            "step": line.step,
            metric: line.value,
            f"best {metric}": line.best,
            "reason": line.reason,
            **line.params,
        }
        for line in lines
    ]


def read(folder: str) -> list[Line]:
    """The trials of a sweep as they stood when it last ended."""
    return [Line(**entry) for entry in json.loads(storage.read_bytes(storage.join(folder, TRIALS)))]
