"""A local session: closed to the network and other users, beside another one, and one that does not start at once."""

from __future__ import annotations

import ipaddress
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.cluster import session

BESIDE = """
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

JOIN = """
import sys
import ray

ray.init(address=sys.argv[1], logging_level="ERROR")
print("joined")
"""


def environment(**variables: str) -> dict[str, str]:
    """The environment without a token, and with these variables."""
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")} | variables


@pytest.mark.slow  # a second Ray
def test_processes_of_a_local_session_ask_their_own_server(ray_cluster) -> None:
    """Ray's state API looks for any running session otherwise, and fails where it finds two.

    Its token is its own, too, whatever was exported.
    """
    done = subprocess.run(
        [sys.executable, "-c", BESIDE],
        env=environment(RAY_AUTH_MODE="disabled"),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "nodes 1"


def failing(times: int, error: Exception, started: list[subprocess.Popen]) -> Callable[..., SimpleNamespace]:
    """A `ray.init` that leaves a process behind when it fails, which it does the first `times`."""

    def init(**options: object) -> SimpleNamespace:
        assert options["address"] == "local"
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        if len(started) <= times:
            raise error
        return SimpleNamespace(address_info={"session_dir": ""})

    return init


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No session is there, and none is shut down."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(session, "_require_token", lambda token: None)  # that of the tests' own session stays
    monkeypatch.setattr(session, "_own_folder", "")
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


def test_workers_of_a_cluster_have_time_to_set_up_what_was_sent(stubbed: pytest.MonkeyPatch) -> None:
    """Ray Train takes 60 s for the start of a group, in which a machine may have to unpack the code or to be bought.

    It hands the variable to its controller and, where a trial of a sweep trains, finds it in that process: each joins
    through `connect`.
    """
    import ray

    constants = pytest.importorskip("ray.train.v2._internal.constants", reason="Ray Train has moved its constants")
    name = constants.WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
    stubbed.setenv(name, "")
    stubbed.delenv(name)
    stubbed.setattr(ray, "init", lambda **options: None)
    stubbed.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    session.connect()
    assert float(constants.get_env_vars_to_propagate()[name]) >= 900
    stubbed.setenv(name, "1800")
    session.connect()
    assert constants.get_env_vars_to_propagate()[name] == "1800", "what was exported is not replaced"


def test_no_process_of_a_local_session_listens_beyond_the_machine(ray_cluster) -> None:
    import psutil
    import ray

    @ray.remote
    def identify() -> int:
        return os.getpid()

    worker = ray.get(identify.remote())
    me = psutil.Process()
    processes = [me, *me.children(recursive=True)]
    assert worker in [process.pid for process in processes]
    listening = {
        (process.name(), connection.laddr.ip, connection.laddr.port)
        for process in processes
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    names = {name for name, _, _ in listening}
    assert {"gcs_server", "raylet"} <= names and len(listening) > 6, names
    open_doors = [entry for entry in listening if not on_loopback(entry[1])]
    assert open_doors == []


def on_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


@pytest.mark.parametrize("token", [None, "0" * 64, "its own"])
def test_a_local_session_answers_to_its_token_alone(ray_cluster, token: str | None) -> None:
    """Asked for its nodes by a program that is no Ray, which would take 20 s to give up."""
    import grpc
    import ray
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    shown = os.environ["RAY_AUTH_TOKEN"] if token == "its own" else token
    metadata = [("authorization", f"Bearer {shown}")] if shown else []
    with grpc.insecure_channel(ray.get_runtime_context().gcs_address) as channel:
        nodes = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)

        def ask() -> int:
            request = gcs_service_pb2.GetAllNodeInfoRequest()
            return len(nodes.GetAllNodeInfo(request, timeout=30, metadata=metadata).node_info_list)

        if token == "its own":
            assert ask() == 1
        else:
            with pytest.raises(grpc.RpcError) as refused:
                ask()
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]


@pytest.mark.slow  # Ray takes 20 s to give up
@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_nobody_joins_a_local_session_without_its_token(ray_cluster, mode: str) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    token = {} if mode == "disabled" else {"RAY_AUTH_TOKEN": "0" * 64}
    code, told = join(address, environment(RAY_AUTH_MODE=mode, **token))
    assert code != 0 and "joined" not in told and "uthentication" in told, told


@pytest.mark.slow
def test_with_its_token_it_is_joined(ray_cluster) -> None:
    """So that the refusals above are the token's doing."""
    import ray

    code, told = join(ray.get_runtime_context().gcs_address, dict(os.environ))
    assert code == 0 and "joined" in told, told


