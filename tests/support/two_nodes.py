"""A Ray cluster of several nodes on this machine: a head and further raylets as processes of their own.

Each node has a loopback address of its own (127.0.0.2, 127.0.0.3, …), ports, a temporary folder and a small object
store, and the cluster asks for a token. This process joins none of it: `Cluster.run` and `Cluster.start` give commands
the environment of a client. Whatever a node starts inherits a mark in its environment, by which the cluster is ended:
at the end of `cluster_of_nodes`, and by a process that waits for the end of this one, should that be killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

MARK = "PANOPTIC_TEST_CLUSTER"
"""Environment variable that every process of a cluster has: which cluster it is."""

NODE = "PANOPTIC_TEST_NODE"
"""The same of a node's processes: its number, 0 for the head."""

STORE = 100_000_000
"""Bytes of a node's object store."""

DEFAULTS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # a dead node is noticed after five seconds, not after fifteen
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    # no terminal colours in logs that tests read
    "RAY_COLOR_PREFIX": "0",
}


def ray(*arguments: str) -> list[str]:
    """The command line of Ray's program of this environment."""
    return [sys.executable, "-m", "ray.scripts.scripts", *arguments]


def free_ports(count: int) -> list[str]:
    """Ports that nobody listens on, held all at once so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [str(one.getsockname()[1]) for one in sockets]


@dataclass
class Node:
    """One raylet with all that it started."""

    number: int
    address: str
    """Its IP address, one of the loopback network's."""
    folder: Path
    """Its temporary folder, which no other node has."""
    id: str
    """As Ray names it, in hexadecimal digits."""
    mark: str
    process: subprocess.Popen[bytes]

    def pids(self) -> list[int]:
        """All processes of the node that run."""
        return [pid for pid, node in marked(self.mark).items() if node == self.number]

    def kill(self) -> None:
        """End all its processes on the spot, as a machine that loses its power."""
        self.process.kill()
        end(lambda: self.pids())
        self.process.wait()

    @contextlib.contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """Its processes of this name stand still meanwhile, those that start too: no step is taken unseen."""
        stopped: set[int] = set()
        over = threading.Event()

        def stop() -> None:
            while not over.wait(0.1):
                for pid in set(self.pids()) - stopped:
                    if name in " ".join(command_line(pid)):
                        stopped.add(pid)
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGSTOP)

        thread = threading.Thread(target=stop, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            for pid in stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def kill_raylet(self) -> None:
        """End the raylet alone on the spot; its workers notice that by themselves."""
        for pid in self.pids():
            if command_line(pid)[:1] and command_line(pid)[0].endswith("/raylet"):
                os.kill(pid, signal.SIGKILL)


@dataclass
class Cluster:
    """A running cluster, as a client sees it."""

    address: str
    """host:port of its head, for RAY_ADDRESS."""
    dashboard: str
    """URL of its job server, for RAY_API_SERVER_ADDRESS."""
    environment: dict[str, str]
    """Of a client of this cluster."""
    mark: str
    folder: Path
    store: int
    nodes: list[Node] = field(default_factory=list)

    @property
    def head(self) -> Node:
        return self.nodes[0]

    def add(self, cpus: int = 2, hide: Sequence[Path] = (), **resources: float) -> Node:
        """Start one more node and wait until it has joined.

        Args:
            cpus: logical CPUs.
            hide: folders that are empty for this node's processes, since another machine has not got them; for root
                alone, others see what is there.
            resources: further ones by their names, which a task or actor may ask for.
        """
        return self._join(self._start(cpus, resources, hide, "--address", self.address))

    def run(self, command: Sequence[str], timeout: float = 500, **options: Any) -> subprocess.CompletedProcess[str]:
        """A command as a client of the cluster, with its output as text: stderr follows stdout."""
        options = {"cwd": ROOT, "env": self.environment, "check": False} | options
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)
        done.stdout += done.stderr
        return done

    def start(self, command: Sequence[str], log: Path, **options: Any) -> subprocess.Popen[bytes]:
        """The same without waiting; its output goes to a file. It is ended with the cluster."""
        options = {"cwd": ROOT, "env": self.environment | {MARK: self.mark}} | options
        with log.open("wb") as file:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **options)

    def drain(self, node: Node, seconds: float, reason: str = "PREEMPTION") -> None:
        """Tell Ray that a node will be taken away after so many seconds, as a cloud's notice of a spot machine does.

        Args:
            reason: PREEMPTION, or IDLE_TERMINATION, which Ray refuses while something runs there.
        """
        command = ray("drain-node", "--address", self.address, "--node-id", node.id)
        command += ["--reason", f"DRAIN_NODE_REASON_{reason}", "--reason-message", "the test takes it away"]
        done = self.run([*command, "--deadline-remaining-seconds", str(int(seconds))], timeout=180)
        assert done.returncode == 0, done.stdout

    def logs(self) -> str:
        """The last lines of what the nodes printed, for messages of failures."""
        texts = [f"{log}:\n{log.read_text(errors='replace')[-3000:]}" for log in sorted(self.folder.glob("*.log"))]
        return "\n".join(texts)

    def _start(self, cpus: int, resources: Mapping[str, float], hide: Sequence[Path], *where: str) -> Node:
        number = len(self.nodes)
        address, folder = f"127.0.0.{2 + number}", self.folder / str(number)
        agent, grpc, metrics = free_ports(3)
        command = ray("start", "--block", *where, "--node-ip-address", address, "--temp-dir", str(folder))
        command += ["--num-cpus", str(cpus), "--object-store-memory", str(self.store), "--num-gpus", "0"]
        command += ["--dashboard-agent-listen-port", agent, "--dashboard-agent-grpc-port", grpc]
        command += ["--metrics-export-port", metrics, "--disable-usage-stats"]
        command += ["--resources", "{" + ", ".join(f'"{name}": {count}' for name, count in resources.items()) + "}"]
        # RAY_API_SERVER_ADDRESS stays: what looks for a job server by itself stumbles over other Rays of the machine
        variables = {k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"}
        variables |= {MARK: self.mark, NODE: str(number)}
        if hide and os.getuid() == 0:
            mounts = "; ".join(f"mount -t tmpfs none {shlex.quote(str(path))}" for path in hide)
            command = ["unshare", "--mount", "sh", "-ec", f'{mounts}; exec "$@"', "sh", *command]
        with (self.folder / f"{number}.log").open("wb") as log:
            process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, cwd=self.folder)
        self.nodes.append(Node(number, address, folder, "", self.mark, process))
        return self.nodes[-1]

    def _join(self, node: Node, seconds: float = 90) -> Node:
        """Wait until `ray start` says that it is done; the node then has its id."""
        log, until = self.folder / f"{node.number}.log", time.monotonic() + seconds
        while "Ray runtime started" not in log.read_text(errors="replace"):
            if node.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"a node of the test's cluster did not start\n{self.logs()}")
            time.sleep(0.1)
        words = [word for pid in node.pids() for word in command_line(pid)]
        ids = {match[1] for word in words if (match := re.fullmatch(r"--node[-_]id=([0-9a-f]{56})", word))}
        (node.id,) = ids
        return node


