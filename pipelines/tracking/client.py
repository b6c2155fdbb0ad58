"""Clients of MLflow with bounded patience, what is known of a store that is away, and names that MLflow accepts.

MLflow by itself retries a request for four minutes and prints each retry. Here a request has few seconds
(`patience`), a store that failed is left in peace for a moment by everything in the process (`attempt`, `answering`),
and an outage is two lines: one when the store goes, one when it is back.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.cluster.masking import masked

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger("pipelines.tracking")

PAUSE = 15.0
"""Seconds for which a store that failed is not asked again."""

LAST_WORDS = 5
"""Seconds of a request at the end of a run: status, description, the question whether the store answers."""

REFUSALS = (400, 413, 422)
"""HTTP statuses of a store that is there and will never take what it was sent. 404 is none: a proxy says it, too."""


class Refused(ValueError):
    """The store answered that it does not take something; sending it again does not help."""


class Unwritten(ValueError):
    """Something could not be written although the store answers; it alone is tried again."""


@dataclass
class Outage:
    """One store that does not answer, as this process knows it."""

    began: float
    """Monotonic time of the first failure."""
    quiet_until: float
    """Monotonic time before which it is not asked again."""
    reason: str
    """First line of the last error."""


_lock = threading.RLock()
_outages: dict[str, Outage] = {}
_patience: list[dict[str, str]] = []
_environment: dict[str, str | None] = {}


def connect(uri: str) -> MlflowClient:
    """A client of one store, whatever store the process uses otherwise."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    with _alone(uri):
        return mlflow.MlflowClient(tracking_uri=uri)


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process of this machine at a time, for a SQLite store: the first client of a new one creates its tables.

    Of several that do so at once all but one fail. The lock is a file beside the database and ends with its process;
    where it cannot be created, neither can the database, and MLflow says so.
    """
    path = sqlite_file(uri)
    if not path or not os.access(os.path.dirname(path) or ".", os.W_OK):
        yield
        return
    import fcntl

    with open(f"{path}.lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sqlite_uri(path: str) -> str:
    """The URI of a SQLite file, with what SQLAlchemy would take for something else (`?`, `%20`) quoted.

    MLflow 3.14 makes an empty folder of the quoted name beside such a file, and uses the right one.

    Raises:
        ValueError: SQLAlchemy would open another file, whatever is quoted.
    """
    if "?" not in path and "%" not in path:
        return f"sqlite:///{path}"
    uri = f"sqlite:///{path.replace('%', '%25').replace('?', '%3F')}"
    if sqlite_file(uri) != path:
        raise ValueError(f"{path}: MLflow cannot open a store in a folder with ? or % in its name; give another folder")
    return uri


def sqlite_file(uri: str) -> str:
    """The file of a SQLite store as SQLAlchemy opens it; "" of other stores and of those in memory."""
    if not uri.startswith("sqlite:///"):
        return ""
    if "?" not in uri and "%" not in uri:
        return uri.removeprefix("sqlite:///")
    from sqlalchemy.engine import make_url

    return make_url(uri).database or ""


@contextmanager
def patience(retries: int, timeout: int) -> Iterator[None]:
    """Limit MLflow's retries and seconds per request; without progress bars and lines about retries.

    MLflow reads both from the environment, which is that of the whole process: of several threads inside, the one
    that entered last decides for all. The environment is as it was when the last one has left.
    """
    wanted = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout),
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    with _lock:
        if not _patience:
            _environment.update({name: os.environ.get(name) for name in wanted})
            logging.getLogger("urllib3.connectionpool").addFilter(_no_retries)
        _patience.append(wanted)
        _set_environment(wanted)
    try:
        yield
    finally:
        with _lock:
            _patience[:] = [entry for entry in _patience if entry is not wanted]
            _set_environment(_patience[-1] if _patience else _environment)
            if not _patience:
                logging.getLogger("urllib3.connectionpool").removeFilter(_no_retries)


def _set_environment(values: Mapping[str, str | None]) -> None:
    """Set variables, or remove those that are None; one that is right is left alone, since C libraries may read it."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        elif os.environ.get(name) != value:
            os.environ[name] = value


