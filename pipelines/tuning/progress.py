"""The progress of a sweep: one table of its trials, and each trial's state in MLflow.

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

from panoptic.metrics.text import text_table
from pipelines.cluster import storage
from pipelines.cluster.json_file import read_json
from pipelines.tracking import runs
from pipelines.tuning import concurrency
from pipelines.tuning.failures import record_failure
from pipelines.tuning.plan import Plan, failure_file, run_id
from pipelines.tuning.trial import WORST
from pipelines.tuning.trial_config import config_of

logger = logging.getLogger(__name__)

TERMINAL_SECONDS = 2.0
"""Seconds between two tables on a terminal."""

LOG_SECONDS = 30.0
"""Least seconds between two tables in a log, where a trial's state has changed."""

LINE_SECONDS = 10.0
"""Seconds between two lines of a log that say how far the sweep has come."""

QUIET_SECONDS = 600.0
"""Seconds between two tables in a log where none has."""

TRIALS = "trials.json"
"""File of a sweep's folder that holds its trials as they stood when it last ended."""

SHOWN = 30
"""Trials in the table; of more the running, failed and best ones."""

STATES = ("running", "failed", "finished", "pruned", "waiting")
"""States of a trial, in the order in which a long table keeps them."""

STATUS = {"RUNNING": "running", "TERMINATED": "finished", "ERROR": "failed"}
"""States by Tune's status of a trial; PENDING and PAUSED wait."""


@dataclass(frozen=True)
class TrialResult:
    """The state and the metric of a trial, while it runs or at its end."""

    identity: str
    """Id of the trial in Tune."""
    label: str
    """Name of the trial: the options in which it differs."""
    state: str
    """One of `STATES`; pruned = ended by the scheduler."""
    step: int = 0
    """Step of its last validation."""
    total: int = 0
    """Steps in all; 0 = not known yet."""
    value: float = math.nan
    """Last value of the metric that trials are compared by."""
    best: float = math.nan
    """Best value of that metric."""
    reason: str = ""
    """Why it failed."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of its MLflow run: what differs between the trials."""

    @property
    def ended(self) -> bool:
        """True if nothing more comes."""
        return self.state in ("finished", "pruned", "failed")