def join(address: str, variables: dict[str, str]) -> tuple[int, str]:
    """Exit code and lines of another process that tries to join a session over the loopback address."""
    loopback = {session.SEVERAL_MACHINES: "0"}  # Ray would replace it by the machine's own, where nobody listens
    done = subprocess.run(
        [sys.executable, "-c", JOIN, address],
        env=variables | loopback,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_nobody_listens_at_the_other_addresses_of_the_machine(ray_cluster) -> None:
    """Where Ray's port would be open to a stranger who knows it."""
    import ray

    port = int(ray.get_runtime_context().gcs_address.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), 5):
        pass
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing, tells the outward address
        probe.connect(("192.0.2.1", 9))
        address = probe.getsockname()[0]
    if on_loopback(address):
        pytest.skip("the machine has no other address")
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((address, port), 5)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_only_the_processes_of_the_named_session_are_ended(tmp_path: Path) -> None:
    """Told by command line or open log; somebody who reads the logs and another session are none of it."""
    folder = tmp_path / "session_2026-11-29_21-08-35_672988_7807"
    (folder / "logs").mkdir(parents=True)
    log = folder / "logs" / "raylet.out"
    log.touch()
    sleep = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    ray_file = "/x/site-packages/ray/core/raylet"
    commands = {
        "named": [*sleep, ray_file, f"--session_dir={folder}"],
        "stubborn": [
            *(sys.executable, "-c", "import signal, time; signal.signal(15, 1); print(flush=True); time.sleep(60)"),
            *(ray_file, f"--log_dir={folder}/logs"),
        ],
        "reader": [*sleep, str(log)],
        "other": [*sleep, ray_file, f"--session_dir={folder}0"],
    }
    processes = {name: subprocess.Popen(command, stdout=subprocess.PIPE) for name, command in commands.items()}
    with log.open("ab") as out:
        processes["writer"] = subprocess.Popen([*sleep, ray_file], stdout=subprocess.PIPE, stderr=out)
    try:
        for process in processes.values():
            assert process.stdout is not None and process.stdout.readline() == b"\n"
        assert session.end_leftovers("") == session.end_leftovers(str(tmp_path)) == 0
        assert session.end_leftovers(str(folder), patience=0.5) == 3
        time.sleep(0.2)
        ended = {name for name, process in processes.items() if process.poll() is not None}
        assert ended == {"named", "stubborn", "writer"}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def test_a_process_does_not_end_its_own_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run in one process, after a first one whose lease lies on a store that went away."""
    folder = "/tmp/ray/session_2026-01-01_00-00-00_000000_1"
    monkeypatch.setattr(session, "_own_folder", folder)
    monkeypatch.setattr(session, "_processes_of", lambda _: [1])
    monkeypatch.setattr(session.os, "kill", lambda *_: pytest.fail("ended"))
    assert session.end_leftovers(folder) == 0


def test_a_cluster_with_an_autoscaler_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    """It is asked once for what the workers need; the hint is withdrawn when the machines are there, or do not come."""
    import ray
    import ray.autoscaler.sdk

    asked, there = [], [{"CPU": 4.0}] * 3 + [{"CPU": 20.0, "GPU": 2.0}]
    monkeypatch.setattr(ray, "cluster_resources", lambda: there.pop(0) if len(there) > 1 else there[0])
    monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(session.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(session, "own_folder", lambda: "")
    session.grow(2, {"CPU": 8.0, "GPU": 1.0})
    assert not asked, "without the variable a cluster is taken as it is"
    monkeypatch.setenv(session.CLUSTER_PATIENCE, "600")
    session.grow(2, {"CPU": 8.0, "GPU": 1.0})
    assert asked == [[{"CPU": 8.0, "GPU": 1.0}] * 2, []] and len(there) == 1
    session.grow(2, {"CPU": 10.0, "GPU": 1.0})
    assert len(asked) == 2, "a cluster that is large enough is asked for nothing"
    monkeypatch.setenv(session.CLUSTER_PATIENCE, "0.05")
    session.grow(3, {"GPU": 1.0})
    assert asked[2:] == [[{"GPU": 1.0}] * 3, []]
    monkeypatch.setenv(session.CLUSTER_PATIENCE, "an hour")
    with pytest.raises(ValueError, match="PANOPTIC_CLUSTER_PATIENCE=an hour: give seconds"):
        session.grow(1, {"CPU": 1.0})
