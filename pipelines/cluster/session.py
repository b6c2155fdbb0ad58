"""The one place that starts or joins Ray.

The same call serves a script on a laptop (a private session, closed to the network and to other users), `ray job
submit` and any existing cluster (`RAY_ADDRESS` is set), and code that runs inside a session (tests, Tune trials,
workers).
Ray is imported inside the functions: its environment defaults must be set first.
"""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import psutil

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[2]

ENVIRONMENT = {
    # Trials and workers keep the working directory of the driver, so that relative paths mean the same.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Without it every line printed in a training worker appears twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # A process for each training; workers look for drained nodes themselves (pipelines/training/notice.py).
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # One run speaks at a time, so its lines need no name of a process before them.
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
    # `uv run` would otherwise rebuild the environment in every worker.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
"""Defaults set before Ray is imported; what the user exported wins."""

CLUSTER_ENVIRONMENT = {
    # Workers of a submitted job wait for its code to be set up on their machine, and for machines that are added.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "900",
}
"""Defaults set beside `ENVIRONMENT` where a cluster is joined."""

API_SERVER = "RAY_API_SERVER_ADDRESS"
"""Variable that names the job server, as for Ray's own commands."""

LOOPBACK = "127.0.0.1"
"""Address of a local session: no process of it listens on another one."""

SEVERAL_MACHINES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""With "0" Ray takes the loopback address for a node's own, on every system; its default on Windows and macOS."""

OBJECT_STORE = 1 << 30
"""Bytes of a local session's object store: only encoded images and compact maps cross it. Pages are taken as used."""

ATTEMPTS = 2
"""Starts of a local session that may fail before that is an error."""


SESSION_FOLDER = re.compile(r"/session_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d{6}_\d+/?$")
"""The end of the path of a session's folder, which holds the time of its start to the microsecond."""

PACKAGE = "-packages/ray/"
"""Part of the command line of every process that Ray starts, unless it has taken a title that begins with "ray"."""

CLUSTER_PATIENCE = "PANOPTIC_CLUSTER_PATIENCE"
"""Variable with the seconds for which `grow` waits for machines of an autoscaler; unset or 0 = not at all."""

_own_folder = ""
_raylet: psutil.Process | None = None


def connect(cpus: int | None = None, object_store: int = OBJECT_STORE) -> None:
    """Join the Ray session that is there, or start a local one.

    An initialised session is reused. With `RAY_ADDRESS` set (as `ray job submit` does) the cluster is
    joined as it is: Ray refuses sizes for a cluster that already runs. Otherwise a local session starts.

    Args:
        cpus: logical CPUs of a local session, which may exceed the cores; None = as many as Ray counts.
        object_store: bytes of a local session's object store.
    """
    for name, value in {**ENVIRONMENT, **(CLUSTER_ENVIRONMENT if os.environ.get("RAY_ADDRESS") else {})}.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():  # a file or a pipe, which is to hold text alone
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    import ray
    from ray._private import ray_constants

    if not ray.is_initialized():
        # read from the variable when Ray was imported, which may have been before
        ray_constants.RAY_DISABLE_WORKER_LOG_PREFIX = os.environ["RAY_DISABLE_WORKER_LOG_PREFIX"] not in ("0", "")
        logger.info("joining the Ray cluster" if os.environ.get("RAY_ADDRESS") else "starting Ray")
        if os.environ.get("RAY_ADDRESS"):
            ray.init(logging_level=logging.WARNING)
        else:
            _start(cpus, object_store)
    data_context()


def is_connected() -> bool:
    """True if this process has a Ray session; imports nothing."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def grow(count: int, each: Mapping[str, float]) -> None:
    """Ask the autoscaler of the cluster for machines that hold `count` workers, and wait until they have come.

    A cluster that grows with its work has no GPU while nobody trains, so what is there now says nothing about what a
    training can get. Does nothing where `PANOPTIC_CLUSTER_PATIENCE` is not set, in a local session, or where the
    cluster is large enough. Returns when the machines are there or the time is over; whoever asked then looks at what
    there is.

    Args:
        count: of workers.
        each: resources of a worker, as {"CPU": 1.0, "GPU": 1.0}.

    Raises:
        ValueError: the variable is no number of seconds.
    """
    text = os.environ.get(CLUSTER_PATIENCE, "") or "0"
    try:
        patience = float(text)
    except ValueError:
        patience = math.nan
    if not 0 <= patience < math.inf:
        raise ValueError(f"{CLUSTER_PATIENCE}={text}: give seconds, 0 or more")
    if not patience or own_folder() or _holds(count, each):
        return
    from ray.autoscaler.sdk import request_resources

    wanted = ", ".join(f"{count * number:g} {name}s" for name, number in each.items() if number)
    logger.info("asking the cluster's autoscaler for %s; waiting for at most %g s", wanted, patience)
    end = time.monotonic() + patience
    request_resources(bundles=[dict(each)] * count)
    try:
        while not _holds(count, each) and time.monotonic() < end:
            time.sleep(min(5.0, patience / 10))
    finally:
        request_resources(bundles=[])  # the workers' own placement keeps the machines from here on


def _holds(count: int, each: Mapping[str, float]) -> bool:
    """True if the resources of all the cluster's machines together hold `count` workers."""
    import ray

    there = ray.cluster_resources()
    return all(there.get(name, 0.0) >= count * number for name, number in each.items())


def _start(cpus: int | None, object_store: int) -> None:
    """A local session that no other machine and no other user can join, whose processes find our packages.

    Ray listens on every interface by default, and whoever joins a session may run anything as its user. So every
    process of this one binds `LOOPBACK`, and asks for a token that is drawn here and lies in the environment of the
    session's processes alone. What the user exported for a cluster (`RAY_AUTH_MODE`, a token) has no effect on it.
    """
    import ray

    _require_token(secrets.token_hex(32))
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(REPOSITORY) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, paths)])

    def start() -> Any:
        port = _free_port()
        with _on_loopback(), _exported(API_SERVER, f"http://{LOOPBACK}:{port}"):
            return ray.init(
                address="local",
                num_cpus=cpus,
                object_store_memory=object_store,
                include_dashboard=True,  # Ray Train reclaims the resources of dead trials through it
                dashboard_host=LOOPBACK,
                dashboard_port=port,
                logging_level=logging.WARNING,
            )

    context = _start_patiently(start)
    global _own_folder, _raylet
    _own_folder = str(context.address_info["session_dir"])
    _raylet = next((child for child in psutil.Process().children() if child.name() == "raylet"), None)