def table(results: Sequence[TrialResult], metric: str = "PQ", mode: str = "max", most: int = SHOWN) -> str:
    """The trials as text, best first, with the number in each state above.

    Args:
        results: of the trials.
        metric: heading of the values.
        mode: max where more of it is better, else min.
        most: trials in the table.
    """
    counts = {state: sum(result.state == state for result in results) for state in STATES}
    head = f"{len(results)} trials: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    ordered = ranked(results, mode)
    if len(ordered) > most:
        first = sorted(ordered, key=lambda result: STATES.index(result.state))[: most // 2]
        others = [result for result in ordered if result not in first]
        kept = {id(result) for result in [*first, *others[: most - len(first)]]}
        head += f"; {len(kept)} of them:"
        ordered = [result for result in ordered if id(result) in kept]
    rows = [["trial", "state", "step", metric, "best", ""]]
    for place, result in enumerate(ordered):
        star = "*" if place == 0 and not math.isnan(result.best) else ""
        step = f"{result.step}/{result.total}" if result.total else "-"
        figures = [number(result.value), number(result.best) + star]
        rows.append([result.label, result.state, step, *figures, result.reason[:80]])
    return f"{head}\n{text_table(rows, words=('state', ''))}"


def share_done(results: Sequence[TrialResult], count: int) -> float:
    """The share of all steps of all trials that is done, or that nobody will do: a trial that ended counts as whole."""
    parts = [1.0 if result.ended else min(result.step / result.total, 1.0) for result in results if result.total]
    parts += [1.0 for result in results if result.ended and not result.total]
    return sum(parts) / max(count, len(results), 1)


def line(results: Sequence[TrialResult], count: int, began: float, seconds: float) -> str:
    """The progress of a sweep in a line: trials that ended, the share of all steps, and the time that is left.

    Args:
        results: of the trials that Tune has made.
        count: trials in all, 0 = not known.
        began: the share that was done when this process began.
        seconds: since then.
    """
    done, total = share_done(results, count), max(count, len(results))
    ended = sum(result.ended for result in results)
    text = f"trials: {ended} of {total} ended, {done:.0%} of all steps"
    if done <= began or done >= 1:
        return text
    left = round(seconds * (1 - done) / (done - began))
    return f"{text}, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"


def ranked(results: Sequence[TrialResult], mode: str = "max") -> list[TrialResult]:
    """The trials, best first, those without a value last."""
    sign = -1 if mode == "max" else 1
    return sorted(results, key=lambda result: math.inf if math.isnan(result.best) else sign * result.best)


def number(value: float) -> str:
    """A value with two digits, three significant ones where it is small; `-` for NaN."""
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"


class Display:
    """Writes a table when it is due."""

    def __init__(self, terminal: bool) -> None:
        """Args:
        terminal: the table is drawn in place.
        """
        self.terminal = terminal
        self._last, self._states, self._height = -math.inf, "", 0
        self._text = ""
        self._line = -math.inf

    def due(self, now: float, states: str) -> bool:
        """True if a table should be written at the time `now`, in seconds; `states` are those of all trials."""
        waited = now - self._last
        if self.terminal:
            return waited >= TERMINAL_SECONDS
        return waited >= (LOG_SECONDS if states != self._states else QUIET_SECONDS)

    def line_due(self, now: float) -> bool:
        """True if a log should have a line of progress at the time `now`; a terminal has it in its table."""
        if self.terminal or now - self._line < LINE_SECONDS:
            return False
        self._line = now
        return True

    @property
    def most(self) -> int:
        """Trials in a table: on a terminal, those that it holds beside the two lines above and the cursor's."""
        return min(SHOWN, max(1, shutil.get_terminal_size().lines - 3)) if self.terminal else SHOWN

    def write(self, text: str, now: float, states: str) -> None:
        """Write a table, on a terminal over the last one, where a line that is too long would take two."""
        if self.terminal:
            width = shutil.get_terminal_size().columns
            text = "\n".join(line[:width] for line in text.splitlines())
        if text != self._text:
            up = f"\x1b[{self._height}F\x1b[J" if self.terminal and self._height else ""
            print(up + text if self.terminal else f"\n{text}", flush=True)
            self._height = text.count("\n") + 1
        self._text, self._last, self._states = text, now, states


class Progress(Callback):
    """A callback of Ray Tune that shows the trials in a table and writes their states into their MLflow runs.

    Tune pickles it into its own snapshots; only the plan goes along.
    """

    def __init__(self, plan: Plan) -> None:
        """Args:
        plan: of the sweep.
        """
        self.plan = plan
        self._forget()

    def _forget(self) -> None:
        """Reset what does not outlive the process."""
        self._display: Display | None = None
        self._limiter: Any = None
        self._running: list[str] = []
        self._began: tuple[float, float] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"plan": self.plan}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.plan = state["plan"]
        self._forget()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called at each turn of Tune's loop."""
        self.update_limiter([trial.trial_id for trial in trials if trial.status == "RUNNING"])
        self.show(trials)

    def update_limiter(self, running: list[str]) -> None:
        """Send the limiter the ids of the trials that Tune runs, where these have changed."""
        if running == self._running:
            return
        if self._limiter is None:
            self._limiter = concurrency.find_limiter(self.plan.parent.run_id)
        if self._limiter is not None:
            self._limiter.update.remote(running)
            self._running = running

    def show(self, trials: Sequence[Any], last: bool = False) -> None:
        """Write the table if it is due, or because it is the last; what fails in it must not end the sweep."""
        _guarded("the table could not be shown", lambda: self._show(trials, last))

    def _show(self, trials: Sequence[Any], last: bool) -> None:
        if self._display is None:
            self._display = Display(sys.stdout.isatty())
        now, states = time.monotonic(), " ".join(f"{trial.trial_id}:{trial.status}" for trial in trials)
        due, told = last or self._display.due(now, states), self._display.line_due(now)
        if not due and not told:
            return
        results, metric = [result_of(trial, self.plan) for trial in trials], short_metric(self.plan.metric)
        if self._began is None:
            self._began = (now, share_done(results, self.plan.count))
        head = line(results, self.plan.count, self._began[1], now - self._began[0])
        if due:
            text = table(results, metric, self.plan.mode, self._display.most - 1)
            self._display.write(f"{head}\n{text}", now, states)
        else:
            print(head, flush=True)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Write the last table, and the trials' results into the sweep's folder."""
        self.show(trials, last=True)
        content = [asdict(result_of(trial, self.plan)) for trial in trials]
        storage.write_bytes(storage.join(self.plan.folder, TRIALS), json.dumps(content, indent=1).encode())

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write the state of a trial that finished or was stopped by the scheduler."""
        _guarded("a trial's state was not written", lambda: self._complete(trial))

    def _complete(self, trial: Any) -> None:
        result = result_of(trial, self.plan, ended=True)
        known = run_id(self.plan.folder, trial.trial_id)
        if not known:
            return
        run = replace(self.plan.parent, run_id=known)
        state = f"pruned at step {result.step} of {result.total}" if result.state == "pruned" else "finished"
        runs.tag(run, {"state": state})
        runs.finish(run, "KILLED" if result.state == "pruned" else "FINISHED")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write the reason of a failed trial that could not leave it itself, because its process died."""
        _guarded("a trial's failure was not written", lambda: self._fail(trial))

    def _fail(self, trial: Any) -> None:
        if storage.exists(failure_file(self.plan.folder, trial.trial_id)):
            return
        text = Path(trial.error_file).read_text() if trial.error_file else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        reason = lines[-1] if lines else "its process died"
        record_failure(self.plan, config_of(trial.config, self.plan), trial.trial_id, reason)


def _guarded(failure: str, work: Callable[[], None]) -> None:
    """Do what only informs of a sweep: a store that is away must not end it; `failure` is logged then."""
    try:
        work()
    except Exception as error:  # whatever the storage, MLflow or the terminal raise
        logger.warning("%s (%s: %s)", failure, type(error).__name__, error)


def result_of(trial: Any, plan: Plan, ended: bool = False) -> TrialResult:
    """The state and the metric of a trial of Tune.

    Args:
        trial: `ray.tune.experiment.Trial`.
        plan: of the sweep.
        ended: it has ended, whatever its status says.
    """
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
    objective = float((trial.metric_analysis or {}).get("objective", {}).get(plan.mode, math.nan))
    best = objective if abs(objective) < WORST else math.nan
    config = config_of(trial.config, plan)
    return TrialResult(trial.trial_id, config.label, state, step, total, value, best, reason, dict(config.params))


def short_metric(metric: str) -> str:
    """A metric's name as a heading: `val/pq_things` is PQ things."""
    words = metric.removeprefix("val/").replace("_", " ")
    return words.replace("pq", "PQ") if words.startswith("pq") else words


def rows(results: Sequence[TrialResult], metric: str) -> list[dict[str, Any]]:
    """The trials for a CSV file, one row each."""
    return [
        {
            "trial": result.label,
            "state": result.state,
            "step": result.step,
            metric: result.value,
            f"best {metric}": result.best,
            "reason": result.reason,
            **result.params,
        }
        for result in results
    ]


def read(folder: str) -> list[TrialResult]:
    """The trials of a sweep as they stood when it last ended."""
    remedy = "the sweep goes on with --resume, which writes it anew"
    return read_json(storage.join(folder, TRIALS), list[TrialResult], remedy)
