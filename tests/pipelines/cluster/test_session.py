"""A local session beside another one on the same machine, and one that does not start at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from pipelines.cluster import session

SCRIPT = """
import os
from pipelines.cluster import session
session.connect(2)
assert "RAY_API_SERVER_ADDRESS" not in os.environ  # for the session's processes only
import ray

@ray.remote
def nodes():
    from ray.util.state import list_nodes
    return len(list_nodes())

print("nodes", ray.get(nodes.remote()))
"""


def test_processes_of_a_local_session_ask_their_own_server(ray_cluster) -> None:
    """Ray's state API looks for any running session otherwise, and fails where it finds two."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "nodes 1"


def failing(times: int, error: Exception, started: list[subprocess.Popen]) -> Callable[..., None]:
    """A `ray.init` that leaves a process behind when it fails, which it does the first `times`."""

    def init(**options: object) -> None:
        assert options["address"] == "local"
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        if len(started) <= times:
            raise error

    return init


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No session is there, and none is shut down."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", "")
    return monkeypatch


LATE = Exception("The current node timed out during startup. This could happen because\nthe GCS is overloaded.")


def test_a_session_that_does_not_start_is_tried_once_more(stubbed: pytest.MonkeyPatch) -> None:
    import ray

    started: list[subprocess.Popen] = []
    stubbed.setattr(ray, "init", failing(1, LATE, started))
    session.connect(2)
    assert len(started) == 2
    assert started[0].wait(timeout=5) < 0 and started[1].poll() is None  # what the failed attempt left is gone
    started[1].kill()
    started[1].wait()


def test_a_session_that_does_not_start_twice_is_one_line(stubbed: pytest.MonkeyPatch) -> None:
    import ray

    started: list[subprocess.Popen] = []
    stubbed.setattr(ray, "init", failing(9, LATE, started))
    with pytest.raises(ConnectionError, match=r"Ray did not start, 2 times \(The current node timed out.*same command"):
        session.connect(2)
    assert len(started) == 2 and all(process.wait(timeout=5) < 0 for process in started)


def test_what_another_attempt_would_not_mend_is_told_at_once(stubbed: pytest.MonkeyPatch) -> None:
    import ray

    started: list[subprocess.Popen] = []
    stubbed.setattr(ray, "init", failing(9, ValueError("object_store_memory is too small"), started))
    with pytest.raises(ValueError, match="too small"):
        session.connect(2)
    assert len(started) == 1
    started[0].kill()
    started[0].wait()