def _start_patiently(start: Callable[[], Any]) -> Any:
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
    return {process.pid for process in psutil.Process().children()}


def is_lost() -> bool:
    """True if the raylet of the local session that this process started has ended, as the kernel ends one for memory.

    Nothing of the session works from then on, and Ray ends this process some ten seconds later, without a word of ours.
    """
    if _raylet is None:
        return False
    try:
        return not _raylet.is_running() or _raylet.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def own_folder() -> str:
    """The folder of the local session that this process started; "" where it started none or joined one."""
    return _own_folder


def end_leftovers(folder: str, patience: float = 5.0) -> int:
    """End what is left of a local session whose driver is gone, and return how many processes that were.

    Ray's processes notice the end of their driver, some of them only after minutes. They are told by the session's
    folder, which stands in their command line or holds their open logs. Does nothing where there is no /proc, and never
    ends the session of this process: a run that ended here, and whose lease could not be given back, names that.

    Args:
        folder: as `own_folder` gave it to the driver.
        patience: seconds that they have to end by themselves after SIGTERM.
    """
    if folder == _own_folder:
        return 0
    left = _processes_of(folder)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _processes_of(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        end = time.monotonic() + patience
        while _processes_of(folder) and time.monotonic() < end:
            time.sleep(0.1)
    return len(left)


def _processes_of(folder: str) -> list[int]:
    """This user's processes of a session, except this one; zombies have neither command line nor files."""
    if SESSION_FOLDER.search(folder) is None:
        return []
    return [
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if int(entry.name) != os.getpid() and _belongs(entry, folder.rstrip("/"))
    ]


def _belongs(process: Path, folder: str) -> bool:
    """True if a process, by its folder in /proc, is Ray's and names a session's folder or has a file in it open."""
    try:
        command = (process / "cmdline").read_bytes().decode(errors="replace")
        # somebody who reads the session's logs is not of the session
        if process.stat().st_uid != os.getuid() or not (command.startswith("ray") or PACKAGE in command):
            return False
        words = re.split(r"[\0 =:,\"']", command)
        if any(word == folder or word.startswith(f"{folder}/") for word in words):
            return True
        return any(os.readlink(link).startswith(f"{folder}/") for link in (process / "fd").iterdir())
    except OSError:  # it has ended meanwhile
        return False


def _require_token(token: str) -> None:
    """Ray's processes started from now on ask for this token, and this process shows it.

    Ray has read mode and token already where it was imported before.
    """
    from ray import _raylet

    compiled: Any = _raylet

    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    compiled.Config.initialize("")
    compiled.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A context in which a session that starts takes `LOOPBACK` for the address of its node.

    `ray.init(_node_ip_address="127.0.0.1")` would be replaced by the machine's own address. The variable reaches the
    processes that Ray starts; this one has read it when Ray was imported.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _exported(SEVERAL_MACHINES, "0"):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _exported(name: str, value: str) -> Iterator[None]:
    """A context with an environment variable for the processes that are started in it.

    `API_SERVER` is such a variable: without it they look for a running Ray, and stumble over a second session.
    """
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


@contextmanager
def printing_to(folder: str | None) -> Iterator[None]:
    """A context in which printed lines go to log.txt in `folder`: None = nowhere, "" = to the console as ever."""
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
    """A context in which SIGTERM raises SystemExit, in place of ending the process on the spot.

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