RETRY = "Retrying ("
"""The beginning of urllib3's warning about a retry, whose logger and level are those of its other warnings."""


def _no_retries(record: logging.LogRecord) -> bool:
    """Drops urllib3's paragraph about each retry; the outage has a line of its own."""
    return not str(record.msg).startswith(RETRY)


def attempt(uri: str, write: Callable[[], object], timeout: int, *, at_once: bool = False) -> bool:
    """Write to a store that may be away; True on success.

    Nothing is tried within `PAUSE` seconds of a failure, of whatever part of the process, unless `at_once`.

    Args:
        uri: of the store.
        write: one request or few.
        timeout: seconds of each request, which is not retried.

    Raises:
        Refused: the store is there and does not take it.
        Unwritten: `write` found that the store answers.
    """
    with _lock:
        outage = _outages.get(uri)
        if outage is not None and not at_once and time.monotonic() < outage.quiet_until:
            return False
    try:
        with patience(0, timeout):
            write()
    except Unwritten:
        _answered(uri)
        raise
    except Exception as error:  # whatever MLflow, requests, boto3 or SQLAlchemy raise: training goes on
        if status(error) in REFUSALS:
            _answered(uri)
            raise Refused(first_line(error)) from error
        _failed(uri, error)
        return False
    _answered(uri)
    return True


def reach(uri: str, timeout: int = LAST_WORDS) -> MlflowClient:
    """A client of a store that answers now.

    Raises:
        ConnectionError: it does not answer, or failed within the last `PAUSE` seconds.
    """
    clients: list[MlflowClient] = []

    def ask() -> None:
        clients.append(connect(uri))
        clients[-1].search_experiments(max_results=1)

    if attempt(uri, ask, timeout):
        return clients[-1]
    outage = _outages.get(uri)
    reason = "" if outage is None else f" ({outage.reason})"
    raise ConnectionError(f"MLflow at {masked(uri)} does not answer{reason}")


@contextmanager
def answering(uri: str, timeout: int = LAST_WORDS) -> Iterator[MlflowClient]:
    """A client of a store that answers now, with bounded patience for what it is asked inside.

    Raises:
        ConnectionError: as `reach`. An error inside the block passes as it is.
    """
    client = reach(uri, timeout)
    with patience(1, timeout):
        yield client


def _failed(uri: str, error: Exception) -> None:
    """Note a failure; the first of an outage is told."""
    now, reason = time.monotonic(), first_line(_root(error))
    with _lock:
        known = _outages.get(uri)
        _outages[uri] = Outage(now if known is None else known.began, now + PAUSE, reason)
    if known is None:
        logger.warning(
            "tracking: MLflow at %s does not answer (%s); what it lacks is sent when it does", masked(uri), reason
        )


def _answered(uri: str) -> None:
    """Note an answer; the first after an outage is told."""
    with _lock:
        outage = _outages.pop(uri, None)
    if outage is not None:
        logger.warning("tracking: MLflow at %s is back after %.0f s", masked(uri), time.monotonic() - outage.began)


def _root(error: BaseException) -> BaseException:
    """The error with which a chain began: "connection refused" under three layers of MLflow, requests and urllib3."""
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    return error


def status(error: Exception) -> int:
    """The HTTP status of an answer; 0 where there was no answer."""
    response = getattr(error, "response", None)
    if response is not None:
        return int(getattr(response, "status_code", 0))
    status = getattr(error, "get_http_status_code", None)  # of an MlflowException, also of stores without HTTP
    return 0 if status is None else int(status())


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's name where it has none."""
    text = str(error).strip() or type(error).__name__
    return masked(text.splitlines()[0])[:200]
