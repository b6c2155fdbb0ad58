"""The one place that starts or joins Ray.

The same call serves a script on a laptop (a private local session), `ray job submit` and any existing
cluster (`RAY_ADDRESS` is set), and code that runs inside a session (tests, Tune trials, workers).
Ray is imported inside the functions: its environment defaults must be set first.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]

ENVIRONMENT = {
    # Trials and workers keep the working directory of the driver, so that relative paths mean the same.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Without it every line printed in a training worker appears twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # `uv run` would otherwise rebuild the environment in every worker.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
"""Defaults set before Ray is imported; what the user exported wins."""

API_SERVER = "RAY_API_SERVER_ADDRESS"

OBJECT_STORE = 1 << 30
"""Bytes of a local session's object store: only encoded images and compact maps cross it. Pages are taken as used."""

ATTEMPTS = 2
"""How often a local session is started before that is an error."""


def connect(cpus: int | None = None, object_store: int = OBJECT_STORE) -> None:
    """Join the Ray session that is there, or start a local one.

    An initialised session is reused. With `RAY_ADDRESS` set (as `ray job submit` does) the cluster is
    joined as it is: Ray refuses sizes for a cluster that already runs. Otherwise a local session starts.

    Args:
        cpus: logical CPUs of a local session, which may exceed the cores; None = as many as Ray counts.
        object_store: bytes of a local session's object store.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if not ray.is_initialized():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(logging_level=logging.WARNING)
        else:
            _start(cpus, object_store)
    data_context()


def _start(cpus: int | None, object_store: int) -> None:
    """A local session whose processes find our packages, installed or not."""
    import ray

    # A private session on the loopback address. Left unset, Ray would write a token into the home folder
    # that switches authentication on for clusters started later, whose clients do not pick it up.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(REPOSITORY) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, paths)])

    def start() -> None:
        port = _free_port()
        with _told(port):
            ray.init(
                address="local",
                num_cpus=cpus,
                object_store_memory=object_store,
                include_dashboard=True,  # Ray Train reclaims the resources of dead trials through it
                dashboard_port=port,
                logging_level=logging.WARNING,
            )

    _start_patiently(start)


def _start_patiently(start: Callable[[], None]) -> None:
    """Start a session, and once more where that fails: on a busy machine Ray's processes miss each other's deadlines.

    What the first attempt left running is ended, so that it does not make the second one slower.

    Raises:
        ConnectionError: it failed twice.
        ValueError: the arguments of `ray.init` are wrong, which another attempt would not mend.
    """
    import ray

    reason = ""
    for _ in range(ATTEMPTS):
        before = _children()
        try:
            return start()
        except ValueError:
            raise
        except Exception as error:  # Ray raises bare exceptions here
            reason = " ".join(str(error).split())
        ray.shutdown()
        for process in _children() - before:
            with suppress(OSError):  # it ended meanwhile
                os.kill(process, signal.SIGKILL)
    logs = os.path.join(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "session_latest", "logs")
    raise ConnectionError(
        f"Ray did not start, {ATTEMPTS} times ({reason}). The machine may be too busy or short of memory: give the "
        f"same command again when it has room; Ray's logs are in {logs}"
    )


def _children() -> set[int]:
    """Ids of the processes that this one started and that still run."""
    import psutil  # Ray carries it along

    return {process.pid for process in psutil.Process().children()}


@contextmanager
def _told(port: int) -> Iterator[None]:
    """Processes of a session that starts in here know where its API server listens.

    Left to themselves they look for a running Ray, and stumble over a second session on the machine.
    """
    before = os.environ.get(API_SERVER)
    os.environ[API_SERVER] = f"http://127.0.0.1:{port}"
    try:
        yield
    finally:
        if before is None:
            del os.environ[API_SERVER]
        else:
            os.environ[API_SERVER] = before


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def printing_to(folder: str | None) -> Iterator[None]:
    """Printed lines of this process go to log.txt in a folder, nowhere where that is None, to the console where ""."""
    if folder == "":
        yield
        return
    if folder is not None:
        os.makedirs(folder, exist_ok=True)
    with open(os.devnull if folder is None else os.path.join(folder, "log.txt"), "a") as file, redirect_stdout(file):
        yield


def data_context() -> None:
    """Ray Data defaults for datasets built from now on in this process."""
    from ray.data import DataContext

    context = DataContext.get_current()
    # The second Parquet reader loses rows when a path is listed twice, and takes seconds to its first batch.
    context.use_datasource_v2 = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that there are no bars


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM, which would end the process on the spot, as SystemExit.

    Also in place of Ray's handler, which first ends Ray's processes: without them Ray's own threads abort this one,
    often before its MLflow runs are closed. What Ray started ends with the process as after any exit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    came: list[int] = []

    def stop(number: int, frame: Any) -> None:
        came.append(number)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit as error:
        if came:  # what was waiting inside of Ray leaves it with another code
            raise SystemExit(128 + came[0]) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
