"""The tests' cluster of two nodes: what later tests rely on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import two_nodes
from tests.support.two_nodes import Cluster

NODES = """
import ray
ray.init(logging_level="ERROR")
for node in ray.nodes():
    print(node["NodeID"], "alive" if node["Alive"] else "dead")
"""

WHERE = """
import ray, time
ray.init(logging_level="ERROR")

@ray.remote(num_cpus=2)
def where():
    time.sleep(2)
    return ray.get_runtime_context().get_node_id()

print(*ray.get([where.remote() for _ in range(COUNT)]))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with two_nodes.cluster_of_nodes() as cluster:
        yield cluster


def script(cluster: Cluster, text: str) -> str:
    done = cluster.run([sys.executable, "-c", text], timeout=60)
    assert done.returncode == 0, done.stdout + cluster.logs()
    return done.stdout


def wait_for(condition, seconds: float = 40) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.3)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_cluster_has_two_nodes_and_takes_and_loses_one(cluster: Cluster):
    ids = {node.id for node in cluster.nodes}
    assert len(ids) == 2 and set(script(cluster, WHERE.replace("COUNT", "2")).split()) == ids
    added = cluster.add(cpus=2, special=1)
    assert added.id in script(cluster, NODES)
    cluster.drain(added, 1)
    added.kill()
    assert not added.pids()
    wait_for(lambda: f"{added.id} dead" in script(cluster, NODES))
    assert set(script(cluster, WHERE.replace("COUNT", "2")).split()) == ids


@pytest.mark.slow
def test_a_cluster_asks_for_its_token(cluster: Cluster):
    stranger = cluster.environment | {"RAY_AUTH_TOKEN": "0" * 64}
    done = cluster.run([sys.executable, "-c", NODES], env=stranger, timeout=60)
    assert done.returncode != 0 and "auth" in done.stdout.lower()


@pytest.mark.slow
def test_a_cluster_ends_with_the_process_that_started_it(tmp_path: Path):
    """Although that is killed and can end nothing itself."""
    text = (
        "import time\nfrom tests.support.two_nodes import cluster_of_nodes\n"
        "with cluster_of_nodes(nodes=1) as c:\n    print(c.mark, c.folder, flush=True)\n    time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", text], cwd=two_nodes.ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        mark, folder = owner.stdout.readline().split()
        assert len(two_nodes.marked(mark)) > 3
    finally:
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
    wait_for(lambda: not two_nodes.marked(mark) and not Path(folder).exists(), 20)