@contextlib.contextmanager
def cluster_of_nodes(
    nodes: int = 2, cpus: int = 2, environment: Mapping[str, str] | None = None, store: int = STORE
) -> Iterator[Cluster]:
    """A head and further nodes, ended with all that they started at the end.

    Args:
        nodes: how many, the head among them.
        cpus: logical CPUs of each.
        environment: beside that of this process, for nodes and clients; an empty value removes a variable.
        store: bytes of each object store.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets lie in it, whose paths may have 107 bytes
    mark = secrets.token_hex(8)
    port, dashboard, client = free_ports(3)
    address, url = f"127.0.0.2:{port}", f"http://127.0.0.2:{dashboard}"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # as an activated environment has it
    variables = os.environ | DEFAULTS | {"PATH": path, "RAY_AUTH_TOKEN": secrets.token_hex(32)} | (environment or {})
    variables |= {"RAY_ADDRESS": address, "RAY_API_SERVER_ADDRESS": url}
    cluster = Cluster(address, url, {k: v for k, v in variables.items() if v}, mark, folder, store)
    with ended_without_us(mark, folder):
        try:
            where = ["--head", "--port", port, "--dashboard-host", "127.0.0.2", "--dashboard-port", dashboard]
            cluster._join(cluster._start(cpus, {}, (), *where, "--ray-client-server-port", client))
            for _ in range(1, nodes):  # together: each takes seconds of imports
                cluster._start(cpus, {}, (), "--address", address)
            for node in cluster.nodes[1:]:
                cluster._join(node)
            yield cluster
        finally:
            end(lambda: list(marked(mark)))
            for node in cluster.nodes:
                node.process.wait()
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def ended_without_us(mark: str, folder: Path) -> Iterator[None]:
    """Should this process be killed in here, another one ends the cluster: it waits for the end of a pipe."""
    command = [sys.executable, "-E", __file__, mark, str(folder)]
    unmarked = {name: value for name, value in os.environ.items() if name != MARK}  # it is not to end itself
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=unmarked) as waiting:
        yield
        assert waiting.stdin is not None
        waiting.stdin.close()


def marked(mark: str) -> dict[int, int]:
    """The processes of a cluster that run: their ids, and the number of the node of each (-1 = a client)."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            variables = (entry / "environ").read_bytes().split(b"\0")  # empty for zombies
            if f"{MARK}={mark}".encode() in variables:
                number = [v.split(b"=")[1] for v in variables if v.startswith(f"{NODE}=".encode())]
                found[int(entry.name)] = int(number[0]) if number else -1
    return found


def command_line(pid: int) -> list[str]:
    """The words of a process's command line, none where it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    return []


def end(pids: Any, seconds: float = 20) -> None:
    """Kill processes, and those that they start meanwhile, until none is left.

    Args:
        pids: called for the ids of those that are left.
    """
    until = time.monotonic() + seconds
    while left := pids():
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > until:
            raise RuntimeError(f"processes of the test's cluster do not end: {left}")
        time.sleep(0.05)


if __name__ == "__main__":  # the process that waits for the end of a test
    sys.stdin.buffer.read()
    end(lambda: list(marked(sys.argv[1])))
    shutil.rmtree(sys.argv[2], ignore_errors=True)
